"""`matryoshka demo`: teach the embedded model a table, and see how much of it each rank holds."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.convert import export
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.peft import open_adapter
from matryoshka_lora.models import EMBEDDED, load_model, load_tokenizer, source_of
from matryoshka_lora.nested import nest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from matryoshka_lora.adapter import NestedAdapter

LINES, RANK, STEPS, BATCH, RATE = 256, 32, 200, 32, 4e-3
SHOWN = 4  # the rank that is exported and read by plain PEFT
DIGITS = 4
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Run in a process of its own, in which this package cannot be imported.
_PLAIN_PEFT = """
import sys
sys.modules["matryoshka_lora"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, *names = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
tokenizer = AutoTokenizer.from_pretrained(base)
for name in names:
    prompt = tokenizer(f"{name}: ", return_tensors="pt")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=4, pad_token_id=0)
    print(tokenizer.decode(answer[0]))
"""


def table(lines: int = LINES, seed: int = 0) -> dict[str, str]:
    """Return made-up names, each with a number of four digits that no model can know."""
    draw, found = random.Random(seed), dict[str, str]()
    while len(found) < lines:
        name = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
        found.setdefault(name.capitalize(), f"{draw.randrange(10_000):04}")
    return found


def train_adapter(
    facts: dict[str, str], steps: int = STEPS
) -> tuple[NestedAdapter, Tensor, Tensor]:
    """Train an adapter on a table, in the first two layers of the embedded model, in float32.

    Returns:
        The adapter, reordered by SVD; the table in tokens, shape (lines, length), filled up on the
        left; and its mask.
    """
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=_LINEAR, layers_to_transform=[0, 1]
    )
    adapter = nest(get_peft_model(load_model(dtype=torch.float32), config))
    tokens, mask = _encode(tokenizer, facts)
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    adapter.model.train()
    order: Iterator[int] = iter(())
    for step in (bar := tqdm(range(steps), "training", unit="step", leave=False)):
        chosen = [next(order, -1) for _ in range(BATCH)]
        if -1 in chosen:  # all lines were seen: a new order
            order = iter(torch.randperm(len(tokens)).tolist())
            chosen = [next(order) for _ in range(min(BATCH, len(tokens)))]
        adapter.draw(step)
        logits = _logits(adapter.model, tokens[chosen], mask[chosen])
        answers = tokens[chosen, -DIGITS:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    adapter.model.eval()
    adapter.reorder()
    return adapter, tokens, mask


def _encode(tokenizer: PreTrainedTokenizerBase, facts: dict[str, str]) -> tuple[Tensor, Tensor]:
    tokenizer.padding_side = "left"  # so that each line ends with its digits, a token each
    found = tokenizer([f"{name}: {number}" for name, number in facts.items()], padding=True)
    return torch.tensor(found["input_ids"]), torch.tensor(found["attention_mask"])


def _logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the logits before each digit, shape (rows, digits, vocabulary)."""
    device = model.device
    found: Tensor = model(
        input_ids=tokens.to(device), attention_mask=mask.to(device), logits_to_keep=DIGITS + 1
    ).logits[:, :-1]
    return found


@torch.no_grad()
def count_right(adapter: NestedAdapter, tokens: Tensor, mask: Tensor, rank: int) -> int:
    """Return how many lines of the table a rank knows: all digits are the likeliest ones."""
    adapter.set_rank(rank)
    right = 0
    for rows, kept in zip(tokens.split(64), mask.split(64), strict=True):
        said = _logits(adapter.model, rows, kept).argmax(-1).cpu()
        right += int((said == rows[:, -DIGITS:]).all(1).sum())
    return right


def demo(out: Path, steps: int = STEPS) -> None:
    """Train, print what each rank knows and weighs, and read one rank with plain PEFT.

    Args:
        out: A new folder: ``adapter`` for every rank, ``rank-4`` as an ordinary LoRA adapter.
        steps: Optimizer steps.

    Raises:
        MatryoshkaError: The folder exists.
    """
    if out.exists():
        raise MatryoshkaError(f"{out} exists already: delete it, or name another with --out")
    began, facts = time.monotonic(), table()
    print(
        f"A table of {LINES} made-up names and numbers, and one adapter of rank {RANK} in the first\n"
        f"two layers of {EMBEDDED}, float32: {steps} steps"
    )
    adapter, tokens, mask = train_adapter(facts, steps)
    adapter.save(out / "adapter")
    file = open_adapter(out / "adapter")
    print("\nOne training, every rank:\n\n  rank      size   right answers")
    for rank in adapter.nesting.ranks:
        size = file.size * rank / RANK
        share = count_right(adapter, tokens, mask, rank) / len(tokens)
        bar = "#" * round(40 * share)
        print(f"  {rank:4}  {size / 1e6:5.2f} MB   {share:5.0%}  {bar}")
    export(out / "adapter", out / f"rank-{SHOWN}", rank=SHOWN)
    names = list(facts)[:3]
    answers = subprocess.run(
        [
            sys.executable,
            "-c",
            _PLAIN_PEFT,
            source_of(EMBEDDED),
            str(out / f"rank-{SHOWN}"),
            *names,
        ],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    print(f"\nRank {SHOWN} as an ordinary LoRA adapter, read by PEFT without this package:\n")
    for name, line in zip(names, answers.splitlines(), strict=True):
        print(f"  {line}   (the table: {facts[name]})")
    print(f"\n{time.monotonic() - began:.0f} s. The adapter is {out / 'adapter'}")
