"""Factorize the changes of weights by a randomized SVD, and measure the errors of the factors.

The factors are kept in a folder until all are there, so that an interrupted extraction continues.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora.atomic import replace_file
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError, wrap_errors
from matryoshka_lora.extraction.model_diff import Float8Tensor, WeightPair
from matryoshka_lora.formats.safetensors_io import open_safetensors
from matryoshka_lora.linalg.allocation import LayerSpectrum, ranks_for_error
from matryoshka_lora.lora.keys import DIFFUSERS_SUFFIXES, PEFT_PREFIX
from matryoshka_lora.lora.layer import Layer, LayerKeys, StoredTensor
from matryoshka_lora.progress import progress_bar
from matryoshka_lora.tensors import to_torch, to_torch_dtype

# The rank that is tried first if a share is to be kept, or the error is limited.
_FIRST_RANK = 64
# Arguments of torch.svd_lowrank: columns beyond the rank, and power iterations.
_OVERSAMPLING = 32
_NUM_ITERATIONS = 4


@dataclass(frozen=True)
class Change:
    """The norms of the change D of one weight, and the singular values of its factors.

    Attributes:
        total: The squared Frobenius norm of D.
        residual: The squared norm of ``D - B A``, with the factors as they are written.
        rounding: The expected part of ``total`` that comes from rounding to half precision or
            float8.
        singular_values: The singular values of ``B A``, decreasing.
    """

    total: float
    residual: float
    rounding: float
    singular_values: tuple[float, ...]


def factorize_change(
    name: str, weight: WeightPair, max_rank: int, share: float | None = None
) -> tuple[Tensor, Tensor, Change]:
    """Factorize the change D of one weight.

    With a share, the rank is the smallest one that keeps this share of the squared norm of D, if it
    does not exceed ``max_rank``.

    Returns:
        A and B in the shapes that PEFT saves, float32, and the norms of the change.

    Raises:
        NotFiniteError: D is NaN or infinite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = to_torch(weight.new.read()).to(device)
    old = to_torch(weight.old.read()).to(device)
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    D = (new.to(dtype) - old.to(dtype)).float()
    if not D.isfinite().all():
        raise NotFiniteError(f"The weights of {name} are NaN or infinite. Copy the models again.")
    matrix = D.T if weight.is_transposed else D.flatten(1)
    total = float(matrix.double().norm() ** 2)

    max_rank = min(max_rank, weight.full_rank)
    rank = max_rank if share is None else min(_FIRST_RANK, max_rank)
    while True:
        U, S, V = _largest_singular_values(matrix, rank)
        if share is None:
            break
        missing = total - S.double().square().cumsum(0)
        needed_rank = int((missing > (1 - share) * total).sum()) + 1
        if needed_rank <= rank or rank == max_rank:
            rank = min(needed_rank, rank)
            break
        rank = min(2 * rank, max_rank)
    U, S, V = U[:, :rank], S[:rank], V[:, :rank]

    root = S.sqrt()
    A, B = root[:, None] * V.T, U * root
    written_dtype = to_torch_dtype(weight.new.dtype)
    product = B.to(written_dtype).float() @ A.to(written_dtype).float()
    residual = float((matrix - product).double().norm() ** 2)
    if not weight.is_transposed:
        A = A.reshape(rank, *D.shape[1:])
        B = B.reshape(len(D), rank, *[1] * (D.ndim - 2))
    rounding = _expected_rounding(weight.new, new)
    if isinstance(weight.old, Float8Tensor) and not isinstance(weight.new, Float8Tensor):
        rounding = _expected_rounding(weight.old, old)  # much larger
    return A, B, Change(total, residual, rounding, tuple(S.tolist()))


def _largest_singular_values(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of a truncated SVD, of at least the rank."""
    width = rank + _OVERSAMPLING
    if 2 * width > min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U, S, Vh.mH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, width, _NUM_ITERATIONS)
    return U, S, V


def _expected_rounding(stored: StoredTensor, weight: Tensor) -> float:
    """Return the expected squared norm of the rounding error of a weight of at most 16 bits."""
    dtype, scale = weight.dtype, 1.0
    if isinstance(stored, Float8Tensor):
        dtype, scale = to_torch_dtype(stored.float8), stored.scale
    elif dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    limits = torch.finfo(dtype)
    # The numbers in [2^(e-1), 2^e) are multiples of eps 2^(e-1). The error of rounding to multiples
    # of h is uniformly distributed, with variance h^2 / 12.
    weight = weight[weight != 0].float() / scale  # 0 is not rounded
    exponents = weight.frexp().exponent - 1
    # Subnormal numbers, which float8 weights often are, have the step of the smallest normal one.
    steps = limits.eps * torch.exp2(exponents.double()).clamp(min=limits.smallest_normal)
    return float(steps.square().sum()) * scale**2 / 12


def factorize_layers(
    weights: Mapping[str, WeightPair],
    folder: Path,
    max_rank: int | None = None,
    *,
    share: float | None = None,
    max_error: float | None = None,
) -> tuple[tuple[Layer, ...], tuple[Change, ...]]:
    """Factorize the changes of all layers that are not in a folder yet.

    With a maximum error, the factors have at least the ranks that `ranks_for_error` needs: a layer
    that may need further components is factorized again, at twice the rank.

    Returns:
        The layers, with the keys of a PEFT folder, and the `Change` of each layer.
    """
    max_ranks = {
        name: min(max_rank or weight.full_rank, weight.full_rank)
        for name, weight in weights.items()
    }
    files = {name: folder / f"{index}.safetensors" for index, name in enumerate(weights, start=1)}
    layers: dict[str, Layer] = {}
    changes: dict[str, Change] = {}
    ranks = max_ranks
    if max_error is not None:
        ranks = {name: min(_FIRST_RANK, rank) for name, rank in max_ranks.items()}
    while ranks:
        for name, rank in progress_bar([*ranks.items()], "extracting"):
            layers[name], changes[name] = _read_or_factorize(
                files[name], name, weights[name], rank, share
            )
        if max_error is None:
            break

        # The singular values that are not known are as large as they may be: none is larger than
        # the last known one, and their squares add up to the residual.
        spectra: dict[str, LayerSpectrum] = {}
        for name, layer in layers.items():
            values, residual = list(changes[name].singular_values), changes[name].residual
            while len(values) < max_ranks[name] and residual > 0 and values[-1] > 0:
                values.append(min(values[-1], math.sqrt(residual)))
                residual -= values[-1] ** 2
            spectra[name] = LayerSpectrum(np.array(values), layer.parameters_per_rank, len(values))
        total = sum(change.total for change in changes.values())
        residual = total - sum(sum(spectrum.squares) for spectrum in spectra.values())
        needed_ranks = ranks_for_error(spectra, max_error, total, max(residual, 0.0))
        ranks = {
            name: min(2 * layer.rank, max_ranks[name])
            for name, layer in layers.items()
            if needed_ranks[name] > layer.rank
        }
    return tuple(layers.values()), tuple(changes.values())


def _read_or_factorize(
    file: Path, name: str, weight: WeightPair, rank: int, share: float | None
) -> tuple[Layer, Change]:
    """Return the factors of a change, which are in a file afterwards."""
    rank_in_file = open_safetensors(file)[0]["A"].shape[0] if file.exists() else 0
    # A file with a share has the final rank.
    if rank_in_file < (rank if share is None else 1):
        A, B, change = factorize_change(name, weight, rank, share)
        tensors = {"A": A.cpu().contiguous(), "B": B.cpu().contiguous()}
        with replace_file(file) as temporary:
            save_file(tensors, temporary, {"change": json.dumps(asdict(change))})
    stored, metadata = open_safetensors(file)
    keys = LayerKeys(*(f"{PEFT_PREFIX}{name}{suffix}" for suffix in DIFFUSERS_SUFFIXES))
    layer = Layer.from_tensors(name, stored["A"], stored["B"], 1.0, keys, source=str(file))
    # The factors are float32 in the file, and get the dtype of the weight in the output.
    layer = replace(layer, dtype=weight.new.dtype, has_new_factors=True)
    return layer, Change(**json.loads(metadata["change"]))


@contextmanager
def resumable_folder(
    output: Path, sources: Sequence[Path], settings: Sequence[object]
) -> Iterator[Path]:
    """Yield a folder next to the output, which is deleted at the end unless there is an exception.

    A folder of the same sources and settings is used again; the content of another one is deleted
    first. Only one process at a time uses it. A changed or replaced file is another source, and the
    settings are everything else that the factors depend on.
    """
    folder = output.absolute().with_name(f".{output.name}.extracting")
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / "settings.json"
    names = {file.name for file in folder.iterdir()} - {"lock"}
    if folder.is_symlink() or (names and settings_file.name not in names):
        raise MatryoshkaError(
            f"{folder} is not a folder of an interrupted extraction. Move it, or pass another path."
        )
    states: list[object] = []
    for source in sources:
        stat = source.stat()
        # `cp -p` keeps the modification time, but not the inode or the time of the change.
        times = stat.st_mtime_ns, stat.st_ctime_ns
        states.append([str(source.resolve()), stat.st_size, stat.st_ino, *times])
    text = json.dumps([states, *settings])
    in_use = f"Another process is extracting to {output}"
    with wrap_errors(in_use, "Wait for it, or pass another path.", Timeout):
        # The operating system releases the lock if the process is killed.
        lock = FileLock(folder / "lock").acquire(timeout=0)
    with lock:
        if settings_file.is_file() and settings_file.read_text(encoding="utf-8") != text:
            for file in folder.glob("*.safetensors"):
                file.unlink()
        settings_file.write_text(text, encoding="utf-8")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)  # Windows keeps the lock while it is held
