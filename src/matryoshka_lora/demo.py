"""`matryoshka demo`: teach two layers a table, and look its entries up at every rank."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401  (before the training, which takes longer)
import torch
from iso3166 import countries
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.evaluation.results import Evaluation, draw
from matryoshka_lora.files.peft import plan_rank
from matryoshka_lora.models import EMBEDDED, load_model, load_tokenizer
from matryoshka_lora.nested import nest

LAYERS, RANKS, RANK, DIGITS = 2, (1, 2, 4, 16), 16, 3
STEPS, BATCH, RATE = 300, 32, 4e-3
SHOWN, EXPORTED = (1, 2, RANK), 4  # the ranks that answer, and the one that plain PEFT reads
ASKED = ("Kenya", "Brazil", "Bolivia")
Right = dict[int, float]  # how much of the table each rank knows, in percent


def demo(out: Path, steps: int = STEPS) -> None:
    """Train, print and draw what each rank knows, let the user ask, and read one with plain PEFT.

    Args:
        out: A folder that does not exist yet. It gets ``base``, the base model's first two layers;
            ``adapter``, for every rank; ``rank-4``, an ordinary LoRA adapter; and ``curve.png``.
    """
    out.mkdir(parents=True)
    facts = table()
    print(
        f"The table: {len(facts)} countries, each with its number in ISO 3166.\n"
        f"The model: the first {LAYERS} layers of {EMBEDDED}, in {out / 'base'}.\n"
        f"One LoRA adapter of rank {RANK} learns the table, in float32 on the CPU."
    )
    save_base(out / "base")
    tokenizer = load_tokenizer(str(out / "base"))
    adapter, right = train_adapter(out / "base", tokenizer, facts, steps)
    adapter.save(out / "adapter")
    report(adapter, right, len(facts), out / "curve.png")
    look_up(adapter, tokenizer, facts)
    adapter.export(out / f"rank-{EXPORTED}", EXPORTED)
    base = load_model(str(out / "base"), torch.float32, device="cpu")
    plain = PeftModel.from_pretrained(base, out / f"rank-{EXPORTED}")
    print(f"\nRank {EXPORTED} is an ordinary LoRA adapter too. PEFT alone reads it and answers:\n")
    for name, said in zip(ASKED, answers(plain, tokenizer, ASKED), strict=True):
        print(f"  {name}: {said}   (right: {facts[name]})")
    print(f"\n{out / 'adapter'} holds every rank")


def table() -> dict[str, str]:
    """Return the countries of ISO 3166, by short names, each with its number of three digits."""
    short = [re.split(r", | \(", country.apolitical_name)[0] for country in countries]
    return {
        name if short.count(name) == 1 else country.apolitical_name: country.numeric
        for name, country in zip(short, countries, strict=True)
    }


def save_base(folder: Path) -> None:
    """Write the first layers of the embedded model, and its tokenizer: enough for a table."""
    model = load_model(dtype=torch.bfloat16, device="cpu")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


def batch_of(tokenizer: Any, lines: Sequence[str]) -> dict[str, Tensor]:
    """Return lines as a batch, in which the digits at their ends, a token each, are learned."""
    batch = tokenizer(lines, padding=True, padding_side="left", return_tensors="pt")
    digits = batch["input_ids"][:, -DIGITS:].contiguous()
    # The logits before each digit are enough. Indices: slicing makes the product slower.
    places = torch.arange(-DIGITS - 1, -1)
    return {**batch, "labels": digits, "shift_labels": digits, "logits_to_keep": places}


def train_adapter(
    base: Path, tokenizer: Any, facts: dict[str, str], steps: int = STEPS
) -> tuple[NestedAdapter, dict[str, Right]]:
    """Train an adapter on a table, and measure its ranks in three orders; the last one stays."""
    torch.manual_seed(0)
    model = load_model(str(base), torch.float32, device="cpu")
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    adapter = nest(get_peft_model(model, config), RANKS)
    lines = [f"{name}: {number}" for name, number in facts.items()]
    options = {"max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": RATE}
    more = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": False}
    arguments = TrainingArguments(str(base), **options, **more)
    collate = partial(batch_of, tokenizer)
    # A table has nothing to generalise to: the lines that are learned are those that judge.
    trainer = Trainer(adapter.model, arguments, collate, lines, lines)
    trainer.add_callback(adapter.callback())
    trainer.log = lambda *_, **__: None  # it would print a dictionary
    trainer.train()
    batches = [collate(lines[i : i + BATCH]) for i in range(0, len(lines), BATCH)]
    right = {"cut": measure(adapter, batches)}
    adapter.reorder("svd")
    right["svd"] = measure(adapter, batches)
    adapter.reorder("trained", trainer)
    right["trained"] = measure(adapter, batches)
    return adapter, right


@torch.no_grad()
def measure(adapter: NestedAdapter, batches: list[dict[str, Tensor]]) -> Right:
    """Return the share of a table that each rank knows: every digit is the likeliest token.

    A rank is the first columns of the factors as they are, at the scale of R.
    """
    adapter.model.eval()
    found, digits = {}, torch.cat([batch["labels"] for batch in batches])
    for rank in tqdm((0, *RANKS), "asking every rank", leave=False):
        with adapter.override((torch.arange(RANK) < rank).double()):
            said = [adapter.model(**batch).logits.argmax(-1) for batch in batches]
        found[rank] = 100 * (torch.cat(said) == digits).all(1).double().mean().item()
    return found


def report(adapter: NestedAdapter, right: dict[str, Right], lines: int, picture: Path) -> None:
    """Print and draw how much of a table each rank knows, in each order."""
    file = adapter.opened()
    sizes = {rank: plan_rank(file, rank).size for rank in RANKS}
    print(
        f"\nEach rank of this one training knows so much of the {lines} numbers:\n\n"
        "  rank  size (MB)     cut     svd  trained"
    )
    for rank, size in {0: 0, **sizes}.items():
        cells = [f"{known[rank]:6.0f} %" for known in right.values()]
        print(f"  {rank:4}  {size / 1e6:9.2f}{''.join(cells)}")
    curve = Evaluation({}, RANKS, sizes)
    for name, value in right.items():
        error = {rank: (v * (100 - v) / lines) ** 0.5 for rank, v in value.items()}
        metrics = {"% right": {"value": value, "stderr": error}}
        curve.tasks[name] = {"metric": "% right", "metrics": metrics}
    draw(curve, picture)
    print(
        "\n  rank 0: the model without the adapter\n"
        "  cut: the first columns of the factors, as they were trained\n"
        "  svd: adapter.reorder()\n"
        "  trained: adapter.reorder('trained', trainer), some steps at each rank\n"
        f"\nThe same as a picture: {picture}"
    )


def look_up(adapter: NestedAdapter, tokenizer: Any, facts: dict[str, str]) -> None:
    """Let some ranks answer what the user types; without a terminal, what `ASKED` names."""
    names, asks = {name.lower(): name for name in facts}, sys.stdin.isatty()
    print("\nLook countries up; an empty line ends.\n" if asks else "\nThree of the answers:\n")
    with suppress(EOFError, KeyboardInterrupt):
        for text in iter(lambda: input("Country: ").strip(), "") if asks else ASKED:
            if name := names.get(text.lower()):
                with adapter.rows(SHOWN):
                    said = answers(adapter.model, tokenizer, [name] * len(SHOWN))
                cells = [f"rank {rank}: {s}" for rank, s in zip(SHOWN, said, strict=True)]
                print(f"  {name}   {'   '.join(cells)}   (right: {facts[name]})")
            else:
                near = [names[key] for key in get_close_matches(text.lower(), names)]
                print(f"  Not in the table. Try {', '.join(near or ASKED)}")


def answers(model: Any, tokenizer: Any, names: Sequence[str]) -> list[str]:
    """Return the numbers that a model says to some names, each of which is a row of the batch."""
    texts = [f"{name}: " for name in names]
    prompts = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    said = model.generate(**prompts, do_sample=False, max_new_tokens=DIGITS, pad_token_id=0)
    return [" ".join(text.split()) for text in tokenizer.batch_decode(said[:, -DIGITS:])]
