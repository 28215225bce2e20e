"""Training the ranks of a LoRA in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plain_peft import plain_adapter
from helpers.tiny_chat import save_tiny_chat, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, NotFiniteError, export, train_ranks

COMPLETIONS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]
EXAMPLES = [{"prompt": f"{n} {n % 8}=", "completion": COMPLETIONS[n % 8]} for n in range(64)]


def mean_loss(model: Any, examples: list[dict[str, str]] = EXAMPLES) -> Tensor:
    """Return the mean loss of the completions, computed without the package."""
    tokenizer = tiny_tokenizer()
    texts = [f"{example['prompt']}{example['completion']}</s>" for example in examples]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()
    for row, example in enumerate(examples):
        labels[row, : len(example["prompt"])] = -100  # a character is a token
        labels[row, len(texts[row]) - len("</s>") + 1 :] = -100
    loss: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss
    return loss


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter with ranks by layer, which has learned the examples, and its tokenizer."""
    folder = tmp_path_factory.mktemp("train_ranks")
    save_tiny_chat(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 2},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-2
    )
    for step in range(96):
        optimizer.zero_grad()
        first = step % 4 * 16
        mean_loss(model, EXAMPLES[first : first + 16]).backward()
        optimizer.step()
    model.save_pretrained(folder / "lora")
    tiny_tokenizer().save_pretrained(folder / "lora")
    return folder / "lora"


def loss_of_folder(base_folder: Path, adapter_folder: Path) -> float:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(base, adapter_folder).eval()
    with torch.no_grad():
        return float(mean_loss(model))


def test_a_folder_gets_trained_ranks(lora_folder: Path, tmp_path: Path) -> None:
    """Of an adapter with ranks by layer. PEFT reads the output as rank R."""
    base_folder = lora_folder.with_name("base")
    output = tmp_path / "nested"
    data = tmp_path / "examples.jsonl"
    data.write_text("\n".join(map(json.dumps, EXAMPLES)))
    result = train_ranks(
        lora_folder, output, data, eval_data=str(data), max_examples=640, dtype="fp32"
    )
    assert (result.path, result.outcome, result.num_examples) == (output, "kept", 640)
    lora = ml.open(output)
    assert (lora.order, lora.max_rank, lora.nested_ranks) == ("svd", 4, (1, 2, 4))
    assert lora.small_rank == result.small_rank > 0
    assert (output / "tokenizer_config.json").is_file()
    export(output, tmp_path / "rank-1", 1)
    loss_at_rank_1 = loss_of_folder(base_folder, tmp_path / "rank-1")
    assert loss_at_rank_1 == pytest.approx(result.losses_after[1], abs=0.02)
    assert loss_at_rank_1 < result.losses_before[1] - 0.1
    loss_before = loss_of_folder(base_folder, lora_folder)
    assert loss_of_folder(base_folder, output) == pytest.approx(loss_before, abs=1e-5)


def test_a_folder_is_reordered_with_examples(lora_folder: Path, tmp_path: Path) -> None:
    """The low ranks change the loss less than those of the SVD, and rank R does not."""
    base_folder = lora_folder.with_name("base")
    ml.reorder(lora_folder, tmp_path / "svd")
    result = ml.reorder(lora_folder, tmp_path / "nested", EXAMPLES, dtype="fp32")
    assert result.path == tmp_path / "nested"
    assert result.weighted_errors.keys() == result.errors.keys() == {1, 2, 4}
    assert ml.open(tmp_path / "nested").order == "weighted"
    assert (tmp_path / "nested" / "tokenizer_config.json").is_file()
    loss = loss_of_folder(base_folder, lora_folder)
    assert loss_of_folder(base_folder, tmp_path / "nested") == pytest.approx(loss, abs=1e-5)
    losses = {}
    for name in ("svd", "nested"):
        export(tmp_path / name, tmp_path / f"{name}-2", 2)
        losses[name] = loss_of_folder(base_folder, tmp_path / f"{name}-2")
    assert losses["nested"] < losses["svd"]
    with pytest.raises(MatryoshkaError):
        ml.reorder(ml.open(lora_folder), tmp_path / "new", EXAMPLES)


def test_untrained_ranks_are_written_in_the_order_of_the_svd(
    lora_folder: Path, tmp_path: Path
) -> None:
    """Of an update of rank 1, no rank is behind."""
    source = Path(shutil.copytree(lora_folder, tmp_path / "source"))
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[:, 1:] = 0
    save_file(tensors, file)
    result = train_ranks(
        source,
        tmp_path / "nested",
        EXAMPLES,
        base_model=str(lora_folder.with_name("base")),
        dtype="fp32",
    )
    assert (result.outcome, result.losses_after) == ("nothing to train", {})
    nested = ml.open(tmp_path / "nested")
    assert (nested.order, nested.small) == ("svd", None)


def test_an_output_that_cannot_be_written_is_an_error_before_the_training(
    lora_folder: Path, tmp_path: Path
) -> None:
    """The factors, which are read first for the training, are NaN."""
    lora = Path(shutil.copytree(lora_folder, tmp_path / "lora"))
    file = lora / "adapter_model.safetensors"
    save_file({key: tensor * torch.nan for key, tensor in load_file(file).items()}, file)
    with pytest.raises(MatryoshkaError, match="Cannot write"):
        train_ranks(lora, lora / "adapter_config.json" / "new", EXAMPLES)
    with pytest.raises(NotFiniteError):
        train_ranks(lora, tmp_path / "new", EXAMPLES)


def save_plain(folder: Path) -> Path:
    """An adapter whose config names no base model."""
    plain_adapter(folder, target_modules=["q_proj"])
    return folder


@pytest.mark.parametrize(
    ("make_arguments", "keyword"),
    [
        (lambda lora, new: (lora, lora, EXAMPLES), "source"),
        (lambda lora, new: (lora, lora.with_name("base"), EXAMPLES), "source"),
        (lambda lora, new: (lora, new, []), "examples"),
        (lambda lora, new: (lora, new, "missing.jsonl"), "missing"),
        (lambda lora, new: (save_plain(new.with_name("plain")), new, EXAMPLES), "base_model"),
        (lambda lora, new: (new.with_name("missing"), new, EXAMPLES), "missing"),
        (lambda lora, new: (new.with_name("a.safetensors"), new, EXAMPLES), "single file"),
    ],
    ids=[
        "output-is-source",
        "output-is-base",
        "no-examples",
        "no-data",
        "no-base",
        "no-lora",
        "single-file",
    ],
)
def test_bad_arguments_are_an_error(
    make_arguments: Callable[[Path, Path], Any], keyword: str, lora_folder: Path, tmp_path: Path
) -> None:
    single_file = {
        "layer.lora_down.weight": torch.ones(2, 8),
        "layer.lora_up.weight": torch.ones(8, 2),
    }
    save_file(single_file, tmp_path / "a.safetensors")
    output = tmp_path / "nested"
    with pytest.raises(MatryoshkaError, match=keyword):
        train_ranks(*make_arguments(lora_folder, output), force=True)
    assert not output.exists()
