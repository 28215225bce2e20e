"""Training data from a Trainer, a dataset, a list and a file: the tokens and labels of TRL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.examples import (
    all_equal,
    collate,
    copy_lora_parameters,
    make_trainer,
    random_examples,
)
from helpers.models import nested_llama, tiny_llama
from helpers.tiny_chat import tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, nest
from matryoshka_lora.training.data import IGNORED_LABEL, read_training_data

TEXTS = [
    # A completion may end with the end-of-sequence token already.
    {"prompt": f"{a} is", "completion": f" {b}</s>" if b == "u" else f" {b}"}
    for a, b in zip("abcdefghijklmnopqr", "stuvwxyzabcdefghij", strict=True)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": example["prompt"]}],
        "completion": [{"role": "assistant", "content": example["completion"]}],
    }
    for example in TEXTS
]
MESSAGES = [{"messages": example["prompt"] + example["completion"]} for example in CHATS]
LABELLED = [{"input_ids": [5, 6, 7, n], "labels": [-100, 6, 7, n]} for n in range(8, 32)]


@pytest.fixture(scope="module")
def model() -> Any:
    base = tiny_llama(vocab_size=len(tiny_tokenizer()), num_hidden_layers=1)
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"]))


def small_adapter() -> NestedAdapter:
    return nested_llama(Nesting((1, 2)), "lora", layers=1, target_modules=["q_proj"])


# Examples


@pytest.mark.parametrize(
    ("examples", "max_length"), [(TEXTS, 6), (TEXTS, 99), (CHATS, 24), (CHATS, 99)]
)
def test_examples_have_the_tokens_and_labels_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, examples: Any, max_length: int
) -> None:
    """In full, and truncated within the completion."""
    monkeypatch.setattr(model.config, "max_position_embeddings", max_length)
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, max_length=max_length)
    trainer = SFTTrainer(
        tiny_llama(vocab_size=99),
        args,
        train_dataset=Dataset.from_list(examples),
        processing_class=tiny_tokenizer(),
    )
    expected = [
        {"input_ids": example["input_ids"], "labels": example["labels"]}
        for example in trainer.train_dataset
    ]
    assert len(expected) == len(examples)
    assert read_training_data(model, examples, tiny_tokenizer()).examples == expected


def test_every_source_gives_the_same_examples(tmp_path: Path, model: Any) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text("\n".join(map(json.dumps, CHATS)))
    expected = read_training_data(model, CHATS, tiny_tokenizer()).examples
    padded = [
        {
            "input_ids": [0, *example["input_ids"], 0],
            "labels": [-100, *example["labels"], -100],
            "attention_mask": [0, *[1] * len(example["labels"]), 0],
        }
        for example in expected
    ]
    sources: list[Any] = [str(file), file, Dataset.from_list(CHATS), MESSAGES, iter(CHATS)]
    for source in [*sources, DataLoader(CHATS), expected, padded]:
        assert read_training_data(model, source, tiny_tokenizer()).examples == expected
    data = read_training_data(model, expected)  # tokens need no tokenizer
    assert data.examples == expected
    assert [len(batch["labels"]) for batch in data.batches(range(18))] == [12, 6]


@pytest.mark.parametrize(
    "data",
    [
        DatasetDict(train=Dataset.from_list(TEXTS)),
        TEXTS[0],
        ["a", "b"],
        [*TEXTS, None],
        [{"prompt": "a", "completion": 3}],
        "missing.jsonl",
        [],
        [{"input_ids": [5, 6], "labels": [-100, -100]}],
    ],
    ids=[
        "dataset-dict",
        "one-example",
        "texts",
        "none",
        "no-text",
        "missing-file",
        "empty",
        "no-label",
    ],
)
def test_other_data_is_an_error_and_the_adapter_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = small_adapter()
    before = copy_lora_parameters(adapter)
    with pytest.raises(MatryoshkaError):
        adapter.train_ranks(data, tiny_tokenizer())
    with pytest.raises(MatryoshkaError):
        adapter.train_ranks(TEXTS, tiny_tokenizer(), eval_data=data)
    assert all_equal(before, copy_lora_parameters(adapter))


def test_text_needs_a_tokenizer_and_messages_a_template(model: Any) -> None:
    with pytest.raises(MatryoshkaError, match="tokenizer"):
        read_training_data(model, TEXTS)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(MatryoshkaError, match="template"):
        read_training_data(model, CHATS, tokenizer)


@pytest.mark.parametrize("supports_logits_to_keep", [True, False])
def test_the_loss_is_that_of_the_completions(
    model: Any, monkeypatch: pytest.MonkeyPatch, supports_logits_to_keep: bool
) -> None:
    """Examples of different lengths; the expected loss uses the logits of all tokens."""
    examples = [{"prompt": "a" * n, "completion": "b" * (9 - n)} for n in range(1, 9)]
    data = read_training_data(model, examples, tiny_tokenizer())
    total, count = 0.0, 0
    with torch.no_grad():
        for example in data.examples:
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(example["labels"][1:])
            total += float(cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
        base = model.get_base_model()
        if not supports_logits_to_keep:
            forward = base.forward
            monkeypatch.setattr(base, "forward", lambda **inputs: forward(**inputs))
        (batch,) = data.batches(range(8))
        assert float(data.loss(batch)) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, T5ForSequenceClassification])
def test_examples_are_for_causal_language_models(kind: Any) -> None:
    config = T5Config(
        vocab_size=64,
        decoder_start_token_id=0,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
    )
    model = get_peft_model(kind(config), LoraConfig(r=4, target_modules=["q"]))
    with pytest.raises(MatryoshkaError, match=kind.__name__):
        read_training_data(model, LABELLED)


# The split


def tokens_of(batches: list[Any]) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("with_trainer", [False, True])
def test_the_first_label_does_not_count(model: Any, with_trainer: bool, tmp_path: Path) -> None:
    """A causal model has no prediction of the first token, so a loss of it alone is NaN."""
    one_token = {"input_ids": [5] * 6, "labels": [5, *[-100] * 5]}
    examples = [one_token, *random_examples(3)]
    data = read_training_data(model, examples)
    if with_trainer:
        data = read_training_data(model, make_trainer(model, tmp_path, examples))
    batches = data.batches(range(len(data.examples)), batch_size=1)
    assert len(batches) == 3
    assert all(batch["labels"][0, 0] == IGNORED_LABEL for batch in batches)


@pytest.mark.parametrize("tokens", [[5, 10**6], [10**6, 5]])
def test_tokens_that_the_model_does_not_have(model: Any, tokens: list[int]) -> None:
    with pytest.raises(MatryoshkaError, match="tokenizer"):
        read_training_data(model, [{"input_ids": tokens, "labels": tokens}])


def test_all_examples_come_before_any_repeats_and_some_of_them_validate(model: Any) -> None:
    data = read_training_data(model, random_examples(40))
    split = data.split(120, 10, seed=3)
    passes = [split.training_indices[start : start + 40] for start in (0, 40, 80)]
    for indices_of_pass in passes:
        assert sorted(indices_of_pass) == list(range(40))
    assert len({tuple(indices_of_pass) for indices_of_pass in passes}) == 3
    all_tokens = [example["input_ids"] for example in data.examples]
    validated_on = tokens_of(split.validation_batches)
    assert len(validated_on) == 10
    assert all(tokens in all_tokens for tokens in validated_on)
    assert [len(batch["labels"]) for batch in split.validation_batches] == [10]
    again = data.split(120, 10, seed=3)
    assert again.training_indices == split.training_indices
    assert tokens_of(again.validation_batches) == validated_on
    other = data.split(120, 10, seed=4)
    assert other.training_indices != split.training_indices
    assert tokens_of(other.validation_batches) != validated_on


@pytest.mark.parametrize(
    ("num_validation", "sizes"), [(10, [10]), (24, [12, 12]), (40, [10] * 4), (26, [9, 9, 8])]
)
def test_all_examples_validate_in_batches_of_about_equal_sizes(
    model: Any, num_validation: int, sizes: list[int]
) -> None:
    data = read_training_data(model, random_examples(40))
    assert data.batch_size == 12
    split = data.split(40, num_validation, seed=3)
    assert [len(batch["labels"]) for batch in split.validation_batches] == sizes
    assert split.num_validation == sum(sizes)


def test_an_evaluation_set_validates(model: Any) -> None:
    evaluation_examples = random_examples(20, seed=9)
    data = read_training_data(model, random_examples(40), eval_data=evaluation_examples)
    split = data.split(40, 64, seed=3)
    assert sorted(split.training_indices) == list(range(40))
    expected = [example["input_ids"] for example in evaluation_examples]
    assert sorted(tokens_of(split.validation_batches)) == sorted(expected)


# Trainers


def test_a_trainer_gives_its_examples_and_how_many_it_has_seen(tmp_path: Path) -> None:
    adapter = small_adapter()
    examples = random_examples(20)
    trainer = make_trainer(
        adapter.model,
        tmp_path,
        examples,
        examples[:5],
        num_train_epochs=3,
        gradient_accumulation_steps=2,
    )
    data = read_training_data(adapter.model, trainer)
    assert data.num_examples_seen is None
    trainer.train()
    data = read_training_data(adapter.model, trainer)
    assert data.num_examples_seen == 60  # the last batch of an epoch is smaller
    assert not data.show_progress
    assert data.validation is not None
    assert len(data.validation.examples) == 5
    assert [len(batch["labels"]) for batch in data.batches(range(20))] == [8, 8, 4]
    trainer.eval_dataset = {"first": examples[:5], "second": examples}
    validation = read_training_data(adapter.model, trainer).validation
    assert validation is not None
    assert len(validation.examples) == 5
    other_data = read_training_data(adapter.model, trainer, eval_data=random_examples(7))
    assert other_data.validation is not None
    assert len(other_data.validation.examples) == 7


class WeightedTrainer(Trainer):
    """A Trainer that loads its data itself, with a column that its model does not take."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weight = inputs.pop("weight")
        return model(**inputs).loss * weight.mean()


def plain_trainer(
    model: Any, folder: Path, examples: Any, collator: Any, kind: Any = Trainer
) -> Any:
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=1,
    )
    return kind(model, args, train_dataset=examples, data_collator=collator)


PAD = DataCollatorForSeq2Seq(tiny_tokenizer())
WITH_TEXT = [{**example, "text": "hello"} for example in LABELLED]
WITH_WEIGHT = [{**example, "weight": 0.5} for example in LABELLED]
WITHOUT_LABEL = {"input_ids": [5, 6], "labels": [-100, -100]}


@pytest.mark.parametrize(
    ("examples", "collator", "kind"),
    [
        (WITH_TEXT, PAD, Trainer),
        (Dataset.from_list(WITH_TEXT), PAD, Trainer),
        (WITH_WEIGHT, default_data_collator, WeightedTrainer),
        ([*LABELLED, WITHOUT_LABEL], PAD, Trainer),
    ],
    ids=["list", "dataset", "weighted", "one-without-label"],
)
def test_the_examples_of_a_trainer_are_collated_as_in_its_training(
    tmp_path: Path, examples: Any, collator: Any, kind: Any
) -> None:
    adapter = small_adapter()
    trainer = plain_trainer(adapter.model, tmp_path, examples, collator, kind)
    data = read_training_data(adapter.model, trainer)
    indices = range(len(examples))
    batches = data.batches(indices)
    expected = [row["input_ids"] for row in examples if row["labels"] != [-100, -100]]
    assert [row for batch in batches for row in batch["input_ids"].tolist()] == expected
    weight = 0.5 if kind is WeightedTrainer else 1.0
    adapter.model.eval()
    inputs = collate([LABELLED[0], LABELLED[1]])
    with torch.no_grad():
        own_loss = adapter.model(**inputs).loss
        torch.testing.assert_close(data.loss(batches[0]), own_loss * weight)


def test_a_custom_loss_gets_what_a_trainer_passes_to_it(tmp_path: Path) -> None:
    def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    adapter = small_adapter()
    examples = Dataset.from_list(LABELLED)
    args = SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer: Any = SFTTrainer(
        adapter.model,
        args,
        train_dataset=examples,
        eval_dataset=examples.select(range(8)),
        processing_class=tiny_tokenizer(),
        compute_loss_func=mean_loss,
    )
    trainer.train()
    data = read_training_data(adapter.model, trainer)
    (batch,) = data.batches(range(8))
    with torch.no_grad():
        expected = adapter.model.eval()(**collate(LABELLED[:8])).loss
        torch.testing.assert_close(data.loss(batch), expected)
    assert not trainer._metrics["eval"]  # they would count in the next evaluation


def sft_trainer(folder: Path) -> tuple[NestedAdapter, Any]:
    adapter = small_adapter()
    args = SFTConfig(str(folder), report_to="none", use_cpu=True, disable_tqdm=True)
    examples = Dataset.from_list(random_examples(24))
    tokenizer = tiny_tokenizer()
    trainer = SFTTrainer(adapter.model, args, train_dataset=examples, processing_class=tokenizer)
    return adapter, trainer


def image_trainer(folder: Path) -> tuple[NestedAdapter, Any]:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    lora = LoraConfig(
        r=4,
        # Before transformers 5.1 the layers are called dense.
        target_modules=r".*(fc1|fc2|(intermediate|output)\.dense)",
        modules_to_save=["classifier"],
    )
    adapter = nest(get_peft_model(ViTForImageClassification(config), lora))
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": n % 3} for n in range(24)]
    return adapter, plain_trainer(adapter.model, folder, images, default_data_collator)


@pytest.mark.filterwarnings("ignore:The trained ranks")
@pytest.mark.parametrize("make", [sft_trainer, image_trainer])
def test_ranks_are_trained_with_an_sft_trainer_and_with_images(
    tmp_path: Path, make: Callable[[Path], tuple[NestedAdapter, Any]]
) -> None:
    adapter, trainer = make(tmp_path)
    result = adapter.train_ranks(trainer, max_examples=16)
    assert result.losses_before.keys() == set(adapter.nesting.ranks)
    assert adapter.order == "svd"


@pytest.mark.parametrize("kind", ["no-labels", "labels-ignored", "stream"])
def test_a_trainer_without_labels_or_with_a_stream_leaves_the_ranks_reordered(
    tmp_path: Path, kind: str
) -> None:
    """As in GRPO: an error would stop a script after training, before it saves."""
    adapter = small_adapter()
    examples: Any = [{"input_ids": [5, 6]}] * 20
    if kind == "labels-ignored":
        examples = [{**example, "labels": [-100] * 6} for example in random_examples(20)]
    if kind == "stream":
        examples = Dataset.from_list(random_examples(20)).to_iterable_dataset()
    trainer = plain_trainer(adapter.model, tmp_path, examples, default_data_collator)
    with pytest.warns(UserWarning, match="not trained"):
        result = adapter.train_ranks(trainer)
    assert (result.outcome, result.num_examples, result.losses_before) == ("no examples", 0, {})
    assert adapter.order == "svd"


class FailingTrainer(Trainer):
    """A Trainer whose loss fails on the examples of one set, as a bug or a lack of memory does."""

    error: Exception
    fails_on: int

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].shape[1] == self.fails_on:
            raise self.error
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("failing_set", ["training", "evaluation"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        *(kind("a bug") for kind in (AttributeError, KeyError, TypeError, ValueError)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_loss_passes_unchanged(
    tmp_path: Path, error: Exception, failing_set: str
) -> None:
    adapter = small_adapter()
    before = copy_lora_parameters(adapter)
    trainer = plain_trainer(adapter.model, tmp_path, LABELLED, PAD, FailingTrainer)
    trainer.eval_dataset = random_examples(8)
    trainer.error = error
    trainer.fails_on = 4 if failing_set == "training" else 6
    with pytest.raises(type(error)) as raised:
        adapter.train_ranks(trainer)
    assert raised.value is error
    assert all_equal(before, copy_lora_parameters(adapter))
    assert adapter.order is None


@pytest.mark.parametrize(
    "examples",
    [[{"input_ids": [5, 6]}] * 8, [{"input_ids": [5, 6], "labels": [-100, -100]}] * 8],
    ids=["no-labels", "labels-ignored"],
)
def test_an_evaluation_set_without_labels_is_an_error(tmp_path: Path, examples: Any) -> None:
    adapter = small_adapter()
    trainer = plain_trainer(adapter.model, tmp_path, LABELLED, default_data_collator)
    trainer.eval_dataset = examples
    with pytest.raises(ValueError, match=r"loss|label"):
        adapter.train_ranks(trainer)


def test_a_streamed_evaluation_set_leaves_the_ranks_reordered(tmp_path: Path) -> None:
    """Training examples do not take its place."""
    adapter = small_adapter()
    trainer = plain_trainer(adapter.model, tmp_path, LABELLED, default_data_collator)
    trainer.eval_dataset = Dataset.from_list(LABELLED).to_iterable_dataset()
    with pytest.warns(UserWarning, match="eval_data"):
        assert adapter.train_ranks(trainer).outcome == "no examples"
