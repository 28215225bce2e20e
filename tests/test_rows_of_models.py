"""A rank per row in models of many kinds: each row equals what it is alone, or the model is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import lora_config, nest_as, nested_llama, randomize, tiny_llama, tiny_mixtral
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongformerConfig,
    LongformerModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting

NESTING = Nesting([1, 2, 4], "sqrt")
IMAGE = 49
"""The token of an image's patch in `llava`."""


def longformer() -> Any:
    config = LongformerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        attention_window=4,
        max_position_embeddings=80,
        pad_token_id=1,
    )
    return LongformerModel(config, add_pooling_layer=False)


def xlnet() -> Any:
    return XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=20))


def t5() -> Any:
    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=20,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        initializer_factor=3.0,
    )
    return T5ForConditionalGeneration(config)


def bart() -> Any:
    config = BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_position_embeddings=40,
        init_std=0.3,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def whisper() -> Any:
    config = WhisperConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        num_mel_bins=4,
        max_source_positions=7,
        max_target_positions=20,
        init_std=0.3,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def clip() -> Any:
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    heads = {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, **heads, "eos_token_id": 49}, vision_config={**vision, **heads}, projection_dim=8
    )
    return CLIPModel(config)


def llava() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8),
        text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, initializer_range=0.2),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def vit() -> Any:
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False)


class SequenceFirst(nn.Module):
    """torch's own encoder, which by default takes tokens first, in a model that takes rows first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(50, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 20, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        if self.batch_first:
            return self.head(self.block(hidden))
        return self.head(self.block(hidden.transpose(0, 1)).transpose(0, 1))


def nested(build: Callable[[], nn.Module], targets: Any, rule: str = "matryoshka") -> NestedAdapter:
    torch.manual_seed(0)
    model = get_peft_model(build().eval(), lora_config(NESTING, target_modules=targets))
    randomize(model)
    return nest_as(model.eval(), NESTING, rule)


def ids(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(3, 49, (rows, length), generator=torch.Generator().manual_seed(seed))


def alone(adapter: NestedAdapter, call: Callable[[slice], Tensor], ranks: list[int]) -> Tensor:
    """Each row by itself, at its rank."""
    outputs = []
    for row, rank in enumerate(ranks):
        adapter.set_rank(rank)
        outputs.append(call(slice(row, row + 1)))
    adapter.set_rank(4)
    return torch.cat(outputs)


# Models that take rows first.

GENERATING = {
    "t5": (t5, ["q", "k", "v", "o", "wi_0", "wo"]),
    "bart": (bart, ["q_proj", "k_proj", "v_proj", "fc1"]),
    "whisper": (whisper, ["q_proj", "k_proj", "v_proj", "fc1"]),
    "mixtral": (tiny_mixtral, ["q_proj", "k_proj", "v_proj", "gate"]),
    "llama": (tiny_llama, ["q_proj", "v_proj", "embed_tokens"]),
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", GENERATING)
def test_generation_equals_the_rows_one_by_one(name: str, options: dict[str, Any]) -> None:
    build, targets = GENERATING[name]
    if name == "mixtral":
        targets = targets[:-1]  # its router gets tokens without their rows
    adapter = nested(build, targets)
    inputs = {"input_ids": ids(3, 7)}
    if name == "whisper":
        inputs = {"input_features": torch.randn(3, 4, 14, generator=torch.Generator().manual_seed(0))}

    def generate(rows: slice) -> Tensor:
        some = {key: value[rows] for key, value in inputs.items()}
        said = adapter.model.generate(**some, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
        return nn.functional.pad(said, (0, 20 - said.shape[1]), value=2)  # Whisper cuts what all rows end in

    ranks = [1, 4, 2]
    with adapter.rows(ranks):
        mixed = generate(slice(None))
    assert torch.equal(mixed, alone(adapter, generate, ranks))
    assert not torch.equal(mixed, generate(slice(None)))


def test_clip_takes_one_image_for_each_text() -> None:
    adapter = nested(clip, ["q_proj", "fc1"])
    texts, images = ids(3, 6), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def features(rows: slice) -> Tensor:
        output = adapter.model(input_ids=texts[rows], pixel_values=images[:3][rows])
        return torch.cat([output.text_embeds, output.image_embeds], dim=1)

    with torch.no_grad():
        with adapter.rows([1, 4, 2]):
            mixed = features(slice(None))
        torch.testing.assert_close(mixed, alone(adapter, features, [1, 4, 2]), rtol=1e-4, atol=1e-5)
        # Four images for two texts are no beams.
        with adapter.rows([1, 4]), pytest.raises(MatryoshkaError, match=r"called with 2 rows, .* begins with 4 of"):
            adapter.model(input_ids=texts[:2], pixel_values=images)


def with_images(*images_in_row: int) -> dict[str, Tensor]:
    """A text of 14 tokens for each row, with some images of 4 patches, as `llava` takes them."""
    texts = ids(len(images_in_row), 14)
    for row, images in zip(texts, images_in_row, strict=True):
        for number in range(images):
            row[1 + 5 * number : 5 + 5 * number] = IMAGE
    images = torch.randn(sum(images_in_row), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"input_ids": texts, "pixel_values": images}


@pytest.mark.parametrize("mode", ["rows", "generate", "stratified"])
def test_images_that_are_as_many_as_rows_and_not_one_each_are_refused(mode: str) -> None:
    """An image would get the rank of another row."""
    adapter = nested(llava, "all-linear", "stratified" if mode == "stratified" else "matryoshka")
    inputs, message = with_images(2, 0, 1), "got images, .* not known to be one for each row: give each row one"
    if mode == "stratified":
        adapter.model.train()
        adapter.draw(0, rows=3)
        with pytest.raises(MatryoshkaError, match=message):
            adapter.model(**inputs)
        return
    call = adapter.model if mode == "rows" else partial(adapter.model.generate, max_new_tokens=2)
    with torch.no_grad():
        with adapter.rows([1, 4, 2]), pytest.raises(MatryoshkaError, match=message):
            call(**inputs)
        with adapter.rows([2, 2, 2]):
            call(**inputs)


def test_images_of_prompts_are_rows_where_each_has_one() -> None:
    adapter = nested(llava, "all-linear")

    def generate(rows: slice, *images_in_row: int) -> Tensor:
        inputs = {name: value[rows] for name, value in with_images(*images_in_row).items()}
        return adapter.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)

    with adapter.rows([1, 4, 2]):
        mixed = generate(slice(None), 1, 1, 1)
        # Six of three rows are no beams.
        with pytest.raises(MatryoshkaError, match="not known to be one for each row"):
            generate(slice(None), 2, 2, 2)
    assert torch.equal(mixed, alone(adapter, lambda rows: generate(rows, 1, 1, 1), [1, 4, 2]))


@pytest.mark.parametrize(
    ("targets", "images"),
    [
        ("all-linear", (1, 1, 1)),
        (r".*language_model.*_proj|lm_head", (2, 0, 1)),
        (r".*language_model.*_proj|lm_head", (2, 2, 1)),
    ],
)
def test_rows_with_images_have_ranks_of_their_own(targets: str, images: tuple[int, ...]) -> None:
    adapter = nested(llava, targets)
    inputs, ranks, expected, began = with_images(*images), [1, 4, 2], [], 0
    with torch.no_grad():
        with adapter.rows(ranks):
            mixed = adapter.model(**inputs).logits
        for row, (rank, number) in enumerate(zip(ranks, images, strict=True)):
            adapter.set_rank(rank)
            its = {"pixel_values": inputs["pixel_values"][began : began + number]} if number else {}
            expected.append(adapter.model(input_ids=inputs["input_ids"][row][None], **its).logits)
            began += number
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_images_are_rows_where_they_are_the_input() -> None:
    adapter = nested(vit, ["q_proj", "fc1", "projection"])
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def hidden(rows: slice) -> Tensor:
        return adapter.model(pixel_values=images[rows]).last_hidden_state

    with torch.no_grad():
        with adapter.rows([1, 4, 2]):
            mixed = hidden(slice(None))
        torch.testing.assert_close(mixed, alone(adapter, hidden, [1, 4, 2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 6])
def test_more_rows_in_a_call_of_the_whole_model_are_no_beams(rows: int) -> None:
    adapter = nested(tiny_llama, ["q_proj"])
    with (
        torch.no_grad(),
        adapter.rows([1, 4]),
        pytest.raises(MatryoshkaError, match=f"2 rows have a rank, but a layer got {rows} rows"),
    ):
        adapter.model(ids(rows, 5))


# Models whose layers take something else first.

SHAPES = [(2, 8), (2, 6), (3, 6), (4, 8), (2, 2), (4, 4)]  # rows and tokens; multiples of the rows, and as many


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (longformer, ["query", "key", "value"]),
        (xlnet, ["layer_1", "layer_2"]),
        (lambda: SequenceFirst(batch_first=False), ["linear1", "linear2"]),
    ],
    ids=["longformer", "xlnet", "torch"],
)
@pytest.mark.parametrize("mode", ["rows", "rows with gradients", "stratified"])
def test_tokens_are_never_taken_for_rows(build: Any, targets: Any, rows: int, length: int, mode: str) -> None:
    adapter = nested(build, targets, "stratified" if mode == "stratified" else "matryoshka")
    ranks = [1, 4, 2, 4][:rows]
    if mode == "stratified":
        adapter.model.train()
        adapter.draw(0, rows=8)  # the last batch of an epoch has fewer
        with pytest.raises(MatryoshkaError, match="rows"):
            adapter.model(input_ids=ids(rows, length))
        return
    with (
        torch.set_grad_enabled(mode == "rows with gradients"),
        adapter.rows(ranks),
        pytest.raises(MatryoshkaError, match=f"called with {rows} rows|there are {rows} rows and {rows} of"),
    ):
        adapter.model(input_ids=ids(rows, length))


@pytest.mark.parametrize(("rows", "length"), [(2, 8), (3, 6), (2, 2)])
def test_the_layers_of_a_longformer_that_take_rows_first_are_used(rows: int, length: int) -> None:
    adapter = nested(longformer, ["dense"])
    ranks, tokens = [1, 4, 2][:rows], ids(rows, length)

    def hidden(some: slice) -> Tensor:
        return adapter.model(input_ids=tokens[some]).last_hidden_state

    with torch.no_grad():
        with adapter.rows(ranks):
            mixed = hidden(slice(None))
        torch.testing.assert_close(mixed, alone(adapter, hidden, ranks), rtol=1e-4, atol=1e-5)


def test_one_rank_for_all_rows_is_right_in_any_order() -> None:
    adapter = nested(longformer, ["query", "key", "value"])
    with torch.no_grad():
        adapter.set_rank(2)
        expected = adapter.model(input_ids=ids(4, 4)).last_hidden_state
        adapter.set_rank(4)
        with adapter.rows([2, 2, 2, 2]):
            actual = adapter.model(input_ids=ids(4, 4)).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_as_many_rows_as_tokens(training: bool) -> None:
    """The first call says nothing about the layers, so that one with a token less is made before it."""
    adapter = nested(tiny_llama, ["q_proj", "down_proj"])
    adapter.model.train(training)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.no_grad():
        with adapter.rows([1, 4, 2]):
            mixed = adapter.model(ids(3, 3)).logits
        assert torch.equal(torch.get_rng_state(), state)
        adapter.model.eval()
        expected = alone(adapter, lambda rows: adapter.model(ids(3, 3)[rows]).logits, [1, 4, 2])
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)


def test_as_many_rows_as_tokens_where_no_call_can_show_it() -> None:
    """An encoder's output reaches the decoder's layers first; the message says what to do, and that does it."""
    adapter = nested(t5, ["k"])
    with torch.no_grad(), adapter.rows([1, 4]):
        with pytest.raises(MatryoshkaError, match=r"2 rows and 2 of something else .*call the model once with another"):
            adapter.model(input_ids=ids(2, 2), decoder_input_ids=ids(2, 3))
        adapter.model(input_ids=ids(2, 4), decoder_input_ids=ids(2, 3))
        mixed = adapter.model(input_ids=ids(2, 2), decoder_input_ids=ids(2, 3)).logits

    def logits(rows: slice) -> Tensor:
        return adapter.model(input_ids=ids(2, 2)[rows], decoder_input_ids=ids(2, 3)[rows]).logits

    with torch.no_grad():
        torch.testing.assert_close(mixed, alone(adapter, logits, [1, 4]), rtol=1e-4, atol=1e-4)


def test_a_call_that_fails_is_not_counted_on() -> None:
    adapter = nested(tiny_llama, ["q_proj"])
    with torch.no_grad(), adapter.rows([1, 4]):
        with pytest.raises((IndexError, RuntimeError)):
            adapter.model(torch.full((2, 5), 10**6))
        assert adapter.model(ids(2, 4)).logits.shape[0] == 2
    with torch.no_grad(), adapter.rows([1, 4, 2]):
        assert adapter.model(ids(3, 4)).logits.shape[0] == 3


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_nothing_is_left_on_the_base_model(way: str) -> None:
    """It pickles without this package."""
    adapter = nested(t5, ["q"])
    with torch.no_grad(), adapter.rows([1, 4]):
        adapter.model(input_ids=ids(2, 4), decoder_input_ids=ids(2, 3))
    base = getattr(adapter.model, way)()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    assert b"matryoshka" not in pickle.dumps(base)


def test_a_copy_of_a_model_with_ranks_of_rows_counts_for_itself() -> None:
    adapter = nested(lambda: SequenceFirst(batch_first=False), ["linear1"], "stratified")
    clone = NestedAdapter(copy.deepcopy(adapter.model))
    clone.model.train()
    clone.draw(0, rows=8)
    with pytest.raises(MatryoshkaError, match="called with 2 rows"):
        clone.model(input_ids=ids(2, 6))


def test_ranks_of_rows_in_a_batch_of_mixed_adapters_are_refused() -> None:
    adapter = nested_llama(NESTING)
    adapter.model.add_adapter("plain", lora_config(NESTING))
    names = ["default", "plain", "default", "plain"]
    for ranks in ([1, 4], [1, 4, 2, 4]):
        with torch.no_grad(), adapter.rows(ranks), pytest.raises(MatryoshkaError, match="rows"):
            adapter.model(input_ids=ids(4, 5), adapter_names=names)


# Modules of torch that pass over PEFT's layers.


def test_a_module_that_takes_the_weight_without_calling_the_layer() -> None:
    """Their adapters have no effect, in plain PEFT either."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    x = torch.randn(2, 3, 16)
    for build, target, call, message in (
        (Attention, "out_proj", lambda m: m(x), "MultiheadAttention takes its weight without calling it"),
        (
            lambda: SequenceFirst(batch_first=True),
            "linear1",
            lambda m: m(ids(2, 3)),
            r"TransformerEncoderLayer takes .*: call torch\.backends\.mha\.set_fastpath_enabled\(False\) first",
        ),
    ):
        base = build().eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = call(base)
            model = get_peft_model(base, lora_config(NESTING, target_modules=[target])).eval()
            randomize(model)
            assert torch.equal(call(model), before)
        with pytest.raises(MatryoshkaError, match=message):
            nest_as(model, NESTING)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        adapter = nest_as(model, NESTING)
        with torch.no_grad():
            full = model(ids(2, 3))
            adapter.set_rank(1)
            assert not torch.equal(model(ids(2, 3)), full)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
