"""Single files of image models, read by their keys; `tests/readers` has diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strangers import STYLES, best, file_updates
from torch import Tensor, nn

from matryoshka_lora import MatryoshkaError, export, reorder
from matryoshka_lora.files.peft import open_adapter

CONV = "down_blocks.0.resnets.0.conv1"
# Module, rank, inputs, outputs, kernel.
LAYERS = (
    ("unet.down_blocks.0.attn1.to_q", 8, 20, 12, ()),
    ("unet.mid_block.attn1.to_out.0", 3, 10, 16, ()),
    (f"unet.{CONV}", 4, 6, 8, (3, 3)),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 5, 7, 9, ()),
)
WORDS = {"unet.": "lora_unet_", "text_encoder.": "lora_te_"}


def kohya_name(module: str) -> str:
    part, _, inside = module.partition(".")
    return WORDS[f"{part}."] + inside.replace(".", "_")


def lora_file(
    file: Path, style: str, alpha: float | None = 6.0, dtype: Any = torch.float32
) -> Path:
    """Write a LoRA with random factors and ranks by layer."""
    generator, state = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for module, rank, wide, tall, kernel in LAYERS:
        name = kohya_name(module) if style == "kohya" else module
        A = torch.randn(rank, wide, *kernel, generator=generator)
        B = torch.randn(tall, rank, *([1] * len(kernel)), generator=generator)
        state[name + STYLES[style][0]], state[name + STYLES[style][1]] = A.to(dtype), B.to(dtype)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    metadata = {
        **{"ss_network_dim": "8", "ss_network_alpha": str(alpha), "ss_training_comment": "a test"},
        "sshs_model_hash": "of the old tensors",
    }
    save_file(state, file, metadata)
    return file


def ranks_of(file: Path) -> dict[str, int]:
    downs = tuple(down for down, _ in STYLES.values())
    return {k: len(t) for k, t in load_file(file).items() if k.endswith(downs)}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [6.0, None])
def test_at_each_rank_every_layer_is_numpys_best(tmp_path: Path, style: str, alpha: Any) -> None:
    file = lora_file(tmp_path / "lora.safetensors", style, alpha)
    given = file_updates(file)
    reorder(file, tmp_path / "ordered.safetensors")
    assert ranks_of(tmp_path / "ordered.safetensors") == ranks_of(file)
    wishes: tuple[Any, ...] = ({"rank": 1}, {"rank": 5}, {"keep": "80%"}, {"max_bytes": 5000})
    for number, wish in enumerate((*wishes, {"max_bytes": "1MB"})):
        source, out = ("lora", "ordered")[number % 2], tmp_path / f"{number}.safetensors"
        made = export(tmp_path / f"{source}.safetensors", out, **wish)
        found, ranks, lost = file_updates(out), ranks_of(out), 0.0
        assert load_file(out).keys() == load_file(file).keys()
        for name, rank in zip(found, ranks.values(), strict=True):
            wanted = best(given[name], rank)
            np.testing.assert_allclose(found[name], wanted, atol=1e-5 * np.abs(given[name]).max())
            lost += ((wanted - given[name]) ** 2).sum()
        whole = sum((update**2).sum() for update in given.values())
        assert made.error == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
        assert made.after == out.stat().st_size
        if "max_bytes" in wish:
            limit = wish["max_bytes"]
            assert made.after <= limit if isinstance(limit, int) else ranks == ranks_of(file)


def test_one_alpha_and_the_metadata_are_renewed(tmp_path: Path) -> None:
    file, out = lora_file(tmp_path / "lora.safetensors", "kohya"), tmp_path / "cut.safetensors"
    export(file, out, 5)
    metadata = metadata_of(out)
    assert {float(t) for key, t in load_file(out).items() if key.endswith(".alpha")} == {5.0}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "5")
    assert metadata["ss_training_comment"] == "a test"
    assert "sshs_model_hash" not in metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_rounds_little(tmp_path: Path, dtype: torch.dtype) -> None:
    file = lora_file(tmp_path / "lora.safetensors", "kohya", dtype=dtype)
    export(file, tmp_path / "cut.safetensors", 3)
    state = load_file(tmp_path / "cut.safetensors")
    assert {t.dtype for key, t in state.items() if "alpha" not in key} == {dtype}
    given, found = file_updates(file), file_updates(tmp_path / "cut.safetensors")
    for name, update in given.items():
        error = np.linalg.norm(found[name] - best(update, 3))
        assert error < 1e-2 * np.linalg.norm(update)


PAIR = {"b.lora_down.weight": torch.ones(2, 3), "b.lora_up.weight": torch.ones(4, 2)}
BESIDE = {
    "DoRA": {**PAIR, "b.dora_scale": torch.ones(4, 1)},
    "an older DoRA": {k.replace(".lora_", "_lora."): x for k, x in PAIR.items()}
    | {"b.dora_scale": torch.ones(4, 1)},
    "another DoRA": {**PAIR, "b.magnitude": torch.ones(4)},
    "biases": {
        **{"b.lora_A.weight": torch.ones(2, 3), "b.lora_B.weight": torch.ones(4, 2)},
        "b.lora_B.bias": torch.ones(4),
    },
    "a third matrix": {**PAIR, "b.lora_mid.weight": torch.ones(2, 2)},
    "LoKr": {"b.lokr_w1": torch.ones(2, 2), "b.lokr_w2": torch.full((4, 4), float("nan"))},
    "odd dtypes": {
        **{"c": torch.arange(3, dtype=torch.int32), "d": torch.ones(5).to(torch.float8_e4m3fn)},
        **{"e": torch.tensor([True]), "f": torch.zeros(0)},
    },
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_no_pair_is_kept_and_said(tmp_path: Path, kind: str) -> None:
    file, out = lora_file(tmp_path / "lora.safetensors", "kohya"), tmp_path / "out.safetensors"
    save_file(load_file(file) | BESIDE[kind], file)
    made = export(file, out, 2)
    assert f"{len(BESIDE[kind])} tensors stay as they are" in made.lines()[-1]
    found = load_file(out)
    for key, tensor in BESIDE[kind].items():
        assert found[key].dtype == tensor.dtype
        bits = [each.reshape(-1).view(torch.uint8) for each in (found[key], tensor)]
        assert bits[0].equal(bits[1])
    with pytest.raises(MatryoshkaError, match="leave its style"):
        export(file, tmp_path / "other.safetensors", 2, style="diffusers")
    save_file(BESIDE[kind], file)
    why = (
        "DoRA, LoHa or LoKr, or has biases, and has no ranks"
        if "odd" not in kind
        else "keys are known: .* as 'c'"
    )
    with pytest.raises(MatryoshkaError, match=why):
        export(file, tmp_path / "other.safetensors", 2)
    assert not (tmp_path / "other.safetensors").exists()


def module_file(file: Path, *modules: str) -> dict[str, Tensor]:
    """Write a LoRA of rank 2 in diffusers' style."""
    state = {}
    for module in modules:
        state[f"{module}.lora_A.weight"] = torch.randn(2, 6)
        state[f"{module}.lora_B.weight"] = torch.randn(6, 2)
    save_file(state, file)
    return state


def test_another_style_changes_no_number(tmp_path: Path) -> None:
    file, kohya = tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors"
    state = module_file(file, LAYERS[0][0], LAYERS[1][0])
    export(file, kohya, style="kohya")
    found, given = file_updates(kohya), file_updates(file)
    assert {kohya_name(name) for name in given} == found.keys()
    for name, update in given.items():
        np.testing.assert_array_equal(found[kohya_name(name)], update)
    with pytest.raises(MatryoshkaError, match="where the dots of a module"):
        export(kohya, tmp_path / "x.safetensors", style="diffusers")
    export(file, tmp_path / "same.safetensors", style="diffusers")
    again = load_file(tmp_path / "same.safetensors")
    assert all(again[key].equal(state[key]) for key in state)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_have_the_names_that_comfyui_knows(tmp_path: Path, prefix: str) -> None:
    """transformers has dropped ``text_model.``, and ComfyUI maps only names that have it."""
    file, out = tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors"
    inside = f"{prefix}encoder.layers.3.self_attn.q_proj"
    parts = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for wanted in ({"text_encoder": "lora_te_"}, parts):
        module_file(file, *(f"{part}.{inside}" for part in wanted))
        export(file, out, style="kohya", force=True)
        names = {key.partition(".")[0] for key in load_file(out)}
        ending = "text_model_encoder_layers_3_self_attn_q_proj"
        assert names == {f"{word}{ending}" for word in wanted.values()}


@pytest.mark.parametrize(
    ("module", "style"),
    [("blocks.0.q", "diffusers"), ("prior.x", "kohya"), ("transformer.x", "kohya")],
)
def test_a_part_without_a_name_is_not_guessed(tmp_path: Path, module: str, style: Any) -> None:
    module_file(tmp_path / "lora.safetensors", module)
    with pytest.raises(MatryoshkaError, match=f"{style} has no name for {module}.*of a pipeline"):
        export(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", style=style)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv = nn.Linear(6, 6), nn.Conv2d(3, 4, 3)


def test_pefts_style_is_a_folder_that_peft_reads(tmp_path: Path) -> None:
    shapes = {"to_q": ((4, 6), (6, 4)), "conv": ((2, 3, 3, 3), (4, 2, 1, 1))}
    state = {
        f"transformer.{name}.lora_{x}.weight": torch.randn(shape)
        for name, pair in shapes.items()
        for x, shape in zip("AB", pair, strict=True)
    }
    fields = {"r": 4, "lora_alpha": 4, "rank_pattern": {"conv": 2}, "alpha_pattern": {"conv": 6}}
    metadata = json.dumps({f"transformer.{key}": value for key, value in fields.items()})
    file = tmp_path / "lora.safetensors"
    save_file(state, file, {"lora_adapter_metadata": metadata})
    export(file, tmp_path / "folder", style="peft")
    found = PeftModel.from_pretrained(Attention(), tmp_path / "folder")
    for name, scale in {"to_q": 1, "conv": 3}.items():
        module: Any = found.base_model.model.get_submodule(name)
        assert module.r["default"] == len(state[f"transformer.{name}.lora_A.weight"])
        delta = module.get_delta_weight("default").flatten(1).detach().numpy()
        wanted = file_updates(file)[f"transformer.{name}"] * scale
        np.testing.assert_allclose(delta, wanted, atol=1e-4)
    with pytest.raises(MatryoshkaError, match="becomes a folder"):
        export(file, tmp_path / "x.safetensors", style="peft")
    # Readers that know no metadata get the strength that they had.
    reorder(file, tmp_path / "ordered.safetensors")
    for name, update in file_updates(tmp_path / "ordered.safetensors").items():
        np.testing.assert_allclose(update, file_updates(file)[name], atol=1e-4)


def test_the_metadata_gives_mixed_ranks_their_scale(tmp_path: Path) -> None:
    """diffusers takes one alpha for all ranks where the metadata says none."""
    file = lora_file(tmp_path / "lora.safetensors", "diffusers", alpha=None)
    export(file, tmp_path / "cut.safetensors", 5)
    found = json.loads(metadata_of(tmp_path / "cut.safetensors")["lora_adapter_metadata"])
    assert (found["unet.r"], found["unet.lora_alpha"]) == (5, 5)
    assert found["unet.rank_pattern"] == found["unet.alpha_pattern"]
    assert set(found["unet.rank_pattern"].values()) == {3, 4}
    assert {layer.scale for layer in open_adapter(tmp_path / "cut.safetensors").layers} == {1.0}


@pytest.mark.parametrize("style", [None, "diffusers"])
@pytest.mark.parametrize("name", ["diffusion_model.blocks.0.q", "transformer.blocks.0.q"])
def test_an_alpha_counts_in_every_style(tmp_path: Path, name: str, style: Any) -> None:
    """Not the metadata. ComfyUI reads alphas alone; SimpleTuner writes a LoraConfig beside them."""
    file = tmp_path / "lora.safetensors"
    alpha = {f"{name}.alpha": torch.tensor(1.0)}
    config = {"lora_adapter_metadata": '{"r": 2, "transformer.r": 2, "transformer.lora_alpha": 2}'}
    save_file(module_file(file, name) | alpha, file, config if style is None else {})
    export(file, tmp_path / "cut.safetensors", 1, style=style)
    cut = file_updates(tmp_path / "cut.safetensors")[name]
    np.testing.assert_allclose(cut, best(file_updates(file)[name], 1), atol=1e-5)


def test_a_pipeline_with_some_doras_is_refused(tmp_path: Path) -> None:
    """diffusers reads the metadata's ranks as those of all layers, so a cut would not load."""
    file, bias = tmp_path / "lora.safetensors", {"transformer.k.lora_B.bias": torch.ones(6)}
    save_file(module_file(file, "transformer.q", "transformer.k") | bias, file)
    with pytest.raises(MatryoshkaError, match="or has biases"):
        export(file, tmp_path / "cut.safetensors", 1)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), [1.0, 2.0]])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: Any) -> None:
    file = lora_file(tmp_path / "lora.safetensors", "kohya")
    state = load_file(file)
    state[f"{kohya_name(LAYERS[0][0])}.alpha"] = torch.tensor(alpha)
    save_file(state, file)
    with pytest.raises(MatryoshkaError, match="is no positive number"):
        export(file, tmp_path / "x.safetensors", 2)
