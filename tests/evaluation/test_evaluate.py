"""`evaluate`, from tasks and examples to the folder that it writes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.loras import random_lora
from helpers.models import randomize, tiny_llama
from helpers.outputs import names_in
from helpers.two_processes import run_in_two_processes
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import (
    Evaluation,
    MatryoshkaError,
    MissingDependencyError,
    NestedAdapter,
    aurac,
    evaluate,
    nest,
    select,
)
from matryoshka_lora.evaluation.tasks import LoadedTask
from matryoshka_lora.peft.base_model import load_tokenizer

RANKS = (1, 2, 4)
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star"]
FILES = ["curve.png", "evaluation.json", "examples.jsonl"]
MEAN = {"aggregation": "mean", "higher_is_better": True}

CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
}
GENERATION: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", **MEAN}],
}
PERPLEXITY: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "num_fewshot": 0,
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def new_adapter(base_model: Path, **config: Any) -> NestedAdapter:
    model = AutoModelForCausalLM.from_pretrained(base_model)
    config = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **config}
    peft_model = get_peft_model(model, LoraConfig(**config))
    randomize(peft_model, size=0.4)
    adapter = nest(peft_model.eval(), rule="lora")
    adapter.reorder()
    return adapter


@pytest.fixture(scope="module")
def in_memory(base_model: Path) -> NestedAdapter:
    return new_adapter(base_model)


@pytest.fixture(scope="module")
def saved(in_memory: NestedAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    in_memory.save(folder)
    return folder


@pytest.fixture
def on_disk(saved: Path, tmp_path: Path) -> Path:
    """The adapter's folder, in a folder of this test alone."""
    return Path(shutil.copytree(saved, tmp_path / "lora"))


def task_config(folder: Path, name: str = "colors", **config: Any) -> dict[str, Any]:
    """Return the config of a task after writing its data: a choice between three words."""
    data_files: dict[str, str] = {}
    for split, count in (("train", 6), ("test", 5)):
        lines: list[str] = []
        for n in range(count):
            question = f"{WORDS[n]} or {WORDS[-n - 1]}?"
            choices = WORDS[n : n + 3]
            lines.append(json.dumps({"question": question, "choices": choices, "label": n % 3}))
        file = folder / f"{name}-{split}.jsonl"
        file.write_text("\n".join(lines))
        data_files[split] = str(file)
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data_files},
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 2,
        "metadata": {"version": 1},
        **(config or CHOICE),
    }


def write_task(folder: Path, name: str = "colors", **config: Any) -> str:
    """Write the YAML file of a task and its data."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task_config(folder, name, **config)))
    return str(file)


def some_examples(count: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"{word} is", "completion": f" {word}"} for word in WORDS[:count]]


def harness_evaluation(
    adapter: Path | None, base_model: Path, task: str, num_fewshot: int | None
) -> Any:
    """Return the harness's results of a plain PEFT adapter, or of the base model."""
    model = AutoModelForCausalLM.from_pretrained(base_model)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    backend = HFLM(model, tokenizer=load_tokenizer(str(base_model)), batch_size=2)
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(backend, tasks=[task], num_fewshot=num_fewshot, task_manager=manager)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [CHOICE, GENERATION, PERPLEXITY], ids=["choice", "generation", "perplexity"]
)
@pytest.mark.parametrize("num_fewshot", [None, 1])
def test_metrics_equal_the_harness_s_of_exported_ranks(
    config: Any,
    num_fewshot: int | None,
    on_disk: Path,
    base_model: Path,
    in_memory: NestedAdapter,
    tmp_path: Path,
) -> None:
    task = write_task(tmp_path, **config)
    evaluation = evaluate(
        on_disk, task, num_fewshot=num_fewshot, progress=False, dtype=torch.float32
    )
    assert evaluation.ranks == RANKS
    result = evaluation.tasks["colors"]
    for rank in (0, *RANKS):
        exported = None
        if rank > 0:
            exported = tmp_path / f"rank-{rank}"
            in_memory.export(exported, rank)
        expected = harness_evaluation(exported, base_model, task, num_fewshot)
        for name, metric in result.metrics.items():
            expected_value = expected["results"]["colors"][name]
            assert metric.values[rank] == pytest.approx(expected_value, rel=1e-4)
        prompts = [sample["arguments"][0][0] for sample in expected["samples"]["colors"]]
        assert [example.prompt for example in evaluation.examples] == prompts
        assert result.num_fewshot == expected["n-shot"]["colors"]


def test_the_output_folder(on_disk: Path, tmp_path: Path) -> None:
    tasks = [write_task(tmp_path), write_task(tmp_path, "words", **GENERATION)]
    evaluation = evaluate(on_disk, tasks, ranks="all", limit=4, progress=False)
    assert evaluation.ranks == (1, 2, 3, 4)
    folder = tmp_path / "lora-evaluation"
    assert names_in(folder) == FILES
    assert Evaluation.read(folder) == Evaluation.read(on_disk) == evaluation
    result = evaluation.tasks["colors"]
    values = [value or 0.0 for value in evaluation.values("colors").values()]
    stored = json.loads((folder / "evaluation.json").read_text())["tasks"]["colors"]
    assert stored["aurac_log2"] == pytest.approx(aurac(values, evaluation.ranks))
    assert stored["aurac_linear"] == pytest.approx(aurac(values, evaluation.ranks, "linear"))
    assert (result.primary_metric, result.num_examples, result.num_fewshot) == ("acc,none", 4, 2)
    assert len(evaluation.examples) == 8
    assert set(evaluation.examples[0].answers) == {0, 1, 2, 3, 4}
    assert evaluation.settings["dtype"] in ("float32", "bfloat16")
    assert evaluation.settings["adapter"] == str(on_disk)
    sizes = list(evaluation.sizes.values())
    assert sizes == sorted(sizes)


def test_a_long_completion_does_not_truncate_other_prompts(in_memory: NestedAdapter) -> None:
    prompt = " ".join(WORDS * 5)
    examples = [{"prompt": f"{word} {prompt}", "completion": " x"} for word in WORDS[:3]]
    long_example = {"prompt": "a", "completion": " " + " ".join(WORDS * 15)}
    evaluation = evaluate(in_memory, data=examples, ranks=[1], progress=False)
    with_long_example = evaluate(
        in_memory, data=[*examples, long_example], ranks=[1], progress=False
    )
    assert with_long_example.examples[:3] == evaluation.examples


def test_a_truncated_prompt_is_warned_about(in_memory: NestedAdapter) -> None:
    examples = [{"prompt": " ".join(WORDS * 30), "completion": " x"}]
    with pytest.warns(UserWarning, match="truncated"):
        evaluate(in_memory, data=examples, ranks=[1], progress=False)


def test_an_adapter_in_memory_is_not_changed(in_memory: NestedAdapter, tmp_path: Path) -> None:
    in_memory.set_rank(2)
    in_memory.model.train()
    frozen = in_memory.model.get_base_model().lm_head.eval()
    torch.manual_seed(7)
    evaluation = evaluate(in_memory, data=some_examples(), ranks=[1, 4], progress=False)
    random_number = torch.rand(1)
    torch.manual_seed(7)
    assert random_number == torch.rand(1)
    assert (in_memory.rank, in_memory.model.training, frozen.training) == (2, True, False)
    in_memory.model.eval()
    assert evaluation.ranks == (1, 4)
    assert evaluation.settings["adapter"] is None
    assert not list(tmp_path.iterdir())
    in_memory.export(tmp_path / "rank-4", 4)
    exported_size = (tmp_path / "rank-4/adapter_model.safetensors").stat().st_size
    assert evaluation.sizes[4] == exported_size


def test_an_output_is_overwritten_with_force_alone(on_disk: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    evaluate(on_disk, data=some_examples(), output=output, ranks=[2], progress=False)
    with pytest.raises(MatryoshkaError, match="exists"):
        evaluate(on_disk, data=some_examples(), output=output, ranks=[1], progress=False)
    assert Evaluation.read(output).ranks == (2,)
    evaluate(on_disk, data=some_examples(), output=output, ranks=[1], force=True, progress=False)
    assert Evaluation.read(output).ranks == (1,)
    assert names_in(output) == FILES


def test_an_output_that_cannot_be_written_is_an_error_before_the_evaluation(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matryoshka_lora.evaluation.tasks.run_task", None)
    output = on_disk / "adapter_config.json" / "output"
    with pytest.raises(MatryoshkaError, match="Cannot write"):
        evaluate(on_disk, data=some_examples(), output=output, progress=False)


def test_values_are_logged_before_they_are_written(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Evaluation, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Evaluation, "write", fail)
    caplog.set_level("INFO", "matryoshka_lora")
    with pytest.raises(MatryoshkaError, match="No space"):
        evaluate(on_disk, data=some_examples(), ranks=[1], progress=False)
    assert "rank 1: " in caplog.text


def test_a_task_that_fails_keeps_the_results_of_the_others(on_disk: Path, tmp_path: Path) -> None:
    tasks = [write_task(tmp_path), write_task(tmp_path, "words", **GENERATION)]
    evaluate(on_disk, data=some_examples(), ranks=[1], progress=False)
    # The second task has no answer that is short enough for the context window.
    config = yaml.safe_load(Path(tasks[1]).read_text())
    config["generation_kwargs"]["max_gen_toks"] = 999
    Path(tasks[1]).write_text(yaml.safe_dump(config))
    with pytest.raises(MatryoshkaError, match=r"words.*999"):
        evaluate(on_disk, tasks, ranks=[1, 4], force=True, progress=False)
    evaluation = Evaluation.read(on_disk)
    assert list(evaluation.tasks) == ["colors"]
    assert len(evaluation.examples) == 5
    assert names_in(tmp_path / "lora-evaluation") == FILES


def test_a_file_that_appears_between_two_tasks_stays(on_disk: Path, tmp_path: Path) -> None:
    tasks = [write_task(tmp_path), write_task(tmp_path, "words", **GENERATION)]
    foreign_file = tmp_path / "lora-evaluation" / ".DS_Store"

    class Editor(logging.Handler):
        """Writes the file while the second task runs."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("words"):
                foreign_file.write_text("mine")

    handler, logger = Editor("INFO"), logging.getLogger("matryoshka_lora.evaluation.evaluate")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        evaluation = evaluate(on_disk, tasks, ranks=[1], progress=False)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert foreign_file.read_text() == "mine"
    assert Evaluation.read(on_disk) == evaluation
    assert list(evaluation.tasks) == ["colors", "words"]
    assert names_in(foreign_file.parent) == [".DS_Store", *FILES]


@pytest.mark.parametrize(
    "error", [RuntimeError("no font"), ValueError("no font"), OSError("no font")]
)
def test_a_plot_that_fails_is_a_warning(
    error: Exception, on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Figure, *_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Figure, "savefig", fail)
    tasks = [write_task(tmp_path), write_task(tmp_path, "words", **GENERATION)]
    with pytest.warns(UserWarning, match="not plotted"):
        evaluation = evaluate(on_disk, tasks, ranks=[1], progress=False)
    assert Evaluation.read(on_disk) == evaluation
    assert len(evaluation.tasks) == 2


def test_ctrl_c_in_a_plot_loses_nothing(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Figure, *_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(on_disk, data=some_examples(), ranks=[1], progress=False)
    assert list(Evaluation.read(on_disk).tasks) == ["data"]


@pytest.mark.filterwarnings("error:The curve is not plotted")
@pytest.mark.parametrize("name", ["cost_$5_vs_$6", os.fsdecode(b"caf\xe9")])
def test_the_name_of_the_data_is_any_file_name(name: str, on_disk: Path, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, some_examples())))
    evaluation = evaluate(on_disk, data=file, ranks=[1], progress=False)
    assert Evaluation.read(on_disk) == evaluation
    assert list(evaluation.tasks) == [name]
    assert (tmp_path / "lora-evaluation/curve.png").is_file()


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("config", [CHOICE, PERPLEXITY], ids=["choice", "perplexity"])
def test_each_progress_bar_has_a_name(
    config: Any,
    progress: bool,
    in_memory: NestedAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate(in_memory, write_task(tmp_path, **config), ranks=[1], progress=progress)
    bars = re.findall(r"[^\r\n]*?\d+%\|", capsys.readouterr().err)
    assert bool(bars) == progress
    assert all(re.match(r"\r?\w", bar) and ": " in bar for bar in bars)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_no_future_warning_is_shown(on_disk: Path) -> None:
    evaluate(on_disk, data=some_examples(), ranks=[1], progress=False)


def test_a_missing_library_is_an_error_before_the_model_is_loaded(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matryoshka_lora.evaluation.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("matryoshka_lora.peft.base_model.load_model", None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        evaluate(on_disk, data=some_examples(), progress=False)


def test_the_rank_is_restored_after_decoding_by_the_harness(
    in_memory: NestedAdapter, tmp_path: Path
) -> None:
    sampling = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 2}
    task = write_task(tmp_path, **{**GENERATION, "generation_kwargs": sampling})
    in_memory.set_rank(2)
    evaluate(in_memory, task, ranks=[1, 4], progress=False)
    assert in_memory.rank == 2


@pytest.mark.parametrize(
    ("arguments", "keyword"),
    [
        ({}, "tasks"),
        ({"tasks": "a", "data": "b"}, "tasks"),
        ({"data": some_examples(), "ranks": [3, 2]}, "increasing"),
        ({"data": some_examples(), "ranks": [8]}, "got 8"),
        ({"data": some_examples(), "ranks": []}, "ranks"),
        ({"data": some_examples(), "limit": 0}, "limit"),
        ({"data": some_examples(), "max_batch_tokens": 0}, "max_batch_tokens"),
        ({"data": some_examples(), "backend": "onnx"}, "backend"),
        ({"data": some_examples(), "backend": "vllm"}, r"pip install vllm .*\[eval\]"),
        ({"data": some_examples(), "backend": "vllm", "tokenizer": "b"}, "tokenizer"),
        ({"data": []}, "no examples"),
        ({"data": [{"prompt": "a"}]}, "Example 0"),
        ({"data": [*some_examples(1), {"text": "a"}]}, "Example 1"),
        ({"data": [{"messages": ["a", "b"]}]}, "Example 0"),
        ({"data": "no.jsonl"}, r"no\.jsonl"),
        ({"tasks": "no.yaml"}, r"no\.yaml"),
        ({"data": "rows/my.jsonl", "output": "rows", "force": True}, "source"),
        ({"data": some_examples(), "output": "lora", "force": True}, "source"),
        ({"data": some_examples(), "output": "b", "base_model": "b", "force": True}, "source"),
        ({"tasks": "rows/my.yaml", "output": "rows", "force": True}, "source"),
    ],
)
def test_invalid_arguments_are_rejected_before_the_model_is_loaded(
    arguments: Any, keyword: str, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(on_disk.parent)
    monkeypatch.setattr("matryoshka_lora.peft.base_model.load_model", None)
    for folder in ("rows", "b"):
        Path(folder).mkdir(exist_ok=True)
    for file in ("rows/my.jsonl", "rows/my.yaml"):
        Path(file).touch()
    with pytest.raises(MatryoshkaError, match=keyword):
        evaluate(on_disk, progress=False, **arguments)


def test_vllm_cannot_evaluate_an_adapter_of_the_head(base_model: Path, tmp_path: Path) -> None:
    new_adapter(base_model, target_modules=["q_proj", "lm_head"]).save(tmp_path / "lora")
    with pytest.raises(MatryoshkaError, match="lm_head"):
        evaluate(tmp_path / "lora", data=some_examples(), backend="vllm", progress=False)


def test_a_single_file_cannot_be_evaluated(on_disk: Path) -> None:
    with pytest.raises(MatryoshkaError, match="folder"):
        evaluate(on_disk / "adapter_model.safetensors", data=some_examples(), progress=False)


def test_more_few_shot_examples_than_the_task_has(in_memory: NestedAdapter, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="colors"):
        evaluate(in_memory, write_task(tmp_path), num_fewshot=20, progress=False)


@pytest.mark.parametrize(
    "config",
    [
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_rank_0_is_left_out_where_it_is_not_the_base_model(config: Any, base_model: Path) -> None:
    adapter = new_adapter(base_model, target_modules=["q_proj", "v_proj"], **config)
    evaluation = evaluate(adapter, data=some_examples(), ranks=[1], progress=False)
    assert set(evaluation.metric().values) == {1}


def test_an_adapter_that_is_not_active(base_model: Path) -> None:
    adapter = new_adapter(base_model)
    adapter.model.add_adapter("other", adapter.model.peft_config["default"])
    adapter.model.set_adapter("other")
    with pytest.raises(MatryoshkaError, match="not active"):
        evaluate(adapter, data=some_examples(), ranks=[1], progress=False)
    # Rank 0 would not be the base model.
    adapter.model.base_model.set_adapter(["default", "other"])
    with pytest.raises(MatryoshkaError, match="set_adapter"):
        evaluate(adapter, data=some_examples(), ranks=[1], progress=False)
    model: Any = adapter.model
    with pytest.raises(MatryoshkaError, match="NestedAdapter"):
        evaluate(model, data=some_examples(), ranks=[1], progress=False)


@pytest.mark.parametrize("kind", ["text", "messages", "bos token"])
def test_the_loss_is_that_of_training(
    kind: str, in_memory: NestedAdapter, base_model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(base_model))
    examples = some_examples()
    if kind != "text":
        user = {"role": "user", "content": "Which color?"}
        assistant = {"role": "assistant", "content": "red"}
        examples = [{"prompt": [user], "completion": [assistant]}] * 2
    if kind == "bos token":
        # Texts begin with a token that the template does not write, as those of TinyLlama.
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    evaluation = evaluate(
        in_memory, data=examples, ranks=[1, 4], tokenizer=tokenizer, progress=False
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base_model),
        args=SFTConfig(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    batches = [trainer.data_collator([example]) for example in trainer.train_dataset]
    if kind == "messages":
        for batch in batches:
            # The harness counts the white space before the completion as part of it.
            first = int((batch["labels"] != -100).nonzero()[0, 1]) - 1
            batch["labels"][0, first] = batch["input_ids"][0, first]
    expected: dict[int, float] = {}
    for rank in (1, 4):
        in_memory.set_rank(rank)
        losses = [in_memory.model(**batch).loss.item() for batch in batches]
        expected[rank] = fmean(losses)
    metrics = evaluation.tasks["data"].metrics
    assert list(metrics) == ["exact_match,none", "loss,none"]
    measured = metrics["loss,none"].values
    assert {rank: measured[rank] for rank in expected} == pytest.approx(expected, rel=1e-4)
    del measured[0]  # random factors may be worse than the base model
    selection = select(evaluation, max_bytes="1GB", metric="loss")
    assert selection.rank == min(expected, key=lambda rank: expected[rank])


def test_a_group_has_its_own_metric(
    in_memory: NestedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        write_task(tmp_path, name)
    group = {
        "group": "pair",
        "task": ["first", "second"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(group))
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    loaded_group = LoadedTask("pair", manager.load(["pair"]))
    monkeypatch.setattr("matryoshka_lora.evaluation.tasks.load_task", lambda _: loaded_group)
    evaluation = evaluate(in_memory, "pair", ranks=[1, 4], progress=False)
    assert list(evaluation.tasks) == ["pair"]
    assert evaluation.tasks["pair"].num_examples == len(evaluation.examples) == 10
    accuracies = [example.metrics["acc,none"][4] for example in evaluation.examples]
    assert evaluation.values()[4] == pytest.approx(fmean(accuracies))
    assert evaluation.difference(None, 1, 4) is not None


@pytest.mark.slow
def test_two_processes_evaluate_as_one(on_disk: Path, tmp_path: Path) -> None:
    """Each computes a share of choices, of answers and of log-likelihoods."""
    examples = tmp_path / "words.jsonl"
    examples.write_text("".join(f"{json.dumps(example)}\n" for example in some_examples(5)))
    tasks = ",".join([write_task(tmp_path), write_task(tmp_path, "words", **GENERATION)])
    for name, sources in (("data", ["--data", str(examples)]), ("tasks", ["--tasks", tasks])):
        output = tmp_path / name
        arguments = ["eval", str(on_disk), *sources, "--dtype", "fp32", "-o", str(output)]
        text = run_in_two_processes("ddp", "launch.py", arguments)
        assert text.count("Written to") == 1
        options: Any = {"data": examples} if name == "data" else {"tasks": tasks}
        expected = evaluate(on_disk, **options, dtype="fp32", output=None, force=True)
        evaluation = Evaluation.read(output)
        assert evaluation.examples == expected.examples
        for task, result in expected.tasks.items():
            for key, metric in result.metrics.items():
                actual = evaluation.tasks[task].metrics[key]
                assert actual.values == pytest.approx(metric.values, abs=1e-5)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora"])
def test_an_image_model_has_no_answers(tmp_path: Path, name: str) -> None:
    lora = random_lora({"unet.down_blocks.0.attentions.0.to_q": (8, 8)})
    lora.save(tmp_path / "lora.safetensors")
    lora.convert("peft").save(tmp_path / "lora")
    with pytest.raises(MatryoshkaError, match="causal language models"):
        evaluate(tmp_path / name, data=[{"prompt": "a", "completion": "b"}])
