"""Exports as their readers see them: plain PEFT, transformers, the gguf package. A wrong one is thrown away."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import torch
from conftest import LINEAR_LAYERS, randomize, tiny_llama
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from strangers import deltas, output, plain_adapter
from torch import Size, Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from matryoshka_lora import MatryoshkaError, Nesting, load, nest
from matryoshka_lora.adapter import read_adapter
from matryoshka_lora.formats.opened import Layer, open_adapter
from matryoshka_lora.serving import export as exports
from matryoshka_lora.serving.budget import choose_ranks
from matryoshka_lora.serving.ladder import VLLM_RANKS
from matryoshka_lora.serving.reorder import reorder_adapter
from matryoshka_lora.formats.spectra import Spectra, read_spectra
from matryoshka_lora.serving.verify import probe_logits, use_ranks

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def tiny_qwen() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return Qwen2ForCausalLM(config).eval()


def tiny_gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2)
    return Gemma3ForCausalLM(config).eval()


BASES: dict[str, Callable[[], Any]] = {"llama": tiny_llama, "qwen2": tiny_qwen, "gemma3": tiny_gemma}


def base(dtype: torch.dtype | None = None) -> Any:
    return tiny_llama() if dtype is None else tiny_llama().to(dtype)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's adapter, reordered; its layers differ in size, so that they deserve other ranks."""
    folder = tmp_path_factory.mktemp("export")
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=4, target_modules=LINEAR_LAYERS))
    randomize(model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data *= 0.5 ** (number % 5) * torch.logspace(0, -1.5, 8)
    model.save_pretrained(folder / "plain")
    reorder_adapter(folder / "plain", folder / "nested")
    return folder / "nested"


# Ranks per layer


def layer(name: str, width: int, rank: int) -> Layer:
    return Layer(name, f"{name}.A", f"{name}.B", Size((rank, width // 2)), Size((width - width // 2, rank)), rank, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_layers_of_one_width_get_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [layer(name, 10, 4) for name in "abc"]
    values = {x.name: torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True)[0] for x in layers}
    for count in range(1, 13):
        choice = choose_ranks(layers, Spectra("frobenius", values), count / 12)
        assert choice.parameters == 10 * count
        best = max(
            sum(float((values[name][:r] ** 2).sum()) for name, r in zip("abc", ranks, strict=True))
            for ranks in itertools.product(range(5), repeat=3)
            if sum(ranks) <= count
        )
        total = sum(float((v**2).sum()) for v in values.values())
        assert choice.kept == pytest.approx(best / total)


def test_a_wide_layer_must_be_worth_its_parameters() -> None:
    layers = [layer("narrow", 10, 2), layer("wide", 100, 2)]
    values = {"narrow": torch.tensor([1.0, 0.5]).double(), "wide": torch.tensor([1.5, 1.4]).double()}
    assert choose_ranks(layers, Spectra("loss", values), 0.1).ranks == {"narrow": 2, "wide": 0}
    assert choose_ranks(layers, Spectra("loss", values), 0.6).ranks == {"narrow": 2, "wide": 1}
    assert choose_ranks(layers, Spectra("loss", values), 1.0).ranks == {"narrow": 2, "wide": 2}


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), True, "0.5"])
def test_a_budget_is_a_share(budget: Any) -> None:
    with pytest.raises(MatryoshkaError, match="share of the parameters"):
        choose_ranks([layer("a", 10, 2)], Spectra("loss", {"a": torch.ones(2)}), budget)


def test_a_budget_that_fits_nothing() -> None:
    with pytest.raises(MatryoshkaError, match="at least 10"):
        choose_ranks([layer("a", 10, 4)], Spectra("loss", {"a": torch.ones(4)}), 0.1)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("budget", [0.06, 0.25, 1.0])
def test_plain_peft_reads_ranks_per_layer(nested: Path, tmp_path: Path, budget: float, pad: bool) -> None:
    opened = open_adapter(nested)
    choice = choose_ranks(opened.layers, read_spectra(opened), budget)
    verified = exports.export_peft(exports.cut(nested, choice.ranks, pad), tmp_path / "out", base)
    assert verified is not None
    assert verified.share < 1e-4

    wanted = load(tiny_llama(), nested)
    use_ranks(wanted, choice.ranks)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(output(model), output(wanted.model), rtol=0, atol=1e-4)
    found = open_adapter(tmp_path / "out")
    sizes = {x.name: x.rank for x in found.layers}
    top = max(choice.ranks.values())
    assert sizes == {name: top if pad else r for name, r in choice.ranks.items() if r or pad}
    if not pad:
        assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == choice.parameters
        assert choice.parameters <= budget * choice.total + 1
    # An engine that ignores the patterns multiplies by the one lora_alpha / r of the config.
    assert {x.scale for x in found.layers} == {found.config.lora_alpha / found.config.r} == {1.0}
    if budget == 0.06:
        assert 0 in choice.ranks.values()
        assert len(set(choice.ranks.values())) > 2


class NamesLikeOthers(nn.Module):
    """Names that end like others, and one in which another's dot stands for a letter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)
        self.sub = nn.ModuleDict({"fc": nn.Linear(6, 5), "sub": nn.ModuleDict({"fc": nn.Linear(6, 5)})})
        self.subxfc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.sub["fc"](x) + self.sub["sub"]["fc"](x) + self.subxfc(x)


@pytest.mark.parametrize("pad", [False, True])
def test_ranks_of_layers_whose_names_end_alike(tmp_path: Path, pad: bool) -> None:
    names = ("fc", "sub.fc", "sub.sub.fc", "subxfc")
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["fc", "subxfc"])
    model = get_peft_model(NamesLikeOthers(), config)
    randomize(model)
    adapter = nest(model, Nesting([1, 3]))
    adapter.reorder()
    adapter.save(tmp_path / "nested")
    whole = load_file(tmp_path / "nested" / "adapter_model.safetensors")
    for ranks in list(itertools.product((0, 1, 2, 3), repeat=4))[1::19]:
        own = dict(zip(names, ranks, strict=True))
        exports.export_peft(exports.cut(tmp_path / "nested", own, pad), tmp_path / "out", None, overwrite=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = PeftModel.from_pretrained(NamesLikeOthers(), tmp_path / "out")
        found = deltas(plain)
        for name, rank in own.items():
            A, B = (whole[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
            wanted = B[:, :rank] @ A[:rank]
            torch.testing.assert_close(found.get(name, torch.zeros(5, 6).double()), wanted, rtol=1e-5, atol=1e-6)
            stored = plain.get_submodule(f"base_model.model.{name}").r["default"] if name in found else 0
            # A layer that is left out has a column of zeros where its name ends like one that is not.
            needless = int(any(own[other] and name.endswith(f".{other}") for other in names))
            assert stored == (max(ranks) if pad else rank or needless), (ranks, name)


def test_ranks_per_layer_need_a_reordered_adapter(tmp_path: Path, nested: Path) -> None:
    adapter = load(tiny_llama(), nested)
    adapter.save(tmp_path / "raw")
    file = tmp_path / "raw" / "nesting.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "form": "raw"}))
    with pytest.raises(MatryoshkaError, match="matryoshka reorder"):
        exports.cut(tmp_path / "raw", {"any": 1})


# A wrong export is thrown away


WRITERS: dict[str, Callable[[exports.Cut, Path], Any]] = {
    "peft": lambda cut, path: exports.export_peft(cut, path, base),
    "merged": lambda cut, path: exports.export_merged(cut, path, base),
    "out.gguf": lambda cut, path: exports.export_gguf(cut, path, base, base().config),
    "ladder": lambda cut, path: exports.export_ladder(cut, [2, 8], path, base),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_computes_something_else_is_not_put_into_place(nested: Path, tmp_path: Path, kind: str) -> None:
    cut = exports.cut(nested, 4)
    key = next(key for key in cut.tensors if "q_proj.lora_B" in key)
    wrong = {**cut.tensors, key: -cut.tensors[key].flip(0)}
    (tmp_path / "there").mkdir()
    with pytest.raises(MatryoshkaError, match="computes something else"):
        WRITERS[kind](replace(cut, tensors=wrong), tmp_path / "there" / kind)
    assert list((tmp_path / "there").iterdir()) == []
    WRITERS[kind](cut, tmp_path / "there" / kind)
    assert (tmp_path / "there" / kind).exists()


@dataclass(frozen=True)
class Wrong(exports.Cut):
    """A cut that writes another one than it says."""

    other: exports.Cut | None = None

    def write(self, folder: Path, home: Path | None = None) -> None:
        assert self.other is not None
        self.other.write(folder, home)


def with_tensors(cut: exports.Cut, change: Callable[[str, Tensor], Tensor | None]) -> exports.Cut:
    changed = {key: change(key, tensor) for key, tensor in cut.tensors.items()}
    return replace(cut, tensors={key: tensor for key, tensor in changed.items() if tensor is not None})


def times(factor: float, layer: str, cut: exports.Cut) -> exports.Cut:
    return with_tensors(cut, lambda key, t: t * factor if f"{layer}.lora_B" in key else t)


def without(layer: str, cut: exports.Cut) -> exports.Cut:
    return with_tensors(cut, lambda key, t: None if f"{layer}.lora_" in key else t)


FAULTS: dict[str, Callable[[exports.Cut], exports.Cut]] = {
    "a layer left out": lambda cut: without("layers.1.mlp.up_proj", cut),
    "a layer left out that does little": lambda cut: without("layers.0.self_attn.k_proj", cut),
    "scaled by 1.1": lambda cut: times(1.1, "_proj", cut),
    "one layer scaled by 0.9": lambda cut: times(0.9, "layers.1.mlp.up_proj", cut),
    "a rank less": lambda cut: replace(cut, ranks=3),
    "a rank more": lambda cut: replace(cut, ranks=5),
    "its last direction zero": lambda cut: with_tensors(
        cut, lambda key, t: t * (torch.arange(t.shape[1]) != 3) if "lora_B" in key else t
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def in_dtypes(nested: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The adapter with factors in each dtype, one of whose layers hardly does anything."""
    folder = tmp_path_factory.mktemp("dtypes")
    adapter = load(tiny_llama(), nested)
    with torch.no_grad():
        layer = "base_model.model.model.layers.0.self_attn.k_proj"
        adapter.model.get_parameter(f"{layer}.lora_B.default.weight").mul_(1e-3)
    adapter.save(folder / "whole")
    for dtype in DTYPES:
        reorder_adapter(folder / "whole", folder / str(dtype), dtype=dtype)
    return {dtype: folder / str(dtype) for dtype in DTYPES}


def stored_in(dtype: torch.dtype) -> exports.Base:
    return lambda asked: tiny_llama().to(dtype).to(asked or dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WRITERS)
def test_no_fault_passes_for_rounding(
    in_dtypes: dict[torch.dtype, Path], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """In no dtype of the factors, nor of the base model."""

    def write(cut: exports.Cut) -> Any:
        if kind == "merged":
            return exports.export_merged(cut, tmp_path / kind, stored_in(dtype))
        return WRITERS[kind](cut, tmp_path / kind)

    cut = exports.cut(in_dtypes[dtype], 4)
    if kind != "ladder":  # of which the ranks are given
        for name, fault in FAULTS.items():
            with pytest.raises(MatryoshkaError, match="computes something else"):
                write(Wrong(**vars(cut), other=fault(cut)))
            assert list(tmp_path.iterdir()) == [], name
    verified = write(cut)
    for found in verified.values() if kind == "ladder" else [verified]:
        assert found.share < (1e-4 if dtype == torch.float32 else 0.2 if kind == "merged" else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_is_reported_of_a_merge_is_what_rounding_does(nested: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = stored_in(dtype)
    cut = exports.cut(nested, 4)
    verified = exports.export_merged(cut, tmp_path / "merged", stored)
    exact = oracle.fold(stored(torch.float32), cut.tensors, oracle.prefix_p([8], 4))
    rounded = copy.deepcopy(exact).to(dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, parameter in merged.named_parameters():
        # Now and then a sum lies in the middle between two numbers, and the other one is taken.
        assert (parameter != rounded.get_parameter(name)).float().mean() < 1e-3, name
    wanted, found, before = (probe_logits(model.float()) for model in (exact, rounded, stored(None)))
    assert verified is not None
    assert verified.share == pytest.approx(float((found - wanted).norm() / (wanted - before).norm()), rel=0.02)


def test_a_merge_that_rounding_undoes_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR_LAYERS))
    randomize(model, size=0.006)
    model.save_pretrained(tmp_path / "plain")
    reorder_adapter(tmp_path / "plain", tmp_path / "nested")
    cut = exports.cut(tmp_path / "nested", 4)
    with pytest.raises(MatryoshkaError, match=r"rounding its weights to torch\.bfloat16 takes too much"):
        exports.export_merged(cut, tmp_path / "merged", stored_in(torch.bfloat16))
    assert not (tmp_path / "merged").exists()
    verified = exports.export_merged(cut, tmp_path / "merged", base)
    assert verified is not None
    assert verified.share < 1e-2


def test_a_merge_that_does_not_fit_its_dtype_is_refused(nested: Path, tmp_path: Path) -> None:
    def stored(asked: torch.dtype | None) -> Any:
        model = tiny_llama()
        model.model.layers[0].mlp.up_proj.weight.data.fill_(65504.0)
        return model.half().to(asked or torch.float16)

    huge = times(10_000, "up_proj", exports.cut(nested, 4))
    with pytest.raises(MatryoshkaError, match=r"up_proj\.weight is too large for torch\.float16"):
        exports.export_merged(huge, tmp_path / "merged", stored, verify=False)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["peft", "merged", "ladder"])
def test_the_adapter_is_not_written_over_by_its_export(nested: Path, kind: str) -> None:
    before = {file.name: file.read_bytes() for file in nested.iterdir() if file.is_file()}
    with pytest.raises(MatryoshkaError, match="the adapter itself"):
        WRITERS[kind](exports.cut(nested, 4), nested)
    assert {file.name: file.read_bytes() for file in nested.iterdir() if file.is_file()} == before


def test_an_export_over_another_leaves_nothing_of_it(nested: Path, tmp_path: Path) -> None:
    """A reader of the folder would else find the old weights, or both."""
    other = tmp_path / "other"
    adapter = load(tiny_llama(), nested)
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-2)
    adapter.save(other)
    for first, second in ((nested, other), (other, nested)):
        place = tmp_path / f"over-{first.name}"
        shutil.copytree(first, place, dirs_exist_ok=True)
        exports.export_directions(exports.cut(second, 8), place, overwrite=True)
        for found, wanted in zip(read_adapter(place)[2].items(), read_adapter(second)[2].items(), strict=True):
            assert found[0] == wanted[0]
            assert found[1].equal(wanted[1])
        exports.export_peft(exports.cut(first, 8), place, base, overwrite=True)
        assert not (place / "directions.safetensors").exists()
        assert open_adapter(place).state is None


# Merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_a_model_like_any_other(nested: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def stored(asked: torch.dtype | None) -> Any:
        return tiny_llama().to(dtype).to(asked or dtype)

    verified = exports.export_merged(exports.cut(nested, 4), tmp_path / "merged", stored)
    assert verified.share < (1e-4 if dtype == torch.float32 else 0.2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == dtype
    assert not list((tmp_path / "merged").glob("*.bin"))
    wanted = load(stored(torch.float32), nested, rank=4)
    expected, found = output(wanted.model), output(model.float())
    assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 0.05) * expected.norm()


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_merge_that_changes_nothing_is_an_error(tmp_path: Path, size: float) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    randomize(model, size=size**0.5)
    model.save_pretrained(tmp_path / "plain")
    reorder_adapter(tmp_path / "plain", tmp_path / "nested")
    with pytest.raises(MatryoshkaError, match="merging changed none of the weights"):
        exports.export_merged(
            exports.cut(tmp_path / "nested", 2),
            tmp_path / "merged",
            lambda dtype: tiny_llama().bfloat16().to(dtype or torch.bfloat16),
        )
    assert not (tmp_path / "merged").exists()


# What an adapter may do to embeddings


@pytest.mark.parametrize("kind", ["peft", "merged", "ladder"])
def test_an_embedding_that_is_a_target_is_exported(tmp_path: Path, kind: str) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["embed_tokens", "q_proj"])
    reorder_adapter(tmp_path / "plain", tmp_path / "nested")
    verified = WRITERS[kind](exports.cut(tmp_path / "nested", 4), tmp_path / "out")
    assert all(v.share < 1e-4 for v in (verified.values() if kind == "ladder" else [verified]))


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "head alone": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "embedding and saved head": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_a_merged_model_has_the_adapter_s_embeddings(tmp_path: Path, case: str, tied: bool, verify: bool) -> None:
    """What is tied in the base model is tied no more where the adapter changes only one of the two."""
    model = get_peft_model(
        tiny_llama(tie_word_embeddings=tied), LoraConfig(r=8, lora_alpha=8, **copy.deepcopy(EMBEDDINGS[case]))
    )
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    wanted = output(model)
    model.save_pretrained(tmp_path / "plain")
    reorder_adapter(tmp_path / "plain", tmp_path / "nested")
    exports.export_merged(
        exports.cut(tmp_path / "nested", 8),
        tmp_path / "merged",
        lambda dtype: tiny_llama(tie_word_embeddings=tied),
        verify=verify,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (output(merged) - wanted).norm() < 1e-5 * wanted.norm()
    is_tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert is_tied == merged.config.tie_word_embeddings == (tied and case in ("tokens", "neither"))


def test_a_tied_weight_that_no_merge_changes_is_an_error(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", tiny_llama(tie_word_embeddings=True), target_modules=["lm_head"])
    reorder_adapter(tmp_path / "plain", tmp_path / "nested")
    cut = exports.cut(tmp_path / "nested", 8)
    zero = replace(cut, tensors={key: tensor * (".lora_" not in key) for key, tensor in cut.tensors.items()})
    with pytest.raises(MatryoshkaError, match="merging changed none of the weights"):
        exports.export_merged(
            zero, tmp_path / "merged", lambda dtype: tiny_llama(tie_word_embeddings=True), verify=False
        )
    assert not (tmp_path / "merged").exists()


# llama.cpp


def rotated_rows(B: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbours, transformers the two halves of a head; written row by row."""
    size = B.shape[0] // heads
    rows = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return B[rows]


@pytest.mark.parametrize("budget", [None, 0.3])
@pytest.mark.parametrize("kind", BASES)
def test_gguf_holds_the_deltas_in_llama_cpp_s_order(tmp_path: Path, kind: str, budget: float | None) -> None:
    own = BASES[kind]()
    plain_adapter(tmp_path / "plain", copy.deepcopy(own), lora_alpha=5)
    reorder_adapter(tmp_path / "plain", tmp_path / "nested")
    opened = open_adapter(tmp_path / "nested")
    ranks: Any = 4 if budget is None else choose_ranks(opened.layers, read_spectra(opened), budget).ranks
    cut = exports.cut(tmp_path / "nested", ranks)
    verified = exports.export_gguf(cut, tmp_path / "out.gguf", lambda dtype: copy.deepcopy(own), own.config)
    assert verified is not None
    assert verified.share < 1e-4

    exports.export_peft(cut, tmp_path / "slice", None)
    wanted = deltas(PeftModel.from_pretrained(copy.deepcopy(own), tmp_path / "slice"))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == kind
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    assert len(found) == 2 * len(wanted)
    places = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    for name, delta in wanted.items():
        number, last = name.split(".")[2], name.split(".")[-1]
        place = f"blk.{number}.{places.get(last) or 'ffn_' + last.removesuffix('_proj')}.weight"
        A, B = found[f"{place}.lora_a"].double(), found[f"{place}.lora_b"].double()
        expected = delta
        if kind == "llama" and last in ("q_proj", "k_proj"):
            expected = rotated_rows(delta, 4 if last == "q_proj" else 2)
        # As llama.cpp scales it: alpha over the rank of the tensor.
        torch.testing.assert_close(B @ A * alpha / A.shape[0], expected, rtol=0, atol=1e-5)


def test_gguf_of_what_llama_cpp_does_not_know(tmp_path: Path, nested: Path) -> None:
    config = base().config
    plain_adapter(tmp_path / "plain", target_modules=["embed_tokens", "q_proj"])
    reorder_adapter(tmp_path / "plain", tmp_path / "embedding")
    for source, kind, message in ((tmp_path / "embedding", "llama", "embed_tokens"), (nested, "falcon", "'falcon'")):
        with pytest.raises(MatryoshkaError, match=message):
            exports.export_gguf(exports.cut(source, 4), tmp_path / "x.gguf", None, _of_type(config, kind))
    with pytest.raises(MatryoshkaError, match=r"ends in \.gguf"):
        exports.export_gguf(exports.cut(nested, 4), tmp_path / "folder", None, config)
    assert not list(tmp_path.glob("*.gguf*"))


def _of_type(config: Any, kind: str) -> Any:
    other = copy.deepcopy(config)
    other.model_type = kind
    return other


# The ladder


def test_the_ladder_is_one_adapter_for_each_rank_and_a_command(nested: Path, tmp_path: Path) -> None:
    found = exports.export_ladder(exports.cut(nested, 8), [1, 2, 8], tmp_path / "a ladder", base)
    assert max(v.share for v in found.values() if v is not None) < 1e-4
    whole = load(tiny_llama(), nested)
    for rank in (1, 2, 8):
        whole.set_rank(rank)
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a ladder" / f"rank-{rank}")
        assert model.peft_config["default"].r == rank
        torch.testing.assert_close(output(model), output(whole.model), rtol=0, atol=1e-4)
    readme = (tmp_path / "a ladder" / "README.md").read_text()
    assert "In this folder (BASE_MODEL is the base model's folder, or its id):" in readme
    command = re.search(r"^vllm serve .*$", readme, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[0])
    assert words[words.index("--max-lora-rank") + 1] == "8"
    modules = dict(word.split("=", 1) for word in words[words.index("--lora-modules") + 1 :])
    assert modules == {f"rank-{rank}": f"rank-{rank}" for rank in (1, 2, 8)}
    assert 8 in VLLM_RANKS


# What the study in docs/reorder.md rests on


def test_peft_s_truncation_is_a_prefix_of_its_largest(tmp_path: Path) -> None:
    model = plain_adapter(tmp_path / "plain")
    _, whole = convert_to_lora(model, 8)
    for rank in (1, 3):
        _, some = convert_to_lora(model, rank)
        for key, tensor in some.items():
            torch.testing.assert_close(tensor, whole[key][:rank] if "lora_A" in key else whole[key][:, :rank])
