"""Checking what a config says: YAML as people expect it, keys and types, words of version 0.1, tokens and paths."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from matryoshka_lora.data.sources import parse_data
from matryoshka_lora.errors import MatryoshkaError, one_line
from matryoshka_lora.privacy import marks_in, paths_in, tokens_in

_NOW = {
    "alpha": "the scale of the largest rank is lora.lora_alpha / r: for scaling 'rank' write alpha as lora.lora_alpha, "
    "for 'sqrt' alpha * sqrt(r), and for 'none' leave both out",
    "inference": "leave it out. inference: prefix with reorder: false is nesting.deploy: paper",
}

_TOKENS = ("hub_token", "model_init_kwargs.token")
"""Where a config may have a token: neither is ever written."""


class _Loader(yaml.SafeLoader):
    """2e-4 is a number, ``no`` is a word, and a key that is written twice is an error."""

    # YAML 1.1, which PyYAML reads, takes 2e-4 for text and `save_strategy: no` for false.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; may raise ``yaml.YAMLError``."""
    return yaml.load(text, _Loader)


def read_yaml(path: str | PathLike[str]) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        MatryoshkaError: It cannot be read, or holds something else.
    """
    try:
        read = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MatryoshkaError(f"there is no config {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MatryoshkaError(f"cannot read the config {path}: {error}") from error
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise MatryoshkaError(f"the config {path} holds no keys; write for example data: family_relationships")
    return read


def apply_override(config: dict[str, Any], override: str) -> None:
    """Write ``"key=value"`` into a config, where key may have dots and value is YAML.

    Raises:
        MatryoshkaError: It is none, or its value is no YAML.
    """
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise MatryoshkaError(f"{override!r} is no override; write key=value, for example lora.r=8")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise MatryoshkaError(f"the value of {name} is no YAML: {one_line(error)}") from error
    *sections, key = name.strip().split(".")
    for section in sections:
        below = config.get(section)
        if section in ("data", "eval_data") and isinstance(below, str):
            below = parse_data(below)
        if below is not None and not isinstance(below, dict):
            raise MatryoshkaError(f"{override!r}: {section} is {below!r}, which has nothing below it")
        config[section] = {} if below is None else below
        config = config[section]
    config[key] = value


def write_yaml(value: Mapping[str, Any]) -> str:
    """The YAML text of plain values, in the order of the mapping."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def names(of: Any) -> list[str]:
    """What a dataclass can be made with."""
    return [field.name for field in fields(of) if field.init]


def check_keys(
    given: Any, known: Collection[str], section: str = "", elsewhere: Mapping[str, Collection[str]] | None = None
) -> None:
    """Every key is a known one.

    Args:
        given: A mapping.
        known: Its possible keys.
        section: Where it stands in the config; ``""`` is the top level.
        elsewhere: The keys of other sections, for the hint.

    Raises:
        MatryoshkaError: One is not; the message names the section and the nearest right key.
    """
    if not isinstance(given, Mapping):
        raise MatryoshkaError(f"{section or 'the config'} is {given!r}; write a mapping of keys to values")
    for key in given:
        if key in known:
            continue
        place = f"in section {section!r}" if section else "at the top level"
        homes = [name for name, keys in (elsewhere or {}).items() if key in keys]
        close = get_close_matches(str(key), known, n=1)
        if homes:
            hint = f"write it in section {homes[0]!r}" if homes[0] else "write it at the top level"
        elif close:
            hint = f"did you mean {close[0]!r}?"
        elif len(known) <= 20:
            hint = f"the keys are {', '.join(known)}"
        else:
            hint = "it is near to none of the keys"
        raise MatryoshkaError(f"there is no key {str(key)!r} {place}; {hint}")


def check_types(given: Mapping[str, Any], of: Any, section: str = "", also: Mapping[str, Any] | None = None) -> None:
    """Every value has the type that a dataclass declares.

    The classes themselves take any value, and fail on it long after the model is loaded, or never.

    Args:
        given: Field names and values.
        of: The dataclass.
        section: Where they stand in the config.
        also: Types that replace those of the class.

    Raises:
        MatryoshkaError: One has not.
    """
    hints = {**typing.get_type_hints(of), **(also or {})}
    for key, value in given.items():
        if not _fits(value, hints[key]):
            name = f"{section}.{key}" if section else key
            raise MatryoshkaError(f"{name} is {value!r}; expected {_words(hints[key])}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is typing.Literal:
        # PEFT writes a pattern among the values: 'pissa_niter_[number of iters]'.
        patterns = [arg.partition("[")[0] for arg in get_args(hint) if isinstance(arg, str) and "[" in arg]
        return value in get_args(hint) or (isinstance(value, str) and value.startswith(tuple(patterns)))
    kind = origin or hint
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (list, tuple, set):
        return isinstance(value, (list, tuple))
    if kind in (bool, str, dict, type(None)):
        return isinstance(value, kind)
    # Nested configs are mappings here, and enums are written by name.
    return isinstance(value, (str, Mapping))


def _words(hint: Any) -> str:
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(hint))
    if hint is type(None):
        return "null"
    if get_origin(hint) is typing.Literal:
        return ", ".join(map(str, get_args(hint)))
    return {float: "a number", int: "an integer", bool: "true or false", str: "text"}.get(
        get_origin(hint) or hint, getattr(hint, "__name__", str(hint))
    )


def check_trainable(training: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """Raises MatryoshkaError for what the libraries take, and with which nothing can be trained or written."""
    if not training["output_dir"]:
        raise MatryoshkaError(f"output_dir is {training['output_dir']!r}; write a folder for the adapter")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if training.get(key, 1) < 1:
            raise MatryoshkaError(f"{key} is {training[key]}; write a positive integer")
    if lora.get("inference_mode"):
        raise MatryoshkaError("lora.inference_mode is true, with which PEFT trains nothing; leave it out")


def refuse_old_words(config: Mapping[str, Any]) -> None:
    """Raises MatryoshkaError for a word of version 0.1, with the one that has its place."""
    nesting = config.get("nesting")
    for key, now in _NOW.items():
        if isinstance(nesting, Mapping) and key in nesting:
            raise MatryoshkaError(f"nesting.{key} is of version 0.1: {now}")
    if "recipe" in config:
        raise MatryoshkaError(
            "recipe is of version 0.1: write nesting.deploy: paper for recipe: paper, and nothing for recipe: default"
        )


def in_new_words(written: Mapping[str, Any]) -> dict[str, Any]:
    """The ``train.yaml`` of a run, by whichever version: what it says, in the words of today.

    Factors that were saved with P in them and not reordered have no word now; their ``reorder`` stays False.
    """
    config, nesting = dict(written), written.get("nesting")
    if not isinstance(nesting, Mapping) or "inference" not in nesting:
        return config
    new = {key: value for key, value in nesting.items() if key not in _NOW}
    is_paper = nesting["inference"] == "prefix" and nesting.get("reorder") is False
    new |= {"deploy": "paper", "reorder": None} if is_paper else {"deploy": "reordered"}
    return {**config, "nesting": new}


def check_private(config: Mapping[str, Any]) -> None:
    """Raises MatryoshkaError for a config with a token or a path where it would be written or sent."""
    for name in tokens_in(config):
        if name not in _TOKENS:
            raise MatryoshkaError(
                f"{name or 'a key'} holds what looks like a token, and a config is kept with its run: take it out, and "
                "log in with `hf auth login` or set HF_TOKEN. A token for the base model may stand in "
                "model_init_kwargs.token, which is not written"
            )
    options = config.get("model_init_kwargs")
    revision = options.get("revision") if isinstance(options, Mapping) else None
    for name in paths_in({"lora": config.get("lora"), "model_init_kwargs": {"revision": revision}}):
        raise MatryoshkaError(
            f"{name} holds an absolute path, and adapter_config.json, where it would stand, goes wherever the adapter "
            "goes: take it out"
        )
    for name in marks_in(config):
        raise MatryoshkaError(
            f"{name} is a path without its folders, as a run's train.yaml has it: write the path again, for example "
            f"{name}=/where/it/is"
        )
    if config.get("push_to_hub"):
        raise MatryoshkaError(
            "push_to_hub would send logs, configs and factors without their nesting while training: leave it out, and "
            "use `matryoshka push` afterwards"
        )
