"""Does the fused step train what PEFT's own step trains?

    python benchmarks/same_losses.py --out runs/same-losses

Trains SmolLM2-135M on `family_relationships` with a loop of its own: plain PEFT LoRA, and a nested adapter whose rule
is `lora`, the same function by our operation; R = 32, AdamW, the same first weights and the same batches. In fp32 their
losses must agree step by step; every token has a label there, since the mean of the few tokens of an answer shows each
rounding. In bf16 roundings differ anyway: the mean loss of the last ten steps is compared with how much it differs
between seeds. Finished runs are kept in the output folder and skipped when the script is started
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from matryoshka_lora import nest
from matryoshka_lora.data.questions import pad_rows, tokenize
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.files import write_text
from matryoshka_lora.models import DTYPES, load_model, load_tokenizer

RANK, RATE, LAST = 32, 2e-3, 10
# dtype, rows of a batch, seeds, variants: fp32 costs several times bf16, and there one seed and few rows are enough.
PLAN = (("fp32", 4, (0,), ("peft", "lora")), ("bf16", 12, (0, 1, 2), ("peft", "lora")))


def batches(rows: int, steps: int, answers_only: bool) -> Iterator[dict[str, Tensor]]:
    tokenizer = load_tokenizer()
    examples = get_task("family_relationships").examples("train", rows * steps)
    questions = [tokenize(tokenizer, example) for example in examples]
    for start in range(0, len(questions), rows):
        ids, is_token, is_answer = pad_rows(questions[start : start + rows], tokenizer.pad_token_id)
        labels = ids.masked_fill(~(is_answer if answers_only else is_token), -100)
        yield {"input_ids": ids, "attention_mask": is_token.long(), "labels": labels}


def losses(dtype: str, rows: int, seed: int, variant: str, steps: int) -> list[float]:
    base = load_model(dtype=DTYPES[dtype])
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    adapter = None if variant == "peft" else nest(model, rule=variant)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model.train()
    found = []
    for step, batch in enumerate(batches(rows, steps, answers_only=dtype == "bf16")):
        if adapter is not None:
            adapter.draw(step, rows=rows)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        print(f"{dtype} {variant} seed {seed}: step {step + 1} of {steps}, loss {found[-1]:.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/same-losses"))
    parser.add_argument("--steps", type=int, default=50, help="of each run (default: 50)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    runs: dict[tuple[str, str], list[list[float]]] = {}
    for dtype, rows, seeds, variants in PLAN:
        for seed in seeds:
            for variant in variants:
                file = args.out / f"{dtype}-{variant}-{seed}.json"
                if not file.exists():
                    write_text(file, json.dumps(losses(dtype, rows, seed, variant, args.steps)) + "\n")
                runs.setdefault((dtype, variant), []).append(json.loads(file.read_text()))
    pairs = zip(runs["fp32", "peft"][0], runs["fp32", "lora"][0], strict=True)
    print(f"\nfp32: largest difference of a step's loss from PEFT's: {max(abs(a - b) for a, b in pairs):.1e}")
    for variant in PLAN[1][3]:
        ends = [statistics.mean(run[-LAST:]) for run in runs["bf16", variant]]
        each = ", ".join(f"{end:.4f}" for end in ends)
        spread = statistics.stdev(ends)
        print(f"bf16 {variant:4}: mean loss of the last {LAST} steps, by seed: {each}; spread {spread:.4f}")


if __name__ == "__main__":
    main()
