"""All ranks at once, compared with the harness's own backend on a model set to each rank."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.models import randomize
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)

from matryoshka_lora import MatryoshkaError, NestedAdapter, nest
from matryoshka_lora.evaluation.harness import ManyRanksLM
from matryoshka_lora.peft.base_model import load_tokenizer

RANKS = (0, 1, 2, 4)
CONTEXT_WINDOW = 80
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "red",
    "mat",
    "and",
    "saw",
    "seven",
    "green",
    "birds",
    "fly",
]

SIZES = {
    "vocab_size": 49152,  # of the bundled model's tokenizer
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT_WINDOW,
    "initializer_range": 0.2,  # large enough for the tokens to depend on the adapter
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 5.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, eager": lambda: LlamaConfig(**SIZES, attn_implementation="eager"),
    "mistral, sliding": lambda: MistralConfig(**SIZES, sliding_window=7),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=7, **LAYER_TYPES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gpt2": lambda: GPT2Config(**SIZES, tie_word_embeddings=False),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "phi3, longrope": lambda: Phi3Config(**SIZES, **LONGROPE),
    "mamba": lambda: MambaConfig(**SIZES, state_size=8, time_step_rank=4),
}
RANK_BY_RANK = {"mamba", "phi3, longrope"}
TARGET_MODULES = {"mixtral": ["q_proj", "v_proj"], "mamba": ["in_proj", "x_proj"]}


def new_adapter(architecture: str = "llama", **generation_config: Any) -> NestedAdapter:
    """Return a nested adapter of random factors, reordered, on a tiny model."""
    torch.manual_seed(0)
    base_model = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    base_model.generation_config.update(eos_token_id=2, pad_token_id=2, **generation_config)
    target_modules = TARGET_MODULES.get(architecture, "all-linear")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=target_modules)
    model = get_peft_model(base_model, config)
    randomize(model, size=0.4)
    adapter = nest(model.eval(), rule="lora")
    adapter.reorder()
    return adapter


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="module")
def llama() -> NestedAdapter:
    return new_adapter()


def random_text(num_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def log_likelihood_arguments() -> list[tuple[str, str]]:
    few_shot = random_text(40, 0) + "\n"
    pairs: list[tuple[str, str]] = []
    for n in range(6):
        context = (few_shot if n % 3 else "") + random_text(n * 4 + 1, n) + " " * (n % 2)
        for i in range(1 + n % 4):
            pairs.append((context, f" the cat {random_text(1 + (n + i) % 4, i)}"))
    pairs += [("Say", " A"), ("Say", " B"), ("Say", " Bob is"), ("", "the cat sat"), ("", "dog")]
    too_long_context = (random_text(150, 1), " and so on")
    too_long_together = (random_text(80, 2), " so " + random_text(70, 3))
    return [*pairs, too_long_context, too_long_together]


def generation_arguments(**settings: Any) -> list[tuple[str, dict[str, Any]]]:
    settings = {"until": ["\n", " mat"], "max_gen_toks": 12, "do_sample": False, **settings}
    few_shot = random_text(40, 0) + "\n"
    arguments = []
    for n in range(6):
        prompt = (few_shot if n % 3 else "") + random_text(3 * n + 1, n)
        arguments.append((prompt, dict(settings)))
    too_long = (random_text(120, 9), {"until": [], "max_gen_toks": 7})
    repeated = arguments[1]
    return [*arguments, too_long, repeated]


ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "loglikelihood": log_likelihood_arguments(),
    "loglikelihood_rolling": [(random_text(n, n),) for n in (1, 30, 150)],
    "generate_until": generation_arguments(),
}


def make_requests(request_type: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type, {}, request_arguments, 0) for request_arguments in arguments]


def respond(lm: ManyRanksLM, request_type: str, arguments: list[Any], rank: int) -> list[Any]:
    lm.lora_rank = rank
    return list(getattr(lm, request_type)(make_requests(request_type, arguments)))


KNOWN_RESPONSES: dict[tuple[NestedAdapter, int, str], list[Any]] = {}


def harness_responses(
    adapter: NestedAdapter, tokenizer: Any, request_type: str, arguments: list[Any], rank: int
) -> list[Any]:
    """Return the responses of the harness's own backend."""
    key = (adapter, rank, request_type)
    is_standard = arguments is ARGUMENTS[request_type]
    if is_standard and key in KNOWN_RESPONSES:
        return KNOWN_RESPONSES[key]
    is_exact_alone = request_type == "generate_until" or "longrope" in str(adapter.model.config)
    previous_rank = adapter.rank
    adapter.set_rank(rank)
    backend = HFLM(adapter.model, tokenizer=tokenizer, batch_size=1 if is_exact_alone else 4)
    requests = make_requests(request_type, arguments)
    responses = list(getattr(backend, request_type)(requests, disable_tqdm=True))
    adapter.set_rank(previous_rank)
    if is_standard:
        KNOWN_RESPONSES[key] = responses
    return responses


def check_responses(
    lm: ManyRanksLM,
    adapter: NestedAdapter,
    tokenizer: Any,
    request_type: str,
    ranks: tuple[int, ...],
    arguments: list[Any] | None = None,
) -> None:
    """Assert that responses at some ranks are those of the harness's own backend."""
    arguments = arguments or ARGUMENTS[request_type]
    for rank in ranks:
        responses = respond(lm, request_type, arguments, rank)
        expected = harness_responses(adapter, tokenizer, request_type, arguments, rank)
        if request_type == "generate_until":
            assert responses == expected
            assert len(set(responses)) > 3
        elif request_type == "loglikelihood":
            logprobs, is_greedy = zip(*responses, strict=True)
            expected_logprobs, expected_is_greedy = zip(*expected, strict=True)
            assert logprobs == pytest.approx(expected_logprobs, abs=2e-4)
            assert is_greedy == expected_is_greedy
        else:
            assert responses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CONFIGS)[1:])],
)
def test_responses_equal_those_of_the_harness(
    architecture: str, tokenizer: Any, llama: NestedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_llama = architecture == "llama"
    adapter = llama if is_llama else new_adapter(architecture)
    lm = ManyRanksLM(adapter, tokenizer, RANKS)
    assert lm.is_supported == (architecture not in RANK_BY_RANK)
    if lm.is_supported:
        # The harness's own forward passes must not be used.
        monkeypatch.setattr(lm, "_model_call", None)
        monkeypatch.setattr(lm, "_model_generate", None)
    for request_type in ARGUMENTS:
        ranks = (0, 2) if is_llama else (1, 4)
        check_responses(lm, adapter, tokenizer, request_type, ranks)


@pytest.mark.parametrize("max_batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 150])
def test_small_batches_change_nothing(
    max_batch_tokens: int, llama: NestedAdapter, tokenizer: Any
) -> None:
    """Finished rows leave, waiting prompts join, and forward passes are split."""
    lm = ManyRanksLM(llama, tokenizer, RANKS, max_batch_tokens)
    for request_type in ARGUMENTS:
        check_responses(lm, llama, tokenizer, request_type, (2,))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_the_tokenizer_changes_nothing(side: str, llama: NestedAdapter) -> None:
    tokenizer = load_tokenizer()
    tokenizer.padding_side = side
    tokenizer.pad_token = None
    lm = ManyRanksLM(llama, tokenizer, RANKS)
    check_responses(lm, llama, load_tokenizer(), "loglikelihood", (2,))
    check_responses(lm, llama, load_tokenizer(), "generate_until", (2,))
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, None)


def test_generated_texts_are_greedy_at_their_rank(llama: NestedAdapter, tokenizer: Any) -> None:
    lm = ManyRanksLM(llama, tokenizer, (1, 4))
    prompts = generation_arguments(until=[])[:3]
    for rank in (1, 4):
        texts = respond(lm, "generate_until", prompts, rank)
        pairs = [(prompt, text) for (prompt, _), text in zip(prompts, texts, strict=True)]
        responses = respond(lm, "loglikelihood", pairs, rank)
        expected = harness_responses(llama, tokenizer, "loglikelihood", pairs, rank)
        for (logprob, is_greedy), (expected_logprob, expected_is_greedy) in zip(
            responses, expected, strict=True
        ):
            assert logprob == pytest.approx(expected_logprob, abs=2e-4)
            assert is_greedy == expected_is_greedy
        assert any(is_greedy for _, is_greedy in responses)


def count_forward_passes(lm: ManyRanksLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that gets the rows and the new tokens of each forward pass."""
    model = lm.engine
    forward = model.forward
    shapes: list[tuple[int, int]] = []

    def counting_forward(batch: Any, inputs: Any, num_logits: int) -> Any:
        shapes.append((len(inputs), len(inputs[0])))
        return forward(batch, inputs, num_logits)

    monkeypatch.setattr(model, "forward", counting_forward)
    return shapes


def test_all_ranks_are_computed_once(
    llama: NestedAdapter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = ManyRanksLM(llama, tokenizer, RANKS)
    shapes = count_forward_passes(lm, monkeypatch)
    counts: list[int] = []
    for rank in (4, 1, 0):
        for request_type, arguments in ARGUMENTS.items():
            respond(lm, request_type, arguments, rank)
        counts.append(len(shapes))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("request_type", ["loglikelihood", "generate_until"])
def test_the_progress_bar_ends_at_its_total(
    request_type: str, llama: NestedAdapter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    totals: list[int] = []

    class Bar(nullcontext[Any]):
        def __init__(self, total: int, **_: object) -> None:
            super().__init__(self)
            totals.append(total)

        def update(self, step: int) -> None:
            steps.append(step)

    monkeypatch.setattr("matryoshka_lora.evaluation.harness.tqdm", Bar)
    lm = ManyRanksLM(llama, tokenizer, RANKS, max_batch_tokens=600)
    respond(lm, request_type, ARGUMENTS[request_type], 2)
    assert sum(steps) == sum(totals) > 0
    assert max(steps) < sum(totals) / 2


def test_each_task_has_its_own_prefix(
    llama: NestedAdapter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed once per rank, so an example computes only its own tokens."""
    pairs = [(f"{random_text(30, n % 2)} {random_text(3, n)}", " cat") for n in range(8)]
    requests = make_requests("loglikelihood", pairs)
    for n, request in enumerate(requests):
        request.task_name = f"task {n % 2}"
    lm = ManyRanksLM(llama, tokenizer, (1, 4))
    shapes = count_forward_passes(lm, monkeypatch)
    lm.lora_rank = 4
    responses = lm.loglikelihood(requests)
    assert [rows for rows, _ in shapes] == [2, 8, 2, 8]
    assert shapes[0][1] >= 30
    assert shapes[1][1] < 10
    expected = harness_responses(llama, tokenizer, "loglikelihood", pairs, 4)
    expected_logprobs = [logprob for logprob, _ in expected]
    assert [logprob for logprob, _ in responses] == pytest.approx(expected_logprobs, abs=2e-4)


@pytest.mark.parametrize("source", ["task", "model"])
def test_other_decoding_than_greedy_is_the_harness_s(
    source: str, llama: NestedAdapter, tokenizer: Any
) -> None:
    settings = {"repetition_penalty": 1.7}
    greedy_arguments = generation_arguments()
    if source == "task":
        adapter, arguments = llama, generation_arguments(**settings)
    else:
        adapter, arguments = new_adapter("llama", **settings), greedy_arguments
    lm = ManyRanksLM(adapter, tokenizer, (1, 4))
    check_responses(lm, adapter, tokenizer, "generate_until", (1, 4), list(arguments))
    greedy_lm = ManyRanksLM(llama, tokenizer, (1, 4))
    greedy_texts = respond(greedy_lm, "generate_until", greedy_arguments, 4)
    assert greedy_texts != respond(lm, "generate_until", arguments, 4)


def test_a_task_that_samples_gets_the_harness_s_answers(
    llama: NestedAdapter, tokenizer: Any
) -> None:
    lm = ManyRanksLM(llama, tokenizer, (1, 4))
    settings = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}
    arguments = [("the cat", settings)] * 4
    for rank in (4, 1):
        torch.manual_seed(rank)
        texts = respond(lm, "generate_until", arguments, rank)
        assert len(set(texts)) > 1
        torch.manual_seed(rank)
        llama.set_rank(rank)
        backend = HFLM(llama.model, tokenizer=tokenizer, batch_size=8)
        requests = make_requests("generate_until", arguments)
        assert backend.generate_until(requests, disable_tqdm=True) == texts


@pytest.mark.parametrize(
    ("request_type", "arguments", "keyword"),
    [
        ("loglikelihood", ("the cat", ""), "got 0"),
        ("loglikelihood", ("the cat", random_text(CONTEXT_WINDOW + 1, 0)), "80 tokens"),
        ("generate_until", ("the cat", {"max_gen_toks": CONTEXT_WINDOW}), "max_gen_toks"),
    ],
)
def test_requests_that_do_not_fit_the_context_window(
    request_type: str, arguments: Any, keyword: str, llama: NestedAdapter, tokenizer: Any
) -> None:
    """They are an error before anything is computed."""
    lm = ManyRanksLM(llama, tokenizer, RANKS)
    fitting_arguments = (
        ("a", "b") if request_type == "loglikelihood" else ("a", {"max_gen_toks": 2})
    )

    def fail(*_: object, **__: object) -> None:
        pytest.fail("the model must not run")

    handle = llama.model.register_forward_pre_hook(fail)
    with pytest.raises(MatryoshkaError, match=keyword):
        respond(lm, request_type, [fitting_arguments, arguments], 1)
    handle.remove()


def test_ranks_that_are_not_available(llama: NestedAdapter, tokenizer: Any) -> None:
    with pytest.raises(MatryoshkaError, match="rank"):
        ManyRanksLM(llama, tokenizer, (1, 5))
