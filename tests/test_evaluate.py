"""`evaluate`, from tasks and rows to the folder that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from conftest import randomize
from datasets import Dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter, nest
from matryoshka_lora.evaluation import tasks
from matryoshka_lora.evaluation.evaluate import evaluate
from matryoshka_lora.evaluation.results import Evaluation, aurac
from matryoshka_lora.evaluation.select import select
from matryoshka_lora.evaluation.tasks import load_data
from matryoshka_lora.files.rows import read_rows
from matryoshka_lora.models import load_tokenizer

RANKS = (1, 2, 4)
WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star")
MEAN = {"aggregation": "mean", "higher_is_better": True}
FILES = ["curve.png", "evaluation.json", "examples.jsonl"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the embedded model's tokenizer, on the disk."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(vocab_size=49152, initializer_range=0.2, eos_token_id=2, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def new_adapter(base: Path, **config: Any) -> NestedAdapter:
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **config}
    peft = get_peft_model(model, LoraConfig(**settings))
    randomize(peft, size=0.4)
    adapter = nest(peft.eval(), rule="lora")
    adapter.reorder()
    return adapter


@pytest.fixture(scope="module")
def memory(base: Path) -> NestedAdapter:
    return new_adapter(base)


@pytest.fixture(scope="module")
def saved(memory: NestedAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    memory.save(folder)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """The adapter's folder, in a place of its own."""
    folder = tmp_path / "lora"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write_task(folder: Path, name: str = "colours", shots: int = 2, **config: Any) -> str:
    """Write a YAML file of a choice between two words, and its data."""
    files = {}
    for split, count in (("train", 6), ("test", 5)):
        rows = [
            {
                "question": f"{WORDS[n]} or {WORDS[-n - 1]}?",
                "choices": WORDS[n : n + 3],
                "label": n % 3,
            }
            for n in range(count)
        ]
        files[split] = str(folder / f"{name}-{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    }
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    more = {"fewshot_split": "train", "num_fewshot": shots, "doc_to_text": "{{question}}"}
    file = folder / f"{name}.yaml"
    text = yaml.safe_dump(
        {"task": name, **data, **more, "metadata": {"version": 1}, **choice, **config}
    )
    file.write_text(text)
    return str(file)


WRITES = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", **MEAN}],
}
READS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "doc_to_choice": None,
    "num_fewshot": 0,
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


def rows(count: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"{word} is", "completion": f" {word}"} for word in WORDS[:count]]


def by_the_harness(adapter: Path, base: Path, rank: int, task: str, shots: int | None) -> Any:
    """Return what the harness says of a plain PEFT adapter of one rank."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rank:
        model = PeftModel.from_pretrained(model, adapter).eval()
    backend = HFLM(model, tokenizer=load_tokenizer(str(base)), batch_size=2)
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(backend, tasks=[task], num_fewshot=shots, task_manager=manager)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, WRITES, READS], ids=["choice", "text", "perplexity"])
@pytest.mark.parametrize("shots", [None, 1])
def test_numbers_are_the_harness_own_on_exported_ranks(
    config: Any, shots: int | None, adapter: Path, base: Path, memory: NestedAdapter, tmp_path: Path
) -> None:
    task = write_task(tmp_path, **config)
    found = evaluate(adapter, task, num_fewshot=shots, progress=False, dtype=torch.float32)
    assert found.ranks == RANKS
    for rank in (0, *RANKS):
        if rank:
            memory.export(tmp_path / f"rank-{rank}", rank)
        wanted = by_the_harness(tmp_path / f"rank-{rank}", base, rank, task, shots)
        for name, metric in found.tasks["colours"]["metrics"].items():
            assert metric["value"][rank] == pytest.approx(
                wanted["results"]["colours"][name], rel=1e-4
            )
        prompts = [row["arguments"][0][0] for row in wanted["samples"]["colours"]]
        assert [row["prompt"] for row in found.examples] == prompts
    assert found.tasks["colours"]["num_fewshot"] == wanted["n-shot"]["colours"]


def test_the_folder_has_all_that_is_known(adapter: Path, tmp_path: Path) -> None:
    first, second = write_task(tmp_path), write_task(tmp_path, "words", **WRITES)
    found = evaluate(adapter, [first, second], ranks="all", limit=4)
    assert found.ranks == (1, 2, 3, 4)
    folder = tmp_path / "lora-evaluation"
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert Evaluation.read(folder) == Evaluation.read(adapter) == found
    values = found.values("colours")
    assert found.tasks["colours"]["aurac"] == pytest.approx(aurac([*values.values()], [*values]))
    assert {name: task["items"] for name, task in found.tasks.items()} == {"colours": 4, "words": 4}
    assert len(found.examples) == 8
    assert set(found.examples[0]["answers"]) == {"0", "1", "2", "3", "4"}
    assert "colours: acc,none, 4 questions, 2 shots" in found.lines()
    del found.metric("words")["value"][0]  # random ranks may be no better than the base model
    choice = select(found, within="99%", task="words")
    assert (choice.rank, choice.evaluation.about["adapter"]) == (1, str(adapter))
    assert found.about["dtype"] in ("float32", "bfloat16")
    sizes = [found.bytes[rank] for rank in found.ranks]
    assert sizes == sorted(sizes)


def test_a_long_completion_does_not_cut_the_other_prompts(memory: NestedAdapter) -> None:
    prompt = " ".join(WORDS * 5)
    some = [{"prompt": f"{word} {prompt}", "completion": " x"} for word in WORDS[:3]]
    long = [{"prompt": "a", "completion": " " + " ".join(WORDS * 15)}]
    alone, beside = (evaluate(memory, data=x, progress=False) for x in (some, [*some, *long]))
    assert beside.examples[:3] == alone.examples


def test_that_a_prompt_is_cut_is_said(memory: NestedAdapter) -> None:
    asked = [{"prompt": " ".join(WORDS * 30), "completion": " x"}]
    with pytest.warns(UserWarning, match="cannot hold lose their beginning"):
        evaluate(memory, data=asked, ranks=[1], progress=False)


def test_an_adapter_in_memory_is_as_it_was(memory: NestedAdapter, tmp_path: Path) -> None:
    memory.set_rank(2)
    memory.model.train()
    torch.manual_seed(7)
    found = evaluate(memory, data=rows(), ranks=[1, 4], progress=False)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert drawn == torch.rand(1)
    assert (memory.rank, memory.model.training) == (2, True)
    memory.model.eval()
    assert found.ranks == (1, 4)
    assert not list(tmp_path.iterdir())
    memory.export(tmp_path / "rank-4", 4)
    assert found.bytes[4] == (tmp_path / "rank-4/adapter_model.safetensors").stat().st_size


def test_what_we_did_not_write_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/examples.jsonl").write_text("mine")
    with pytest.raises(MatryoshkaError, match="exists already"):
        evaluate(adapter, data=rows(), out=tmp_path / "mine", progress=False)
    assert [file.read_text() for file in (tmp_path / "mine").iterdir()] == ["mine"]
    evaluate(adapter, data=rows(), out=tmp_path / "mine", ranks=[1], force=True, progress=False)
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == FILES


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "give either tasks"),
        ({"tasks": "a", "data": "b"}, "give either tasks"),
        ({"data": rows(), "ranks": [3, 2]}, "increas"),
        ({"data": rows(), "ranks": [8]}, "has no rank 8: choose one of 1 to 4"),
        ({"data": []}, "has no rows: give rows"),
        ({"data": [{"prompt": "a"}]}, "row 1 of the data is"),
        ({"data": [*rows(1), {"text": "a"}]}, "row 2 of the data is"),
        ({"data": "no.jsonl"}, r"no\.jsonl cannot be read"),
        ({"tasks": "no.yaml"}, "task no.yaml cannot be loaded"),
        ({"data": [{"messages": ["a", "b"]}]}, "row 1 of the data is"),
        ({"data": "rows/my.jsonl", "out": "rows", "force": True}, "is or holds the source"),
        ({"data": rows(), "out": ..., "force": True}, "is or holds the source"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_model_is_loaded(
    asked: Any, said: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matryoshka_lora.models.load_model", None)
    out = {"out": adapter} if asked.get("out") is ... else {}
    with pytest.raises(MatryoshkaError, match=said):
        evaluate(adapter, progress=False, **asked | out)


@pytest.mark.slow
def test_a_name_that_is_no_task_gets_a_near_one(adapter: Path) -> None:
    with pytest.raises(MatryoshkaError, match="did you mean gsm8k"):
        evaluate(adapter, "gsm8kk")


def test_shots_that_there_are_not(memory: NestedAdapter, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="the harness cannot run colours"):
        evaluate(memory, write_task(tmp_path), num_fewshot=20, progress=False)


@pytest.mark.parametrize("config", [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_a_base_model_that_is_not_there_is_not_measured(config: Any, base: Path) -> None:
    targets = ["q_proj", "v_proj"]
    adapter = new_adapter(base, target_modules=targets, **config)
    found = evaluate(adapter, data=rows(), ranks=[1], progress=False)
    assert set(found.metric()["value"]) == {1}


def test_an_adapter_that_is_not_active_is_not_measured(base: Path) -> None:
    adapter = new_adapter(base)
    adapter.model.add_adapter("other", adapter.model.peft_config["default"])
    adapter.model.set_adapter("other")
    with pytest.raises(MatryoshkaError, match="not active"):
        evaluate(adapter, data=rows(), ranks=[1], progress=False)


MESSAGES = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "red"}]
IN = [MESSAGES[0], {"role": "assistant", "content": "in"}]  # these letters are in the template
MARK = {"chat_template_kwargs": {"mark": ":"}}
OWN = [MESSAGES[0], {"role": "assistant", "content": "<think>mine</think>in"}]


@pytest.mark.parametrize(
    ("row", "prompt", "until"),
    [
        ({"prompt": "a b", "completion": " c "}, "a b", ["\n"]),
        ({"prompt": "a b", "completion": "c\nd"}, "a b", []),
        ({"prompt": "a b", "completion": "\nc"}, "a b", []),  # its answer begins with a newline
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, None, ["\n", "<|im_end|>"]),
        ({"messages": MESSAGES}, None, ["\n", "<|im_end|>"]),
        ({"messages": MESSAGES, "tools": '[{"name": "add"}]', **MARK}, "add:", ["\n"]),
        ({"messages": IN}, "Which colour?;<think>\n\n</think>\n\n", ["\n", ";"]),  # Qwen3
        ({"messages": OWN}, "Which colour?;", ["\n", ";"]),  # its thought belongs to the answer
        ({"messages": MESSAGES}, "Which colour?", ["\n", ";"]),  # Mistral's space is the answer's
    ],
)
def test_rows_are_asked_in_trls_formats(
    row: dict[str, Any], prompt: str | None, until: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer()
    if "tools" in row:
        tokenizer.chat_template = (
            "{{ tools[0].name }}{{ mark }}{{ messages[1].content if messages[1:] }}"
        )
    elif prompt == "Which colour?":
        write = "{{ ' ' + m.content + ';' if m.role == 'assistant' else m.content }}"
        tokenizer.chat_template = "{% for m in messages %}" + write + "{% endfor %}"
    elif (prompt or "").startswith("Which"):
        thought = (
            "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and '<' not in m.content }}"
        )
        tokenizer.chat_template = (
            "{% for m in messages %}" + thought + "{{ m.content }};{% endfor %}"
        )
    elif prompt is None:
        chat = {"tokenize": False, "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template(MESSAGES[:1], **chat)
        assert prompt.endswith("<|im_start|>assistant\n")
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row) + "\n\n", encoding="utf-8-sig")  # as Windows begins files
    _, loaded = load_data("mine", read_rows(file), tokenizer)
    (task,) = loaded["tasks"].values()
    task.build_all_requests()
    text, settings = task.instances[0].args
    assert (text, settings["until"], settings["do_sample"]) == (prompt, until, False)


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])  # answers are without it
@pytest.mark.parametrize(("said", "right"), [(" red \n", 1.0), ("red.", 0.0), ("", 0.0)])
def test_an_answer_is_right_if_it_is_the_completion(said: str, right: float, end: str) -> None:
    asked = [{"prompt": "red is", "completion": f" red{end}"}]
    (task,) = load_data("mine", asked, load_tokenizer())[1]["tasks"].values()
    (doc,) = task.test_docs()
    found = task.process_results(doc, [said, (-3.0, False)])
    assert found == {"exact_match": right, "loss": 3.0 / doc["tokens"]}


@pytest.mark.parametrize("kind", ["text", "chat", "bos"])
def test_the_loss_is_that_of_training_and_may_choose(
    kind: str, memory: NestedAdapter, base: Path, tmp_path: Path
) -> None:
    chat = [{"prompt": MESSAGES[:1], "completion": [{**MESSAGES[1], "content": "red"}]}] * 2
    asked, tokenizer = rows() if kind == "text" else chat, load_tokenizer(str(base))
    if kind == "bos":  # texts begin with a token that the template leaves out, as TinyLlama's do
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
        begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = begin
    found = evaluate(memory, data=asked, ranks=[1, 4], tokenizer=tokenizer, progress=False)
    assert found.lines()[0].split() == ["rank", "size", "exact_match", "loss"]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(asked),
        processing_class=tokenizer,
    )
    batches, losses = [trainer.data_collator([row]) for row in trainer.train_dataset], {}
    for batch in batches if kind == "chat" else []:  # the harness counts the line's end before it
        first = int((batch["labels"] != -100).nonzero()[0, 1]) - 1
        batch["labels"][0, first] = batch["input_ids"][0, first]
    for rank in (1, 4):
        memory.set_rank(rank)
        losses[rank] = fmean(float(memory.model(**batch).loss) for batch in batches)
    measured = found.tasks["data"]["metrics"]["loss,none"]["value"]
    assert {rank: measured[rank] for rank in losses} == pytest.approx(losses, rel=1e-4)
    del measured[0]  # random ranks may be no better than the base model
    assert select(found, "0%", metric="loss").rank == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(
    ("content", "template", "said"),
    [
        ("red", None, "cannot write row 1 of the data"),
        ("red", "{{ raise_exception('no system') }}", "row 1 of the data: no system"),
        ("", "{{ messages }}", "the answer of row 1 is '': give it as a text"),  # it calls a tool
        (None, "{{ messages }}", "the answer of row 1 is None: give"),
        ([{"type": "text", "text": "red"}], "{{ messages }}", "the answer of row 1 is .*: give"),
    ],
)
def test_chat_needs_a_template_and_answers(content: Any, template: str | None, said: str) -> None:
    tokenizer, answer = load_tokenizer(), {"role": "assistant", "content": content}
    tokenizer.chat_template = template
    with pytest.raises(MatryoshkaError, match=said):
        load_data("mine", [{"messages": [MESSAGES[0], answer]}], tokenizer)


def test_a_group_has_a_number_of_its_own(
    memory: NestedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        write_task(tmp_path, name)
    group = {"group": "both", "task": ["first", "second"]}
    group |= {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(tasks, "_manager", lambda _: manager)
    found = evaluate(memory, "both", ranks=[1, 4], progress=False)
    assert list(found.tasks) == ["both"]
    assert found.tasks["both"]["items"] == len(found.examples) == 10
    right = [row["metrics"]["acc,none"]["4"] for row in found.examples]
    assert found.values()[4] == pytest.approx(sum(right) / 10)
    assert found.difference(None, 1, 4) is not None
    apart = evaluate(memory, ["first", "second"], ranks=[4], progress=False)
    assert sum(apart.values(name)[4] or 0 for name in apart.tasks) / 2 == found.values()[4]
