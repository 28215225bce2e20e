"""Measure what each part of the evaluation at several ranks gains, and compare with the harness.

    python benchmarks/evaluate_ranks.py
    python benchmarks/evaluate_ranks.py --tasks generate-short --items 48

The tasks are made here from reasoning-gym. Each of these sides answers them at all ranks, in turn:

* all: `ManyRanksLM`, as `matryoshka eval` uses it.
* no prefix: The few-shot examples are computed for each prompt.
* no sharing: A prompt is computed for each of its choices.
* one rank: One rank after the other, instead of several ranks in a batch.
* harness: lm-evaluation-harness's own backend, one rank after the other, at the batch size at which
  it is fastest on some of the examples.

The adapter has R = 32 on all linear layers of the bundled model, with random factors that are small
enough for the model to continue to write sentences; nothing is trained. The time is the CPU time of
one thread, or the wall time on a CUDA device, from the tasks to the metrics. The medians of the
ratios are reported, with the smallest and the largest. Every answer is compared with the harness's
at every rank. A choice that the harness makes by less than 1e-4 counts as a tie, not as different.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from train_step import machine, now

from matryoshka_lora import NestedAdapter, nest
from matryoshka_lora.evaluation.engine import Engine, Tokens, Tree
from matryoshka_lora.evaluation.harness import ManyRanksLM
from matryoshka_lora.peft.base_model import load_model, load_tokenizer

BATCH_SIZES = (8, 32)
NUM_TUNING_ITEMS = 4
TIE = 1e-4

Item = dict[str, Any]
Answers = list[list[Any]]
"""For each example its text, or the log-likelihoods of its choices."""


class Task(NamedTuple):
    """A kind of task.

    Attributes:
        source: The dataset of reasoning-gym.
        options: Its options.
        convert: Makes an example of an item and its number.
        num_fewshot: The first examples, the same for all prompts, as in mmlu and gsm8k_cot.
        max_new_tokens: The maximum length of an answer; None for a choice.
    """

    source: str
    options: dict[str, int]
    convert: Callable[[Item, int], Item]
    num_fewshot: int
    max_new_tokens: int | None = None

    @property
    def sides(self) -> list[str]:
        """The sides to measure: not those that switch off a part that the task does not use."""
        sides = ["all", "one rank", "harness"]
        if self.num_fewshot:
            sides.append("no prefix")
        if self.max_new_tokens is None:
            sides.append("no sharing")
        return sides


def choice(item: Item, number: int) -> Item:
    """Return a question which of four sentences is true; only the relation differs in them."""
    relations = ["mother", "father", "sister", "brother", "grandmother", "aunt", "uncle"]
    relations += ["daughter"]
    wrong_relations = [relation for relation in relations if relation != item["answer"]]
    rng = random.Random(number)
    options = [item["answer"], *rng.sample(wrong_relations, 3)]
    rng.shuffle(options)
    story, _, question = item["question"].partition("\n\n")
    names = question.split("What relation is ")[-1].split("?")[0].split("How is ")[-1]
    first, _, second = names.replace(" related to ", " to ").partition(" to ")
    return {
        "question": story,
        "choices": [f"{first} is the {relation} of {second}." for relation in options],
        "label": options.index(item["answer"]),
        "answer": "",
    }


def steps(item: Item, number: int) -> Item:
    """Return a sum of six terms, which is answered step by step in about 90 tokens."""
    expression = item["question"].split(":")[-1].split("=")[0]
    terms = [int(term) for term in expression.replace("- ", "-").replace("+ ", "").split()]
    total = terms[0]
    sentences: list[str] = []
    for term in terms[1:]:
        sign = "+" if term >= 0 else "-"
        sentences.append(f"{total} {sign} {abs(term)} = {total + term}.")
        total += term
    question = f"What is {' + '.join(map(str, terms))}?"
    return {"question": question, "answer": f"{' '.join(sentences)} The answer is {total}."}


def one_word(item: Item, number: int) -> Item:
    """Return a question about a family, which is answered in one word."""
    return {"question": item["question"], "answer": item["answer"]}


SMALL_FAMILY = {"max_family_size": 4}  # about as long as a question of ARC
SUM = {"min_terms": 6, "max_terms": 6, "min_digits": 2, "max_digits": 2}
TASKS = {
    "choice-0shot": Task("family_relationships", SMALL_FAMILY, choice, 0),
    "choice-5shot": Task("family_relationships", SMALL_FAMILY, choice, 5),
    "generate-short": Task("family_relationships", {}, one_word, 0, max_new_tokens=8),
    "generate-long": Task("chain_sum", SUM, steps, 3, max_new_tokens=64),
}


def make_task(folder: Path, name: str, num_items: int) -> Any:
    """Write the YAML file of a task and its data, and return the task as the harness loads it."""
    import reasoning_gym

    task = TASKS[name]
    data_files: dict[str, str] = {}
    for split, size, seed in (("test", num_items, 0), ("train", 16, 1)):
        items = reasoning_gym.create_dataset(task.source, size=size, seed=seed, **task.options)
        lines = [json.dumps(task.convert(item, number)) for number, item in enumerate(items)]
        file = folder / f"{name}-{split}.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        data_files[split] = str(file)
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data_files},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": task.num_fewshot,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metadata": {"version": 1},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    if task.max_new_tokens is None:
        config["output_type"] = "multiple_choice"
        config["doc_to_choice"] = "choices"
        config["doc_to_target"] = "label"
        config["metric_list"] = [{"metric": "acc", **mean}]
    else:
        config["output_type"] = "generate_until"
        config["doc_to_target"] = "{{answer}}"
        config["generation_kwargs"] = {
            "until": ["\n"],
            "max_gen_toks": task.max_new_tokens,
            "do_sample": False,
        }
        config["metric_list"] = [{"metric": "exact_match", **mean}]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return TaskManager(include_defaults=False).load([str(file)])


def answer(lm: Any, task: Any, limit: int | None = None) -> Answers:
    """Run a task, and return its answers."""
    with redirect_stderr(StringIO()):  # the harness's progress bars
        results: Any = evaluate(lm, task, limit=limit, bootstrap_iters=0)
    (samples,) = results["samples"].values()
    answers: Answers = []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        responses = [response[0] for response in sample["resps"]]
        answers.append([r if isinstance(r, str) else r[0] for r in responses])
    return answers


class NoPrefix(Engine):
    """An engine that computes few-shot examples for each prompt."""

    def compute_prefix(self, contexts: Sequence[Tokens]) -> None:
        """Return no prefix."""


class NoSharing(Engine):
    """An engine that computes a prompt for each of its choices."""

    def build_trees(self, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Tree]:
        """Return a tree for each request."""
        trees: list[Tree] = []
        for index, request in enumerate(requests):
            (tree,) = super().build_trees([request])
            trees.append(tree._replace(branches=[(index, tree.branches[0][1])]))
        return trees


class Benchmark:
    """An adapter at some ranks, and the sides that evaluate it."""

    def __init__(self, dtype: str, ranks: Sequence[int]) -> None:
        config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
        model: Any = get_peft_model(load_model(dtype=dtype), config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = 0.02 if "lora_A" in name else 0.01
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
        self.adapter: NestedAdapter = nest(model.eval(), rule="lora")
        self.adapter.reorder()
        model.requires_grad_(False)
        self.ranks = ranks
        self.tokenizer = load_tokenizer()
        self.harness = HFLM(model, tokenizer=load_tokenizer())

    def run(self, side: str, task: Any) -> tuple[float, dict[int, Answers]]:
        """Return the seconds of a side, and its answers by rank."""
        lms: dict[int, Any] = {}
        if side == "harness":
            lms = dict.fromkeys(self.ranks, self.harness)
        elif side == "one rank":
            lms = {r: ManyRanksLM(self.adapter, self.tokenizer, [r]) for r in self.ranks}
        else:
            lm = ManyRanksLM(self.adapter, self.tokenizer, self.ranks)
            if side == "no prefix":
                lm.engine = NoPrefix(self.adapter, self.ranks)
            elif side == "no sharing":
                lm.engine = NoSharing(self.adapter, self.ranks)
            lms = dict.fromkeys(self.ranks, lm)
        answers: dict[int, Answers] = {}
        start = now(self.adapter.model.device)
        for rank, lm in lms.items():
            lm.lora_rank = rank
            if side == "harness":
                self.adapter.set_rank(rank)
            answers[rank] = answer(lm, task)
        return now(self.adapter.model.device) - start, answers

    def measure(self, name: str, task: Any, repeats: int) -> dict[str, Any]:
        """Return the seconds of all sides on one task, and the differences to the harness."""
        seconds_by_batch_size: dict[int, float] = {}
        for size in BATCH_SIZES:
            self.harness.batch_size_per_gpu = size
            start = now(self.adapter.model.device)
            answer(self.harness, task, NUM_TUNING_ITEMS)
            seconds_by_batch_size[size] = now(self.adapter.model.device) - start
        batch_size = min(BATCH_SIZES, key=lambda size: seconds_by_batch_size[size])
        self.harness.batch_size_per_gpu = batch_size
        seconds: dict[str, list[float]] = {side: [] for side in TASKS[name].sides}
        answers: dict[str, dict[int, Answers]] = {}
        for _ in range(repeats):
            for side, measured in seconds.items():
                side_seconds, answers[side] = self.run(side, task)
                measured.append(side_seconds)
        ratios: dict[str, list[float]] = {}
        for side, measured in seconds.items():
            by_repeat = [a / b for a, b in zip(measured, seconds["all"], strict=True)]
            ratios[side] = [round(f(by_repeat), 3) for f in (median, min, max)]
        return {
            "harness_batch_size": batch_size,
            "seconds": {side: round(median(measured), 2) for side, measured in seconds.items()},
            "ratios_median_min_max": ratios,
            **compare(answers["all"], answers["harness"]),
        }


def compare(answers: dict[int, Answers], expected: dict[int, Answers]) -> dict[str, float]:
    """Return how many answers differ, and by how much log-likelihoods do."""
    num_different = num_ties = 0
    largest_difference = 0.0
    for rank, expected_answers in expected.items():
        for values, expected_values in zip(answers[rank], expected_answers, strict=True):
            if isinstance(expected_values[0], str):
                num_different += values != expected_values
                continue
            for value, expected_value in zip(values, expected_values, strict=True):
                largest_difference = max(largest_difference, abs(value - expected_value))
            if values.index(max(values)) != expected_values.index(max(expected_values)):
                best, second = sorted(expected_values, reverse=True)[:2]
                if best - second < TIE:
                    num_ties += 1
                else:
                    num_different += 1
    return {
        "different_answers": num_different,
        "ties": num_ties,
        "largest_logprob_difference": largest_difference,
    }


def describe_machine(device: torch.device) -> str:
    """Return the hardware, its threads, and the versions of the libraries."""
    libraries = [f"{name} {version(name)}" for name in ("transformers", "lm_eval")]
    return ", ".join([machine(device), *libraries])


def main() -> None:
    """Print and write the results of each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=6, help="examples of each task")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--ranks", default="1,4,16,32", help="powers of two up to 32")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    default_output = Path("benchmarks/results/evaluate_ranks.json")
    parser.add_argument("--output", "-o", type=Path, default=default_output)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    benchmark = Benchmark(options.dtype, ranks)
    document: dict[str, Any] = {"results": {}}
    if options.output.exists():  # other tasks keep their results
        document = json.loads(options.output.read_text(encoding="utf-8"))
    device = benchmark.adapter.model.device
    document = {**document, "machine": describe_machine(device), "dtype": options.dtype}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.tasks.split(","):
            task = make_task(Path(folder), name, options.items)
            result = benchmark.measure(name, task, options.repeats)
            result = {"items": options.items, "ranks": ranks, "repeats": options.repeats, **result}
            print(json.dumps({name: result}), flush=True)
            document["results"][name] = result
            options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
