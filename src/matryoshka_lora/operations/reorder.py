"""Reorder a LoRA file by singular value decomposition, so that every rank of it can be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_lora.atomic import PathLike, check_output
from matryoshka_lora.errors import MatryoshkaError, check_list, optional_imports
from matryoshka_lora.examples import read_examples
from matryoshka_lora.formats.open import open_lora
from matryoshka_lora.linalg.factors import relative_errors
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.results import ReorderResult
from matryoshka_lora.lora.save import choose_format

if TYPE_CHECKING:
    import torch


def reorder(
    source: Lora | PathLike,
    output: PathLike,
    data: Iterable[object] | PathLike | None = None,
    *,
    max_examples: int = 64,
    base_model: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    model_args: Mapping[str, Any] | None = None,
    pipeline: Any = None,
    prompts: Iterable[str] = (),
    pipeline_args: Mapping[str, Any] | None = None,
    offload: bool = False,
    seed: int = 0,
    force: bool = False,
) -> ReorderResult:
    """Make a LoRA nested: every prefix of its factors becomes the best one of its rank.

    The update of the largest rank stays the same. Without data, the singular value decomposition of
    each layer's update needs neither data nor the base model. With data, it is weighted by what
    changes the outputs on examples; see `NestedAdapter.reorder`. With a pipeline of diffusers, it
    is weighted by what changes the latents in the steps of pictures, which the pipeline draws for
    some prompts. The output keeps the weighted values, so that `export` can choose ranks by them
    without the model.

    Args:
        source: A PEFT folder, a single ``.safetensors`` file, the Hub id of either, or an opened
            LoRA. With data, a PEFT folder or its Hub id.
        output: The folder or file to write, of the same kind as the source. In a folder each layer
            is padded to the largest rank; in a file it keeps its own. With a pipeline, a file,
            which has the keys of diffusers if these split or fuse layers of the source.
        data: Examples of the adapter's own task: a dataset or a list of examples with ``prompt``
            and ``completion``, or with ``messages``; or the path of a file with an example in each
            line, in JSON.
        max_examples: The number of examples to use.
        base_model: A folder or Hub id. Defaults to the model that the adapter's config names. The
            base model is used with data only.
        base_revision: Its revision on the Hub. Defaults to the one that the config names.
        revision: Branch, tag or commit of the source on the Hugging Face Hub.
        dtype: Dtype of the base model, as `load_model` takes it, or of the pipeline. Chosen by the
            hardware by default.
        model_args: More arguments of `load_model`, such as ``{"device_map": "auto"}``.
        pipeline: A pipeline of diffusers: a folder, a Hub id, or one in memory that has no LoRA.
        prompts: Prompts of the LoRA, with its trigger words. The pipeline draws a picture for each.
        pipeline_args: Arguments of the pipeline, such as ``{"num_inference_steps": 20}``.
        offload: Whether the parts of a pipeline on disk are on the accelerator only while they
            compute.
        seed: The seed of the choice of examples, of the noise of pictures, and of random directions
            of the outputs.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: The source, the data, the base model or the pipeline cannot be read or
            used, or the output already exists.
        MissingDependencyError: Data needs PyTorch, or a pipeline diffusers, which is not installed.
        NotFiniteError: A factor or a gradient is NaN or infinite.
    """
    prompts = check_list("prompts", prompts)
    if (pipeline is not None) != bool(prompts) or (data is not None and pipeline is not None):
        raise MatryoshkaError(
            "Pass `pipeline` and at least one prompt for an image model, or `data` for a language "
            "model."
        )
    if data is not None:
        if isinstance(source, Lora):
            raise MatryoshkaError(
                "An opened LoRA is reordered without data. Pass the path of its folder."
            )
        with optional_imports():
            from matryoshka_lora.operations.in_memory import adapter_in_memory

        examples = read_examples(data)
        with adapter_in_memory(
            source,
            output,
            (data,),
            base_model=base_model,
            base_revision=base_revision,
            revision=revision,
            dtype=dtype,
            model_args=model_args,
            force=force,
        ) as (adapter, tokenizer):
            result = adapter.reorder(examples, tokenizer, max_examples=max_examples, seed=seed)
        return replace(result, path=Path(output))
    lora = source if isinstance(source, Lora) else open_lora(source, revision=revision)
    if lora.small is not None:
        warnings.warn(
            f"{lora.name} is reordered without the trained ranks up to {lora.small_rank}.",
            stacklevel=2,
        )
    if pipeline is None:
        ordered = lora.reorder()
    else:
        if lora.container == "peft":
            lora = lora.convert("diffusers")
        choose_format(lora, output)
        check_output(output, force, lora.sources, is_file=True)
        with optional_imports():
            from matryoshka_lora.operations.in_memory import weighted_by_pictures

        ordered = weighted_by_pictures(
            lora,
            pipeline,
            prompts,
            pipeline_args=pipeline_args,
            dtype=dtype,
            offload=offload,
            seed=seed,
        )
    saved = ordered.save(output, ordered.container, force=force)
    ranks = ordered.nested_ranks
    weighted_errors = ordered.weighted_squared_errors()
    return ReorderResult(
        saved.path,
        ranks,
        saved.written.relative_errors(ranks),
        saved.written.singular_values,
        relative_errors(weighted_errors, ranks if weighted_errors else ()),
        ordered.notes,
    )
