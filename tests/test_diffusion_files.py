"""Files of image models: written by diffusers and PEFT, cut here, and read again by diffusers' own loader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_files import (
    FluxPipeline,
    Pipeline,
    WanPipeline,
    deltas,
    merged_outputs,
    metadata_of,
    save_flux,
    save_kohya,
    save_old_text,
    save_sd,
    save_wan,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_lora import MatryoshkaError, export, reorder

MIXED = {"rank_pattern": {"to_q": 3, "conv1": 2, "fc1": 5}}
WRITERS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "diffusers": (Pipeline, save_sd),
    "alpha in the metadata": (Pipeline, lambda folder: save_sd(folder, metadata=True, lora_alpha=3)),
    "mixed ranks": (Pipeline, lambda folder: save_sd(folder, metadata=True, lora_alpha=3, **MIXED)),
    "mixed ranks, no metadata": (
        Pipeline,
        lambda folder: save_sd(folder, lora_alpha=6, alpha_pattern=MIXED["rank_pattern"], **MIXED),
    ),
    "down and up": (Pipeline, lambda folder: save_sd(folder, old=True)),
    "flux": (FluxPipeline, lambda folder: save_flux(folder, lora_alpha=12)),
    "kohya": (Pipeline, lambda folder: (save_kohya(folder / "lora.safetensors"), None)),
}


@pytest.fixture(scope="module", params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline and a file with a LoRA for it."""
    pipeline, save = WRITERS[request.param]
    return pipeline, save(tmp_path_factory.mktemp("files"))[0]


def loaded(pipeline: Any, file: Path) -> Tensor:
    """The outputs with a file as diffusers itself reads it."""
    pipe = pipeline()
    pipe.load_lora_weights(str(file))
    found: Tensor = pipe.outputs()
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def best(update: np.ndarray, rank: int) -> np.ndarray:
    """NumPy's best matrix of a rank."""
    u, s, vh = np.linalg.svd(update, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def ranks_of(file: Path) -> dict[str, int]:
    """By the name of the pair."""
    endings = (".lora_down.weight", ".lora_A.weight", ".down.weight")
    return {
        key.removesuffix(ending): len(tensor)
        for key, tensor in load_file(file).items()
        for ending in endings
        if key.endswith(ending)
    }


def test_at_full_rank_the_model_computes_the_same(written: tuple[Any, Path], tmp_path: Path) -> None:
    pipeline, file = written
    before, without = loaded(pipeline, file), pipeline().outputs()
    assert distance(without, before) > 0.1
    reorder(file, tmp_path / "ordered.safetensors")
    assert distance(loaded(pipeline, tmp_path / "ordered.safetensors"), before) < 1e-5
    assert load_file(file).keys() == load_file(tmp_path / "ordered.safetensors").keys()
    assert ranks_of(file) == ranks_of(tmp_path / "ordered.safetensors")


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_at_each_rank_every_layer_is_numpys_best(written: tuple[Any, Path], tmp_path: Path, rank: int) -> None:
    pipeline, file = written
    # What each layer does to the weights, from diffusers' own reading of the file.
    pipe = pipeline()
    pipe.load_lora_weights(str(file))
    wanted, scales = {}, set()
    for part in ("unet", "transformer", "text_encoder"):
        for name, module in (getattr(pipe, part, None) or torch.nn.Module()).named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                (own,) = module.lora_A
                scales.add(module.scaling[own])
                A, B = module.lora_A[own].weight.double().flatten(1), module.lora_B[own].weight.double().flatten(1)
                wanted[f"{part}.{name}"] = (B @ A * module.scaling[own]).detach().numpy()
    made = export(file, tmp_path / "cut.safetensors", rank=rank)
    updates = {name: best(update, rank) for name, update in wanted.items()}
    lost = sum(((wanted[name] - update) ** 2).sum() for name, update in updates.items())
    whole = sum((update**2).sum() for update in wanted.values())
    assert made.error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    found = loaded(pipeline, tmp_path / "cut.safetensors")
    assert distance(found, merged_outputs(pipeline(), updates)) < 1e-5
    # And from the file alone.
    again = deltas(tmp_path / "cut.safetensors")
    assert len(again) == len(wanted)
    assert distance(merged_outputs(pipeline(), again), found) < 1e-5


def test_mixed_ranks_have_the_right_scale_in_diffusers(written: tuple[Any, Path], tmp_path: Path) -> None:
    pipeline, file = written
    made = export(file, tmp_path / "cut.safetensors", keep="70%")
    assert len(set(ranks_of(tmp_path / "cut.safetensors").values())) > 1
    assert made.chosen is not None
    assert made.chosen.kept >= 0.7
    found = loaded(pipeline, tmp_path / "cut.safetensors")
    assert distance(found, merged_outputs(pipeline(), deltas(tmp_path / "cut.safetensors"))) < 1e-5


def test_names_of_a_model_s_authors_get_no_metadata(tmp_path: Path) -> None:
    """diffusers renames them, and would look for its own names there."""
    export(save_wan(tmp_path / "wan.safetensors"), tmp_path / "cut.safetensors", keep="90%")
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "cut.safetensors")
    pipe = WanPipeline()
    pipe.load_lora_weights(str(tmp_path / "cut.safetensors"))
    found = [module for module in pipe.transformer.modules() if len(getattr(module, "lora_A", ()))]
    assert len(found) == 10
    assert len({rank for module in found for rank in module.r.values()}) > 1
    assert {scale for module in found for scale in module.scaling.values()} == {1.0}


def test_a_cut_at_full_rank_of_a_cut_is_the_cut(written: tuple[Any, Path], tmp_path: Path) -> None:
    _, file = written
    export(file, tmp_path / "a.safetensors", rank=2)
    export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=2)
    first, second = deltas(tmp_path / "a.safetensors"), deltas(tmp_path / "b.safetensors")
    for name, update in first.items():
        np.testing.assert_allclose(second[name], update, atol=1e-6 * np.abs(update).max())


def test_linear_layers_and_convolutions_have_ranks_of_their_own(tmp_path: Path) -> None:
    file = save_kohya(tmp_path / "kohya.safetensors")
    export(file, tmp_path / "cut.safetensors", rank=5, conv_rank=2)
    for name, rank in ranks_of(tmp_path / "cut.safetensors").items():
        assert rank == (2 if "conv1" in name else 5)
    metadata = metadata_of(tmp_path / "cut.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("5", "5")
    args = json.loads(metadata["ss_network_args"])
    assert args == {"conv_dim": "2", "conv_alpha": "5", "dropout": "0.1"}
    assert metadata["ss_training_comment"] == "a test"


def test_kohya_s_hash_is_that_of_the_tensors(tmp_path: Path) -> None:
    from hashlib import sha256

    file = save_kohya(tmp_path / "kohya.safetensors")
    export(file, tmp_path / "cut.safetensors", rank=3)
    data, metadata = (tmp_path / "cut.safetensors").read_bytes(), metadata_of(tmp_path / "cut.safetensors")
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == sha256(data[start:]).hexdigest()
    assert "sshs_legacy_hash" not in metadata
    ours = json.loads(metadata["matryoshka_lora"])
    before, after = deltas(file), deltas(tmp_path / "cut.safetensors")
    lost = sum(((before[name] - after[name]) ** 2).sum() for name in before)
    whole = sum((update**2).sum() for update in before.values())
    assert float(ours["error"]) == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert float(ours["kept"]) == pytest.approx(1 - lost / whole, abs=2e-6)
    assert (ours["did"], ours["largest_rank_before"]) == ("rank 3", 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_rounds_little(tmp_path: Path, dtype: torch.dtype) -> None:
    file = save_kohya(tmp_path / "kohya.safetensors", dtype=dtype)
    export(file, tmp_path / "cut.safetensors", rank=3)
    assert {t.dtype for k, t in load_file(tmp_path / "cut.safetensors").items() if "alpha" not in k} == {dtype}
    before, after = deltas(file), deltas(tmp_path / "cut.safetensors")
    for name, update in before.items():
        wanted = best(update, 3)
        assert np.linalg.norm(after[name] - wanted) < 1e-2 * np.linalg.norm(update)


def test_styles_there_and_back_are_exact(tmp_path: Path) -> None:
    """The ranks are powers of two, and so are the scales: no number is rounded."""
    pattern = {"rank_pattern": {"to_q": 2, "proj_out": 8}, "r": 4, "lora_alpha": 4}
    file, before = save_flux(tmp_path, **pattern)
    original = load_file(file)
    export(file, tmp_path / "kohya.safetensors", style="kohya")
    assert all(key.startswith("lora_transformer_") for key in load_file(tmp_path / "kohya.safetensors"))
    # Flux's loader of kohya's style wants all layers that OneTrainer has; the keys are read here.
    found = merged_outputs(FluxPipeline(), deltas(tmp_path / "kohya.safetensors"))
    assert distance(found, before) < 1e-5
    export(file, tmp_path / "folder", style="peft")
    pipe = FluxPipeline()
    PeftModel.from_pretrained(pipe.transformer, str(tmp_path / "folder"))
    assert distance(pipe.outputs(), before) < 1e-6
    export(tmp_path / "folder", tmp_path / "back.safetensors", style="diffusers")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == original.keys()
    assert all(back[key].equal(original[key]) for key in back if "lora_A" in key)
    export(tmp_path / "folder", tmp_path / "second.safetensors", style="kohya")
    assert tensors_equal(load_file(tmp_path / "second.safetensors"), load_file(tmp_path / "kohya.safetensors"))
    assert distance(loaded(FluxPipeline, tmp_path / "back.safetensors"), before) < 1e-6
    export(tmp_path / "back.safetensors", tmp_path / "folder-2", style="peft")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("folder", "folder-2"))
    assert tensors_equal(first, second)


def tensors_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def test_kohya_s_names_become_diffusers_by_the_model(tmp_path: Path) -> None:
    file, pipe = save_kohya(tmp_path / "kohya.safetensors"), Pipeline()
    with pytest.raises(MatryoshkaError, match="where the dots"):
        export(file, tmp_path / "other.safetensors", style="diffusers")
    pipe.unet.save_pretrained(tmp_path / "model" / "unet")
    pipe.text_encoder.save_pretrained(tmp_path / "model" / "text_encoder")
    export(file, tmp_path / "other.safetensors", style="diffusers", model=str(tmp_path / "model"))
    assert "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight" in load_file(tmp_path / "other.safetensors")
    assert distance(loaded(Pipeline, tmp_path / "other.safetensors"), loaded(Pipeline, file)) < 1e-6
    export(tmp_path / "other.safetensors", tmp_path / "back.safetensors", style="kohya")
    first, second = deltas(file), deltas(tmp_path / "back.safetensors")
    assert {re.sub("text_model_", "", name) for name in first} == {re.sub("text_model_", "", name) for name in second}
    assert distance(merged_outputs(Pipeline(), second), merged_outputs(Pipeline(), first)) < 1e-6


def test_old_names_of_a_text_encoder_become_those_of_its_modules(tmp_path: Path) -> None:
    old = save_old_text(tmp_path / "old.safetensors")
    export(old, tmp_path / "new.safetensors", style="diffusers")
    pipe, wanted = Pipeline(), load_file(old)
    pipe.load_lora_weights(str(tmp_path / "new.safetensors"))
    found = {name: module for name, module in pipe.text_encoder.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == 8
    for name, module in found.items():
        inside, last = name.removeprefix("text_model.").rsplit(".", 1)
        old_name = f"{inside}.to_{last.removesuffix('_proj')}_lora"
        (factor,) = module.lora_A.values()
        assert factor.weight.equal(wanted[f"text_encoder.text_model.{old_name}.down.weight"])
