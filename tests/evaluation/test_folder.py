"""`evaluate_folder`: each adapter is evaluated as alone, on a base model that is loaded once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluations import NUM_CORRECT, new_evaluation
from helpers.models import randomize, tiny_llama
from helpers.outputs import names_in
from helpers.tiny_chat import tiny_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from matryoshka_lora import Evaluation, FolderEvaluation, MatryoshkaError, evaluate, evaluate_folder
from matryoshka_lora.peft import base_model as base_model_module

OPTIONS: dict[str, Any] = {"ranks": [1, 2], "dtype": torch.float32, "progress": False}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a model with biases, and of one of another size."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = tiny_tokenizer()
    for name, config in (("first", {"attention_bias": True}), ("second", {"hidden_size": 32})):
        tokenizer.save_pretrained(folder / name)
        tiny_llama(vocab_size=len(tokenizer), **config).save_pretrained(folder / name)
    return folder / "first", folder / "second"


def save_adapter(path: Path, base: Path, seed: int, **config: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    peft_model = get_peft_model(model, LoraConfig(**config))
    randomize(peft_model, seed)
    for name, parameter in peft_model.named_parameters():
        if name.endswith("bias") and config.get("bias") == "all":
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(path)


def write_data(file: Path, *words: str) -> None:
    file.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"{word} is", "completion": f" {word}"}) for word in words]
    file.write_text("\n".join(lines))


@pytest.mark.slow
def test_each_adapter_is_evaluated_as_alone(
    bases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third one replaces weights of its base model, which the next one must not get."""
    folder, data = tmp_path / "loras", tmp_path / "data"
    for seed, name in enumerate("abcde"):
        base = bases[1] if name == "e" else bases[0]
        save_adapter(folder / name, base, seed, bias="all" if name == "c" else "none")
        write_data(data / f"{name}.jsonl", name, 2 * name)
    loaded: list[str] = []
    load_model = base_model_module.load_model

    def load_and_count(name: str, **options: Any) -> Any:
        loaded.append(name)
        return load_model(name, **options)

    monkeypatch.setattr(base_model_module, "load_model", load_and_count)
    evaluations = evaluate_folder(folder, data=data, **OPTIONS).evaluations
    assert loaded == [*[str(bases[0])] * 3, str(bases[1])]  # for a and b, for c, for d; for e
    for name in "abcde":
        alone = evaluate(
            folder / name, data=data / f"{name}.jsonl", output=tmp_path / name, **OPTIONS
        )
        assert evaluations[name] == alone == Evaluation.read(folder / name)
    assert evaluations["a"].values() != evaluations["b"].values()

    model = load_model(str(bases[0]))
    with pytest.raises(MatryoshkaError, match="model"):
        evaluate(folder / "c", data=data / "c.jsonl", output=tmp_path / "new", model=model)


@pytest.mark.slow
def test_problems_are_found_before_anything_is_loaded(
    bases: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, data = tmp_path / "loras", tmp_path / "data"
    keywords = {
        "damaged": "damaged",
        "done": "exists",
        "lost": "missing-base",
        "no-data": "no-data.jsonl",
        "wrong-data": "Example 0",
    }
    for name in ("good", "misfit", *keywords):
        save_adapter(folder / name, bases[0], 0, r=1 if name == "good" else 2)
        write_data(data / f"{name}.jsonl", name)
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"damaged")
    (data / "no-data.jsonl").unlink()
    (data / "wrong-data.jsonl").write_text('{"text": "a"}')
    for name, base in (("lost", tmp_path / "missing-base"), ("misfit", bases[1])):
        file = folder / name / "adapter_config.json"
        config = {**json.loads(file.read_text()), "base_model_name_or_path": str(base)}
        file.write_text(json.dumps(config))
    done = evaluate(folder / "done", data=data / "done.jsonl", **OPTIONS)

    with monkeypatch.context() as context:
        context.setattr(base_model_module, "load_model", None)
        with pytest.raises(MatryoshkaError, match=r"5 of 7.*skip_bad"):
            evaluate_folder(folder, data=data, **OPTIONS)
    for name, keyword in keywords.items():
        messages = [line for line in caplog.messages if line.startswith("Not evaluated: ")]
        (message,) = [line for line in messages if f"/{name}" in line or f" {name}:" in line]
        assert keyword in message
    assert names_in(folder) == sorted(["done-evaluation", "good", "misfit", *keywords])

    result = evaluate_folder(folder, data=data, skip_bad=True, output=tmp_path / "new", **OPTIONS)
    assert result.evaluations.keys() == {"done", "good"}  # another output is free
    assert result.failed.keys() == {"misfit", *keywords} - {"done"}
    assert "second" in result.failed["misfit"]
    assert result.evaluations["good"].ranks == (1,)  # it has no larger one
    assert names_in(tmp_path / "new") == ["done", "good"]
    assert Evaluation.read(folder / "done") == done
    # Without `skip_bad`, what is finished is written before an evaluation fails.
    for name in keywords:
        shutil.rmtree(folder / name, ignore_errors=True)
    with pytest.raises(MatryoshkaError, match="misfit"):
        evaluate_folder(folder, data=data, **OPTIONS)
    assert Evaluation.read(folder / "good").examples == result.evaluations["good"].examples


def test_the_table_marks_the_best_and_the_selected_rank() -> None:
    good = {**NUM_CORRECT, 0: 5, 4: 57, 8: 57}  # 4 and 8 are equal: the smaller one is best
    result = FolderEvaluation(
        {
            "a": new_evaluation(num_correct=good),
            "b": new_evaluation("x", "y"),
            "bad": new_evaluation(num_correct={**NUM_CORRECT, 0: 60}),
        },
        {"c": "a reason"},
    )
    heading, *rows = [line.split() for line in str(result).splitlines()]
    assert heading[:1] == ["base"]
    cells = [["0.083", "0.333", "0.667", "0.950*", "0.950", "4?", "60", "acc", "family", "a"]]
    cells += [
        ["0.333", "0.333", "0.667", "0.933", "0.950*", "8", "60", "acc", task, "b"] for task in "xy"
    ]
    cells += [["1.000", "0.333", "0.667", "0.933", "0.950", "60", "acc", "family", "bad"]]
    assert rows[:4] == cells
    text = str(result)
    assert "bad: No rank is better than the base model" in text
    assert "Not evaluated: c: a reason" in text
    assert result.selected_ranks == {"a": 4, "b": 8}
