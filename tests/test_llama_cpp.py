"""llama.cpp itself, built from source by ``make test-deploy``, serves the slices: the real model, real words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import LINEAR_LAYERS
from peft import LoraConfig, PeftModel, get_peft_model

from matryoshka_lora import export
from matryoshka_lora.data.questions import tokenize
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.models import embedded_gguf, load_model, load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="make test-deploy builds llama.cpp")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

POSITIONS = 500
RANK = 8


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Held-out questions with their answers, in tokens."""
    tokenizer, task = load_tokenizer(), get_task("family_relationships")
    # A question has some 80 tokens of its own after the system prompt.
    tokens = [tokenize(tokenizer, question) for question in task.examples("test", 9)]
    return [question.context + question.completion for question in tokens]


@pytest.fixture(scope="module")
def slice_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 8 of an adapter that was trained for a few steps, as PEFT's files and as GGUF."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = get_peft_model(load_model(), LoraConfig(r=32, lora_alpha=32, target_modules=LINEAR_LAYERS)).train()
    tokenizer = load_tokenizer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    for question in get_task("family_relationships").examples("train", 16):
        tokens = tokenize(tokenizer, question)
        ids = torch.tensor([tokens.context + tokens.completion])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "plain")
    export(folder / "plain", folder / "peft", RANK, verify=False)
    export(folder / "plain", folder / "rank.gguf", RANK, "gguf", verify=False)
    return folder


def by_peft(folder: Path | None, texts: list[list[int]]) -> list[np.ndarray]:
    model: Any = load_model(dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in texts]


def by_llama_cpp(base: Path, adapter: Path | None, texts: list[list[int]]) -> list[np.ndarray]:
    options: dict[str, Any] = {} if adapter is None else {"lora_path": str(adapter)}
    model = llama_cpp.Llama(str(base), n_ctx=1024, n_threads=1, logits_all=True, verbose=False, **options)
    found = []
    for ids in texts:
        model.reset()
        model.eval(ids)
        found.append(np.array(model.scores[: len(ids)]))
    return found


def agreement(one: list[np.ndarray], other: list[np.ndarray], texts: list[list[int]]) -> int:
    """At how many of the positions both have the same most likely token."""
    shared = next(i for i, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)
    # The system prompt is the same in every text: its positions count once, in none of them.
    same = np.concatenate([(a.argmax(-1) == b.argmax(-1))[shared:] for a, b in zip(one, other, strict=True)])
    assert len(same) >= POSITIONS
    return int(same[:POSITIONS].sum())


def in_float32(gguf_file: Path, target: Path) -> Path:
    """The same model with its weights dequantised: llama.cpp then computes in float32, as PEFT does."""
    reader = gguf.GGUFReader(gguf_file)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_slice_agrees_with_peft(slice_folder: Path, texts: list[list[int]], tmp_path: Path, capsys: Any) -> None:
    """On float32 weights almost everywhere. On the 4-bit file as it comes, llama.cpp also rounds what it multiplies
    them with to 8 bits, so even the base model alone disagrees with itself in transformers: that is printed."""
    adapter, four_bit = slice_folder / "rank.gguf", embedded_gguf()
    exact = in_float32(four_bit, tmp_path / "model.gguf")
    peft, base = by_peft(slice_folder / "peft", texts), by_peft(None, texts)
    same = {
        "float32": agreement(peft, by_llama_cpp(exact, adapter, texts), texts),
        "4-bit": agreement(peft, by_llama_cpp(four_bit, adapter, texts), texts),
        "4-bit, no adapter in either": agreement(base, by_llama_cpp(four_bit, None, texts), texts),
        "PEFT with against without": agreement(peft, base, texts),
    }
    with capsys.disabled():
        print(json.dumps({"positions": POSITIONS, "same top-1": same}))
    assert same["float32"] >= 0.99 * POSITIONS
    assert same["4-bit"] >= 0.95 * POSITIONS
    # The adapter matters at these positions, so agreement is no accident.
    assert same["PEFT with against without"] < 0.8 * POSITIONS
