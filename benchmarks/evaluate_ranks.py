"""Measure evaluation at six ranks at once, against lm-evaluation-harness at one rank.

    python benchmarks/evaluate_ranks.py --repeats 3
    python benchmarks/evaluate_ranks.py --items 24 --tasks choice-5shot,generate-long
    python benchmarks/evaluate_ranks.py --against /path/to/other/src

Both sides run the same tasks, which are made here from reasoning-gym. The harness's own backend
gets each rank as a plain PEFT adapter, at the batch size at which it is fastest on a part of the
examples. The adapter has R = 32 on all linear layers of the bundled model, with random factors that
are small enough for the model to continue to write sentences; nothing is trained. With
``--against``, the sources of another version alternate with ours.

The time is the CPU time of one thread, or the wall time on a CUDA device, from the tasks to the
metrics. All sides alternate, and the medians are reported. Every answer is compared at every rank.
A choice that the harness makes by less than 1e-4 counts as a tie, not as different.

The backends for all ranks run in child processes, which load the model once, and the harness's own
backend runs in this process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

RANKS = (1, 2, 4, 8, 16, 32)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH_SIZES = (8, 32, 96)
NUM_TUNING_ITEMS = 16
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
    "generate-long": Task("chain_sum", SUM, steps, 3, max_new_tokens=128),
}


def write_task(folder: Path, name: str, num_items: int) -> Path:
    """Write the YAML file of a task and its data."""
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
    return file


def load_task(file: Path) -> Any:
    """Return what the harness makes of a YAML file."""
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


def now() -> float:
    """Return the CPU time of this thread in seconds, or the wall time on a CUDA device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def load_base_model(path: str, dtype: str) -> Any:
    """Return a model on this machine's device."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


class HarnessBackend:
    """The harness's own backend, with a plain PEFT adapter per rank."""

    def __init__(self, base_model: str, dtype: str, adapters: Path) -> None:
        model: Any = load_base_model(base_model, dtype)
        for rank in RANKS:
            folder, name = str(adapters / f"rank-{rank}"), f"rank_{rank}"
            if rank == RANKS[0]:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
        self.model = model.eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        self.lm = HFLM(self.model, tokenizer=tokenizer, batch_size=1)

    def run(
        self, task: Any, rank: int, batch_size: int, limit: int | None = None
    ) -> tuple[float, Answers]:
        """Return the seconds and the answers at one rank."""
        self.model.set_adapter(f"rank_{rank}")
        self.lm.batch_size_per_gpu = batch_size
        start = now()
        answers = answer(self.lm, task, limit)
        return now() - start, answers


class MultiRankBackend:
    """A child process with the backend for all ranks, of this version or another.

    Args:
        base_model: The folder of the base model.
        dtype: Its dtype.
        source: The sources of another version, or None.
        adapters: Where the child process exports each rank, or None.
    """

    def __init__(
        self, base_model: str, dtype: str, source: Path | None, adapters: Path | None
    ) -> None:
        environment = dict(os.environ)
        if source is not None:
            environment["PYTHONPATH"] = str(source.resolve())
        command = [sys.executable, __file__, "--worker", base_model, "--dtype", dtype]
        if adapters is not None:
            command += ["--export", str(adapters)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()  # the child process is ready

    def run(self, task_file: Path) -> tuple[float, dict[int, Answers]]:
        """Return the seconds and the answers at all ranks."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task_file}\n")
        self.process.stdin.flush()
        result = self._read()
        return result["seconds"], {int(rank): a for rank, a in result["answers"].items()}

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A child process has failed; see its messages above.")
        return json.loads(line)

    def close(self) -> None:
        """End the child process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run_worker(base_model: str, dtype: str, adapters: Path | None, output: TextIO) -> None:
    """Answer tasks at all ranks: the child process of `MultiRankBackend`."""
    from matryoshka_lora import nest

    config = LoraConfig(r=RANKS[-1], lora_alpha=RANKS[-1], target_modules="all-linear")
    model = get_peft_model(load_base_model(base_model, dtype), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            size = 0.02 if "lora_A" in name else 0.01
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    adapter = nest(model.eval(), RANKS, rule="lora")
    adapter.reorder()
    if adapters is not None:
        for rank in RANKS:
            adapter.export(adapters / f"rank-{rank}", rank)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    new_lm = multi_rank_lm()
    print(json.dumps("ready"), file=output, flush=True)
    for line in sys.stdin:
        task = load_task(Path(line.strip()))
        start = now()
        lm = new_lm(adapter, tokenizer)
        answers: dict[int, Answers] = {}
        for rank in RANKS:
            lm.lora_rank = rank
            answers[rank] = answer(lm, task)
        seconds = now() - start
        print(json.dumps({"seconds": seconds, "answers": answers}), file=output, flush=True)


def multi_rank_lm() -> Callable[[Any, Any], Any]:
    """Return a function of an adapter and a tokenizer that makes the backend for all ranks."""
    try:
        from matryoshka_lora.evaluation.harness import ManyRanksLM
    except ModuleNotFoundError:  # version 0.3
        from matryoshka_lora.evaluation.many_ranks import ManyRanks

        return lambda adapter, tokenizer: ManyRanks(adapter, tokenizer, RANKS)
    return lambda adapter, tokenizer: ManyRanksLM(adapter, tokenizer, RANKS)


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


def measure(
    task_file: Path,
    harness: HarnessBackend,
    ours: MultiRankBackend,
    other: MultiRankBackend | None,
    repeats: int,
) -> dict[str, Any]:
    """Return the seconds of all sides on one task, and the differences to the harness."""
    task = load_task(task_file)
    max_rank = RANKS[-1]
    batch_size = min(
        BATCH_SIZES, key=lambda size: harness.run(task, max_rank, size, NUM_TUNING_ITEMS)[0]
    )
    harness_seconds: list[float] = []
    our_seconds: list[float] = []
    other_seconds: list[float] = []
    for _ in range(repeats):
        seconds, answers = ours.run(task_file)
        our_seconds.append(seconds)
        if other is not None:
            seconds, _ = other.run(task_file)
            other_seconds.append(seconds)
        seconds, expected_answers = harness.run(task, max_rank, batch_size)
        harness_seconds.append(seconds)
    ratios = [a / b for a, b in zip(our_seconds, harness_seconds, strict=True)]
    result: dict[str, Any] = {
        "harness_batch_size": batch_size,
        "harness_one_rank_s": round(median(harness_seconds), 2),
        "six_ranks_s": round(median(our_seconds), 2),
        "ratio": round(median(ratios), 3),
    }
    if other is not None:
        ratios = [a / b for a, b in zip(our_seconds, other_seconds, strict=True)]
        result["against_six_ranks_s"] = round(median(other_seconds), 2)
        result["against_ratio"] = round(median(ratios), 3)
    expected = {max_rank: expected_answers}
    for rank in RANKS[:-1]:
        _, expected[rank] = harness.run(task, rank, batch_size)
    return {**result, **compare(answers, expected)}


def describe_machine() -> str:
    """Return the device, its threads, and the versions of the libraries."""
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{device}, {torch.backends.cpu.get_cpu_capability()}, one thread"
    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "lm_eval")]
    return ", ".join([device, *libraries])


def main() -> None:
    """Print and write the results of each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=48, help="examples of each task")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each side")
    parser.add_argument("--against", type=Path, help="the sources of another version")
    default_output = Path("benchmarks/results/evaluate_ranks.json")
    parser.add_argument("--output", "-o", type=Path, default=default_output)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.worker:
        output = sys.stdout
        with redirect_stdout(sys.stderr):
            run_worker(options.worker, options.dtype, options.export, output)
        return
    from matryoshka_lora.peft.base_model import bundled_model_path

    base_model = str(bundled_model_path())
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours = MultiRankBackend(base_model, options.dtype, None, folder)
        other = None
        if options.against:
            other = MultiRankBackend(base_model, options.dtype, options.against, None)
        harness = HarnessBackend(base_model, options.dtype, folder)
        for name in options.tasks.split(","):
            task_file = write_task(folder, name, options.items)
            result = measure(task_file, harness, ours, other, options.repeats)
            result = {"task": name, "dtype": options.dtype, "items": options.items, **result}
            print(json.dumps(result), flush=True)
            results.append(result)
        ours.close()
        if other is not None:
            other.close()
    document = {"machine": describe_machine(), "repeats": options.repeats, "results": results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
