"""How the keys of a single LoRA file are spelled: the styles of kohya, of diffusers and of PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Literal, NamedTuple

from matryoshka_lora.errors import MatryoshkaError

Style = Literal["kohya", "diffusers", "peft"]

PEFT_PREFIX = "base_model.model."

_KOHYA = (".lora_down.weight", ".lora_up.weight")
_DIFFUSERS = (".lora_A.weight", ".lora_B.weight")
_ENDINGS = (
    _KOHYA,
    _DIFFUSERS,
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".down.weight", ".up.weight"),
    (".down", ".up"),
)

# What old versions of diffusers put between the module and `.down.weight`.
_BETWEEN = re.compile(r"(\.lora_linear_layer|\.lora|_lora)$")

# What stands beside the factors of a layer that is more than they are.
_MORE = re.compile(r"(.+)\.(?:dora_scale|lora_(?:magnitude_vector|mid|up|down|[AB])(?:\.[^.]+)*)")

# What old versions of diffusers call the layers of a text encoder's attention, and transformers calls them.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

ORIGINAL = "diffusion_model"
"""What stands in the place of a part where the names are those of a model's own authors: diffusers renames them."""

# The first word of kohya's names, by the part of a pipeline.
_KOHYA_WORDS = {
    "unet": "lora_unet",
    ORIGINAL: "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
KOHYA_PARTS = tuple(_KOHYA_WORDS)
PIPELINE_PARTS = (*KOHYA_PARTS, "transformer_2", "transformer_ref", "connectors", "text_conditioner", "prior")
"""All that diffusers loads a LoRA into (``_lora_loadable_modules`` of its pipelines), and `ORIGINAL`."""


class Keys(NamedTuple):
    """The keys of one pair of factors; ``name`` is what they have in common."""

    name: str
    A: str
    B: str


def find_pairs(keys: Collection[str], where: str) -> list[Keys]:
    """The pairs among a file's keys, by name.

    Raises:
        MatryoshkaError: A key has no partner, or two pairs have one name.
    """
    found: dict[str, Keys] = {}
    for key in sorted(keys):
        ending = next(((A, B) for A, B in _ENDINGS if key.endswith((A, B))), None)
        if ending is None:
            continue
        name = key.removesuffix(ending[0]).removesuffix(ending[1])
        pair = Keys(name, name + ending[0], name + ending[1])
        for other in pair[1:]:
            if other not in keys:
                raise MatryoshkaError(f"{where} holds {key[:200]!r} and lacks its partner. Copy the file again")
        if found.setdefault(name, pair) != pair:
            raise MatryoshkaError(f"{where} holds two pairs of factors for {name[:200]!r}. Save it again")
    return list(found.values())


def alpha_names(pair: Keys) -> Iterator[str]:
    """How the key of its alpha may be spelled."""
    yield f"{pair.name}.alpha"
    if (shorter := _BETWEEN.sub("", pair.name)) != pair.name:
        yield f"{shorter}.alpha"


def beyond_pairs(pairs: Collection[Keys], keys: Iterable[str]) -> dict[str, str]:
    """Layers that compute something else than ``B A``, by name, and the key that says so.

    It is a magnitude (DoRA), a bias, or a matrix between the two.
    """
    factors = {key for pair in pairs for key in (pair.A, pair.B)}
    names = {_BETWEEN.sub("", pair.name): pair.name for pair in pairs}
    found = {}
    for key in keys:
        if key not in factors and (more := _MORE.fullmatch(key)) and more[1] in names:
            found[names[more[1]]] = key
    return found


def module_of(pair: Keys) -> str:
    """The dotted name of a layer's module, with the part of the pipeline that it belongs to.

    Raises:
        MatryoshkaError: It is one of kohya's, whose strokes do not say where the dots were; or of XLabs', which has
            names of its own.
    """
    name = pair.name.removeprefix(PEFT_PREFIX)
    if re.match(r"lora_\w+$", name):
        raise MatryoshkaError(
            f"{name[:80]} is a name of kohya's, which does not say where the dots of the module's own name were: leave "
            "the style as it is, which diffusers and ComfyUI read too; or give the base model's folder with --model"
        )
    if pair.A.endswith((_KOHYA[0], _DIFFUSERS[0])):
        return name
    if re.search(r"_lora\d+$", name):
        raise MatryoshkaError(f"{name[:80]} is a name of XLabs', which is no module's: leave the style as it is")
    short = _BETWEEN.sub("", name).replace(".processor.", ".")
    before, _, last = short.rpartition(".")
    if short != name and last in _OLD_TEXT and short.startswith("text_encoder"):
        return f"{before}.{_OLD_TEXT[last]}"
    if short.endswith(".to_out") and short != name:
        return f"{short}.0"
    return short


def has_style(pair: Keys, style: Style) -> bool:
    """Whether the keys of a pair are in a style."""
    if style == "kohya":
        return pair.A.endswith(_KOHYA[0])
    return pair.A.endswith(_DIFFUSERS[0]) and pair.name.startswith(PEFT_PREFIX) == (style == "peft")


def kind_of(name: str) -> str:
    """A layer's name without its numbers and what stands before them."""
    name = _BETWEEN.sub("", name.replace(".base_layer", ""))
    if "." not in name:
        return re.split(r"_\d+_(?=[a-z])", name)[-1]
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name


def part_of(module: str) -> tuple[str, str]:
    """The part of the pipeline, "" where a name says none, and the module's name inside it."""
    first, _, rest = module.partition(".")
    return (first, rest) if first in PIPELINE_PARTS and rest else ("", module)


def written_keys(module: str, style: Style, parts: Collection[str]) -> Keys:
    """The keys of a pair in another style.

    Args:
        module: Its dotted name.
        style: The other style.
        parts: All parts of a pipeline that the file has layers of.

    Raises:
        MatryoshkaError: The style has no name for it.
    """
    part, inside = part_of(module)
    if style == "peft":
        return _keys(PEFT_PREFIX + inside, _DIFFUSERS)
    if style == "diffusers":
        if not part:
            raise MatryoshkaError(
                f"{module[:80]} does not say which part of a pipeline it is for, as unet. or transformer. before it "
                "would, and diffusers would not find it: leave the style as it is"
            )
        return _keys(module, _DIFFUSERS)
    return _keys(kohya_name(part, inside, parts), _KOHYA)


def kohya_name(part: str, inside: str, parts: Collection[str]) -> str:
    """What kohya calls a module of a part of a pipeline.

    Raises:
        MatryoshkaError: Kohya's programs know no such part.
    """
    if part and part not in KOHYA_PARTS:
        raise MatryoshkaError(f"kohya's style has no name for the {part} of a pipeline: choose the style diffusers")
    first = _KOHYA_WORDS[part or "unet"]
    if part == "text_encoder" and "text_encoder_2" in parts:
        first = "lora_te1"
    return f"{first}_{inside.replace('.', '_')}"


def _keys(name: str, ending: tuple[str, str]) -> Keys:
    return Keys(name, name + ending[0], name + ending[1])
