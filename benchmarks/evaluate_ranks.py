"""What a rank curve costs: all six ranks with the engine, against lm-evaluation-harness for one rank and for six.

    make bench-eval
    python benchmarks/evaluate_ranks.py --items 100 --tasks choice-5shot --json
    python benchmarks/evaluate_ranks.py --table docs/evaluate_ranks.json

Both sides answer the same tasks of the harness, made here from reasoning-gym as local YAML and JSONL, and are judged by
the same code of the harness. The harness's HF backend gets each rank as a plain PEFT adapter, exported before, and the
batch size at which it is fastest on a part of the questions. The adapter has R = 32 on all linear layers and random
factors (seed 0) that are small enough for the model to go on writing sentences; nothing is trained.

Time is CPU time of one thread, and on a CUDA card the clock's, without loading models, from the prompts to the
metrics. The harness at the largest rank and the engine take turns, and the medians of these turns are reported; the
harness at the other ranks runs once each. "identical" is about a float32 run of both on the same questions (on the
first ones with --compared): whether every choice and every text is equal at every rank. Choices that were closer than
1e-4 are listed by name in the files of --out, and do not count.

Each task and dtype is one file in the folder of --out. What is there is not measured again, so that a run that was
stopped goes on, and two processes may take a task each.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # read when the harness is imported

import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from train_step import machine, now

from matryoshka_lora import NestedAdapter, nest
from matryoshka_lora.data.tasks import Example, get_task
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.evaluation.harness import judge
from matryoshka_lora.evaluation.store import Store
from matryoshka_lora.evaluation.tasks import ask
from matryoshka_lora.files import write_text
from matryoshka_lora.models import DTYPES, embedded_folder, load_model, load_tokenizer

RANKS = (1, 2, 4, 8, 16, 32)
BATCH_SIZES = (8, 32, 96)
TUNED_ON = 32
TIE = 1e-4

FAMILY = "family_relationships"
SMALL_FAMILY = {"name": FAMILY, "max_family_size": 4}  # about as long as a question of ARC
SUMS = {"name": "chain_sum", "min_terms": 6, "max_terms": 6, "min_digits": 2, "max_digits": 2}

# Shots are the first examples, the same ones for every question, as in mmlu and gsm8k_cot. Without shots nothing is
# shared between the prompts of different questions, which is the harder case.
TASKS: dict[str, dict[str, Any]] = {
    "choice-5shot": {"data": "choice", "num_fewshot": 5},
    "choice-0shot": {"data": "choice", "num_fewshot": 0},
    "generate-long": {"data": "long", "num_fewshot": 3},
    "generate-short": {"data": "short", "num_fewshot": 0},
    "generate-long-0shot": {"data": "long", "num_fewshot": 0},
    "generate-short-3shot": {"data": "short", "num_fewshot": 3},
}
REQUIRED = ("choice-5shot", "choice-0shot", "generate-long", "generate-short")


def choice(example: Example, number: int) -> dict[str, Any]:
    """Which of four sentences is true; the relation is the only word that differs."""
    relations = ["mother", "father", "sister", "brother", "grandmother", "grandfather", "aunt", "uncle", "daughter"]
    draw = random.Random(number)
    wrong = draw.sample([relation for relation in relations if relation != example.completion], 3)
    options = [example.completion, *wrong]
    draw.shuffle(options)
    story, _, asked = example.prompt.partition("\n\n")
    names = asked.split("What relation is ")[-1].split("?")[0].split("How is ")[-1]
    first, _, second = names.replace(" related to ", " to ").partition(" to ")
    choices = [f"{first} is the {relation} of {second}." for relation in options]
    return {"question": story, "choices": choices, "label": options.index(example.completion), "answer": ""}


def long(example: Example, number: int) -> dict[str, Any]:
    """A sum of six terms, whose answer goes step by step: about 90 tokens."""
    terms = example.prompt.split(":")[-1].split("=")[0].replace("- ", "-").replace("+ ", "").split()
    total, steps = int(terms[0]), []
    for term in map(int, terms[1:]):
        sign, before, total = ("+" if term >= 0 else "-"), total, total + term
        steps.append(f"{before} {sign} {abs(term)} = {total}")
    question = f"What is {' + '.join(terms)}?"
    return {"question": question, "answer": f"{'. '.join(steps)}. The answer is {total}."}


def short(example: Example, number: int) -> dict[str, Any]:
    """A question about a family, whose answer is one word."""
    return {"question": example.prompt, "answer": example.completion}


MAKERS: dict[str, tuple[Any, Callable[[Example, int], dict[str, Any]]]] = {
    "choice": (SMALL_FAMILY, choice),
    "long": (SUMS, long),
    "short": (FAMILY, short),
}


def write_tasks(folder: Path, items: int) -> dict[str, Path]:
    """The YAML file of each task; their data lie beside them."""
    folder.mkdir(exist_ok=True)
    for kind, (spec, make) in MAKERS.items():
        task = get_task(spec)
        for split, size in (("test", items), ("train", 16)):
            rows = [make(example, number) for number, example in enumerate(task.examples(split, size))]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{kind}-{split}.jsonl").write_text(text, encoding="utf-8")
    files = {}
    for name, settings in TASKS.items():
        kind = settings["data"]
        config: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(folder / f"{kind}-{split}.jsonl") for split in ("train", "test")}
            },
            "test_split": "test",
            "fewshot_split": "train",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": settings["num_fewshot"],
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "metadata": {"version": 1},
        }
        if kind == "choice":
            config |= {
                "output_type": "multiple_choice",
                "doc_to_choice": "choices",
                "doc_to_target": "label",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        else:
            most = 8 if kind == "short" else 128
            config |= {
                "output_type": "generate_until",
                "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": most, "do_sample": False},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            }
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(config), encoding="utf-8")
    return files


def make_adapter(dtype: torch.dtype, device: torch.device) -> NestedAdapter:
    """The same factors for each dtype of the base model."""
    config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(load_model(dtype=dtype), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            size = 0.02 if "lora_A" in name else 0.01
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return nest(model.eval().to(device), deploy="paper")


class Contest:
    """Both sides on one dtype."""

    def __init__(self, dtype: str, folder: Path, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.tokenizer = load_tokenizer()
        self.adapter = make_adapter(DTYPES[dtype], device)
        self.engine = Engine(self.adapter, self.tokenizer)
        slices = {rank: str(folder / f"{dtype}-rank-{rank}") for rank in RANKS}
        for rank, path in slices.items():
            self.adapter.export(path, rank)
        first, *others = RANKS
        options = {"dtype": DTYPES[dtype], "device": str(device), "batch_size": 1}
        self.backend = HFLM(str(embedded_folder()), peft=slices[first], **options)
        # One model for all ranks, to spare memory: only the active adapter is computed.
        self.names = {first: "default"} | {rank: f"rank_{rank}" for rank in others}
        for rank in others:
            self.backend.model.load_adapter(slices[rank], self.names[rank], torch_device=str(device))

    def harness(self, task: Path, rank: int, batch_size: int, limit: int | None = None) -> tuple[float, list[Any]]:
        """Seconds, and each request's answer."""
        self.backend.model.set_adapter(self.names[rank])
        self.backend.batch_size_per_gpu = batch_size
        run = partial(evaluate, self.backend, fresh(task, self.tokenizer), limit=limit, bootstrap_iters=0)
        with redirect_stderr(io.StringIO()):  # the backend draws a bar for each call
            begin = now(self.device)
            found = run()
            return now(self.device) - begin, answers(found)

    def ours(self, task: Path) -> tuple[float, dict[int, list[Any]]]:
        """Seconds, and each request's answer at each rank."""
        tasks = ask(str(task), self.tokenizer).tasks
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "answers.jsonl", {})
            begin = now(self.device)
            judged = judge(self.engine, tasks, RANKS, store)
            seconds = now(self.device) - begin
            store.close()
        return seconds, {rank: answers(found) for rank, found in judged.results.items()}

    def best_batch_size(self, task: Path) -> int:
        """At which the harness is fastest on a part of the questions, at the largest rank."""
        return min(BATCH_SIZES, key=lambda size: self.harness(task, RANKS[-1], size, TUNED_ON)[0])


def fresh(task: Path, tokenizer: Any) -> dict[str, Any]:
    found = ask(str(task), tokenizer).tasks
    for each in found:
        each.set_fewshot_seed(1234)
    return {"tasks": {each.config.task: each for each in found}, "groups": {}}


def answers(found: Any) -> list[Any]:
    """Of each question: its text, or the log-likelihoods of its choices."""
    (samples,) = found["samples"].values()
    rows = sorted(samples, key=lambda row: row["doc_id"])
    return [[resp[0] if isinstance(resp[0], str) else resp[0][0] for resp in row["resps"]] for row in rows]


def compare(ours: dict[int, list[Any]], harness: dict[int, list[Any]]) -> dict[str, Any]:
    """How many answers differ, and by how much log-likelihoods do."""
    differ, ties, largest, count = [], [], 0.0, 0
    for rank, rows in harness.items():
        for number, (mine, theirs) in enumerate(zip(ours[rank], rows, strict=True)):
            count += 1
            name = {"rank": rank, "question": number}
            if isinstance(theirs[0], str):
                if mine != theirs:
                    differ.append({**name, "ours": mine[0], "harness": theirs[0]})
                continue
            largest = max(largest, *(abs(a - b) for a, b in zip(mine, theirs, strict=True)))
            if mine.index(max(mine)) != theirs.index(max(theirs)):
                first, second = sorted(theirs, reverse=True)[:2]
                (ties if first - second < TIE else differ).append({**name, "margin": first - second})
    return {"answers": count, "differ": differ, "ties": ties, "largest_logprob_difference": largest}


def measure(contest: Contest, task: Path, repeats: int) -> dict[str, Any]:
    size = contest.best_batch_size(task)
    one, all_ours = [], []
    top = RANKS[-1]
    theirs: dict[int, list[Any]] = {}
    seconds: dict[int, float] = {}
    mine: dict[int, list[Any]] = {}
    for _ in range(repeats):
        spent, mine = contest.ours(task)
        all_ours.append(spent)
        spent, theirs[top] = contest.harness(task, top, size)
        one.append(spent)
    for rank in RANKS[:-1]:
        seconds[rank], theirs[rank] = contest.harness(task, rank, size)
    seconds[top] = statistics.median(one)
    return {
        "dtype": contest.dtype,
        "harness_batch_size": size,
        "harness_one_rank": round(seconds[top], 3),
        "harness_all_ranks": round(sum(seconds.values()), 3),
        "ours_all_ranks": round(statistics.median(all_ours), 3),
        "ratio_min_max": [
            round(extreme(a / b for a, b in zip(all_ours, one, strict=True)), 3) for extreme in (min, max)
        ],
        **compare(mine, theirs),
        "mean_tokens": mean_tokens(contest.tokenizer, theirs),
    }


def mean_tokens(tokenizer: Any, found: dict[int, list[Any]]) -> float | None:
    """Of the generated answers."""
    texts = [row[0] for rows in found.values() for row in rows if isinstance(row[0], str)]
    return round(statistics.fmean(len(tokenizer(text)["input_ids"]) for text in texts), 1) if texts else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100, help="questions of each task (default: 100)")
    parser.add_argument("--tasks", default=",".join(REQUIRED), help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--compared", type=int, help="how many of them are compared in float32 (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="turns in bfloat16 (default: 3)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each task")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate_ranks"), help="the folder of finished parts")
    parser.add_argument("--table", type=Path, help="put the parts of these tasks into this JSON file")
    args = parser.parse_args()
    names: Sequence[str] = args.tasks.split(",")
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        parser.error(f"there is no task {unknown[0]}; there are {', '.join(TASKS)}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = {}
    for name in names:
        fast = part(args.out, name, "bf16", args.items, args.repeats, args.device)
        exact = part(args.out, name, "fp32", args.compared or args.items, 1, args.device)
        tasks[name] = {"bf16": fast, "fp32": exact}
        times = {key: fast[key] for key in ("harness_one_rank", "harness_all_ranks", "ours_all_ranks")}
        line = {"task": name, **times, "identical": not exact["differ"]}
        print(json.dumps(line) if args.json else _text(name, fast, exact), flush=True)
    if args.table:
        before = json.loads(args.table.read_text(encoding="utf-8"))["tasks"] if args.table.exists() else {}
        report = {"ranks": list(RANKS), "tasks": {**before, **tasks}}
        write_text(args.table, json.dumps(report, indent=1) + "\n")


def part(out: Path, name: str, dtype: str, items: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One task in one dtype, from its file where it was measured before."""
    file = out / f"{name}-{dtype}-{items}{'' if device.type == 'cpu' else f'-{device.type}'}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            task = write_tasks(Path(folder), items)[name]
            measured = measure(Contest(dtype, Path(folder), device), task, repeats)
        found = {"machine": machine(device), "items": items, "turns": repeats, **measured}
        write_text(file, json.dumps(found, indent=1) + "\n")
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def _text(name: str, fast: dict[str, Any], exact: dict[str, Any]) -> str:
    lines = [f"\n{name}"]
    for found in (fast, exact):
        ratio = found["ours_all_ranks"] / found["harness_one_rank"]
        lines.append(
            f"  {found['dtype']}, {found['items']} questions: harness {found['harness_one_rank']:.1f} s for one rank "
            f"(batches of {found['harness_batch_size']}), {found['harness_all_ranks']:.1f} s for six; engine "
            f"{found['ours_all_ranks']:.1f} s for six: {ratio:.2f} times one rank. {len(found['differ'])} of "
            f"{found['answers']} answers differ, {len(found['ties'])} ties, log-likelihoods by at most "
            f"{found['largest_logprob_difference']:.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
