"""Train a LoRA adapter with transformers, PEFT and torch alone: the stranger's adapter of the studies.

    python benchmarks/plain_lora.py --model MODEL --data rows.jsonl --out runs/plain --seed 0

Imports nothing of matryoshka_lora. ``rows.jsonl`` has the columns prompt and completion, as chat messages; only the
completion is trained. bf16 base under bf16 autocast, fp32 adapter on all linear layers, AdamW with a linear decay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--data", required=True, type=Path, help="a .jsonl file")
    parser.add_argument("--out", required=True, help="where the adapter is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [encode(tokenizer, json.loads(line)) for line in args.data.read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, args.steps)
    order = torch.randperm(len(rows)).tolist()
    for step in range(args.steps):
        chosen = [order[(step * args.batch_size + i) % len(rows)] for i in range(args.batch_size)]
        loss = completion_loss(model, [rows[i] for i in chosen], tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(args.out)


def encode(tokenizer, row) -> tuple[list[int], int]:  # type: ignore[no-untyped-def]
    """The tokens of prompt and completion, and how many of them are the prompt's."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]
    return whole, len(prompt)


def completion_loss(model, rows: list[tuple[list[int], int]], pad: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The mean negative log likelihood of the completions' tokens; logits only where a row has one."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    position = torch.arange(longest)
    is_target = torch.stack([(position >= start) & (position < len(row)) for row, start in rows])
    kept = is_target[:, 1:].any(dim=0).nonzero().squeeze(1)
    attention = torch.stack([position < len(row) for row, _ in rows]).long()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=kept).logits
    targets = ids[:, 1:].masked_fill(~is_target[:, 1:], -100)[:, kept]
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


if __name__ == "__main__":
    main()
