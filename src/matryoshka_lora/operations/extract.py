"""Extract a LoRA from a fine-tuned model: the closest LoRA to the change from fine-tuning."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.algebra.allocation import ranks_for_size
from matryoshka_lora.errors import MatryoshkaError, check_choice, check_list
from matryoshka_lora.formats import ImageKeyFormat
from matryoshka_lora.lora_file.atomic import PathLike, check_output, create_file
from matryoshka_lora.lora_file.hub import MODEL_FILES, local_path, split_hub_id
from matryoshka_lora.lora_file.key_formats import convert_keys
from matryoshka_lora.lora_file.key_names import PEFT_PREFIX
from matryoshka_lora.lora_file.key_naming import find_models
from matryoshka_lora.lora_file.lora import NESTING_KEY, Layer, LoraFile, OutputPlan, WrittenOutput
from matryoshka_lora.lora_file.peft_folder import PeftFolder
from matryoshka_lora.lora_file.safetensors_io import (
    StoredTensor,
    create_safetensors,
    open_safetensors,
)
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.nesting import check_rank
from matryoshka_lora.nn.arrays import to_numpy
from matryoshka_lora.operations.factorize import Change, RankLimits, factorize_change
from matryoshka_lora.operations.model_diff import (
    Architecture,
    ModelFiles,
    WeightPair,
    compare_models,
    open_model,
    read_architecture,
    saved_tensors,
)
from matryoshka_lora.units import parse_share, parse_size

# The part of a pipeline that a model is, by a word in its class name in diffusers.
_PIPELINE_PARTS = {"UNet": "unet", "Transformer": "transformer"}

# The upper bound of a layer's rank if only the size of the file is limited.
_MAX_RANK_FOR_SIZE = 128


@dataclass(frozen=True)
class ExtractResult:
    """What `extract` wrote.

    Attributes:
        path: The folder or file.
        ranks: The rank of each layer of the output by its name.
        errors: The relative error by rank: the norm of what it misses of the change of the layers
            over the norm of the change. Only a nested output has more than one rank.
        rounding_share: The share of the change's squared norm that comes from rounding the weights
            to their dtype.
        unsaved_tensors: The size in bytes of each tensor that changed and is not in the output, by
            its key.
    """

    path: Path
    ranks: dict[str, int]
    errors: dict[int, float]
    rounding_share: float
    unsaved_tensors: dict[str, int]


def extract(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    rank: int | None = None,
    *,
    keep: float | str | None = None,
    max_bytes: int | str | None = None,
    modules_to_save: Iterable[str] = (),
    key_format: ImageKeyFormat | None = None,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    force: bool = False,
) -> ExtractResult:
    """Write the closest LoRA to the change from fine-tuning.

    The change D of each linear layer and convolution is factorized by a randomized SVD (Halko,
    Martinsson and Tropp, arXiv 0909.4061), and the error of the factors is measured. With a rank
    alone the output is nested. One layer is in memory at a time. The factors are kept in the folder
    ``.NAME.extracting`` next to the output until that is written: after an error or an
    interruption, the same call continues.

    Args:
        base: The model before: a folder or a safetensors file, or ``owner/name`` on the
            Hugging Face Hub.
        tuned: The model after.
        output: The folder to write; with a key format, the ``.safetensors`` file.
        rank: R. With ``keep`` or ``max_bytes``, an upper bound of each layer's rank.
        keep: Give each layer the smallest rank that keeps this share of the squared norm of D,
            such as ``"90%"``.
        max_bytes: The maximum size of the weights file, such as ``"50MB"``.
        modules_to_save: Name suffixes of modules that are saved as they are, in PEFT's
            ``modules_to_save``.
        key_format: The keys of a file for image models. Defaults to a PEFT folder.
        base_revision: Branch, tag or commit of the base model on the Hub.
        tuned_revision: Branch, tag or commit of the tuned model on the Hub.
        force: Whether to overwrite the output.

    Raises:
        MatryoshkaError: A model cannot be read, they are not versions of one model, no layer
            changed, or the output already exists.
        NotFiniteError: A weight is NaN or infinite.
    """
    modules_to_save = check_list("modules_to_save", modules_to_save)
    limits = _rank_limits(rank, keep, max_bytes)
    size_limit = None if max_bytes is None else parse_size(max_bytes)
    _check_key_format(output, key_format)
    base_model = open_model(local_path(base, MODEL_FILES, base_revision))
    tuned_model = open_model(local_path(tuned, MODEL_FILES, tuned_revision))
    files = [*base_model.files, *tuned_model.files]
    path = check_output(output, force, files, is_file=key_format is not None)

    architecture = read_architecture(base_model)
    diff = compare_models(base_model, tuned_model, architecture, modules_to_save)
    saved = saved_tensors(diff, tuned_model, architecture, modules_to_save)
    part = ""
    if key_format is not None:
        if saved:
            raise MatryoshkaError("A file for image models has no `modules_to_save`. Omit it.")
        part = _pipeline_part(base_model, diff.layers, key_format)

    settings: list[object] = [_file_state(file) for file in files]
    # The names of the layers and whether they are transposed depend on further files and arguments.
    settings += [*limits, [(name, pair.is_transposed) for name, pair in diff.layers.items()]]
    with _resumable_folder(path, settings) as cache:
        layers, changes = _factorize_layers(diff.layers, limits, cache)
        total = sum(change.total for change in changes)
        if total == 0:  # differences of float64 may be too small for float32
            raise MatryoshkaError("No linear layer and no convolution changed.")
        lora: LoraFile
        if key_format is None:
            config = _peft_config(base, base_revision, base_model, architecture, layers, saved)
            other_tensors = {PEFT_PREFIX + key: tensor for key, tensor in saved.items()}
            lora = PeftFolder(str(path), layers, other_tensors, config=config)
        else:
            image_layers = tuple(_image_layer(layer, part) for layer in layers)
            lora = convert_keys(SingleFile(str(path), image_layers, {}), key_format)
        plan = _plan_output(lora, limits, size_limit)
        written = plan.write(path, force)

    measured_ranks = lora.ranks if NESTING_KEY in plan.metadata else (plan.rank,)
    unsaved = {key: tensor for key, tensor in diff.other_tensors.items() if key not in saved}
    return ExtractResult(
        path=path,
        ranks=plan.ranks,
        errors={r: _relative_error(plan, written, changes, r) for r in measured_ranks},
        rounding_share=sum(change.rounding for change in changes) / total,
        unsaved_tensors={key: tensor.nbytes for key, tensor in unsaved.items()},
    )


def _rank_limits(
    rank: int | None, keep: float | str | None, max_bytes: int | str | None
) -> RankLimits:
    if rank is None and keep is None and max_bytes is None:
        raise MatryoshkaError("Pass at least one of `rank`, `keep` or `max_bytes`.")
    share = None if keep is None else parse_share(keep)
    if rank is not None:
        return RankLimits(check_rank(rank), share)
    return RankLimits(_MAX_RANK_FOR_SIZE if share is None else None, share)


def _check_key_format(output: PathLike, key_format: ImageKeyFormat | None) -> None:
    is_file = Path(output).suffix.lower() == ".safetensors"
    if key_format is None and is_file:
        raise MatryoshkaError(
            f"Without `key_format` the output is a folder, got {output}. Pass a path without "
            ".safetensors, or `key_format='diffusers'`."
        )
    if key_format is not None and not is_file:
        raise MatryoshkaError(
            f"With `key_format` the output is a .safetensors file, got {output}. Pass a path such "
            "as lora.safetensors."
        )
    if key_format is not None:
        check_choice("key_format", key_format, get_args(ImageKeyFormat))


def _factorize_layers(
    weights: Mapping[str, WeightPair], limits: RankLimits, cache: Path
) -> tuple[tuple[Layer, ...], list[Change]]:
    """Factorize the changes that are not in the cache, and return all."""
    layers: list[Layer] = []
    changes: list[Change] = []
    num_bytes = sum(weight.new.nbytes for weight in weights.values())
    with tqdm(total=num_bytes, desc="extracting", unit="B", unit_scale=True, disable=None) as bar:
        for index, (name, weight) in enumerate(weights.items(), start=1):
            bar.set_postfix_str(f"layer {index} of {len(weights)}")
            file = cache / f"{index}.safetensors"
            if not file.exists():
                A, B, change = factorize_change(name, weight, limits)
                _write_factors(file, A, B, change)
            layer, change = _read_factors(file, name, weight)
            layers.append(layer)
            changes.append(change)
            bar.update(weight.new.nbytes)
    return tuple(layers), changes


def _write_factors(file: Path, A: Tensor, B: Tensor, change: Change) -> None:
    arrays = {"A": to_numpy(A), "B": to_numpy(B)}
    tensors = {key: StoredTensor.from_array(array) for key, array in arrays.items()}
    metadata = {"change": json.dumps(asdict(change))}
    with (
        create_file(file) as temporary,
        create_safetensors(temporary, tensors, metadata) as writer,
    ):
        for key, array in arrays.items():
            writer.write(key, array)


def _read_factors(file: Path, name: str, weight: WeightPair) -> tuple[Layer, Change]:
    tensors, metadata = open_safetensors(file)
    # They are float32 in the cache, and get the dtype of the weight in the output.
    A = replace(tensors["A"], dtype=weight.new.dtype)
    B = replace(tensors["B"], dtype=weight.new.dtype)
    key = f"{PEFT_PREFIX}{name}"
    rank = A.shape[0]
    layer = Layer(name, f"{key}.lora_A.weight", f"{key}.lora_B.weight", A, B, rank, scale=1.0)
    return layer, Change(**json.loads(metadata["change"]))


def _plan_output(lora: LoraFile, limits: RankLimits, max_bytes: int | None) -> OutputPlan:
    """Return what the output will hold. It is nested if only the rank is limited."""
    ranks = {layer.name: layer.rank for layer in lora.layers}
    if max_bytes is not None:
        spectra = lora.spectra(ranks)
        ranks = ranks_for_size(spectra, lambda ranks: lora.plan(ranks).file_size, max_bytes)
    elif limits.share is None and isinstance(lora, PeftFolder):
        return lora.plan_nested()
    return lora.plan(ranks)


def _relative_error(
    plan: OutputPlan, written: WrittenOutput, changes: Iterable[Change], rank: int
) -> float:
    """Return the relative error of a rank: the residual, and what truncation adds to it."""
    total = squared_error = 0.0
    for change in changes:
        total += change.total
        squared_error += change.residual
    for old, new in plan.layers:
        layer_rank = min(old.rank, new.rank, rank)
        squared_error += float(written.squared_errors[new.name][layer_rank])
    return math.sqrt(squared_error / total)


def _file_state(file: Path) -> list[object]:
    """Return values that change when a file is changed."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


@contextmanager
def _resumable_folder(output: Path, settings: list[object]) -> Iterator[Path]:
    """Yield a folder next to the output, which is deleted at the end unless there is an exception.

    A folder of the same settings is used again; the content of another one is deleted first. Only
    one process at a time uses it.
    """
    folder = output.absolute().with_name(f".{output.name}.extracting")
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / "settings.json"
    names = {file.name for file in folder.iterdir()} - {"lock"}
    if folder.is_symlink() or (names and settings_file.name not in names):
        raise MatryoshkaError(
            f"{folder} is not a folder of an interrupted extraction. Move it, or pass another path."
        )
    with _lock(folder / "lock", output):
        text = json.dumps(settings)
        if settings_file.is_file() and settings_file.read_text(encoding="utf-8") != text:
            for file in folder.glob("*.safetensors"):
                file.unlink()
        settings_file.write_text(text, encoding="utf-8")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)  # Windows keeps the lock while it is held


@contextmanager
def _lock(file: Path, output: Path) -> Iterator[None]:
    """Hold a lock, which the operating system releases if the process is killed."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MatryoshkaError(
            f"Another process is extracting to {output}. Wait for it, or pass another path."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _peft_config(
    base: PathLike,
    base_revision: str | None,
    base_model: ModelFiles,
    architecture: Architecture,
    layers: Sequence[Layer],
    saved: Mapping[str, StoredTensor],
) -> dict[str, Any]:
    """Return PEFT's config without ranks and scales, which the output's plan adds."""
    names = [layer.name for layer in layers]
    saved_modules = sorted({key.rpartition(".")[0] for key in saved})
    is_causal_lm = architecture.is_known and "CausalLM" in str(base_model.config)
    hub_id = split_hub_id(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal_lm else None,
        "base_model_name_or_path": hub_id.repo_id if hub_id else str(base),
        "revision": base_revision if hub_id else None,
        "target_modules": names,
        "modules_to_save": saved_modules or None,
        "fan_in_fan_out": any(architecture.is_conv1d(name) for name in names),
    }


def _pipeline_part(
    base_model: ModelFiles, layer_names: Collection[str], key_format: ImageKeyFormat
) -> str:
    """Return the part of a pipeline that a model is, or "" if its own names say so."""
    if all(name.startswith("model.diffusion_model.") for name in layer_names):
        return ""
    class_name = str(base_model.config.get("_class_name"))
    for word, part in _PIPELINE_PARTS.items():
        if word in class_name:
            names = [f"{part}.{name}" for name in layer_names]
            if part == "transformer" and key_format == "kohya" and not find_models(names):
                raise MatryoshkaError(
                    f"The kohya format has no names for the layers of {base_model.path}. Pass "
                    "`key_format='diffusers'`."
                )
            return part
    raise MatryoshkaError(
        f"{base_model.path} cannot be identified as a part of a pipeline. Pass the folder of a "
        "UNet or a transformer that diffusers has saved, or omit `key_format`."
    )


def _image_layer(layer: Layer, part: str) -> Layer:
    """Return a layer with the key prefix of a part of a pipeline."""
    name = f"{part}.{layer.name}" if part else layer.name.removeprefix("model.")
    return replace(layer, name=name, key_A=f"{name}.lora_A.weight", key_B=f"{name}.lora_B.weight")
