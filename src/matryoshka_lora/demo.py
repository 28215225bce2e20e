"""`matryoshka demo`: train a small adapter on a table, and query it at several ranks."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import torch
from iso3166 import countries
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from matryoshka_lora.bundled_model import BUNDLED_MODEL
from matryoshka_lora.peft.adapter import NestedAdapter
from matryoshka_lora.peft.base_model import load_model, load_tokenizer
from matryoshka_lora.peft.nest import nest

NUM_LAYERS = 2
RANKS = (1, 2, 4, 16)
MAX_RANK = 16
NUM_DIGITS = 3
NUM_STEPS = 300
BATCH_SIZE = 32
LEARNING_RATE = 4e-3
QUERY_RANKS = (1, 2, 16)
EXPORT_RANK = 4
SAMPLE_COUNTRIES = ("Kenya", "Brazil", "Bolivia")

Accuracies = dict[int, float]
"""The percentage of the table's numbers that each rank knows; rank 0 is the base model."""


def demo(output: Path, num_steps: int = NUM_STEPS) -> None:
    """Train, show the accuracy of each rank, answer the user's queries, and export one rank.

    Args:
        output: The folder to write, which must not exist. It gets ``base``, the base model's first
            layers; ``adapter``, usable at every rank; and ``rank-4``, an ordinary LoRA adapter.
        num_steps: The number of optimizer steps.
    """
    output.mkdir(parents=True)
    numbers = country_numbers()
    base_path = output / "base"
    print(
        f"The table: {len(numbers)} countries, each with its number in ISO 3166.\n"
        f"The model: the first {NUM_LAYERS} layers of {BUNDLED_MODEL}, in {base_path}.\n"
        f"One LoRA adapter of rank {MAX_RANK} learns the table, in float32 on the CPU."
    )
    save_base_model(base_path)
    tokenizer = load_tokenizer(str(base_path))
    adapter, accuracies_by_method = train_adapter(base_path, tokenizer, numbers, num_steps)
    adapter.save(output / "adapter")

    lora = adapter.to_lora()
    sizes = {rank: lora.truncate(rank).file_size for rank in RANKS}
    print_accuracies(accuracies_by_method, sizes, len(numbers))

    if sys.stdin.isatty():
        print("\nQuery the adapter; press Enter to quit.\n")
        answer_queries(adapter, tokenizer, numbers, typed_queries())

    export_path = output / f"rank-{EXPORT_RANK}"
    adapter.export(export_path, EXPORT_RANK)
    base_model = load_model(str(base_path), torch.float32, device="cpu")
    plain_model = PeftModel.from_pretrained(base_model, str(export_path))
    print(f"\nRank {EXPORT_RANK} is an ordinary LoRA adapter too. PEFT alone loads it:\n")
    answers = generate_numbers(plain_model, tokenizer, SAMPLE_COUNTRIES)
    for country, answer in zip(SAMPLE_COUNTRIES, answers, strict=True):
        print(f"  {country}: {answer}   (correct: {numbers[country]})")
    print(f"\n{output / 'adapter'} is usable at every rank.")


def country_numbers() -> dict[str, str]:
    """Return the three-digit number of each country of ISO 3166 by its short name."""
    short_names = [re.split(r", | \(", country.apolitical_name)[0] for country in countries]
    numbers = {}
    for short_name, country in zip(short_names, countries, strict=True):
        is_unique = short_names.count(short_name) == 1
        numbers[short_name if is_unique else country.apolitical_name] = country.numeric
    return numbers


def save_base_model(folder: Path) -> None:
    """Write the first layers of the bundled model, and its tokenizer."""
    model = load_model(dtype=torch.bfloat16, device="cpu")
    model.model.layers = model.model.layers[:NUM_LAYERS]
    model.config.num_hidden_layers = NUM_LAYERS
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


def collate(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str]) -> dict[str, Tensor]:
    """Return a batch of lines such as ``"Kenya: 404"``, whose digits are the labels.

    Returns:
        The model's inputs. ``labels`` has shape (rows, 3): the tokenizer has a token per digit.
    """
    batch = tokenizer(list(lines), padding=True, padding_side="left", return_tensors="pt")
    digits = batch["input_ids"][:, -NUM_DIGITS:].contiguous()
    # Only the logits that predict a digit are computed. With an index tensor instead of a slice,
    # the product is faster.
    positions = torch.arange(-NUM_DIGITS - 1, -1)
    return {**batch, "labels": digits, "shift_labels": digits, "logits_to_keep": positions}


class SilentTrainer(Trainer):
    """A Trainer that shows a progress bar, and prints no dictionaries of losses."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Print nothing."""


def train_adapter(
    base_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    numbers: dict[str, str],
    num_steps: int = NUM_STEPS,
) -> tuple[NestedAdapter, dict[str, Accuracies]]:
    """Train an adapter on a table, and measure each rank before and after reordering it.

    Returns:
        The adapter, with trained ranks; and the accuracies of its ranks after each method.
    """
    torch.manual_seed(0)
    base_model = load_model(str(base_path), torch.float32, device="cpu")
    config = LoraConfig(r=MAX_RANK, lora_alpha=MAX_RANK, target_modules="all-linear")
    adapter = nest(get_peft_model(base_model, config), RANKS)
    lines = [f"{country}: {number}" for country, number in numbers.items()]
    trainer = SilentTrainer(
        model=adapter.model,
        args=TrainingArguments(
            str(base_path),
            max_steps=num_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=False,
        ),
        data_collator=lambda batch_lines: collate(tokenizer, batch_lines),
        train_dataset=lines,
        callbacks=[adapter.callback()],
    )
    trainer.train()

    starts = range(0, len(lines), BATCH_SIZE)
    batches = [collate(tokenizer, lines[start : start + BATCH_SIZE]) for start in starts]
    accuracies_by_method = {"truncated": measure(adapter, batches)}
    adapter.reorder()
    accuracies_by_method["reorder"] = measure(adapter, batches)
    adapter.train_ranks(trainer)
    accuracies_by_method["train_ranks"] = measure(adapter, batches)
    return adapter, accuracies_by_method


@torch.no_grad()
def measure(adapter: NestedAdapter, batches: Sequence[dict[str, Tensor]]) -> Accuracies:
    """Query every rank. An answer is correct if all digits of the number are.

    Before the factors are ordered, a rank is the first components of the factors as they are.
    """
    adapter.model.eval()
    labels = torch.cat([batch["labels"] for batch in batches])
    accuracies = {}
    for rank in tqdm((0, *RANKS), "querying every rank", leave=False):
        q = torch.arange(MAX_RANK) < rank
        if adapter.order is not None:
            q = adapter.state.deployed_q(rank)
        with adapter.use_diagonal(q):
            predictions = [adapter.model(**batch).logits.argmax(-1) for batch in batches]
        is_correct = (torch.cat(predictions) == labels).all(dim=1)
        accuracies[rank] = 100 * is_correct.double().mean().item()
    return accuracies


def print_accuracies(
    by_method: dict[str, Accuracies], sizes: dict[int, int], num_numbers: int
) -> None:
    """Print a table of the accuracy of each rank."""
    print(
        f"\nHow many of the {num_numbers} numbers each rank knows after this one training run:\n\n"
        f"  rank  size (MB)  {'  '.join(f'{method:>11}' for method in by_method)}"
    )
    for rank in (0, *RANKS):
        cells = [f"{accuracies[rank]:9.0f} %" for accuracies in by_method.values()]
        print(f"  {rank:4}  {sizes.get(rank, 0) / 1e6:9.2f}  {'  '.join(cells)}")
    print(
        "\n  rank 0: the model without the adapter\n"
        "  truncated: the first components of the factors, as they were trained\n"
        "  reorder: after adapter.reorder()\n"
        "  train_ranks: after adapter.train_ranks(trainer), which trains the low ranks"
    )


def typed_queries() -> Iterator[str]:
    """Yield the queries that the user types, up to an empty line, Ctrl-D or Ctrl-C."""
    with suppress(EOFError, KeyboardInterrupt):
        while query := input("Country: ").strip():
            yield query


def answer_queries(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    numbers: dict[str, str],
    queries: Iterator[str] | Sequence[str],
) -> None:
    """Print the answers of several ranks, which share a batch, to each query."""
    names = {name.lower(): name for name in numbers}
    for query in queries:
        country = names.get(query.lower())
        if country is None:
            similar = [names[key] for key in get_close_matches(query.lower(), names)]
            print(f"  Not in the table. Try {', '.join(similar or SAMPLE_COUNTRIES)}")
            continue
        with adapter.rows(QUERY_RANKS):
            answers = generate_numbers(adapter.model, tokenizer, [country] * len(QUERY_RANKS))
        cells = [f"rank {rank}: {s}" for rank, s in zip(QUERY_RANKS, answers, strict=True)]
        print(f"  {country}   {'   '.join(cells)}   (correct: {numbers[country]})")


def generate_numbers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> list[str]:
    """Return the numbers that a model generates for some countries, one per row of the batch."""
    prompts = tokenizer(
        [f"{name}: " for name in names], padding=True, padding_side="left", return_tensors="pt"
    )
    tokens = model.generate(**prompts, do_sample=False, max_new_tokens=NUM_DIGITS, pad_token_id=0)
    texts = tokenizer.batch_decode(tokens[:, -NUM_DIGITS:])
    return [" ".join(text.split()) for text in texts]
