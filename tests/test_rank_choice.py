"""Thresholds and sizes: what is chosen obeys the bound, and no smaller choice does; kohya's three by its formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lora_config, randomize, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Size

from matryoshka_lora import MatryoshkaError, Nesting, export, reorder
from matryoshka_lora.files import read_bytes
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.serving.info import describe
from matryoshka_lora.serving.ranks import Keep, by_size

LAYERS = {"lora_unet_a": (16, 40, 24), "lora_unet_b": (8, 12, 90), "lora_te_c": (12, 20, 20)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Layers whose singular values fall at different speeds; the last layer has three that are not zero."""
    generator, state = torch.Generator().manual_seed(0), {}
    for number, (name, (rank, wide, tall)) in enumerate(LAYERS.items()):
        fall = torch.logspace(0, -1 - number, rank)
        if name == "lora_te_c":
            fall[3:] = 0
        state[f"{name}.lora_down.weight"] = torch.randn(rank, wide, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(tall, rank, generator=generator) * fall
        state[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(state, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def values_of(file: Path) -> dict[str, np.ndarray]:
    """NumPy's singular values of the dense update."""
    state = load_file(file)
    return {
        name: np.linalg.svd(
            (state[f"{name}.lora_up.weight"].double() @ state[f"{name}.lora_down.weight"].double()).numpy(),
            compute_uv=False,
        )[:rank]
        * 4
        / rank
        for name, (rank, _, _) in LAYERS.items()
    }


def ranks_in(file: Path) -> dict[str, int]:
    return {key.split(".")[0]: len(tensor) for key, tensor in load_file(file).items() if "lora_down" in key}


# Whether a rank obeys a threshold: kohya's formulas, and the energy.
OBEYS: dict[str, Callable[[np.ndarray, int, float], bool]] = {
    "energy": lambda s, r, bound: bool((s[:r] ** 2).sum() >= bound * (s**2).sum() * (1 - 1e-12)),
    "sv_fro": lambda s, r, bound: bool((s[:r] ** 2).sum() ** 0.5 >= bound * (s**2).sum() ** 0.5 * (1 - 1e-12)),
    "sv_cumulative": lambda s, r, bound: bool(s[:r].sum() >= bound * s.sum() * (1 - 1e-12)),
    "sv_ratio": lambda s, r, bound: r == len(s) or bool(s[r] <= s[0] / bound),
}


@pytest.mark.parametrize(
    ("rule", "bound"),
    [
        *(("energy", bound) for bound in (0.5, 0.9, 0.99, 1.0)),
        *(("sv_fro", bound) for bound in (0.5, 0.9, 0.99)),
        *(("sv_cumulative", bound) for bound in (0.3, 0.8, 0.95)),
        *(("sv_ratio", bound) for bound in (1.0, 2.0, 20.0)),
    ],
)
def test_each_layer_has_the_smallest_rank_that_obeys(file: Path, tmp_path: Path, rule: str, bound: float) -> None:
    keep = f"{100 * bound}%" if rule == "energy" else f"{rule}={bound}"
    made = export(file, tmp_path / "cut.safetensors", keep=keep)
    values, found = values_of(file), ranks_in(tmp_path / "cut.safetensors")
    for name, rank in found.items():
        assert OBEYS[rule](values[name], rank, bound)
        assert rank == 1 or not OBEYS[rule](values[name], rank - 1, bound)
    assert made.chosen is not None
    assert made.chosen.ranks == found
    wanted = sum((s[: found[name]] ** 2).sum() for name, s in values.items()) / sum(
        (s**2).sum() for s in values.values()
    )
    assert made.chosen.kept == pytest.approx(wanted, rel=1e-6)


def test_a_rank_beside_a_threshold_is_the_most_that_a_layer_gets(file: Path, tmp_path: Path) -> None:
    export(file, tmp_path / "free.safetensors", keep="95%")
    export(file, tmp_path / "cut.safetensors", rank=3, keep="95%")
    free = ranks_in(tmp_path / "free.safetensors")
    assert max(free.values()) > 3
    assert ranks_in(tmp_path / "cut.safetensors") == {name: min(rank, 3) for name, rank in free.items()}


@pytest.mark.parametrize("size", [900, 1500, 2000, 2500, 3001, 4444, 5000, 10**6])
def test_a_size_is_obeyed_and_used(file: Path, tmp_path: Path, size: int) -> None:
    made = export(file, tmp_path / "cut.safetensors", max_bytes=size)
    written = (tmp_path / "cut.safetensors").stat().st_size
    assert written <= size
    values, found = values_of(file), ranks_in(tmp_path / "cut.safetensors")
    state = load_file(tmp_path / "cut.safetensors")
    # With one more direction of any layer the file would be too large, or nothing would be gained.
    for name, (most, wide, tall) in LAYERS.items():
        rank = found.get(name, 0)
        if rank == most or values[name][rank] < 1e-5 * values[name][0]:
            continue
        more = dict(state)
        more[f"{name}.lora_down.weight"] = torch.zeros(rank + 1, wide)
        more[f"{name}.lora_up.weight"] = torch.zeros(tall, rank + 1)
        more[f"{name}.alpha"] = torch.tensor(1.0)
        assert _written(more, tmp_path / "cut.safetensors") > size
    # What was left out is worth less than what was taken, per byte: it would not have fitted in its place alone.
    assert made.chosen is not None
    assert made.chosen.parameters == sum(LAYERS[name][1:][0] * r + LAYERS[name][2] * r for name, r in found.items())


def _written(state: dict[str, torch.Tensor], like: Path) -> int:
    """Bytes of a file with these tensors and the metadata of another."""
    from safetensors import safe_open

    with safe_open(like, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(state, like.parent / "more.safetensors", metadata)
    return (like.parent / "more.safetensors").stat().st_size


def test_info_says_what_export_writes(file: Path, tmp_path: Path) -> None:
    description = describe(file)
    for rank in (1, 4, 16):
        export(file, tmp_path / f"{rank}.safetensors", rank=rank)
        # The name of what was done is in the metadata too.
        assert abs((tmp_path / f"{rank}.safetensors").stat().st_size - description.size(rank)) <= 16
    found = list(description.choices())
    assert len(found) == 9
    for option, chosen, size in found:
        kind, value = option.removeprefix("--").split(" ")
        wish = {"keep": value} if kind == "keep" else {"max_bytes": int(value)}
        made = export(file, tmp_path / "cut.safetensors", overwrite=True, **wish)
        assert made.chosen is not None
        written = (tmp_path / "cut.safetensors").stat().st_size
        if kind == "keep":
            assert made.chosen.ranks == chosen.ranks
            assert abs(written - size) <= 64
        else:  # so small a file has no room for the longer metadata everywhere
            assert max(written, size) <= int(value)
    assert any("--keep sv_ratio=20" in line for line in description.lines())


@pytest.fixture
def without_alphas(tmp_path: Path) -> Path:
    """In diffusers' style: where ranks differ, the metadata name each layer."""
    generator, state = torch.Generator().manual_seed(0), {}
    for number in range(20):
        fall = torch.logspace(0, -3 - number % 4, 8)
        state[f"unet.{number}.to_q.lora_A.weight"] = torch.randn(8, 32, generator=generator)
        state[f"unet.{number}.to_q.lora_B.weight"] = torch.randn(32, 8, generator=generator) * fall
    save_file(state, tmp_path / "diffusers.safetensors")
    return tmp_path / "diffusers.safetensors"


@pytest.mark.parametrize("share", [0.99, 0.7, 0.4, 0.1])
def test_a_size_counts_metadata_that_only_the_cut_has(without_alphas: Path, tmp_path: Path, share: float) -> None:
    size = int(share * without_alphas.stat().st_size)
    export(without_alphas, tmp_path / "cut.safetensors", max_bytes=size)
    # No room for one more direction and a few digits.
    assert size - 64 * 4 - 100 < (tmp_path / "cut.safetensors").stat().st_size <= size


def test_a_choice_that_is_too_large_is_made_again() -> None:
    """A size that is no sum: a cut has 130 bytes that the whole has not."""
    layers = [Layer(name, "A", "B", Size((4, 5)), Size((5, 4)), 4, 1.0) for name in "ab"]
    spectra = {name: torch.tensor([4.0, 3.0, 2.0, 1.0]).double() for name in "ab"}

    def size(ranks: Mapping[str, int]) -> int:
        directions = sum(ranks.values())
        return 100 * directions + 130 * (directions < 8)

    for most in range(230, 800, 7):
        found = by_size(layers, spectra, most, {"a": 10, "b": 10}, size)
        assert sum(found.ranks.values()) == (most - 130) // 100
    with pytest.raises(MatryoshkaError, match="no direction of any layer has room in 229 bytes"):
        by_size(layers, spectra, 229, {"a": 10, "b": 10}, size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter in PEFT's layout that is not nested."""
    model = get_peft_model(tiny_llama(), lora_config(Nesting([8])))
    randomize(model)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_of_peft_s_has_thresholds_and_sizes_too(folder: Path, tmp_path: Path, nested: bool) -> None:
    source = folder
    if nested:
        reorder(folder, tmp_path / "nested")
        source = tmp_path / "nested"
    full = (folder / "adapter_model.safetensors").stat().st_size
    made = export(source, tmp_path / "half", max_bytes=full // 2, verify=False)
    written = (tmp_path / "half" / "adapter_model.safetensors").stat().st_size
    narrowest = min(layer.width for layer in open_adapter(folder).layers) * 4
    assert full // 2 - narrowest - 8 < written <= full // 2
    assert made.chosen is not None
    made = export(source, tmp_path / "most", keep="90%", verify=False)
    model = PeftModel.from_pretrained(tiny_llama(), str(folder))
    for layer in open_adapter(tmp_path / "most").layers:
        module = model.base_model.model.get_submodule(layer.name)
        A, B = (factor["default"].weight.double() for factor in (module.lora_A, module.lora_B))
        values = torch.linalg.svdvals(B @ A).detach().numpy()
        assert OBEYS["energy"](values, layer.rank, 0.9)
        assert layer.rank == 1 or not OBEYS["energy"](values, layer.rank - 1, 0.9)
    assert any("--keep 95%" in line for line in describe(source).lines())


@pytest.mark.parametrize("by", ["learned", "trained", "loss"])
def test_no_share_is_told_that_the_first_directions_do_not_keep(folder: Path, tmp_path: Path, by: str) -> None:
    """Singular values say nothing of a learned order, nor of one by data whose values are lost."""
    reorder(folder, tmp_path / "nested")
    sidecar = tmp_path / "nested" / "nesting.json"
    sidecar.write_text(sidecar.read_text().replace('"svd"', f'"{by}"'))
    if by == "loss":
        (tmp_path / "nested" / "spectra.safetensors").unlink()
    with pytest.raises(MatryoshkaError, match=f"reordered by {by}, and no singular values say"):
        export(tmp_path / "nested", tmp_path / "out", keep="90%", verify=False)
    for number, wish in enumerate(({"rank": 2}, {"budget": 0.5}, {"max_bytes": 20_000})):
        assert export(tmp_path / "nested", tmp_path / str(number), verify=False, **wish).kept is None
    lines = "\n".join(describe(tmp_path / "nested").lines())
    assert "--keep" not in lines
    assert lines.count("kept (svd, at most)") == 2


def test_layers_of_a_folder_keep_within_their_own_ranks(tmp_path: Path) -> None:
    """One layer of rank 16 among layers of rank 2: a share is one of what the adapter has, without padding."""
    pattern = {f"layers.0.self_attn.{name}": 16 for name in ("q_proj", "k_proj")}
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern=pattern)
    model = get_peft_model(tiny_llama(), config)
    randomize(model)
    model.save_pretrained(tmp_path / "plain")
    source = open_adapter(tmp_path / "plain")
    own, total = {x.name: x.rank for x in source.layers}, sum(x.rank * x.width for x in source.layers)
    wishes: list[dict[str, Any]] = [{"budget": 0.2}, {"budget": 0.6}, {"budget": 1.0}, {"keep": "100%"}]
    size = (tmp_path / "plain" / "adapter_model.safetensors").stat().st_size
    for wish in (*wishes, {"max_bytes": size}, {"max_bytes": size // 2}, {"max_bytes": 2 * size}):
        made = export(tmp_path / "plain", tmp_path / "cut", verify=False, overwrite=True, **wish)
        cut = open_adapter(tmp_path / "cut")
        assert made.chosen is not None
        assert made.chosen.total == total
        assert all(layer.rank <= own[layer.name] for layer in cut.layers)
        assert all((B.abs().sum(dim=0) > 0).all() for B in (cut.factors(layer)[1] for layer in cut.layers))
        assert sum(layer.rank * layer.width for layer in cut.layers) <= wish.get("budget", 1) * total
    assert all(chosen.total == total for _, chosen, _ in describe(tmp_path / "plain").choices())


@pytest.mark.parametrize(
    "bad", ["", "0%", "120%", "sv_fro=1.5", "sv_ratio=0.5", "sv_mean=3", "x", -1, "nan", "1e99999%"]
)
def test_what_is_no_threshold(bad: str) -> None:
    with pytest.raises(MatryoshkaError, match="write a share such as 95%"):
        Keep.read(bad)


def test_sizes_in_words() -> None:
    wanted = {"50MB": 50_000_000, "1.5 GB": 1_500_000_000, "20MiB": 20 << 20, "7": 7, 12: 12, "3 kb": 3000}
    assert {text: read_bytes(text) for text in wanted} == wanted
    for bad in ("", "MB", "-3MB", "5 parsecs", "1e3", True, "9" * 40, 0, "0 MB"):
        with pytest.raises(MatryoshkaError, match="write, for example, 50MB"):
            read_bytes(bad)


def test_what_does_not_go_together(file: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(MatryoshkaError, match="a size chooses the ranks itself"):
        export(file, out, rank=2, max_bytes=2000)
    with pytest.raises(MatryoshkaError, match="no direction of any layer has room in 100 bytes"):
        export(file, out, max_bytes=100)
    with pytest.raises(MatryoshkaError, match="ranks from 1 to 16"):
        export(file, out, rank=17)
    with pytest.raises(MatryoshkaError, match="give a rank, for example 8"):
        export(file, out)
    with pytest.raises(MatryoshkaError, match="single file, for which there are"):
        export(file, out, rank=2, format="gguf")
    with pytest.raises(MatryoshkaError, match="not a file that ends in"):
        export(file, tmp_path / "folder-2", rank=2)
    with pytest.raises(MatryoshkaError, match="the adapter itself"):
        export(file, file, rank=2, overwrite=True)
    out.write_text("mine")
    with pytest.raises(MatryoshkaError, match="exists already"):
        export(file, out, rank=2)
    with pytest.raises(MatryoshkaError, match="leave the data out"):
        reorder(file, tmp_path / "new.safetensors", by="learned", data="chain_sum")
    with pytest.raises(MatryoshkaError, match="only a share to keep may have a rank beside it"):
        export(folder, tmp_path / "new", rank=2, max_bytes=2000)
    with pytest.raises(MatryoshkaError, match="format peft without padding"):
        export(folder, tmp_path / "new", max_bytes=20000, pad=True)
    # Its scale is not in the file, and would be taken for 1.
    with pytest.raises(MatryoshkaError, match="scale stands in the adapter_config"):
        export(folder / "adapter_model.safetensors", tmp_path / "new.safetensors", rank=2)
    with pytest.raises(MatryoshkaError, match="which part of a pipeline"):
        export(folder, tmp_path / "new.safetensors", rank=2, style="kohya")
    assert out.read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.safetensors").exists()
