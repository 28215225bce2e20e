"""`matryoshka demo`: teach two layers a table, and see how much of it each rank holds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.convert import export
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.peft import open_adapter, plan_rank
from matryoshka_lora.models import EMBEDDED, load_model, load_tokenizer
from matryoshka_lora.nested import nest

LINES, DIGITS = 256, 4
LAYERS, RANK = 2, 32
STEPS, BATCH, RATE = 400, 32, 4e-3
EXPORTED = 8  # the rank that plain PEFT reads


def demo(out: Path, steps: int = STEPS) -> None:
    """Train, print what each rank weighs and knows, and read one rank with plain PEFT.

    Args:
        out: A new folder. It gets ``base``, the base model's first two layers; ``adapter``, for
            every rank; and ``rank-8``, an ordinary LoRA adapter.
        steps: The optimizer steps.

    Raises:
        MatryoshkaError: The folder exists.
    """
    if out.exists():
        raise MatryoshkaError(f"{out} exists already: delete it, or name another with --out")
    facts = table()
    # On busy machines, fewer threads are faster.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    print(
        f"{LINES} made-up names, each with a number. The first {LAYERS} layers of {EMBEDDED}\n"
        f"learn them with one adapter of rank {RANK}: {steps} steps in float32."
    )
    save_base(out / "base")
    tokenizer = load_tokenizer(str(out / "base"))
    tokens, mask = encode(tokenizer, facts)
    adapter = train_adapter(out / "base", tokens, mask, steps)
    adapter.save(out / "adapter")
    file = open_adapter(out / "adapter")
    print("\nEvery rank of this one training:\n\n  rank       size  right answers")
    for rank in adapter.nesting.ranks:
        size = plan_rank(file, rank).size / 1e6
        share = count_right(adapter, tokens, mask, rank) / LINES
        print(f"  {rank:4}  {size:6.2f} MB  {share:13.0%}  {'#' * round(30 * share)}")
    export(out / "adapter", out / f"rank-{EXPORTED}", EXPORTED)
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype="float32")
    plain = PeftModel.from_pretrained(base, out / f"rank-{EXPORTED}")
    print(f"\nRank {EXPORTED} is an ordinary LoRA adapter. PEFT alone reads it and answers:\n")
    for name in list(facts)[:3]:
        prompt = tokenizer(f"{name}: ", return_tensors="pt")
        answer = plain.generate(**prompt, do_sample=False, max_new_tokens=DIGITS, pad_token_id=0)
        print(f"  {tokenizer.decode(answer[0])}   (right: {facts[name]})")
    print(f"\n{out / 'adapter'} holds every rank")


def table(lines: int = LINES, seed: int = 0) -> dict[str, str]:
    """Return made-up names, each with a number of four digits that no model can know."""
    draw, found = random.Random(seed), dict[str, str]()
    while len(found) < lines:
        name = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
        found.setdefault(name.capitalize(), f"{draw.randrange(10**DIGITS):0{DIGITS}}")
    return found


def save_base(folder: Path) -> None:
    """Write the first layers of the embedded model, and its tokenizer: enough for a table."""
    model = load_model(dtype=torch.bfloat16, device="cpu")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, facts: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Return the lines in tokens, shape (lines, length), filled up on the left, and their mask."""
    tokenizer.padding_side = "left"  # so that each line ends with its digits, a token each
    lines = [f"{name}: {number}" for name, number in facts.items()]
    found = tokenizer(lines, padding=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def train_adapter(base: Path, tokens: Tensor, mask: Tensor, steps: int = STEPS) -> NestedAdapter:
    """Train an adapter on a table in a plain training loop, and reorder it by SVD."""
    torch.manual_seed(0)
    model = load_model(str(base), torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    adapter = nest(get_peft_model(model, config))
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1e-3, steps)
    epochs = -(-steps * BATCH // len(tokens))
    order = torch.cat([torch.randperm(len(tokens)) for _ in range(epochs)])
    adapter.model.train()
    for step in (bar := tqdm(range(steps), "training", leave=False)):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        adapter.draw(step)
        logits = _logits(adapter.model, tokens[chosen], mask[chosen])
        answers = tokens[chosen, -DIGITS:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    adapter.model.eval()
    adapter.reorder()
    return adapter


@torch.no_grad()
def count_right(adapter: NestedAdapter, tokens: Tensor, mask: Tensor, rank: int) -> int:
    """Return how many lines of a table a rank knows: each digit is the likeliest token."""
    adapter.set_rank(rank)
    said = _logits(adapter.model, tokens, mask).argmax(-1).cpu()
    return int((said == tokens[:, -DIGITS:]).all(1).sum())


def _logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the logits before each digit, shape (rows, digits, vocabulary)."""
    places = torch.arange(-DIGITS - 1, -1)  # indices: slicing makes the product slower
    inputs = {"input_ids": tokens.to(model.device), "attention_mask": mask.to(model.device)}
    logits: Tensor = model(**inputs, logits_to_keep=places).logits
    return logits
