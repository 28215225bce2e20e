"""LoRAs of a fine-tuning against NumPy's SVD of what changed, and the tuned model itself."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file
from strangers import IDS, file_updates, logits, updates
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from matryoshka_lora import MatryoshkaError, NotFiniteError, extract, load
from matryoshka_lora.extracting import _factorise

CHANGED = ("q_proj", "down_proj", "o_proj")


def tuned_of(model: Any, names: tuple[str, ...] = CHANGED, size: float = 0.05) -> Any:
    """Change some weights, the more in the first directions."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(word in name for word in names):
                matrix = torch.randn(weight.shape, generator=generator)
                if matrix.ndim > 1:
                    u, s, v = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
                    matrix = (u * s * 0.8 ** torch.arange(len(s))) @ v
                weight += size * matrix.reshape(weight.shape)
    return model


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model before and after, on the disk."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tuned_of(tiny_llama(), (*CHANGED, "model.norm", "lm_head")).save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def change_of(models: tuple[Path, Path]) -> dict[str, np.ndarray]:
    old, new = (load_file(folder / "model.safetensors") for folder in models)
    return {
        name: (new[name].double() - old[name].double()).numpy()
        for name in old
        if any(word in name for word in CHANGED)
    }


def test_every_rank_is_the_best_one_of_the_change(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    made = extract(*models, tmp_path / "lora", rank=16)
    wanted = change_of(models)
    values = [np.linalg.svd(each, compute_uv=False) for each in wanted.values()]
    whole = sum(float((each**2).sum()) for each in values)
    for rank in (1, 2, 4, 8, 16):
        optimum = (sum(float((each[rank:] ** 2).sum()) for each in values) / whole) ** 0.5
        assert made.errors[rank] == pytest.approx(optimum, rel=1e-4)
    found = updates(tmp_path / "lora")
    assert found.keys() == wanted.keys()
    left = sum(float(((wanted[name] - found[name]) ** 2).sum()) for name in wanted)
    assert made.errors[16] == pytest.approx((left / whole) ** 0.5, rel=1e-4)
    assert load(tiny_llama(), tmp_path / "lora", rank=2).order == "svd"
    assert {*made.others} == {"model.norm.weight", "lm_head.weight"}


TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True}


@pytest.mark.parametrize(
    ("before", "after", "whole", "changed"),
    [
        ({}, {}, "lm_head", ["lm_head"]),
        (TIED, TIED, "embed_tokens", ["embed_tokens"]),
        (TIED, {}, "embed_tokens", ["embed_tokens", "lm_head"]),
        (BIASES, BIASES, "k_proj", ["k_proj"]),
        (BIASES, BIASES, "k_proj", ["k_proj.bias"]),
    ],
)
def test_with_all_ranks_and_parts_it_is_the_tuned_model(
    tmp_path: Path, before: Any, after: Any, whole: str, changed: list[str]
) -> None:
    """PEFT gives the head of its own a weight that it shares with the embedding."""
    base, wanted = tiny_llama(**before), tiny_llama(**after)
    wanted.load_state_dict(base.state_dict())
    base.save_pretrained(tmp_path / "base")
    names = ("q_proj.weight", "down_proj", "o_proj.weight", "model.norm", *changed)
    tuned_of(wanted, names).save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", 200, whole=["norm", whole])
    found = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert torch.allclose(logits(found), logits(wanted), atol=1e-4)


def test_t5_shares_its_embedding_with_more_than_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    base = T5ForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    wanted = tuned_of(deepcopy(base), ("shared", "q.weight"), 0.5)
    wanted.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", 16, whole=["shared"])
    found = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    said = [model(input_ids=IDS, decoder_input_ids=IDS).logits for model in (found, wanted)]
    assert torch.allclose(*said, atol=1e-4)


def test_a_share_and_a_size_choose_a_rank_for_each_layer(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    made = extract(*models, tmp_path / "share", keep="90%")
    for name, D in change_of(models).items():
        squares = np.linalg.svd(D, compute_uv=False) ** 2
        needed = int((squares.cumsum() < 0.9 * squares.sum()).sum()) + 1
        assert made.ranks[name.removesuffix(".weight")] == needed
    extract(*models, tmp_path / "size", max_bytes=30_000)
    assert (tmp_path / "size/adapter_model.safetensors").stat().st_size <= 30_000
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "size")


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("shape", [(300, 500), (600, 400)])
def test_a_large_layer_is_nearly_as_good_as_a_full_svd(
    share: float, shape: tuple[int, int]
) -> None:
    """By the randomised way, which small layers do not take."""
    from matryoshka_lora.extracting import Weight
    from matryoshka_lora.files.tensors import Stored

    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 300, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 300, generator=generator))
    values = torch.arange(1, 301) ** -0.7
    D = u * values @ v.T
    weight = Weight(Stored.of(torch.zeros(shape)), Stored.of(D), transposed=False)
    _, change = _factorise("layer", weight, 40, None)
    assert change.left == pytest.approx(float((values[40:] ** 2).sum()), rel=2e-3)
    _, change = _factorise("layer", weight, None, share)
    assert change.left <= (1 - share) * change.square * (1 + 1e-4)


def test_gpt2_keeps_its_weights_transposed(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64)

    def base() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)

    base().save_pretrained(tmp_path / "base")
    wanted = tuned_of(base(), ("c_attn.weight", "c_proj.weight"))
    wanted.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=64)
    found = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert torch.allclose(logits(found), logits(wanted), atol=1e-4)


@pytest.mark.parametrize(
    ("style", "key"), [("diffusers", "unet.mid.conv"), ("kohya", "lora_unet_")]
)
def test_image_models_get_a_file(tmp_path: Path, style: Any, key: str) -> None:
    shapes = {"mid.conv": (8, 6, 3, 3), "mid.to_q": (10, 6), "mid.norm": (6,)}
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(name))
        state = {f"{module}.weight": torch.randn(shape) for module, shape in shapes.items()}
        save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
    file, config = tmp_path / "lora.safetensors", tmp_path / "base/config.json"
    config.write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(MatryoshkaError, match="kohya does not name diffusers' transformers"):
        extract(tmp_path / "base", tmp_path / "tuned", file, rank=6, style="kohya")
    config.write_text('{"_class_name": "UNet2DConditionModel"}')
    extract(tmp_path / "base", tmp_path / "tuned", file, rank=6, style=style)
    old, new = (
        load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("base", "tuned")
    )
    found = file_updates(file)
    conv = next(each for name, each in found.items() if name.endswith("conv"))
    assert any(name.startswith(key) for name in found)
    D = (new["mid.conv.weight"] - old["mid.conv.weight"]).flatten(1).double().numpy()
    u, s, v = np.linalg.svd(D, full_matrices=False)
    assert np.allclose(conv, (u[:, :6] * s[:6]) @ v[:6], atol=1e-4)


def test_rounding_is_no_change(tmp_path: Path) -> None:
    """A layer that was only rounded is left out, and in others its noise is told."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tuned_of(tiny_llama(), ("q_proj",), 1e-3).bfloat16().save_pretrained(tmp_path / "tuned")
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=2)
    assert all("q_proj" in name for name in made.ranks)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    exact = tuned_of(tiny_llama(), ("q_proj",), 1e-3).state_dict()
    squares = {"noise": 0.0, "change": 0.0}
    for name in (f"{name}.weight" for name in made.ranks):
        squares["noise"] += float(((new[name].double() - exact[name]) ** 2).sum())
        squares["change"] += float(((new[name].double() - old[name]) ** 2).sum())
    assert made.noise == pytest.approx(squares["noise"] / squares["change"], rel=0.1)
    assert "is rounding of the weights" in "\n".join(made.lines())


def test_a_run_that_was_killed_goes_on(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()

    def interrupted(limit: int) -> Callable[..., Any]:
        def factorise(name: str, *rest: Any) -> Any:
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(name)
            return _factorise(name, *rest)

        return factorise

    monkeypatch.setattr("matryoshka_lora.extracting._factorise", interrupted(4))
    with pytest.raises(KeyboardInterrupt):
        extract(*models, tmp_path / "lora", rank=4)
    assert not (tmp_path / "lora").exists()
    monkeypatch.setattr("matryoshka_lora.extracting._factorise", interrupted(99))
    made = extract(*models, tmp_path / "lora", rank=4)
    assert len(done) == len({*done}) == len(made.ranks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "tuned"]
    monkeypatch.setattr("matryoshka_lora.extracting._factorise", interrupted(len(done) + 4))
    with pytest.raises(KeyboardInterrupt):
        extract(*models, tmp_path / "other", rank=4)
    monkeypatch.setattr("matryoshka_lora.extracting._factorise", _factorise)
    other = extract(*models, tmp_path / "other", rank=4, whole=["layers.0.mlp.down_proj"])
    assert made.ranks.keys() - other.ranks.keys() == {"model.layers.0.mlp.down_proj"}
    wanted, found = updates(tmp_path / "lora"), updates(tmp_path / "other")
    assert all(np.allclose(found[f"{x}.weight"], wanted[f"{x}.weight"]) for x in other.ranks)


def _shard(tuned: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    (tuned / "model.safetensors").rename(tuned / "model-1.safetensors")


def _cut(tuned: Path) -> None:
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _edit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(tuned: Path) -> None:
        save_file(change(load_file(tuned / "model.safetensors")), tuned / "model.safetensors")

    return edit


Q = "model.layers.0.self_attn.q_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard": (_shard, "there is no file .*model-2.safetensors"),
    "cut": (_cut, "is damaged"),
    "nan": (_edit(lambda s: {**s, Q: s[Q] * torch.nan}), "q_proj hold NaN or infinity"),
    "shape": (_edit(lambda s: {**s, Q: s[Q][:8].clone()}), "they are no versions of one"),
    "quantised": (
        lambda tuned: _edit(lambda s: {**s, Q: s[Q].to(torch.float8_e4m3fn)})(
            tuned.parent / "base"
        ),
        r"q_proj.weight is torch.float8_e4m3fn .*quantised",
    ),
    "quantised and tuned": (
        _edit(lambda s: {**s, Q: s[Q].to(torch.float8_e4m3fn)}),
        r"and torch.float8_e4m3fn .*quantised",
    ),
    "fewer layers": (
        _edit(lambda s: {k: t for k, t in s.items() if "layers.1" not in k}),
        r"layers.1.*\] and none: they are no versions of one",
    ),
    "other": (_edit(lambda s: {f"x.{k}": t for k, t in s.items()}), "have no weight in common"),
    "none": (lambda tuned: (tuned / "model.safetensors").unlink(), "holds no model.safetensors"),
    "index": (
        lambda tuned: (
            (tuned / "model.safetensors").unlink(),
            (tuned / "x.safetensors.index.json").write_text("{}"),
        ),
        "holds no model.safetensors",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_models_are_refused(tmp_path: Path, models: tuple[Path, Path], what: str) -> None:
    breaks, message = BROKEN[what]
    breaks(models[1])
    with pytest.raises((MatryoshkaError, NotFiniteError), match=message):
        extract(*models, tmp_path / "lora", rank=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "target": "lora.safetensors"}, "no style a folder"),
        ({"rank": 4, "style": "kohya", "target": "x.safetensors"}, "which part of a pipeline"),
        ({}, "say how much to keep"),
        ({"rank": 4, "whole": ["embed"]}, "'embed' is no module of the model that changed"),
        ({"keep": "200%"}, "is no share"),
        ({"max_bytes": 100}, "the smallest file"),
        ({"rank": 4, "style": "kohya"}, "a style makes a .safetensors file"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(
    tmp_path: Path, models: tuple[Path, Path], options: Any, message: str
) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        extract(*models, tmp_path / options.pop("target", "lora"), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
    with pytest.raises(MatryoshkaError, match=r"no convolution changed$"):
        extract(models[0], models[0], tmp_path / "lora", rank=4)


@pytest.mark.parametrize("forced", [(), ("--force",)])
@pytest.mark.parametrize("command", ["combine", "extract"])
def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, models: tuple[Path, Path], command: str, forced: tuple[str, ...]
) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses the write."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    sources = models
    if command == "combine":
        extract(*models, tmp_path / "one", rank=16)
        sources = (tmp_path / "one", tmp_path / "one")
    if forced:
        extract(*models, tmp_path / "out", rank=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = [sys.executable, "-m", "matryoshka_lora", command, *map(str, sources), *forced]
    line += ["--rank", "16", "-o", str(tmp_path / "out")]
    ran = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert ran.returncode == 1
    assert "cannot write" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
