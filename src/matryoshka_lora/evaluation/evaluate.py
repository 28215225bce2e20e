"""`evaluate`: an adapter at several ranks, and the base model without it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.results import Evaluation, draw, examples, summary
from matryoshka_lora.files.output import check_place, new_folder
from matryoshka_lora.files.peft import open_adapter, plan_rank
from matryoshka_lora.files.rows import read_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from matryoshka_lora.adapter import NestedAdapter


def evaluate(
    adapter: NestedAdapter | str | os.PathLike[str],
    tasks: str | Sequence[str] | None = None,
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    ranks: Sequence[int] | Literal["all"] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measure an adapter at several ranks, and the base model without it.

    lm-evaluation-harness asks and judges; all ranks answer in the same batches. An adapter on the
    disk gets a folder with ``evaluation.json``, ``examples.jsonl`` and ``curve.png``.

    Args:
        adapter: A folder, or an adapter in memory, which is measured as it is.
        tasks: Tasks or groups of lm-evaluation-harness, or YAML files of tasks.
        data: Instead of tasks: a ``.jsonl`` file or rows with ``prompt`` and ``completion``, texts
            or chat messages, or with ``messages``. The answer must equal the completion.
        ranks: Increasing; None means the nested ones, and ``"all"`` each from 1 to R.
        out: The folder to write. None is ``ADAPTER-evaluation`` beside an adapter on the disk, and
            none for an adapter in memory.
        tokenizer: The base model's; None loads the adapter's own, or else the base model's.
        model: The base model; None is what the adapter names.
        revision: The base model's, on the hub.
        dtype: The base model's, as `load_model` takes it; None chooses by the hardware.
        num_fewshot: Shots of the tasks; None is the task's own number.
        limit: The most questions of a task.
        batch_size: The most tokens of a batch whose keys and values are held; None is 32,768.
        force: Whether to replace an existing folder and all its content.
        progress: Whether progress bars are shown on stderr.

    Raises:
        MatryoshkaError: Adapter, base model, tasks or data do not fit, or the folder is taken.
    """
    if (not tasks) == (data is None):
        raise MatryoshkaError("give either tasks, such as arc_easy, or data, such as my.jsonl")
    loaded = None if isinstance(adapter, (str, os.PathLike)) else adapter
    file = loaded.opened() if loaded else open_adapter(str(adapter))
    every = loaded.ranks if loaded else file.available
    chosen = file.several(every if ranks == "all" else ranks)
    out = out or (None if loaded else folder_for(file.name))
    if out:
        check_place(out, force, [*file.files, data])
    if loaded is None or tokenizer is None:
        model, revision = file.base_model(model, revision)
    rows = read_rows(data) if data is not None else []
    # The arguments are checked. These imports take seconds.
    from matryoshka_lora.evaluation.many_ranks import ManyRanks
    from matryoshka_lora.evaluation.tasks import judge, load_data, load_task
    from matryoshka_lora.models import load_model, tokenizer_beside
    from matryoshka_lora.nested import load

    asked_ranks = ((0,) if _has_base(file.config) else ()) + chosen
    tokenizer = tokenizer or tokenizer_beside(file, model, revision)
    names = dict.fromkeys(tasks.split(",") if isinstance(tasks, str) else tasks or ())
    title = Path(data).stem if isinstance(data, (str, os.PathLike)) else "data"
    asked = [load_task(x.strip()) for x in names] or [load_data(title, rows, tokenizer)]
    about: dict[str, Any] = {"adapter": "" if loaded else file.name, "model": model}
    about |= {"revision": revision, "limit": limit}
    result = Evaluation(about, chosen, {rank: plan_rank(file, rank).size for rank in chosen})
    loaded = loaded or load(load_model(model, dtype, revision), file.name)
    result.about["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    training = loaded.model.training
    try:
        lm = ManyRanks(loaded, tokenizer, asked_ranks, batch_size, progress)
        if any(not isinstance(row.get("prompt"), str) for row in rows):
            lm.add_bos_token = False  # the chat template writes it, where training had one
        for name, task in asked:
            judged = {}
            for lm.lora_rank in asked_ranks:
                judged[lm.lora_rank] = judge(lm, task, num_fewshot, limit)
            _put(result, name, list(task["tasks"]), judged)
    finally:
        loaded.model.train(training)
    if out:
        _write(result, out, force)
    return result


def folder_for(adapter: str | os.PathLike[str]) -> Path:
    """Return where an evaluation goes: beside an adapter on the disk, or here if the hub has it."""
    place = Path(adapter)
    place = place if place.name else place.resolve()  # "." has no name
    return Path(f"{place if place.exists() else place.name}-evaluation")


def _has_base(config: Mapping[str, Any]) -> bool:
    """Return whether rank 0 is the base model."""
    whole = any(config.get(key) for key in ("modules_to_save", "trainable_token_indices"))
    return not whole and config.get("bias", "none") == "none"


def _put(result: Evaluation, name: str, tasks: list[str], judged: dict[int, Any]) -> None:
    """Put the harness' numbers at each rank into an evaluation: a group's as one task's."""
    is_one = len(tasks) == 1
    if is_one or name in next(iter(judged.values())).get("groups", {}):
        result.tasks[name] = summary(tasks[0] if is_one else name, judged)
    else:
        result.tasks |= {task: summary(task, judged) for task in tasks}
    for task in tasks:
        samples = {rank: found["samples"][task] for rank, found in judged.items()}
        result.examples += examples(name if name in result.tasks else task, samples)


def _write(result: Evaluation, out: str | os.PathLike[str], force: bool) -> None:
    with new_folder(out, force) as folder:
        result.write(folder)
        draw(result, folder / "curve.png")
