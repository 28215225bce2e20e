"""Turn a fine-tuned model into a LoRA: `extract` factorises what changed, layer by layer."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from matryoshka_lora.budget import (
    by_size,
    error_lines,
    read_bytes,
    read_share,
    show_bytes,
    singular_values,
)
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.files.hub import MODEL, hub_parts, local
from matryoshka_lora.files.layers import AdapterFile, Layer
from matryoshka_lora.files.output import PathLike, check_place, new_file
from matryoshka_lora.files.peft import write_nested, write_rank
from matryoshka_lora.files.single import Style, in_style
from matryoshka_lora.files.tensors import Stored, open_tensors, read_json

OVERSAMPLING, ITERATIONS = 32, 4  # of torch.svd_lowrank
AT_MOST, FIRST = 128, 64  # the rank where the size of the file decides, and where a share does
_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PARTS = {"UNet": "unet", "Transformer": "transformer"}  # in the class names of diffusers
# Names of embeddings and heads, where transformers does not know the model.
_EMBEDDINGS = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|\bshared\b")


class Weight(NamedTuple):
    """A weight before and after; GPT-2's layers have theirs transposed."""

    old: Stored
    new: Stored
    transposed: bool


class Change(NamedTuple):
    """What one weight changed by, D, and what its factors keep. Squares are of Frobenius norms."""

    values: list[float]  # the singular values that are kept
    square: float  # that of D
    left: float  # that of D - B A, measured with the factors as they are written
    noise: float  # the part of the square that rounding to half precision is expected to be

    def lost(self, rank: int) -> float:
        """Return the square of what a rank leaves out."""
        return self.left + sum(value**2 for value in self.values[rank:])


@dataclass(frozen=True)
class Extracted:
    """Report what `extract` wrote.

    Attributes:
        ranks: The rank of each layer, by its name.
        errors: The norm of what a rank leaves out of the layers' change over that of the change.
        noise: The share of the change's square that is rounding of the weights.
        others: The bytes of each tensor that changed and is not in the adapter, by its key.
    """

    path: Path
    ranks: Mapping[str, int]
    errors: Mapping[int, float]
    noise: float
    others: Mapping[str, int]

    def lines(self) -> list[str]:
        """Return what to tell a user."""
        found = [f"{self.path}: {len(self.ranks)} layers", "", *error_lines(self.errors, "change")]
        if self.noise > 0.001:
            found.append(f"{100 * self.noise:.1f} % of its square is rounding of the weights")
        if self.others:
            size, names = sum(self.others.values()), [key.rpartition(".")[0] for key in self.others]
            text = f"Changed too, and not in it: {len(names)} tensors, {show_bytes(size)}"
            found.append(f"{text}, such as {', '.join(names[:3])}")
            found += [f"--whole {names[0]} keeps one as it is"] * self.path.is_dir()
        return found


def extract(
    base: PathLike,
    tuned: PathLike,
    target: PathLike,
    rank: int | None = None,
    *,
    keep: float | str | None = None,
    max_bytes: int | str | None = None,
    whole: Sequence[str] = (),
    style: Style | None = None,
    force: bool = False,
) -> Extracted:
    """Write the LoRA that is closest to what a fine-tuning changed.

    For each linear layer and convolution, the change D is factorised by a randomised SVD (Halko,
    Martinsson and Tropp, arXiv 0909.4061), and what the factors leave out is measured. With a rank
    alone the output is nested. One layer is in memory at a time. A run that was killed goes on.

    Args:
        base: The model before: a folder or a file of safetensors, or ``owner/name`` on the hub.
        tuned: The model after.
        target: The folder to write, or with a style, the ``.safetensors`` file.
        rank: R, or beside ``keep`` and ``max_bytes`` the most that a layer gets.
        keep: In each layer the smallest rank that keeps this share of the square of D.
        max_bytes: The maximum size of the file.
        whole: Names of modules that are kept as they are, in PEFT's ``modules_to_save``.
        style: The keys of a file for image models: ``"diffusers"`` or ``"kohya"``.
        force: Whether what is at the target is replaced.

    Raises:
        MatryoshkaError: A model cannot be read, the two are no versions of one model, nothing
            changed, or the target is taken.
        NotFiniteError: A weight holds NaN or infinity.
    """
    if (rank, keep, max_bytes) == (None, None, None):
        raise MatryoshkaError("say how much to keep: --rank 32, --keep 90% or --max-bytes 50MB")
    share = None if keep is None else read_share(keep)
    limit = None if max_bytes is None else read_bytes(max_bytes)
    if (style is not None) != (Path(target).suffix.lower() == ".safetensors"):
        raise MatryoshkaError("a style makes a .safetensors file, and no style a folder")
    named = hub_parts(base) or (str(base), None, None)
    base, tuned = local(base, MODEL), local(tuned, MODEL)
    (base_files, old), (tuned_files, new) = _open(base), _open(tuned)
    sources = [*base_files, *tuned_files]
    place = check_place(target, force, sources)
    given = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    modules, tied = _modules(base, given)
    weights, others = _changed(old, new, modules, tuple(whole))
    kept = _kept(whole, others, new, modules, tied)
    part = _part_of(base, given, weights, style) if style else ""
    if kept and style:
        raise MatryoshkaError("a file for image models holds no whole modules: leave --whole out")
    most = rank or (AT_MOST if share is None else None)
    with _cache(place, [*map(_state, sources), most, share, *whole]) as cache:
        layers, changes = _factorise_all(weights, most, share, cache)
        config = _config(given, modules, layers, kept)
        config |= {"base_model_name_or_path": named[0], "revision": named[1]}
        stored = {f"base_model.model.{key}": each for key, each in kept.items()}
        adapter = AdapterFile(str(place), tuple(layers), stored, config)
        if style is not None:
            adapter = in_style(_with_part(adapter, part), style)
        ranks = {layer.name: layer.rank for layer in adapter.layers}
        if limit is not None:
            ranks = by_size(adapter, singular_values(adapter), ranks, limit)
        if share is None and limit is None and style is None:
            write_nested(adapter, place, force)
            several = adapter.ranks
        else:
            write_rank(adapter, place, ranks, force)
            several = (max(ranks.values()),)
    square = sum(change.square for change in changes.values())
    noise = sum(change.noise for change in changes.values())
    rank_of = {layer.A: ranks[layer.name] for layer in adapter.layers}  # a style renames
    pairs = [(changes[layer.name], rank_of[layer.A]) for layer in layers]
    lost = {top: sum(x.lost(min(rank, top)) for x, rank in pairs) for top in several}
    errors = {top: math.sqrt(left / square) for top, left in lost.items()}
    left = {key: each.size for key, each in others.items() if key not in kept}
    return Extracted(place, ranks, errors, noise / square, left)


def _open(path: Path) -> tuple[list[Path], dict[str, Stored]]:
    """Return a model's files and its tensors by key."""
    files = [path]
    if path.is_dir():
        whole = [path / name for name in _NAMES if (path / name).is_file()]
        index = [] if whole else sorted(path.glob("*.safetensors.index.json"))
        shards = [x for file in index for x in (read_json(file).get("weight_map") or {}).values()]
        files = whole[:1] or sorted({path / Path(str(name)).name for name in shards})
        if not files:
            raise MatryoshkaError(f"{path} holds no {' or '.join(_NAMES)}: name a file in it")
    stored = dict[str, Stored]()
    for file in files:
        stored |= open_tensors(file)[0]
    return files, stored


def _modules(base: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return modules by name, None for the head, and tied weights: the key of one by another's."""
    if "model_type" not in config:
        return {}, {}
    import transformers

    kind = getattr(transformers, str((config.get("architectures") or [None])[0]), None)
    if kind is None:
        return {}, {}
    with torch.device("meta"):
        model = kind(transformers.AutoConfig.from_pretrained(base))
    head = model.get_output_embeddings()
    found = {name: None if x is head else x for name, x in model.named_modules()}
    return found, model.all_tied_weights_keys


def _kept(
    whole: Sequence[str],
    others: Iterable[str],
    new: Mapping[str, Stored],
    modules: Mapping[str, Any],
    tied: Mapping[str, str],
) -> dict[str, Stored]:
    """Return the changed tensors of the modules that are kept whole, with those tied to them."""
    owners = {x for key in others if (x := key.rpartition(".")[0]).endswith(tuple(whole))}
    owners &= modules.keys() or owners  # PEFT has the names of the class
    kept = {key: x for key, x in new.items() if key.rpartition(".")[0] in owners}
    for own, key in (pair for x in tied.items() for pair in (x, x[::-1])):  # PEFT would untie them
        kept |= {own: new.get(own, kept[key])} if key in kept else {}
    if nothing := [name for name in whole if not any(name in key for key in kept)]:
        raise MatryoshkaError(f"{nothing[0]!r:.80} is no module of the model that changed")
    return kept


def _is_layer(module: str, weight: Stored, modules: Mapping[str, Any]) -> bool:
    """Return whether LoRA can stand for a change of this weight."""
    shape = weight.shape
    if not weight.is_factor or len(shape) not in (2, 3, 4) or 1 in shape[:2]:
        return False
    if not modules:
        return len(shape) != 3 and not _EMBEDDINGS.search(module)
    own = modules.get(module)
    is_kernel = isinstance(own, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and own.groups == 1
    return isinstance(own, nn.Linear) or is_kernel or type(own).__name__ == "Conv1D"


def _changed(
    old: Mapping[str, Stored],
    new: Mapping[str, Stored],
    modules: Mapping[str, Any],
    whole: tuple[str, ...],
) -> tuple[dict[str, Weight], dict[str, Stored]]:
    """Return the layers that changed, and all else that did, by key."""
    layers, others = dict[str, Weight](), dict[str, Stored]()
    if not old.keys() & new.keys():
        raise MatryoshkaError(
            f"the two models have no weight in common, such as {min(old, default='')[:80]!r} and "
            f"{min(new, default='')[:80]!r}: is one the fine-tune of the other?"
        )
    for key in tqdm(sorted({*old, *new}), "comparing", leave=False, disable=None, delay=1):
        before, after, module = old.get(key), new.get(key), key.removesuffix(".weight")
        one = next((x for x in (after, before) if x and x.is_factor), None)
        may_be = module != key and not module.endswith(whole)
        is_layer = bool(one and may_be and _is_layer(module, one, modules))
        kinds = [(x.shape, x.is_factor) if x else None for x in (before, after)]
        if not (before and after and kinds[0] == kinds[1]):
            if is_layer:
                two = [f"{x.dtype} {[*x.shape]}" if x else "none" for x in (before, after)]
                raise MatryoshkaError(
                    f"{key} is {' and '.join(two)}: they are no versions of one, or quantised"
                )
            others |= {key: after} if after else {}
        elif not _same(before.read(), after.read()):
            if is_layer:
                transposed = type(modules.get(module)).__name__ == "Conv1D"
                layers[module] = Weight(before, after, transposed)
            else:
                others[key] = after
    if not layers:
        also = f"; {min(others)} did, which is neither in the model's own class" if others else ""
        raise MatryoshkaError(f"no linear layer and no convolution changed{also}")
    return layers, others


def _same(old: Tensor, new: Tensor) -> bool:
    """Return whether two weights are one, or one rounded to the other's dtype."""
    if not (old.is_floating_point() and new.is_floating_point()):
        return torch.equal(old, new)
    return torch.equal(old.to(new.dtype), new) or torch.equal(old, new.to(old.dtype))


def _factorise_all(
    weights: Mapping[str, Weight], most: int | None, share: float | None, cache: Path
) -> tuple[list[Layer], dict[str, Change]]:
    """Factorise the layers that the cache lacks, and return all."""
    layers, changes = list[Layer](), dict[str, Change]()
    total = sum(weight.new.size for weight in weights.values())
    with tqdm(total=total, desc="extracting", unit="B", unit_scale=True, disable=None) as bar:
        for number, (name, weight) in enumerate(weights.items(), start=1):
            bar.set_postfix_str(f"layer {number} of {len(weights)}")
            file = cache / f"{number}.safetensors"
            if not file.exists():
                factors, change = _factorise(name, weight, most, share)
                with new_file(file) as fresh:
                    fresh.write_bytes(save(factors, {"change": json.dumps(change)}))
            stored, note = open_tensors(file)
            changes[name] = Change(*json.loads(note["change"]))
            # They are float32 here, and the output has the model's dtype.
            A, B = (stored[each]._replace(dtype=weight.new.dtype) for each in "AB")
            key_A, key_B = (f"base_model.model.{name}.lora_{each}.weight" for each in "AB")
            layers.append(Layer(name, key_A, key_B, A, B, A.shape[0], 1.0))
            bar.update(weight.new.size)
    return layers, changes


def _factorise(
    name: str, weight: Weight, most: int | None, share: float | None
) -> tuple[dict[str, Tensor], Change]:
    """Return the factors of one layer's change, shaped as PEFT's, and what they leave out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = weight.new.read().to(device)
    D = new.float() - weight.old.read().to(device).float()
    if not D.isfinite().all():
        raise NotFiniteError(f"the weights of {name} hold NaN or infinity: copy the models again")
    noise = 0.0
    if new.dtype in (torch.bfloat16, torch.float16):
        # A number in [2^(e-1), 2^e) is a multiple of eps 2^(e-1), so it is off by 1/sqrt(12) of it.
        step = torch.ldexp(torch.ones_like(D), new.float().frexp().exponent - 1)
        noise = float((step.double() ** 2).sum()) * torch.finfo(new.dtype).eps ** 2 / 12
    matrix = D.T if weight.transposed else D.flatten(1)
    square, smaller = float(matrix.double().norm() ** 2), min(matrix.shape)
    rank = min(most or FIRST, smaller)
    while True:
        U, S, V = _svd(matrix, rank)
        missing = square - (S.double() ** 2).cumsum(0)
        if share is not None:
            enough = int((missing > (1 - share) * square).sum()) + 1
            if enough > rank and most is None and rank < smaller:
                rank = min(2 * rank, smaller)
                continue
            rank = min(rank, enough)
        break
    half = S[:rank].sqrt()
    A, B = half[:, None] * V[:, :rank].T, U[:, :rank] * half
    rounded = B.to(new.dtype).float() @ A.to(new.dtype).float()
    left = float((matrix - rounded).double().norm() ** 2)
    change = Change(S[:rank].double().tolist(), square, left, noise)
    if not weight.transposed:
        A = A.reshape(rank, *D.shape[1:])
        B = B.reshape(len(D), rank, *[1] * (D.ndim - 2))
    return {"A": A.cpu().contiguous(), "B": B.cpu().contiguous()}, change


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of the largest singular values, at least as many as the rank."""
    width = rank + OVERSAMPLING
    if 2 * width > min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U, S, Vh.mH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: tuple[Tensor, Tensor, Tensor] = torch.svd_lowrank(matrix, width, ITERATIONS)
    return found


def _state(file: Path) -> list[object]:
    """Return what changes when a file does."""
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]


@contextmanager
def _cache(place: Path, settings: list[object]) -> Iterator[Path]:
    """Give the folder beside the target where layers wait; only a kill or Ctrl-C leaves it."""
    cache = place.absolute().with_name(f".{place.name}.extracting")
    note, text = cache / "settings.json", json.dumps(settings)
    if note.is_file() and note.read_text(encoding="utf-8") != text:
        shutil.rmtree(cache)
    cache.mkdir(parents=True, exist_ok=True)
    note.write_text(text, encoding="utf-8")
    try:
        yield cache
    except MatryoshkaError:
        shutil.rmtree(cache)
        raise
    shutil.rmtree(cache)


def _config(
    given: Mapping[str, Any],
    modules: Mapping[str, Any],
    layers: Sequence[Layer],
    kept: Mapping[str, Stored],
) -> dict[str, Any]:
    """Return PEFT's config."""
    whole = sorted({key.rpartition(".")[0] for key in kept})
    names = [layer.name for layer in layers]
    found = dict[str, Any](peft_type="LORA", target_modules=names, modules_to_save=whole or None)
    found["fan_in_fan_out"] = any(type(modules.get(name)).__name__ == "Conv1D" for name in names)
    is_causal = bool(modules) and "CausalLM" in str(given)
    return found | {"task_type": "CAUSAL_LM" if is_causal else None}


def _part_of(base: Path, config: Mapping[str, Any], names: Iterable[str], style: Style) -> str:
    """Return the part of a pipeline that a model is, or "" if its own names say so."""
    kind = str(config.get("_class_name"))
    if all(name.startswith("model.diffusion_model.") for name in names):
        return ""
    part = next((part for word, part in _PARTS.items() if word in kind), "")
    if (part, style) == ("transformer", "kohya"):
        raise MatryoshkaError("kohya does not name diffusers' transformers: take --style diffusers")
    if part:
        return part
    raise MatryoshkaError(
        f"{base} does not say which part of a pipeline it is: give the folder of a unet or a "
        "transformer that diffusers has saved, or leave out --style"
    )


def _with_part(adapter: AdapterFile, part: str) -> AdapterFile:
    """Return the adapter with the part of a pipeline in front of its names."""
    layers = list[Layer]()
    for layer in adapter.layers:
        name = f"{part}.{layer.name}" if part else layer.name.removeprefix("model.")
        key_A, key_B = (f"{name}.lora_{each}.weight" for each in "AB")
        layers.append(replace(layer, name=name, key_A=key_A, key_B=key_B))
    return replace(adapter, layers=tuple(layers))
