"""PEFT's LoraConfig: patterns match as PEFT's own do, and names are looked up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.numpy import save_file

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError
from matryoshka_lora.formats.lora_config import RanksAndScales
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, WEIGHTS_NAME

PARTS = ["layers", "0", "1", "10", "q_proj", "fc", "to_out", "x_fc", "a+b"]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Draw a name, or its end, as it is, escaped or anchored, or a regular expression."""
    name = draw(NAMES)
    kind = draw(st.sampled_from(["plain", "escaped", "anchored", "cut", "expression"]))
    if kind == "escaped":
        return re.escape(name)
    if kind == "anchored":
        return f"^{re.escape(name)}"
    if kind == "cut":  # in the middle of a part
        return re.escape(name[draw(st.integers(0, len(name) - 1)) :])
    if kind == "expression":
        expressions = [r".*\.fc", r"layers\.\d+\.q_proj", "q_proj|fc", "^fc$", "(q|x)_.*", "[01]"]
        return draw(st.sampled_from([*expressions, rf"\w+\.{re.escape(name)}", f"{name}$"]))
    return name


@settings(max_examples=2000)
@given(st.lists(patterns(), max_size=4, unique=True), NAMES)
def test_patterns_match_as_in_peft(keys: list[str], name: str) -> None:
    ranks = {pattern: index + 2 for index, pattern in enumerate(keys)}
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": {}}
    expected = ranks.get(get_pattern_key(keys, name), 1)
    assert RanksAndScales(config, "lora").of(name) == (expected, 1 / expected)
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": ranks}
    assert RanksAndScales(config, "lora").of(name) == (1, float(expected))


def save_many_ranks(folder: Path, num_layers: int, pattern: str) -> None:
    """Write an adapter whose layers have ranks of their own."""
    names = [f"blocks.{index}.proj" for index in range(num_layers)]
    tensors: dict[str, np.ndarray] = {}
    for index, name in enumerate(names):
        rank = 1 + index % 7
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones((rank, 2), np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones((2, rank), np.float32)
    fields: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    fields["rank_pattern"] = {
        pattern.format(re.escape(name)): 1 + index % 7 for index, name in enumerate(names)
    }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(fields))


@pytest.mark.parametrize("pattern", ["{}", "^{}"])
def test_names_are_looked_up(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching each pattern with each layer would take minutes for a large model."""
    save_many_ranks(tmp_path / "lora", 794, pattern)
    compiled: list[str] = []
    compile_ = re.compile

    def record(expression: Any, *flags: Any) -> Any:
        compiled.append(expression)
        return compile_(expression, *flags)

    monkeypatch.setattr(re, "compile", record)
    lora = ml.open(tmp_path / "lora")
    assert not [expression for expression in compiled if "blocks" in str(expression)]
    assert lora.ranks == {f"blocks.{index}.proj": 1 + index % 7 for index in range(794)}


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(.|..|...)+(?<!.)", ".*" * 9, "(", "a{99999999999}", "[z-a]"]
)
def test_expressions_that_cannot_be_matched_are_rejected(pattern: str) -> None:
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": {pattern: 2}}
    with pytest.raises(MatryoshkaError, match="regular expression"):
        RanksAndScales(config, "lora")
