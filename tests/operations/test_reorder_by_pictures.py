"""`reorder` with a pipeline, and what its output is used for without the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.peft
from helpers.single_files import read_updates
from safetensors.torch import load_file
from typer.testing import CliRunner

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError
from matryoshka_lora.cli import app

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from helpers.pipelines import flux, save_lora, stable_diffusion, wan  # noqa: E402

# transformers 5.24 requires for its text encoders a version of PEFT that is not released yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow

PIPELINES = {"stable diffusion": stable_diffusion, "flux": flux, "wan": wan}
ARGUMENTS = {"num_inference_steps": 2, "height": 16, "width": 16}
VIDEO = {"num_frames": 5}
PROMPTS = ["a dog", "a fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the pipelines, and LoRAs in each form."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, new_pipeline in PIPELINES.items():
        torch.manual_seed(0)
        pipeline = new_pipeline(folder)
        pipeline.save_pretrained(folder / name)
        save_lora(pipeline, folder / f"{name} diffusers.safetensors")
    for name in ("stable diffusion", "flux"):
        source, output = (folder / f"{name} {keys}.safetensors" for keys in ("diffusers", "kohya"))
        ml.export(source, output, key_format="kohya")
    ml.export(folder / "flux diffusers.safetensors", folder / "flux folder", key_format="peft")
    return folder


def scaled_updates(file: Path) -> dict[str, np.ndarray]:
    """Return the update of each module, with the scales of diffusers' metadata."""
    layers = {layer.name: layer for layer in ml.open(file).layers}
    return {
        name: update * (1 if layers[name].keys.alpha else layers[name].scale)
        for name, update in read_updates(file).items()
    }


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("stable diffusion", "stable diffusion kohya.safetensors"),
        ("flux", "flux diffusers.safetensors"),
        ("flux", "flux kohya.safetensors"),  # with one layer for queries, keys and values
        ("flux", "flux folder"),
        ("wan", "wan diffusers.safetensors"),
    ],
)
def test_the_update_stays_and_the_output_chooses_ranks_without_the_pipeline(
    name: str, source: str, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "weighted.safetensors"
    result = ml.reorder(
        folder / source,
        output,
        pipeline=folder / name,
        prompts=PROMPTS,
        pipeline_args={**ARGUMENTS, **(VIDEO if name == "wan" else {})},
    )
    has_other_layers = source == "flux kohya.safetensors"
    assert any("keys" in note for note in result.notes) == has_other_layers
    keeps_keys = source.endswith(".safetensors") and not has_other_layers
    lora = ml.open(output)
    assert lora.order == "weighted"
    updates = scaled_updates(folder / (source if keeps_keys else f"{name} diffusers.safetensors"))
    new_updates = scaled_updates(output)
    assert new_updates.keys() == updates.keys()
    for module, update in updates.items():
        np.testing.assert_allclose(new_updates[module], update, rtol=1e-4, atol=1e-5)
    values = {layer.name: layer.weighted_values for layer in lora.layers}
    total = sum((value**2).sum() for value in values.values() if value is not None)
    for rank, error in result.weighted_errors.items():
        missing = sum((value[rank:] ** 2).sum() for value in values.values() if value is not None)
        assert error == pytest.approx(np.sqrt(missing / total), abs=1e-5)

    exported = ml.export(output, tmp_path / "small.safetensors", error=0.2)
    missing = sum((values[name][rank:] ** 2).sum() for name, rank in exported.ranks.items())  # type: ignore[index]
    assert exported.weighted_error == pytest.approx(np.sqrt(missing / total), abs=1e-5)
    assert exported.weighted_error <= 0.2 < exported.errors[max(exported.ranks.values())]
    size = lora.truncate(1).file_size
    assert ml.export(output, tmp_path / "fits.safetensors", max_bytes=size).size_after <= size
    ml.export(output, tmp_path / "rank-1.safetensors", 1)
    components = load_file(output)
    for layer in lora.layers:
        A, B = components[layer.keys.A][:1], components[layer.keys.B][:, :1]
        np.testing.assert_allclose(
            scaled_updates(tmp_path / "rank-1.safetensors")[layer.name],
            layer.scale * (B @ A).numpy(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_layers_of_text_encoders_keep_the_order_of_the_svd(folder: Path, tmp_path: Path) -> None:
    """They count with their singular values times what the other layers have on average."""
    words = [
        "reorder",
        str(folder / "stable diffusion diffusers.safetensors"),
        f"--pipeline={folder / 'stable diffusion'}",
        "--prompt=a dog",
        "--prompt=a fox",
        "--pipeline-args=num_inference_steps=2,height=16,width=16",
        f"--output={tmp_path / 'weighted.safetensors'}",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "4 of 36 layers" in result.output
    lora = ml.open(tmp_path / "weighted.safetensors")
    assert lora.order == "weighted"
    svd = ml.open(folder / "stable diffusion diffusers.safetensors").reorder()
    weights: dict[str, np.ndarray] = {}
    squares = np.zeros(2)
    for layer, expected in zip(lora.layers, svd.layers, strict=True):
        factors = layer.read()
        singular_values = expected.read().singular_values
        assert layer.weighted_values is not None
        assert singular_values is not None
        if layer.name.startswith("text_encoder"):
            norms = np.linalg.norm(factors.A, axis=1) * np.linalg.norm(factors.B, axis=0)
            np.testing.assert_allclose(layer.scale * norms, singular_values, rtol=1e-4)
            weights[layer.name] = layer.weighted_values / singular_values
        else:
            squares += [(layer.weighted_values**2).sum(), (singular_values**2).sum()]
    assert len(weights) == 4
    for weight in weights.values():
        np.testing.assert_allclose(weight, np.sqrt(squares[0] / squares[1]), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("flux", {"prompts": []}, "pipeline"),
        ("flux", {"pipeline": None}, "pipeline"),
        ("flux", {"data": [{"prompt": "a", "completion": "b"}]}, "data"),
        ("flux", {"pipeline_args": {"generator": None}}, "generator"),
        ("flux", {"dtype": "int8"}, "dtype"),
        ("wan", {}, "load"),
        ("stable diffusion", {"prompts": ["a"]}, "gradient"),  # only the text encoder has layers
    ],
)
def test_a_mistake_is_one_error_and_nothing_is_written(
    name: str, options: dict[str, Any], word: str, folder: Path, tmp_path: Path
) -> None:
    arguments = {"pipeline": folder / "flux", "prompts": PROMPTS, "pipeline_args": ARGUMENTS}
    with pytest.raises(MatryoshkaError, match=word):
        ml.reorder(
            folder / f"{name} diffusers.safetensors",
            tmp_path / "output.safetensors",
            **{**arguments, **options},
        )
    assert not list(tmp_path.iterdir())
