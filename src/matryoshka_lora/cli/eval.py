"""``matryoshka eval``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peft import LoraConfig

    from matryoshka_lora.adapter import NestedAdapter
    from matryoshka_lora.evaluate.questions import Judge, Question


class Split(str, Enum):
    """The splits that were not trained on."""

    test = "test"
    validation = "validation"


class Dtype(str, Enum):
    """The names of `matryoshka_lora.models.DTYPES`, which is slow to import."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="A folder that training has written.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="A built-in task.", show_default=False)] = None,
    data: Annotated[
        str | None, typer.Option(help="Instead of a task: a file, or the id of a hub dataset.", show_default=False)
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Such as 1,2,4, or all that may be chosen.", show_default="the nested ranks")
    ] = None,
    split: Annotated[Split, typer.Option(help="Of the task or dataset.")] = Split.test,
    items: Annotated[int, typer.Option(min=1, help="How many questions at most.")] = 200,
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="what the adapter was trained on")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write.", show_default="ADAPTER/evaluation")
    ] = None,
) -> None:
    """Measure loss and accuracy at every rank, and of the base model without the adapter.

    Prints tables, and writes evaluation.json and curve.png. Answers are judged by the task's own verifier, those to a
    file's questions by being equal to its completion.

    Example: matryoshka eval runs/demo/adapter --task family_relationships --ranks 1,4,32
    """
    if (task is None) == (data is None):
        raise typer.BadParameter(
            "give either --task, for example family_relationships, or --data, for example my.jsonl"
        )
    wanted = None if ranks is None or ranks == "all" else _parse_ranks(ranks)
    folder = out or adapter / "evaluation"

    import torch

    from matryoshka_lora.adapter import load, read_adapter
    from matryoshka_lora.evaluate import Evaluation, evaluate_base, evaluate_ranks, print_tables, write_evaluation
    from matryoshka_lora.files import check_writable
    from matryoshka_lora.models import DTYPES, load_model, load_tokenizer

    # All that can be wrong is found before the slow part begins.
    state, config, _ = read_adapter(adapter)
    chosen = wanted or (state.ranks if ranks == "all" else state.nesting.ranks)
    for rank in chosen:
        state.check_rank(rank)
    check_writable(folder)
    judge, questions = _questions(task, data, split.value, items)
    name = base_name(model, config, adapter)

    base = load_model(name, DTYPES[dtype.value])
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    nested, tokenizer = load(base, adapter), load_tokenizer(name)
    typer.echo(f"Evaluating {adapter} at {len(chosen)} ranks on {len(questions)} questions of {judge.name}")
    scores = evaluate_base(nested, tokenizer, judge, questions)
    evaluation = Evaluation(judge.name, split.value, name, str(base.dtype).removeprefix("torch."), scores)
    label = _label(nested)
    evaluation.curves[label] = evaluate_ranks(nested, tokenizer, judge, questions, chosen, name=label)
    write_evaluation(evaluation, folder)
    print_tables(evaluation)
    typer.echo(f"Written to {folder}: evaluation.json and curve.png")
    accuracies = evaluation.curves[label].accuracy
    # Two points are within the error of a few hundred questions.
    rank = next(rank for rank, found in zip(chosen, accuracies, strict=True) if found >= max(accuracies) - 0.02)
    typer.echo(
        f"Next, as rank {rank} is the smallest within 2 points of the best: "
        f"matryoshka export {adapter} --rank {rank} -o {adapter.name}-rank-{rank}"
    )


def _parse_ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--ranks is {text!r}; write numbers such as 1,2,4, or all") from error
    if list(ranks) != sorted(set(ranks)):
        raise typer.BadParameter(f"--ranks must increase; write {','.join(map(str, sorted(set(ranks))))}")
    return ranks


def _questions(task: str | None, data: str | None, split: str, items: int) -> tuple[Judge, Sequence[Question]]:
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.evaluate import ExactMatch, rows_from
    from matryoshka_lora.tasks import get_task
    from matryoshka_lora.train.data import load_data, parse_data

    if task is not None:
        built_in = get_task(task)
        return built_in, built_in.examples("test" if split == "test" else "validation", items)
    parsed = parse_data(data or "", split=split)
    if "task" in parsed:
        raise MatryoshkaError(f"{data} is a built-in task; write --task {data}")
    return ExactMatch(str(data)), rows_from(load_data({**parsed, "size": items}), str(data))


def base_name(given: str | None, config: LoraConfig, adapter: Path) -> str:
    """The base model that was asked for, or that the adapter names."""
    from matryoshka_lora.errors import MatryoshkaError

    name = given or config.base_model_name_or_path
    if not name:
        raise MatryoshkaError(f"{adapter} does not say which base model it belongs to; give it with --model")
    return str(name)


def _label(adapter: NestedAdapter) -> str:
    return f"{adapter.rule.name}-{'reordered' if adapter.reordered else adapter.inference}"
