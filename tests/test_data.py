"""Rows out of a Trainer, a dataset, a list and a file: the tokens and labels of TRL's training."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nested_llama, tiny_llama
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from some_rows import all_factors, same_bits, some_rows, trainer_of
from tiny_chat import tiny_tokenizer
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

from matryoshka_lora import MatryoshkaError, Nesting, nest
from matryoshka_lora.reordering.data import read_data

TEXT = [
    {"prompt": f"{name} is", "completion": f" {end}</s>" if end == "u" else f" {end}"}
    for name, end in zip("abcdefghijklmnopqr", "stuvwxyzabcdefghij", strict=True)
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in TEXT
]
MESSAGES = [{"messages": row["prompt"] + row["completion"]} for row in CHAT]


@pytest.fixture(scope="module")
def model() -> Any:
    base = tiny_llama(vocab_size=len(tiny_tokenizer()), num_hidden_layers=1)
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(("rows", "limit"), [(TEXT, 6), (TEXT, 99), (CHAT, 24), (CHAT, 99)])
def test_rows_have_the_tokens_and_labels_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, rows: Any, limit: int
) -> None:
    """Whole, and cut within the answer."""
    monkeypatch.setattr(model.config, "max_position_embeddings", limit)
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, max_length=limit)
    data, base = Dataset.from_list(rows), tiny_llama(vocab_size=99)
    trainer = SFTTrainer(base, args, train_dataset=data, processing_class=tiny_tokenizer())
    wanted = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]
    assert len(wanted) == len(rows)
    assert read_data(model, rows, tiny_tokenizer()).rows == wanted


def test_every_source_gives_the_same_rows(tmp_path: Path, model: Any) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, CHAT)) + "\n\n")
    tokens = read_data(model, CHAT, tiny_tokenizer()).rows
    padded = [
        {
            "input_ids": [0, *row["input_ids"], 0],
            "labels": [-100, *row["labels"], -100],
            "attention_mask": [0, *[1] * len(row["labels"]), 0],
        }
        for row in tokens
    ]
    listed = Dataset.from_list(CHAT)
    for source in (str(lines), lines, listed, MESSAGES, iter(CHAT), tokens, padded):
        assert read_data(model, source, tiny_tokenizer()).rows == tokens
    assert read_data(model, tokens).rows == tokens
    found = read_data(model, tokens).batches(range(len(tokens)))
    assert [len(batch["labels"]) for batch in found] == [12, 6]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DatasetDict(train=Dataset.from_list(TEXT)), "row 1 of the data is 'train': give rows"),
        (["a", "b"], "row 1 of the data is 'a'"),
        ([*TEXT, None], "row 19 of the data is None"),
        ([{"prompt": "a", "completion": None}], "row 1 of the data"),
        ([{"prompt": "a", "completion": 3}], "both text or both messages"),
        ([{"prompt": [{"role": "user"}], "completion": "a"}], "both text or both messages"),
        ([{"messages": CHAT[0]["prompt"]}], "messages that end with the assistant's"),
        ("missing.jsonl", r"missing.jsonl cannot be read: .*No such file"),
        ("broken.jsonl", r"broken.jsonl cannot be read in line 1: .*Give a JSON object"),
    ],
)
def test_what_are_no_rows_is_refused_and_the_adapter_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"prompt": "a"\n')
    adapter = nested_llama(Nesting((1, 2)), "lora", layers=1, target_modules=["q_proj"])
    adapter.reorder()
    before = all_factors(adapter)
    with pytest.raises(MatryoshkaError, match=message):
        adapter.reorder("trained", data, tiny_tokenizer())
    assert same_bits(before, all_factors(adapter))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(MatryoshkaError, match="template cannot write row 1 of the data"):
        adapter.reorder("trained", CHAT, tokenizer)
    with pytest.raises(MatryoshkaError, match="give tokenizer="):
        adapter.reorder("trained", TEXT)


@pytest.mark.parametrize("leaves_out", [True, False])
def test_the_loss_is_that_of_the_answers(model: Any, monkeypatch: Any, leaves_out: bool) -> None:
    """Rows of unlike lengths, with the logits of all tokens for the oracle."""
    rows = [{"prompt": "a" * n, "completion": "b" * (9 - n)} for n in range(1, 9)]
    data = read_data(model, rows, tiny_tokenizer())
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data.rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += float(cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
        if not leaves_out:  # as in a model that cannot leave out logits
            forward = model.get_base_model().forward
            plain = partial(lambda call, **inputs: call(**inputs), forward)
            monkeypatch.setattr(model.get_base_model(), "forward", plain)
        (batch,) = data.batches(range(8))
        assert float(data.loss(batch)) == pytest.approx(total / count, rel=1e-5)


def test_rows_come_all_before_one_comes_again_and_the_held_out_never(model: Any) -> None:
    data, others = read_data(model, some_rows(40)), read_data(model, some_rows(20, seed=9))

    def split(count: int, seed: int) -> tuple[list[int], list[int]]:
        numbers, judges = data.split(count, 64, seed)
        rows = [row["input_ids"] for row in (data.held_out or data).rows]
        return numbers, [rows.index(row) for batch in judges for row in batch["input_ids"].tolist()]

    numbers, chosen = split(105, 3)
    assert len(chosen) == 5
    rounds = [numbers[begin : begin + 35] for begin in (0, 35, 70)]
    assert all(set(each) == set(range(40)) - set(chosen) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 3
    assert split(105, 3) == (numbers, chosen) != split(105, 4)
    data.held_out = others
    numbers, chosen = split(40, 3)
    assert sorted(numbers) == list(range(40))
    assert sorted(chosen) == list(range(20))


# Trainers.


def test_a_trainer_gives_what_it_has_seen(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting((1, 2)), "lora", layers=1, target_modules=["q_proj"])
    rows = some_rows(20)
    trainer = trainer_of(
        adapter.model, tmp_path, rows, rows[:5], num_train_epochs=3, gradient_accumulation_steps=2
    )
    assert read_data(adapter.model, trainer).seen is None  # it may be another one's adapter
    trainer.train()
    found = read_data(adapter.model, trainer)
    assert found.seen == 60  # the last batch of an epoch is a small one
    assert found.quiet
    assert found.held_out is not None
    assert len(found.held_out.rows) == 5
    assert [len(batch["labels"]) for batch in found.batches(range(20))] == [8, 8, 4]
    trainer.eval_dataset = {"one": rows[:5], "two": rows}
    assert len(read_data(adapter.model, trainer).held_out.rows) == 5


def plain_trainer(
    model: Any, folder: Path, rows: Any, collator: Any, kind: Any = Trainer
) -> Trainer:
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return kind(model, args, train_dataset=rows, data_collator=collator)


@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, T5ForSequenceClassification])
def test_rows_train_what_writes_from_left_to_right_alone(kind: Any) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = kind(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    adapter = nest(get_peft_model(model, LoraConfig(r=4, target_modules=["q"])))
    with pytest.raises(MatryoshkaError, match=f"cannot train a {kind.__name__}: give its Trainer"):
        adapter.reorder("trained", LABELLED)


@pytest.mark.filterwarnings("ignore:(the|these) trained ranks|no nested rank")
def test_a_loss_of_ones_own_gets_what_a_trainer_gives_it(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting((1, 2)), "lora", layers=1, target_modules=["q_proj"])

    def mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        each = outputs.logits[:, :-1].flatten(0, 1)
        return cross_entropy(each, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    rows = Dataset.from_list(LABELLED)
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = SFTConfig(str(tmp_path), **settings)
    with_both = {"processing_class": tiny_tokenizer(), "compute_loss_func": mean}
    trainer = SFTTrainer(adapter.model, args, None, rows, rows.select(range(8)), **with_both)
    trainer.train()
    adapter.reorder("trained", trainer, rows=16)
    assert not trainer._metrics["eval"]  # else they would count in the next evaluation


class Weighted(Trainer):
    """A Trainer that loads its data itself, with a column that its model does not take."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weight = inputs.pop("weight")
        return model(**inputs).loss * weight.mean()


LABELLED = [{"input_ids": [5, 6, 7, n], "labels": [-100, 6, 7, n]} for n in range(8, 32)]
WITH_TEXT = [{**row, "text": "hello"} for row in LABELLED]
PAD = DataCollatorForSeq2Seq(tiny_tokenizer())
COLUMNS = {
    "a-list": (WITH_TEXT, PAD, Trainer),
    "a-dataset": (Dataset.from_list(WITH_TEXT), PAD, Trainer),
    "its-own": ([{**row, "weight": 0.5} for row in LABELLED], default_data_collator, Weighted),
    "no-label": ([*LABELLED, {"input_ids": [5, 6], "labels": [-100, -100]}], PAD, Trainer),
}


@pytest.mark.filterwarnings("ignore:(the|these) trained ranks|no nested rank")
@pytest.mark.parametrize("kind", COLUMNS)
def test_a_trainer_s_rows_are_collated_as_in_its_training(tmp_path: Path, kind: str) -> None:
    adapter = nested_llama(Nesting((1, 2)), "lora", layers=1, target_modules=["q_proj"])
    trainer = plain_trainer(adapter.model, tmp_path, *COLUMNS[kind])
    adapter.reorder("trained", trainer, rows=24)
    assert adapter.order in ("svd", "trained")


@pytest.mark.filterwarnings("ignore:(the|these) trained ranks|no nested rank")
def test_an_sft_trainer_and_images(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting((1, 2)), "lora", layers=1, target_modules=["q_proj"])
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    data, tokenizer = Dataset.from_list(some_rows(24)), tiny_tokenizer()
    sft: Any = SFTTrainer(adapter.model, args, train_dataset=data, processing_class=tokenizer)
    adapter.reorder("trained", sft, rows=16)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = ViTForImageClassification(
        ViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4, num_labels=3)
    )
    targets = r".*(fc1|fc2|(intermediate|output)\.dense)"  # before transformers 5.1 they are dense
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"])
    images = nest(get_peft_model(base, config))
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": n % 3} for n in range(24)]
    trainer = plain_trainer(images.model, tmp_path, rows, default_data_collator)
    images.reorder("trained", trainer, rows=24)
    assert images.order is not None


def test_rows_without_labels_and_streams_are_refused(tmp_path: Path, model: Any) -> None:
    stream = Dataset.from_list(some_rows(20)).to_iterable_dataset()
    for rows in ([{"input_ids": [5, 6]}] * 20, stream):
        args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
        trainer = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)
        with pytest.raises(
            MatryoshkaError, match="the rows of the Trainer have no labels, or are a"
        ):
            read_data(model, trainer)
    none = [{**row, "labels": [-100] * 6} for row in some_rows(20)]
    with pytest.raises(MatryoshkaError, match="none of the rows that judge has a label"):
        read_data(model, trainer_of(model, tmp_path, none)).split(8, 4, 0)


def test_one_of_several_processes_is_told_what_to_do(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(MatryoshkaError, match="reorder FOLDER -o NEW --by trained --data FILE"):
        read_data(model, some_rows(20))
