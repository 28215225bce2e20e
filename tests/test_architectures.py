"""Architectures with mechanisms of their own: what is right, and what is refused with its reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_checks import RANKS, check, difference, parameters
from conftest import lora_config, randomize, tiny_llama
from lm_checks import CausalCase, check_language_model, inputs
from peft import PeftModel, get_peft_model
from tiny_architectures import ARCHITECTURES, VARIANTS, tiny_causal_lm

from matryoshka_lora import MatryoshkaError, Nesting, nest

NESTING = Nesting([1, 2, 4])


# One of each mechanism: what is refused beside the engine. Everything else must be right.
ALL_LINEAR, EXPERTS = {"all-linear": {"nest"}}, {"experts": {"rows"}}
REPRESENTATIVE: dict[str, dict[str, set[str]]] = {
    "llama": {},
    "gemma2": {},  # windows, softcaps
    "gpt2": {},  # transposed weights, learned positions
    "bloom": {},  # ALiBi
    "gemma3n_text": {},  # keys and values of another layer, changes in place
    "opt": {"all-linear": {"rows"}},  # flattened tokens
    "xlnet": {"all-linear": {"rows"}},  # tokens first
    "recurrent_gemma": {},  # recurrence
    "zamba": {"all-linear": {"merge"}},  # Mamba, shared blocks
    "mamba2": {},
    "deepseek_v3": {**ALL_LINEAR, **EXPERTS},  # latent attention
    "gpt_oss": EXPERTS,  # attention sinks, experts with biases
    "moshi": {},  # a part of its config belongs to no part of the model
    "qwen3_next": {**ALL_LINEAR, "named": {"rows"}, **EXPERTS},  # linear attention
}


@pytest.mark.parametrize("architecture", REPRESENTATIVE)
def test_every_part_is_right_or_refused(architecture: str) -> None:
    """`python benchmarks/architectures.py` does this for all of transformers' architectures."""
    reports = check_language_model(tiny_causal_lm(architecture))
    verdicts = {(targets, part): v for targets, report in reports.items() for part, v in report.parts.items()}
    assert not {key: verdict.why for key, verdict in verdicts.items() if verdict.state == "wrong"}
    refused = {key for key, verdict in verdicts.items() if verdict.state == "refused" and key[1] != "engine"}
    assert refused == {(targets, part) for targets, parts in REPRESENTATIVE[architecture].items() for part in parts}
    assert len(verdicts) >= 9


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    """Each of them, when one factor is half a percent larger than what plain PEFT was given."""
    case = CausalCase(tiny_causal_lm("llama").double(), {"target_modules": "all-linear"}, tmp_path)
    case.nest()
    case.train()
    for rank in RANKS:
        case.plain(rank)
    for module in case.layers.values():
        parameters(module)[1].data.mul_(1.005)
    case.nest = case.train = lambda: None  # done
    report = check(case, ("ranks", "rows", "engine", "merge"))
    assert {part: verdict.state for part, verdict in report.parts.items() if part not in ("nest", "train")} == (
        dict.fromkeys(("ranks", "rows", "engine", "merge"), "wrong")
    )


def peft_model(architecture: str, **changes: Any) -> PeftModel:
    return get_peft_model(tiny_causal_lm(architecture), lora_config(NESTING, **changes))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_layers_that_peft_takes_for_experts_are_refused_with_the_way_out(architecture: str) -> None:
    """PEFT gives some of them twice the rank, in a rank_pattern that the user has not written."""
    with pytest.raises(MatryoshkaError, match=r"PEFT takes 'all-linear'.*experts.*target_parameters"):
        nest(peft_model(architecture, target_modules="all-linear"))
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft_model(architecture, target_modules=["o_proj"], target_parameters=experts)
    layers = {module.__class__.__name__ for module in model.modules() if hasattr(module, "lora_A")}
    assert layers == {"Linear", "ParamWrapper"}
    nest(model)


@pytest.mark.parametrize(
    ("architecture", "layer"), [("deepseek_v4", "self_attn.o_a_proj"), ("llama4", "feed_forward.router")]
)
def test_a_layer_that_is_linear_by_its_class_only_is_refused(architecture: str, layer: str) -> None:
    """A grouped linear layer, and a router that returns two tensors: PEFT's own forward fails on them."""
    with pytest.raises(MatryoshkaError, match=rf"{layer}.*leave it out of target_modules"):
        nest(peft_model(architecture, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [("laguna", "mlp.shared_experts.gate_proj"), ("inkling2_text", "k_proj.sconv.weight_proj")],
)
def test_a_layer_whose_factors_peft_could_not_read_again_is_refused(
    architecture: str, layer: str, tmp_path: Any
) -> None:
    model = peft_model(architecture, target_modules="all-linear").eval()
    with pytest.raises(MatryoshkaError, match=rf"{layer}.*PEFT would lose its factors"):
        nest(model)
    # That PEFT loses them is seen without this package.
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_causal_lm(architecture), tmp_path).eval()
    with torch.no_grad():
        assert difference(again(**inputs(2, 8)).logits, model(**inputs(2, 8)).logits) > 0.01


SHARED = {
    "head": (lambda: tiny_llama(tie_word_embeddings=True), ["lm_head"], "model.embed_tokens"),
    "other layers first": (
        lambda: tiny_llama(tie_word_embeddings=True),
        ["q_proj", "down_proj", "lm_head"],
        "model.embed_tokens",
    ),
    "embedding": (lambda: tiny_llama(tie_word_embeddings=True), ["embed_tokens"], "lm_head"),
    "block": (lambda: tiny_causal_lm("zamba"), ["q_proj"], r"model.layers.\d.shared_transf.self_attn.q_proj"),
}


@pytest.mark.parametrize("case", SHARED)
def test_merging_into_a_weight_that_layers_share_is_refused(case: str) -> None:
    """It would change the other layer too."""
    build, targets, other = SHARED[case]
    model = get_peft_model(build(), lora_config(NESTING, target_modules=targets))
    randomize(model)
    adapter = nest(model.eval())
    before, layers = [parameter.clone() for parameter in model.parameters()], adapter.layers()
    for merge in (lambda: adapter.merge(2), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MatryoshkaError, match=rf"also that of {other}"):
            merge()
        assert adapter.layers() == layers
        assert not any(module.merged for _, module, _ in layers)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_weight_that_is_shared_no_more_can_be_merged_into() -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), lora_config(NESTING, target_modules=["lm_head"]))
    randomize(model)
    adapter = nest(model.eval())
    embedding = model.get_base_model().get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    with torch.no_grad():
        expected = model(**inputs(2, 8)).logits
        adapter.merge(4)
        assert difference(model(**inputs(2, 8)).logits, expected) < 1e-5


@pytest.mark.parametrize("length", [2, 7, 8])
def test_a_model_with_tokens_in_the_place_of_rows_is_refused_ranks_for_rows(length: int) -> None:
    """XLNet's feed-forward layers get (tokens, rows, width): with 8 tokens, 2 rows would pass for 8 beams."""
    adapter = nest(peft_model("xlnet", target_modules=["layer_1"]), rule="stratified")
    adapter.draw(0, rows=2)
    with pytest.raises(MatryoshkaError, match="rows"):
        adapter.model.train()(**inputs(2, length))
    with torch.no_grad(), adapter.rows([1, 4]), pytest.raises(MatryoshkaError, match="rows"):
        adapter.model.eval()(**inputs(2, length))


def test_a_layer_with_as_many_tokens_as_rows_first_gets_no_ranks_for_rows() -> None:
    """As in torch's own transformer layers, which are not named here."""
    encoder = torch.nn.TransformerEncoderLayer(16, 2, 8)
    adapter = nest(get_peft_model(encoder, lora_config(NESTING, target_modules=["linear1"])).eval())
    with (
        torch.no_grad(),
        adapter.rows([1, 4]),
        pytest.raises(MatryoshkaError, match="2 rows have a rank, but a layer got 8 rows"),
    ):
        adapter.model(torch.randn(8, 2, 16))


def test_the_table_of_all_architectures_agrees_with_itself() -> None:
    """It is written by `python benchmarks/architectures.py`; whether it is fresh is not tested."""
    page = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
    table, variants = (
        [
            [name, *(cell.strip() for cell in cells)]
            for line in part.splitlines()
            if line.startswith("| `")
            for names, *cells in [line.split("|")[1:-1]]
            for name in re.findall("`[^`]+`", names)
        ]
        for part in page.split("## Variants")
    )
    assert len({cells[0] for cells in table}) == len(table)
    said = {
        word: int(number) for number, word in re.findall(r"^\* (\d+) (are right|are refused|could not)", page, re.M)
    }
    total = int(re.search(r"Of the (\d+) architectures", page)[1])
    usable = [cells for cells in table if cells[1].startswith("right")]
    assert said == {"are right": len(usable), "are refused": len(table) - len(usable), "could not": total - len(table)}
    assert f"{sum(cells[2].startswith('right') for cells in usable)} of them also have a rank for each row" in page
    assert re.search(rf"and {sum(cells[3].startswith('right') for cells in usable)}\s+the engine", page)
    assert all(re.match(r"right|refused|$", cell) for cells in [*table, *variants] for cell in cells[1:])
    assert {cells[0].strip("`") for cells in variants} <= set(VARIANTS)
    reasons = set(re.findall(r"\(#reason-(\d+)\)", page))
    assert reasons == set(re.findall(r'<a id="reason-(\d+)">', page))
    if f"transformers {transformers.__version__}," in page:
        assert {cells[0].strip("`") for cells in table} <= set(ARCHITECTURES)
        assert total == len(ARCHITECTURES)
