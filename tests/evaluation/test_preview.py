"""Pictures at several ranks, on small pipelines with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.peft
from helpers.plain_peft import plain_adapter
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError
from matryoshka_lora.cli import app

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from helpers.pipelines import flux, save_lora, stable_diffusion, wan  # noqa: E402

from matryoshka_lora.evaluation.preview import structural_similarity  # noqa: E402

# transformers 5.24 requires for its text encoders a version of PEFT that is not released yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow

PIPELINES = {"stable diffusion": stable_diffusion, "flux": flux, "wan": wan}
ARGUMENTS = {"num_inference_steps": 3, "height": 16, "width": 16}
VIDEO = {"num_frames": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the pipelines, and LoRAs with the keys of diffusers and of kohya."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, new_pipeline in PIPELINES.items():
        torch.manual_seed(0)
        pipeline = new_pipeline(folder)
        pipeline.save_pretrained(folder / name)
        save_lora(pipeline, folder / f"{name} diffusers.safetensors")
        source, output = (folder / f"{name} {keys}.safetensors" for keys in ("diffusers", "kohya"))
        ml.export(source, output, key_format="kohya")
    ml.export(folder / "flux diffusers.safetensors", folder / "flux folder", key_format="peft")
    ml.reorder(folder / "flux folder", folder / "flux nested")
    return folder


def draw(pipeline: Any, prompt: str, seed: int, **options: Any) -> Any:
    """Return the latents or the picture of a pipeline, without the package."""
    generator = torch.Generator().manual_seed(seed)
    output = pipeline(prompt=prompt, generator=generator, **ARGUMENTS, **options)
    if hasattr(output, "images"):
        return output.images[0]
    frames = output.frames[0]
    return frames if isinstance(frames, torch.Tensor) else frames[len(frames) // 2]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("stable diffusion", "diffusers"),
        ("stable diffusion", "kohya"),
        ("flux", "diffusers"),
        ("flux", "kohya"),  # with one layer for queries, keys and values
        ("flux", "nested"),
        ("wan", "diffusers"),
    ],
)
def test_a_picture_is_that_of_the_exported_file(
    name: str, keys: str, folder: Path, tmp_path: Path
) -> None:
    lora = folder / (f"{name} {keys}" if keys == "nested" else f"{name} {keys}.safetensors")
    video = VIDEO if name == "wan" else {}
    prompts, seeds = ["a dog", "a fox"], [3, 4]
    result = ml.preview(
        lora,
        folder / name,
        prompts,
        [1, 2],
        errors=["20%"],
        seeds=seeds,
        pipeline_args={**ARGUMENTS, **video},
        progress=False,
    )
    names = [column.name for column in result.columns]
    assert sorted(names[1:-1]) == ["error 20%", "rank 1", "rank 2"]
    assert [names[0], names[-1]] == ["no LoRA", "whole LoRA"]
    latents: dict[str, list[torch.Tensor]] = {}
    for column in result.columns:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / name)
        file = lora
        if column.options or lora.is_dir():
            file = tmp_path / f"{column.name}.safetensors"
            ml.export(lora, file, **(column.options or {"rank": 4}))
        if column.name != "no LoRA":
            assert column.size == (file.stat().st_size if column.options else ml.open(lora).size)
            if (name, keys) == ("flux", "kohya"):  # diffusers splits layers of the full size only
                exported = file
                file = tmp_path / f"{column.name} diffusers.safetensors"
                ml.export(exported, file, key_format="diffusers")
            pipeline.load_lora_weights(str(file))
        latents[column.name] = []
        rows = [(prompt, seed) for prompt in prompts for seed in seeds]
        for (prompt, seed), picture in zip(rows, column.pictures, strict=True):
            expected = draw(pipeline, prompt, seed, output_type="pil", **video)
            difference = np.asarray(expected, dtype=int) - np.asarray(picture.image, dtype=int)
            assert np.abs(difference).max() <= 1  # the conversion of keys rounds
            drawn = draw(pipeline, prompt, seed, output_type="latent", **video)
            latents[column.name].append(drawn)
    for column in result.columns:
        for index, picture in enumerate(column.pictures):
            whole, base = latents["whole LoRA"][index], latents["no LoRA"][index]
            distance = (latents[column.name][index] - whole).norm() / (base - whole).norm()
            assert picture.distance == pytest.approx(float(distance), abs=1e-3)
    assert result.columns[1].distance > 0.1


def test_a_trained_rank_is_marked_and_not_suggested(folder: Path, tmp_path: Path) -> None:
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder / "flux/transformer")
    adapter = ml.load(model, folder / "flux nested")
    A_and_B = {name: (A[:2], B[:, :2]) for name, (A, B) in adapter.factors.copy().items()}
    adapter.set_small_factors(A_and_B)  # as good as the prefix
    adapter.save(tmp_path / "trained")
    result = ml.preview(
        tmp_path / "trained",
        folder / "flux",
        ["a dog"],
        [2, 3],
        within="99%",
        pipeline_args=ARGUMENTS,
        progress=False,
    )
    assert [column.name for column in result.columns[1:-1]] == ["rank 2, trained", "rank 3"]
    assert result.columns[1].distance < 0.99
    assert result.suggestion is result.columns[2]
    ml.export(tmp_path / "trained", tmp_path / "whole.safetensors", rank=4)
    assert result.columns[-1].size == (tmp_path / "whole.safetensors").stat().st_size


def test_the_sheet_and_the_numbers_are_written_and_nothing_else_is_replaced(
    folder: Path, tmp_path: Path
) -> None:
    words = [
        "preview",
        str(folder / "flux diffusers.safetensors"),
        f"--model={folder / 'flux'}",
        "--prompt=a dog",
        "--prompt=a fox",
        "--within=99%",
        "--errors=20%,90%",
        "--pipeline-args=num_inference_steps=2,prompt_2=dark, blurry,height=16,width=16",
        f"--output={tmp_path / 'sheet.png'}",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "sheet.json").read_text())
    columns = {column["name"]: column for column in numbers["columns"]}
    assert list(columns) == ["no LoRA", "error 90%", "error 20%", "whole LoRA"]
    assert numbers["pipeline_args"]["prompt_2"] == "dark, blurry"
    assert columns["no LoRA"]["distance"] == 1
    assert columns["whole LoRA"]["distance"] == 0
    assert columns["whole LoRA"]["psnr"] is None
    assert [picture["prompt"] for picture in columns["error 90%"]["pictures"]] == ["a dog", "a fox"]
    (next_command,) = [line for line in result.output.splitlines() if line.startswith("Next: ")]
    assert f"--{numbers['suggestion']} -o" in next_command
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 16
        assert sheet.height > 2 * 16

    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, MatryoshkaError)
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    for name in ("sheet.png", "sheet.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"of another program")
        result = CliRunner().invoke(app, [*words, "--force"])
        assert isinstance(result.exception, MatryoshkaError)
        assert (tmp_path / name).read_bytes() == b"of another program"
        (tmp_path / name).write_bytes(content)
    assert {file.name for file in tmp_path.iterdir()} == {"sheet.png", "sheet.json"}


def test_pictures_are_kept_if_the_output_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "flux")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    scheduler_step = pipeline.scheduler.step

    def step(*args: Any, **options: Any) -> Any:
        (tmp_path / "sheet.json").write_text("of another program")
        return scheduler_step(*args, **options)

    pipeline.scheduler.step = step
    with pytest.raises(MatryoshkaError, match="instead"):
        ml.preview(
            folder / "flux diffusers.safetensors",
            pipeline,
            ["a"],
            [1],
            pipeline_args=ARGUMENTS,
            output=tmp_path / "sheet.png",
            progress=False,
        )
    assert (tmp_path / "sheet.json").read_text() == "of another program"
    (sheet,) = (tmp_path / "temporary").glob("*/sheet.png")
    assert Image.open(sheet).width > 3 * 16
    assert len(json.loads(sheet.with_suffix(".json").read_text())["columns"]) == 3


def test_layers_that_the_pipeline_lacks_are_reported(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "flux diffusers.safetensors")
    for factor in ("A", "B"):
        key = f"transformer.transformer_blocks.0.attn.to_q.lora_{factor}.weight"
        tensors[key.replace("blocks.0", "blocks.7")] = tensors[key].clone()
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "flux")
    arguments = {"pipeline_args": ARGUMENTS, "progress": False}
    result = ml.preview(tmp_path / "lora.safetensors", pipeline, ["a"], [1], **arguments)
    assert "1 of" in result.notes[0]
    source = folder / "flux diffusers.safetensors"
    assert ml.preview(source, pipeline, ["a"], [1], **arguments).notes == ()


@pytest.mark.parametrize(
    ("lora", "changes", "match"),
    [
        ("flux", {"prompts": []}, "prompts"),
        ("flux", {"output": "sheet.jpg"}, "PNG"),
        ("flux", {"ranks": [9]}, "rank"),
        ("flux", {"pipeline_args": {"steps": 3}}, "steps"),
        ("flux", {"pipeline_args": {"height": -8}}, "draw"),
        ("flux", {"pipeline_args": {"prompt": "a"}}, "prompt"),
        ("flux", {"pipeline_args": {"return_dict": False}}, "returns"),
        ("wan", {}, "the model that the LoRA is for"),
        ("language model", {}, "image model"),
        ("zero", {}, "equal"),
    ],
)
def test_a_bad_argument_is_one_error_and_the_pipeline_stays_as_it_is(
    lora: str, changes: dict[str, Any], match: str, folder: Path, tmp_path: Path
) -> None:
    source = folder / f"{lora} diffusers.safetensors"
    if lora == "language model":
        source = tmp_path / "adapter"
        plain_adapter(source)
    elif lora == "zero":
        source = tmp_path / "zero.safetensors"
        tensors = load_file(folder / "flux diffusers.safetensors")
        save_file({key: tensor * ("lora_A" in key) for key, tensor in tensors.items()}, source)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "flux")
    expected = draw(pipeline, "a dog", 0)
    arguments = {"prompts": ["a dog"], "pipeline_args": ARGUMENTS, "progress": False, **changes}
    with pytest.raises(MatryoshkaError, match=match):
        ml.preview(source, pipeline, **arguments)
    assert draw(pipeline, "a dog", 0) == expected


@pytest.mark.parametrize("model", ["empty", "with a LoRA", "without LoRAs"])
def test_a_pipeline_that_cannot_be_used_is_an_error(
    model: str, folder: Path, tmp_path: Path
) -> None:
    lora = folder / "flux diffusers.safetensors"
    pipeline: Any = tmp_path
    if model == "with a LoRA":
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "flux")
        pipeline.load_lora_weights(str(lora))
    elif model == "without LoRAs":
        pipeline = diffusers.DDPMPipeline(None, diffusers.DDPMScheduler())
    with pytest.raises(MatryoshkaError, match="pipeline"):
        ml.preview(lora, pipeline, ["a dog"], progress=False)


def test_structural_similarity_is_its_formula() -> None:
    random = np.random.default_rng(0)
    picture = random.random((3, 9, 11))
    other = np.clip(picture + 0.1 * random.standard_normal(picture.shape), 0, 1)
    values: list[float] = []
    for channel, row, column in np.ndindex(3, 3, 5):
        window = np.s_[channel, row : row + 7, column : column + 7]
        x, y = picture[window].ravel(), other[window].ravel()
        (variance_x, covariance), (_, variance_y) = np.cov(x, y)
        luminance = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
        values.append(luminance * (2 * covariance + 9e-4) / (variance_x + variance_y + 9e-4))
    similarity = structural_similarity(torch.tensor(picture), torch.tensor(other))
    assert similarity == pytest.approx(np.mean(values), abs=1e-12)
