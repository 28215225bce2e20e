"""What a rank curve costs: six ranks at once, against lm-evaluation-harness at one rank.

    make bench-eval
    python benchmarks/evaluate_ranks.py --items 24 --tasks choice-5shot,generate-long

Both sides answer the same tasks, made here from reasoning-gym as YAML and JSONL. The harness' own
backend gets each rank as a plain PEFT adapter, at the batch size at which it is fastest on a part
of the questions. The adapter has R = 32 on all linear layers of the embedded model, with random
factors that are small enough for the model to go on writing sentences; nothing is trained.

Time is CPU time of one thread (the clock's on a CUDA card), from the tasks to the metrics. Both
sides take turns, and medians are reported. Every choice and text is compared at every rank. A
choice that the harness makes by less than 1e-4 counts as a tie, and no difference.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # read when the harness is imported

import reasoning_gym
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model

from matryoshka_lora import NestedAdapter, nest
from matryoshka_lora.evaluation.many_ranks import ManyRanks
from matryoshka_lora.models import DTYPES, load_model, load_tokenizer

RANKS = (1, 2, 4, 8, 16, 32)
BATCH_SIZES = (8, 32, 96)
TUNED_ON = 32
TIE = 1e-4

# Shots are the first examples, the same for every question, as in mmlu and gsm8k_cot.
TASKS: dict[str, tuple[str, int]] = {
    "choice-5shot": ("choice", 5),
    "choice-0shot": ("choice", 0),
    "generate-long": ("long", 3),
    "generate-short": ("short", 0),
}
TARGETS = {"choice-5shot": 0.6, "choice-0shot": 2.5, "generate-long": 2, "generate-short": 5}


def choice(item: dict[str, Any], number: int) -> dict[str, Any]:
    """Make a question which of four sentences is true; only the relation differs in them."""
    relations = [
        "mother",
        "father",
        "sister",
        "brother",
        "grandmother",
        "aunt",
        "uncle",
        "daughter",
    ]
    draw = random.Random(number)
    wrong = draw.sample([relation for relation in relations if relation != item["answer"]], 3)
    options = [item["answer"], *wrong]
    draw.shuffle(options)
    story, _, asked = item["question"].partition("\n\n")
    names = asked.split("What relation is ")[-1].split("?")[0].split("How is ")[-1]
    first, _, second = names.replace(" related to ", " to ").partition(" to ")
    choices = [f"{first} is the {relation} of {second}." for relation in options]
    label = options.index(item["answer"])
    return {"question": story, "choices": choices, "label": label, "answer": ""}


def long(item: dict[str, Any], number: int) -> dict[str, Any]:
    """Make a sum of six terms, whose answer goes step by step: about 90 tokens."""
    asked = item["question"].split(":")[-1].split("=")[0]
    terms = asked.replace("- ", "-").replace("+ ", "").split()
    total, steps = int(terms[0]), []
    for term in map(int, terms[1:]):
        before, total = total, total + term
        steps.append(f"{before} {'+' if term >= 0 else '-'} {abs(term)} = {total}")
    question = f"What is {' + '.join(terms)}?"
    return {"question": question, "answer": f"{'. '.join(steps)}. The answer is {total}."}


def short(item: dict[str, Any], number: int) -> dict[str, Any]:
    """Make a question about a family, whose answer is one word."""
    return {"question": item["question"], "answer": item["answer"]}


SUMS = {"min_terms": 6, "max_terms": 6, "min_digits": 2, "max_digits": 2}
MAKERS: dict[str, tuple[str, dict[str, int], Callable[[dict[str, Any], int], dict[str, Any]]]] = {
    "choice": ("family_relationships", {"max_family_size": 4}, choice),  # as long as one of ARC
    "long": ("chain_sum", SUMS, long),
    "short": ("family_relationships", {}, short),
}


def write_task(folder: Path, name: str, items: int) -> Path:
    """Write the YAML file of a task and its data."""
    kind, shots = TASKS[name]
    source, options, make = MAKERS[kind]
    files = {}
    for split, size, seed in (("test", items, 0), ("train", 16, 1)):
        drawn = reasoning_gym.create_dataset(source, size=size, seed=seed, **options)
        files[split] = str(folder / f"{split}.jsonl")
        rows = [json.dumps(make(item, number)) + "\n" for number, item in enumerate(drawn)]
        Path(files[split]).write_text("".join(rows), encoding="utf-8")
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metadata": {"version": 1},
    }
    metric = {"aggregation": "mean", "higher_is_better": True}
    if kind == "choice":
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **metric}],
        }
    else:
        most = 8 if kind == "short" else 128
        config |= {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": most, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **metric}],
        }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def make_models(dtype: torch.dtype) -> tuple[NestedAdapter, Any]:
    """Return a nested adapter, and a plain PEFT model with one adapter for each rank."""
    settings = {"target_modules": "all-linear"}
    model = get_peft_model(load_model(dtype=dtype), LoraConfig(r=32, lora_alpha=32, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            size = 0.02 if "lora_A" in name else 0.01
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    adapter = nest(model.eval(), RANKS, rule="lora")
    adapter.reorder()
    plain: Any = load_model(dtype=dtype)
    for rank in RANKS:
        config = LoraConfig(r=rank, lora_alpha=rank, **settings)
        if rank == RANKS[0]:
            plain = get_peft_model(plain, config, adapter_name=f"rank_{rank}")
        else:
            plain.add_adapter(f"rank_{rank}", config)
        for name, (A, B) in adapter.factors().items():
            layer = plain.base_model.model.get_submodule(name)
            layer.lora_A[f"rank_{rank}"].weight.data.copy_(A[:rank])
            layer.lora_B[f"rank_{rank}"].weight.data.copy_(B[:, :rank])
    for parameter in [*plain.parameters(), *model.parameters()]:
        parameter.requires_grad_(False)
    return adapter, plain.eval()


def now() -> float:
    """Return the CPU time of this thread in seconds, or the clock's where a card computes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


class Contest:
    """Both sides on one task."""

    def __init__(self, task: Path, adapter: NestedAdapter, plain: Any) -> None:
        self.adapter, self.plain = adapter, plain
        self.tokenizer = load_tokenizer()
        self.loaded = TaskManager(include_defaults=False).load([str(task)])
        self.backend = HFLM(plain, tokenizer=self.tokenizer, batch_size=1)

    def answers(self, lm: Any, limit: int | None = None) -> list[Any]:
        """Return of each question its text, or the log-likelihoods of its choices."""
        with redirect_stderr(StringIO()):
            found: Any = evaluate(lm, self.loaded, limit=limit, bootstrap_iters=0)
        (samples,) = found["samples"].values()
        rows = sorted(samples, key=lambda row: row["doc_id"])
        return [[r[0] if isinstance(r[0], str) else r[0][0] for r in row["resps"]] for row in rows]

    def harness(self, rank: int, size: int, limit: int | None = None) -> tuple[float, list[Any]]:
        """Return seconds and answers of the harness' own backend at one rank."""
        self.plain.set_adapter(f"rank_{rank}")
        self.backend.batch_size_per_gpu = size
        begin = now()
        found = self.answers(self.backend, limit)
        return now() - begin, found

    def ours(self) -> tuple[float, dict[int, list[Any]]]:
        """Return seconds and answers at all ranks."""
        begin, found = now(), {}
        lm = ManyRanks(self.adapter, self.tokenizer, RANKS)
        for rank in RANKS:
            lm.lora_rank = rank
            found[rank] = self.answers(lm)
        return now() - begin, found


def compare(ours: dict[int, list[Any]], harness: dict[int, list[Any]]) -> dict[str, Any]:
    """Return how many answers differ, and by how much log-likelihoods do."""
    differ = ties = 0
    largest = 0.0
    for rank, rows in harness.items():
        for mine, theirs in zip(ours[rank], rows, strict=True):
            if isinstance(theirs[0], str):
                differ += mine != theirs
                continue
            largest = max(largest, *(abs(a - b) for a, b in zip(mine, theirs, strict=True)))
            if mine.index(max(mine)) != theirs.index(max(theirs)):
                first, second = sorted(theirs, reverse=True)[:2]
                ties, differ = ties + (first - second < TIE), differ + (first - second >= TIE)
    return {"differ": differ, "ties": ties, "largest_logprob_difference": largest}


def measure(contest: Contest, repeats: int) -> dict[str, Any]:
    """Return seconds and differences of one task."""
    top = RANKS[-1]
    size = min(BATCH_SIZES, key=lambda size: contest.harness(top, size, TUNED_ON)[0])
    one, all_ranks = [], []
    for _ in range(repeats):
        seconds, mine = contest.ours()
        all_ranks.append(seconds)
        seconds, at_top = contest.harness(top, size)
        one.append(seconds)
    theirs = {top: at_top, **{rank: contest.harness(rank, size)[1] for rank in RANKS[:-1]}}
    return {
        "harness_batch_size": size,
        "harness_one_rank_s": round(statistics.median(one), 2),
        "ours_six_ranks_s": round(statistics.median(all_ranks), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(all_ranks, one, strict=True)), 3),
        **compare(mine, theirs),
    }


def main() -> None:
    """Print one line of JSON for each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=48, help="questions of each task")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=1, help="turns of both sides")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    models = make_models(DTYPES[args.dtype])
    for name in args.tasks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            task = write_task(Path(folder), name, args.items)
            found = measure(Contest(task, *models), args.repeats)
        about = {"task": name, "dtype": args.dtype, "items": args.items, "target": TARGETS[name]}
        print(json.dumps(about | found), flush=True)


if __name__ == "__main__":
    main()
