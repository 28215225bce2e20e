"""ComfyUI's own loader reads what is converted and combined, on small models with random weights.

COMFYUI_PATH is a checkout of ComfyUI, and COMFYUI_PYTHON is the Python of its environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.single_files import read_ranks, save_random_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_lora import combine, export
from research.blocks.shared import read

COMFYUI_PATH = os.environ.get("COMFYUI_PATH")
COMFYUI_PYTHON = os.environ.get("COMFYUI_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (COMFYUI_PATH and COMFYUI_PYTHON),
        reason="COMFYUI_PATH and COMFYUI_PYTHON are not set",
    ),
]

FAMILIES = read("research/families.json")
MODELS = [name for family in FAMILIES for name in family["run"]]
READ_WITH_DIFFUSERS_NAMES = [
    name for family in FAMILIES if family.get("comfyui_reads_diffusers") for name in family["run"]
]
# Modules without a layer in the files.
LEFT_OUT = {
    "z-image": r"(?!final).*adaLN_modulation.*",  # Lumina 2 has another one
    "aura-flow": r".*\.mod(C|X|CX)\.1|modF\.1",  # they have the inputs of the full model
    "mochi": r"blocks\.(?!(0|47)\.).*",  # two blocks are enough
    # These are no linear layers in diffusers.
    "hidream": r".*\.ff_i\.gate",
    "hunyuan-video-1.5": "cond_type_embedding",
}
WRITTEN_FROM_FOLDERS = ("sd15", "sdxl", "koala", *READ_WITH_DIFFUSERS_NAMES)
TEXT_ENCODER_PREFIXES = {
    "sd15": {"clip_l": "lora_te_"},
    "sdxl": {"clip_l": "lora_te1_", "clip_g": "lora_te2_"},
    "koala": {"clip_l": "lora_te1_", "clip_g": "lora_te2_"},
    "sd3": {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"},
    "flux": {"clip_l": "lora_te1_", "t5xxl": "lora_te3_"},
}
WEIGHTS = (0.8, -0.5)

Updates = dict[str, Tensor]
"""What ComfyUI adds to each weight, by its name."""
Job = tuple[str, list[tuple[str, float]]]
"""A model, and the LoRA files with their strengths."""


def run_comfyui(jobs: list[Job], folder: Path) -> list[Updates]:
    """Return what ComfyUI's loader adds to the weights, for each job."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("run_comfyui_loader.py")
    # -O: Mochi's class asserts that it is as wide as the full model.
    command = [str(COMFYUI_PYTHON), "-O", str(script), str(folder / "jobs.json"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(COMFYUI_PATH)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return [load_file(folder / f"{number}.safetensors") for number in range(len(jobs))]


def kohya_shapes(model: str, weights: Updates) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight that a LoRA can be for, by kohya's name of the layer.

    Args:
        model: The model.
        weights: The shapes of ComfyUI's weights, by their names.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for key, sizes in weights.items():
        shape = tuple(sizes.tolist())
        part, _, name = key.removesuffix(".weight").partition(".")
        if not key.endswith(".weight") or len(shape) < 2:
            continue
        if re.fullmatch(LEFT_OUT.get(model, ""), name):
            continue
        prefix = "lora_unet_"
        if part != "diffusion_model":
            prefix = TEXT_ENCODER_PREFIXES[model][part]
            name = name.removeprefix("transformer.")
        shapes[f"{prefix}{name.replace('.', '_')}"] = shape
    return shapes


def write_without_t5(file: Path) -> Path:
    """Write and return a copy without T5, which ComfyUI reads with kohya's names only."""
    tensors = {key: tensor for key, tensor in load_file(file).items() if "SelfAttention" not in key}
    output = file.with_name(f"without-t5-{file.name}")
    save_file(tensors, output)
    return output


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Updates]]:
    """What ComfyUI adds for the files of each model, by the name of the file."""
    folder = tmp_path_factory.mktemp("comfyui")
    shapes = run_comfyui([(model, []) for model in MODELS], folder / "shapes")
    files: list[tuple[str, str]] = []
    jobs: list[Job] = []
    for model, weights in zip(MODELS, shapes, strict=True):
        model_folder = folder / model
        model_folder.mkdir()
        for name, sources in write_files(model, weights, model_folder).items():
            files.append((model, name))
            jobs.append((model, [(str(file), strength) for file, strength in sources]))
    updates: dict[str, dict[str, Updates]] = {model: {} for model in MODELS}
    for (model, name), update in zip(files, run_comfyui(jobs, folder / "updates"), strict=True):
        updates[model][name] = update
    return updates


def write_files(model: str, weights: Updates, folder: Path) -> dict[str, list[tuple[Path, float]]]:
    """Write the files of a model, and return what is to be loaded with which strength."""
    names = ("kohya", "other", "split", "other-split", "again", "sum", "split-sum")
    kohya, other, split, other_split, again, total, split_total = (
        folder / f"{name}.safetensors" for name in names
    )
    shapes = kohya_shapes(model, weights)
    save_random_lora(kohya, dict(list(shapes.items())[1::2]), has_alpha=True)
    save_random_lora(other, shapes, has_alpha=True, seed=1)
    export(kohya, split, key_format="diffusers")
    export(other, other_split, key_format="diffusers")
    export(split, again, key_format="kohya")
    rank = max(read_ranks(kohya).values()) + max(read_ranks(other).values())
    combine([kohya, other_split], total, WEIGHTS, rank)
    combine([split, other], split_total, WEIGHTS, rank)
    loads = {
        "kohya": [(kohya, 1.0)],
        "again": [(again, 1.0)],
        "sources of the sum": list(zip((kohya, other), WEIGHTS, strict=True)),
        "sum": [(total, 1.0)],
    }
    if model in WRITTEN_FROM_FOLDERS:
        # As an adapter that was trained on the model of diffusers.
        drop = ["lora_te*"] if model in TEXT_ENCODER_PREFIXES else []
        export(kohya, folder / "adapter", key_format="peft", drop=drop)
        of_folder = folder / "of-folder.safetensors"
        export(folder / "adapter", of_folder, max(read_ranks(kohya).values()))
        loads["of a folder"] = [(of_folder, 1.0)]
    if model in READ_WITH_DIFFUSERS_NAMES:
        loads["split"] = [(write_without_t5(split), 1.0)]
        loads["split sum"] = [(write_without_t5(split_total), 1.0)]
    return loads


def assert_same(updates: Updates, expected: Updates, tolerance: float) -> None:
    scale = max(float(update.abs().max()) for update in expected.values())
    assert scale > 0
    for key in updates.keys() | expected.keys():
        update = updates.get(key, torch.zeros(1))
        assert float((update - expected.get(key, torch.zeros(1))).abs().max()) < tolerance * scale


def test_the_table_of_families_has_the_models_of_comfyui() -> None:
    code = "import comfy.options; comfy.options.enable_args_parsing()\n"
    code += "import comfy.supported_models as m; print(*(c.__name__ for c in m.models))"
    environment = {**os.environ, "PYTHONPATH": str(COMFYUI_PATH)}
    command = [str(COMFYUI_PYTHON), "-c", code, "--cpu"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    known = {name for family in FAMILIES for name in family["comfyui"]}
    assert set(result.stdout.split()) == known


@pytest.mark.parametrize("model", MODELS)
def test_a_conversion_and_its_inverse_are_read_as_the_source(
    updates: dict[str, dict[str, Updates]], model: str
) -> None:
    assert len(updates[model]["kohya"]) > 10
    assert_same(updates[model]["again"], updates[model]["kohya"], tolerance=1e-6)


@pytest.mark.parametrize("model", WRITTEN_FROM_FOLDERS)
def test_an_adapter_in_a_folder_is_read_from_the_file_that_export_writes(
    updates: dict[str, dict[str, Updates]], model: str
) -> None:
    expected = updates[model]["kohya"]
    of_image_model = {key: value for key, value in expected.items() if key.startswith("diffusion")}
    assert len(of_image_model) > 5
    assert_same(updates[model]["of a folder"], of_image_model, tolerance=1e-5)


@pytest.mark.parametrize("model", READ_WITH_DIFFUSERS_NAMES)
def test_names_of_diffusers_are_read_as_the_source(
    updates: dict[str, dict[str, Updates]], model: str
) -> None:
    expected = {key: value for key, value in updates[model]["kohya"].items() if "t5xxl" not in key}
    assert_same(updates[model]["split"], expected, tolerance=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["sum", "split sum"])
def test_the_sum_of_files_in_two_formats_is_read_as_both_files(
    updates: dict[str, dict[str, Updates]], model: str, name: str
) -> None:
    if name not in updates[model]:
        pytest.skip("ComfyUI does not read diffusers' names of this model")
    expected = updates[model]["sources of the sum"]
    if name == "split sum":
        expected = {key: value for key, value in expected.items() if "t5xxl" not in key}
    assert_same(updates[model][name], expected, tolerance=1e-5)
