"""Folders of mlx-lm, by its formulas. tests/runtimes has mlx-lm itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_peft import best, updates
from safetensors.torch import load_file, save_file

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, export
from matryoshka_lora.formats.mlx import missing_rope_fields

LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, {}),
        ({"rope_parameters": DEFAULT}, {"rope_theta": 1e4}),
        ({"rope_parameters": DEFAULT, "rope_theta": 5e5}, {}),
        ({"rope_parameters": LINEAR}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
        (
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT}},
            {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_rope_fields_are_added_where_they_are_missing(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert missing_rope_fields(config) == expected


LAYER = "model.layers.1.mlp.down_proj"


def save_mlx_folder(folder: Path, parameters: Any = None, **fields: Any) -> None:
    """Write a layer of rank 4 as mlx-lm does."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {f"{LAYER}.lora_a": torch.randn(96, 4), f"{LAYER}.lora_b": torch.randn(4, 64)}
    save_file(tensors, folder / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": parameters or {"rank": 4, "scale": 2.5, "dropout": 0.0},
        "model": "owner/base",
        "num_layers": 1,
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("rank", [2, 4])
def test_a_folder_of_mlx_lm_becomes_one_of_peft(tmp_path: Path, rank: int) -> None:
    save_mlx_folder(tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    A, B = (tensors[f"{LAYER}.lora_{factor}"].double().numpy() for factor in "ab")
    export(tmp_path / "mlx", tmp_path / "peft", rank)
    (update,) = updates(tmp_path / "peft").values()
    np.testing.assert_allclose(update, best(2.5 * (A @ B).T, rank), atol=1e-5)
    assert ml.open(tmp_path / "peft").config["base_model_name_or_path"] == "owner/base"


@pytest.mark.parametrize(
    ("fields", "key", "keyword"),
    [
        ({"fine_tune_type": "dora"}, "", "dora"),
        ({"fine_tune_type": "full"}, "", "full"),
        ({"parameters": {"rank": 4, "alpha": 16}}, "", "scale"),
        ({"parameters": {"rank": 8, "scale": 2.0}}, "", "rank 8"),
        ({}, f"{LAYER}.m", r"\.m"),
        ({}, "model.embed_tokens.lora_a", "embed_tokens"),
    ],
)
def test_other_folders_of_mlx_lm_are_rejected(
    tmp_path: Path, fields: dict[str, Any], key: str, keyword: str
) -> None:
    save_mlx_folder(tmp_path / "mlx", **fields)
    if key:
        file = tmp_path / "mlx" / "adapters.safetensors"
        save_file({**load_file(file), key: torch.ones(64, 4)}, file)
    with pytest.raises(MatryoshkaError, match=keyword):
        ml.open(tmp_path / "mlx")
