"""Many ranks, prefixes, branches and comings and goings in one batch, against one request at a time without cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import EXPERTS, GROUPED, LATENT, LONGROPE, SIZES, WIDE, tiny_adapter
from conftest import lora_config, nested_llama, tiny_llama, tiny_mixtral
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_chat import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GptOssConfig,
    HrmTextConfig,
    Llama4TextConfig,
    MambaConfig,
    MiniCPM3Config,
    NemotronConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, nest
from matryoshka_lora.engine import runner as runner_module
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.engine.likelihood import token_scores
from matryoshka_lora.engine.packing import MIN_PREFIX, Room, batches, families, measure_room
from matryoshka_lora.engine.runner import row_attention

RANKS = (0, 1, 2, 4)
TOKENIZER = tiny_tokenizer()
NEW = 12


def adapter_of(**changes: Any) -> NestedAdapter:
    adapter = nested_llama(Nesting([1, 2, 4]), **changes)
    adapter.model.get_base_model().generation_config.eos_token_id = 2
    return adapter


ADAPTER = adapter_of()


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(4, 95) for _ in range(count)]


def at(adapter: NestedAdapter, rank: int) -> Any:
    return adapter.rows([rank]) if rank else adapter.model.disable_adapter()


def alone(adapter: NestedAdapter, prompt: Sequence[int], rank: int, until: Sequence[str] = (), **more: Any) -> str:
    """transformers' own generation of one row."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2, **more}
    with at(adapter, rank), torch.no_grad():
        out = adapter.model.generate(input_ids=torch.tensor([list(prompt)]), **settings)
    text = TOKENIZER.decode(out[0, len(prompt) :], skip_special_tokens=True)
    for stop in until:
        text = text.split(stop)[0]
    return text


def likelihood_alone(adapter: NestedAdapter, context: Sequence[int], ending: Sequence[int], rank: int) -> Any:
    """One row without cache, all logits."""
    with at(adapter, rank), torch.no_grad():
        logits = adapter.model(input_ids=torch.tensor([[*context, *ending]])).logits[0]
    logprobs = logits.double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(ending) - 1)
    total = sum(logprobs[place, token].item() for place, token in zip(places, ending, strict=True))
    return total, all(int(logits[place].argmax()) == token for place, token in zip(places, ending, strict=True))


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """Prompts with and without shared beginnings, each at a rank of its own."""
    seed = random.Random(draw(st.integers(0, 10**6)))
    beginnings = [tokens(seed, draw(st.integers(MIN_PREFIX, 40))) for _ in range(draw(st.integers(1, 2)))] + [[]]
    found = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.sampled_from(beginnings)) + tokens(seed, draw(st.integers(1, 12)))
        found += [(prompt, rank) for rank in draw(st.sets(st.sampled_from(RANKS), min_size=1))]
    seed.shuffle(found)
    return found


def test_the_first_batch_may_have_as_many_rows_as_tokens() -> None:
    """Its layers were shown before which of them comes first."""
    adapter = adapter_of()
    engine = Engine(adapter, TOKENIZER)
    prompts = [tokens(random.Random(row), 3) for row in range(3)]
    said = engine.generate(prompts, [1, 2, 4], max_new_tokens=NEW)
    assert said == [alone(adapter, prompt, rank) for prompt, rank in zip(prompts, (1, 2, 4), strict=True)]


@given(workloads(), st.sampled_from([1, 3, None]), st.sampled_from([24, 2048]))
def test_no_neighbour_changes_an_answer(work: list[tuple[list[int], int]], rows: int | None, room: int) -> None:
    engine = Engine(ADAPTER, TOKENIZER, rows)
    prompts, ranks = [prompt for prompt, _ in work], [rank for _, rank in work]
    with limited_room(room):
        found = engine.generate(prompts, ranks, NEW)
    assert found == [alone(ADAPTER, prompt, rank) for prompt, rank in work]


@given(workloads(), st.sampled_from([24, 2048]), st.integers(0, 10**6))
def test_no_neighbour_changes_a_likelihood(work: list[tuple[list[int], int]], room: int, seed: int) -> None:
    draw = random.Random(seed)
    requests = [(prompt, tokens(draw, draw.randint(1, 5)), rank) for prompt, rank in work for _ in range(3)]
    draw.shuffle(requests)
    engine = Engine(ADAPTER, TOKENIZER)
    with limited_room(room):
        found = engine.loglikelihood([(a, b) for a, b, _ in requests], [rank for _, _, rank in requests])
    for (logprob, greedy), request in zip(found, requests, strict=True):
        expected, best = likelihood_alone(ADAPTER, *request)
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy is best


@given(st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 10**6))
def test_tokens_are_scored_as_numpy_does_it(count: int, dtype: torch.dtype, seed: int) -> None:
    """Of whole numbers, so that several tokens are equally likely: the first of them is the best one."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (3, 5, 11), generator=draw).to(dtype)
    rows, places, asked = (torch.randint(0, end, (count,), generator=draw) for end in logits.shape)
    logprobs, is_best = token_scores(logits, rows, places, asked)
    wide = logits.double().numpy()[rows.numpy(), places.numpy()]
    expected = wide[range(count), asked.numpy()] - np.log(np.exp(wide).sum(axis=1))
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-6)
    assert is_best == (wide.argmax(axis=1) == asked.numpy()).tolist()


class limited_room:  # noqa: N801  # reads as what it does
    """Forward passes of so few tokens, so that prefixes and batches are cut in pieces."""

    def __init__(self, prefill_tokens: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.tokens = prefill_tokens

    def __enter__(self) -> None:
        def measured(model: Any, token_bytes: int, batch_size: int | None) -> Room:
            return replace(measure_room(model, token_bytes, batch_size), prefill_tokens=self.tokens)

        self.patch.setattr(runner_module, "measure_room", measured)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def test_the_greedy_continuation_is_called_greedy() -> None:
    prompt = tokens(random.Random(0), 20)
    for rank in RANKS:
        with at(ADAPTER, rank), torch.no_grad():
            out = ADAPTER.model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=94, pad_token_id=2
            )
        best = out[0, len(prompt) :].tolist()
        other = [*best[:-1], (best[-1] + 1) % 90]
        found = Engine(ADAPTER, TOKENIZER).loglikelihood([(prompt, best), (prompt, other)], rank)
        assert [result.greedy for result in found] == [True, False]


def test_rows_differ_by_rank() -> None:
    """The negative control of everything above."""
    prompt = tokens(random.Random(1), 24)
    found = Engine(ADAPTER, TOKENIZER).generate([prompt] * 4, RANKS, NEW)
    assert len(set(found)) == 4
    likelihoods = Engine(ADAPTER, TOKENIZER).loglikelihood([(prompt, [5, 6])] * 4, RANKS)
    assert len({round(result.logprob, 4) for result in likelihoods}) == 4


def test_an_answer_ends_before_the_first_stop() -> None:
    draw = random.Random(2)
    prompts = [tokens(draw, draw.randint(1, 30)) for _ in range(20)]
    until = ["Q", "e ", "\n"]
    found = Engine(ADAPTER, TOKENIZER, 4).generate(prompts, 4, NEW, until)
    expected = [alone(ADAPTER, prompt, 4, until) for prompt in prompts]
    assert found == expected
    assert any(len(text) < len(alone(ADAPTER, p, 4)) for p, text in zip(prompts, found, strict=True))
    assert not any(stop in text for text in found for stop in until)


def test_a_special_token_can_end_an_answer() -> None:
    prompts = [tokens(random.Random(n), 9) for n in range(30)]
    engine = Engine(ADAPTER, TOKENIZER)
    free, ended = engine.generate(prompts, 4, 40), engine.generate(prompts, 4, 40, ["<s>"])
    assert free != ended
    assert all(a.startswith(b) for a, b in zip(free, ended, strict=True))


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    prompts = [tokens(random.Random(n), 9 + n) for n in range(5)]
    plain = Engine(ADAPTER, TOKENIZER).generate(prompts, 4, NEW)
    found = Engine(ADAPTER, TOKENIZER).generate(prompts, 4, NEW, repetition_penalty=1.5)
    assert found == [alone(ADAPTER, prompt, 4, repetition_penalty=1.5) for prompt in prompts]
    assert found != plain


def test_text_is_tokenized_and_results_are_told_as_they_come() -> None:
    engine, told = Engine(ADAPTER, TOKENIZER, 2), {}
    found = engine.generate(["how much?", "a"], [1, 4], NEW, on_result=told.__setitem__)
    assert found == [alone(ADAPTER, engine.encode("how much?"), 1), alone(ADAPTER, engine.encode("a"), 4)]
    assert told == dict(enumerate(found))
    likelihood = engine.loglikelihood([("how ", "much?")], 2)[0]
    context, ending = TOKENIZER("how ")["input_ids"], TOKENIZER("much?")["input_ids"]
    assert likelihood.logprob == pytest.approx(likelihood_alone(ADAPTER, context, ending, 2)[0], abs=1e-4)


def test_answers_are_told_token_by_token_and_an_error_ends_them() -> None:
    engine = Engine(ADAPTER, TOKENIZER)
    prompts, ranks = [tokens(random.Random(7), 5), tokens(random.Random(8), 3)] * 2, [1, 2, 4, 0]
    told: list[tuple[int, str]] = []
    found = engine.generate(prompts, ranks, NEW, on_text=lambda *news: told.append(news))
    assert found == engine.generate(prompts, ranks, NEW)
    for number, answer in enumerate(found):
        texts = [text for place, text in told if place == number]
        # One token is one character, but for those that have no text.
        assert texts == [answer[: len(text)] for text in texts]
        assert texts[-1] == answer
    assert max(map(len, found)) > 5
    assert len(told) > len(found) + 10

    def stop(number: int, text: str) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.generate(prompts, ranks, NEW, on_text=stop)
    assert engine.generate(prompts, ranks, NEW) == found


def test_a_kept_diagonal_a_reordered_adapter_and_the_state_afterwards() -> None:
    prompts = [tokens(random.Random(n), 20 + n) for n in range(4)]
    for reorder in (False, True):
        adapter = adapter_of(deploy="reordered")
        if reorder:
            adapter.reorder()
        adapter.set_rank(2)
        adapter.model.train()
        found = Engine(adapter, TOKENIZER).generate(prompts, [1, 2, 4, 4], NEW)
        assert adapter.model.training
        assert adapter.rank == 2
        adapter.model.eval()
        assert found == [alone(adapter, p, r) for p, r in zip(prompts, [1, 2, 4, 4], strict=True)]
        assert adapter.model.get_base_model().config._attn_implementation == "sdpa"
        assert not adapter.model.get_base_model().get_output_embeddings()._forward_pre_hooks


SPARSE = {**EXPERTS, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**WIDE, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=9.0),
        Qwen3Config(**WIDE),
        DiffLlamaConfig(**GROUPED),
        HrmTextConfig(
            **{**SIZES, "initializer_range": 0.05, "num_hidden_layers": 3},
            H_cycles=1,
            L_cycles=2,
            num_layers_per_stack=1,
        ),
        PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        Qwen2MoeConfig(**GROUPED, **SPARSE, use_sliding_window=True, sliding_window=8),
        Llama4TextConfig(**WIDE, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8),
        GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        DeepseekV3Config(
            **SIZES,
            **LATENT,
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        MiniCPM3Config(**SIZES, **LATENT, num_key_value_heads=4),
        NemotronConfig(**GROUPED),
        Phi3Config(**GROUPED, rope_parameters=dict(LONGROPE), original_max_position_embeddings=48),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config: Any) -> None:
    # The attention with softcaps is exact in transformers' eager form only.
    adapter = tiny_adapter(config)
    draw = random.Random(3)
    shared = tokens(draw, 20)
    prompts = [[*(shared if n % 2 else ()), *tokens(draw, 3 + n)] for n in range(6)]
    ranks = [RANKS[n % 4] for n in range(6)]
    engine = Engine(adapter, TOKENIZER)
    assert engine.generate(prompts, ranks, NEW) == [alone(adapter, p, r) for p, r in zip(prompts, ranks, strict=True)]
    requests = [(prompt, tokens(draw, 3)) for prompt in prompts for _ in range(3)]
    of = [rank for rank in ranks for _ in range(3)]
    for (logprob, _), request, rank in zip(engine.loglikelihood(requests, of), requests, of, strict=True):
        assert logprob == pytest.approx(likelihood_alone(adapter, *request, rank)[0], abs=1e-4)


def test_what_cannot_be_answered_is_said_before_anything_runs() -> None:
    engine = Engine(ADAPTER, TOKENIZER)
    with pytest.raises(MatryoshkaError, match="rank 3 was not trained"):
        engine.generate([[5]], 3)
    with pytest.raises(MatryoshkaError, match="2 ranks for 1 requests"):
        engine.generate([[5]], [1, 2])
    with pytest.raises(MatryoshkaError, match="prompt 1 is empty"):
        engine.generate([[5], []], 1, 4)
    with pytest.raises(MatryoshkaError, match="empty continuation"):
        engine.loglikelihood([([5], [])], 1)
    with pytest.raises(MatryoshkaError, match=r"request 0 is too long: prompt and 40 new tokens need 140 tokens.*128"):
        engine.generate([[5] * 100], 1, 40)
    with pytest.raises(MatryoshkaError, match="max_new_tokens is 0"):
        engine.generate([[5]], 1, 0)
    with pytest.raises(MatryoshkaError, match="batch_size is 0"):
        Engine(ADAPTER, TOKENIZER, 0)
    assert engine.generate([], 1) == []
    assert engine.loglikelihood([], 1) == []


def test_requests_that_llama_4_would_tune_its_attention_for_are_refused() -> None:
    """By a position that it counts by transformers' cache, which the engine does not use. The real one is 8192."""
    config = Llama4TextConfig(**WIDE, num_local_experts=2, intermediate_size_mlp=48, floor_scale=32)
    engine = Engine(tiny_adapter(config), TOKENIZER)
    assert engine.max_length == 31
    with pytest.raises(MatryoshkaError, match=r"have 32 tokens, and from 31 on this model tunes its attention.*export"):
        engine.loglikelihood([([5] * 30, [6, 7, 8])], 4)


def test_requests_beyond_the_switch_of_longrope_are_refused() -> None:
    """There, a neighbour's length would change an answer: with transformers' own forward of a padded batch it does."""
    config = Phi3Config(**GROUPED, rope_parameters=dict(LONGROPE), original_max_position_embeddings=32)
    adapter = tiny_adapter(config)
    draw = random.Random(5)
    engine, short, long = Engine(adapter, TOKENIZER), tokens(draw, 8), tokens(draw, 30)
    found = engine.loglikelihood([(short, [5]), (long, [6, 7])], 4)
    assert found[0].logprob == pytest.approx(likelihood_alone(adapter, short, [5], 4)[0], abs=1e-4)
    assert found[1].logprob == pytest.approx(likelihood_alone(adapter, long, [6, 7], 4)[0], abs=1e-4)
    with pytest.raises(MatryoshkaError, match=r"have 33 tokens, and from 32 on .*longrope.*export the ranks"):
        engine.loglikelihood([(short, [5]), (long, [6, 7, 8, 9])], 4)
    with pytest.raises(MatryoshkaError, match=r"prompt and 3 new tokens need 33 tokens.*longrope"):
        engine.generate([long], 4, 3)
    ids = torch.tensor([[*short, *[0] * 25], [*long, 6, 7, 8]])
    with torch.no_grad():
        alone_, padded = adapter.model(input_ids=ids[:1, :8]).logits[0, -1], adapter.model(input_ids=ids).logits[0, 7]
    assert (alone_ - padded).abs().max() > 0.1


def test_the_attention_of_each_part_of_a_model_is_put_back() -> None:
    config = Gemma3Config(text_config=Gemma3TextConfig(**WIDE), vision_config={"num_hidden_layers": 1})
    config.vision_config._attn_implementation, config.text_config._attn_implementation = "sdpa", "eager"
    model = Gemma3ForConditionalGeneration(config)
    before = {name: part.config._attn_implementation for name, part in model.named_modules() if hasattr(part, "config")}
    assert {"sdpa", "eager"} <= set(before.values())
    with row_attention(model):
        pass
    assert before == {
        name: part.config._attn_implementation for name, part in model.named_modules() if hasattr(part, "config")
    }


def test_a_model_whose_rows_cannot_share_a_batch() -> None:
    config = MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MatryoshkaError, match="lm_eval's own hf backend"), row_attention(model):
        pass


def test_an_adapter_on_routed_experts_is_refused_before_anything_runs() -> None:
    config = lora_config(Nesting([1, 2]), target_modules=[], target_parameters=["experts.down_proj"])
    adapter = nest(get_peft_model(tiny_mixtral(), config))
    with pytest.raises(MatryoshkaError, match="To evaluate, export the ranks and run lm-evaluation-harness on each"):
        Engine(adapter, tiny_tokenizer())


def test_the_attention_is_put_back_after_an_error() -> None:
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="mine"), row_attention(model):
        raise RuntimeError("mine")
    assert model.config._attn_implementation == "sdpa"


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple), max_size=12))
def test_families_hold_every_sequence_once_and_leave_each_a_token(sequences: list[tuple[int, ...]]) -> None:
    found = families(sequences)
    assert sorted(member for family in found for member in family.members) == list(range(len(sequences)))
    for family in found:
        assert not family.prefix or len(family.prefix) >= MIN_PREFIX
        for member in family.members:
            assert sequences[member][: len(family.prefix)] == family.prefix
            assert len(sequences[member]) > len(family.prefix)


def test_the_prefix_that_spares_most_is_chosen() -> None:
    start, shots, other = tuple(range(20)), tuple(range(100, 200)), tuple(range(300, 400))
    one = [(*start, *shots, n) for n in range(5)]
    two = [(*start, *other, n) for n in range(5)]
    assert [len(family.prefix) for family in families(one + two)] == [120, 120]
    short = [(*start, n, n) for n in range(500, 505)]
    assert [len(family.prefix) for family in families(short)] == [20]
    assert families([(1, 2), (3, 4)])[0].prefix == ()
    assert families([]) == []


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 5), st.integers(1, 100))
def test_batches_hold_every_row_once_within_bounds(lengths: list[int], rows: int, size: int) -> None:
    found = list(batches(lengths, rows, size))
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= size


def test_rank_zero_is_the_base_model() -> None:
    ids = torch.tensor([tokens(random.Random(4), 7)] * 2)
    with torch.no_grad():
        with ADAPTER.model.disable_adapter():
            base = ADAPTER.model(input_ids=ids).logits
        for exact in (True, False):
            with ADAPTER.rows([0, 4], exact=exact):
                mixed = ADAPTER.model(input_ids=ids).logits
            torch.testing.assert_close(mixed[0], base[0])
            assert not torch.allclose(mixed[1], base[1])
    with pytest.raises(MatryoshkaError), ADAPTER.rows([False]):
        pass


def test_rows_that_need_not_be_exact_are_computed_in_the_dtype_of_the_activations() -> None:
    adapter = adapter_of()
    adapter.model.get_base_model().to(torch.bfloat16)
    for name, parameter in adapter.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    seen = []
    layer = adapter.model.get_base_model().model.layers[0].mlp.up_proj
    handle = layer.lora_A["default"].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with adapter.rows([4]):
            exact = adapter.model(input_ids=ids).logits
        handle.remove()
        with adapter.rows([4], exact=False):
            fast = adapter.model(input_ids=ids).logits
    assert seen == [torch.float32]
    assert not torch.equal(exact, fast)
    torch.testing.assert_close(exact, fast, rtol=0.1, atol=0.3)
