"""The metadata of single files after truncation and after a sum: nothing in them is wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_lora import combine, export, reorder
from matryoshka_lora.formats.safetensors_io import ERROR_KEY

METADATA = {
    "ss_network_dim": "8",
    "ss_network_alpha": "4",
    "ss_network_args": json.dumps({"conv_dim": "6", "conv_alpha": "1", "algo": "locon"}),
    "ss_network_module": "networks.lora",
    "ss_training_comment": "a test",
    "ss_output_name": "first",
    "ss_tag_frequency": json.dumps({"5_a": {"cat": 3, "dog": 1}}),
    "sshs_model_hash": "hash of the old tensors",
    "sshs_legacy_hash": "another",
    "modelspec.hash_sha256": "0x1",
    "modelspec.title": "Cats",
    "modelspec.date": "2025-01-01",
    "modelspec.license": "MIT",
}


def save_kohya(file: Path, metadata: dict[str, str], ranks: tuple[int, ...] = (8, 8)) -> Path:
    """Write linear layers of some ranks, a 1x1 convolution, and a 3x3 convolution of rank 6."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    kernels: list[tuple[int, ...]] = [() for _ in ranks]
    for number, (rank, kernel) in enumerate(
        zip((*ranks, ranks[0], 6), [*kernels, (1, 1), (3, 3)], strict=True)
    ):
        name = f"lora_unet_{number}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 12, *kernel)
        tensors[f"{name}.lora_up.weight"] = torch.randn(10, rank, *(1 for _ in kernel))
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, file, metadata)
    return file


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def kohya_hash(file: Path) -> str:
    """Return the hash that kohya's scripts compute of a state dict: without the header."""
    data = safetensors.torch.save(load_file(file), {"ss_network_dim": "8"})
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_truncation_renews_ranks_and_hashes_and_adds_a_comment(tmp_path: Path) -> None:
    source = save_kohya(tmp_path / "lora.safetensors", METADATA)
    output = tmp_path / "output.safetensors"
    export(source, output, 5)
    metadata = read_metadata(output)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "5"
    arguments = {"conv_dim": "5", "conv_alpha": "5", "algo": "locon"}
    assert json.loads(metadata["ss_network_args"]) == arguments
    assert metadata["ss_training_comment"].startswith("a test; truncated to rank 5 by matryoshka")
    assert metadata["sshs_model_hash"] == kohya_hash(output)
    assert metadata["modelspec.hash_sha256"] == f"0x{kohya_hash(output)}"
    assert "sshs_legacy_hash" not in metadata
    changed = {
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "ss_training_comment",
        *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
    }
    for key in METADATA.keys() - changed:
        assert metadata[key] == METADATA[key]


def test_ranks_of_convolutions_and_of_linear_layers_are_two_fields(tmp_path: Path) -> None:
    source = save_kohya(tmp_path / "lora.safetensors", METADATA)
    export(source, tmp_path / "7.safetensors", 7)
    metadata = read_metadata(tmp_path / "7.safetensors")
    assert metadata["ss_network_dim"] == "7"
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "6"
    assert "ranks 6 to 7" in metadata["ss_training_comment"]
    mixed = save_kohya(tmp_path / "mixed.safetensors", METADATA, ranks=(8, 3))
    reorder(mixed, tmp_path / "reordered.safetensors")
    metadata = read_metadata(tmp_path / "reordered.safetensors")
    assert metadata["ss_network_dim"] == "Dynamic"
    assert "same rank" in metadata["ss_training_comment"]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"drop": ["lora_unet_1"]}, ["Left out 1 layer of 4"]),
        (
            {"scale": {"*": 0.5, "*_[01]": 2.0}},
            ["Scaled 2 layers of 4 (factor 2)", "Scaled 2 layers of 4 (factor 0.5)"],
        ),
        ({"scale": {"*_[01]": 0, "*_2": 1}}, ["Left out 2 layers of 4"]),
        ({"dtype": "bf16"}, ["Stored the factors in bf16"]),
        ({"rank": 9, "pad": True}, ["Padded to rank 9"]),
        ({"rank": 2, "scale": {"*_0": 3}}, ["Scaled 1 layer of 4 (factor 3)"]),
    ],
)
def test_the_comment_and_the_notes_say_what_was_changed(
    tmp_path: Path, options: dict[str, Any], changes: list[str]
) -> None:
    source = save_kohya(tmp_path / "lora.safetensors", METADATA)
    result = export(source, tmp_path / "output.safetensors", **options)
    assert result.notes == tuple(f"{change}." for change in changes)
    descriptions = [change[0].lower() + change[1:] for change in changes]
    if options.get("rank") == 2:
        descriptions.append("truncated to rank 2")
    comment = read_metadata(tmp_path / "output.safetensors")["ss_training_comment"]
    assert comment.startswith(f"a test; {', '.join(descriptions)} by matryoshka")


@pytest.mark.parametrize("arguments", ["[", "[1]", "null", '{"conv_dim": 3'])
def test_damaged_arguments_stay_as_they_are(arguments: str, tmp_path: Path) -> None:
    metadata = {"ss_network_args": arguments}
    source = save_kohya(tmp_path / "lora.safetensors", metadata)
    export(source, tmp_path / "output.safetensors", 2)
    assert read_metadata(tmp_path / "output.safetensors")["ss_network_args"] == arguments


def test_a_file_without_metadata_of_kohya_gets_none(tmp_path: Path) -> None:
    source = save_kohya(tmp_path / "lora.safetensors", {"modelspec.title": "Cats"})
    export(source, tmp_path / "output.safetensors", 2)
    metadata = read_metadata(tmp_path / "output.safetensors")
    assert metadata.keys() == {"format", "modelspec.title", ERROR_KEY}


def test_a_sum_claims_only_what_is_true_of_all_sources(tmp_path: Path) -> None:
    others: dict[str, Any] = {
        **METADATA,
        "ss_training_comment": "another test",
        "ss_output_name": "second",
        "modelspec.title": "Birds",
        "modelspec.license": "CC-BY-4.0",
        "modelspec.trigger_phrase": "a bird",
    }
    first = save_kohya(tmp_path / "cats.safetensors", METADATA)
    second = save_kohya(tmp_path / "birds.safetensors", others)
    output = tmp_path / "sum.safetensors"
    combine([first, second], output, weights=[1, -0.5], rank=4)
    metadata = read_metadata(output)
    comment = metadata["ss_training_comment"]
    assert comment.startswith("sum of 1 x cats.safetensors, -0.5 x birds.safetensors, truncated")
    assert str(tmp_path) not in json.dumps(metadata)
    assert "ss_output_name" not in metadata
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.title"] == "Cats + Birds"
    assert metadata["modelspec.license"] == "MIT, CC-BY-4.0"
    assert metadata["modelspec.trigger_phrase"] == "a bird"
    assert metadata["sshs_model_hash"] == kohya_hash(output)
