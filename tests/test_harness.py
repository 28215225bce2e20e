"""The harness's numbers for all ranks, against its own HF backend on plain PEFT adapters of each rank."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import torch
import yaml
from conftest import lora_config, nest_as, nested_llama, randomize, tiny_llama
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from strangers import forget_weights
from tiny_chat import save_tiny_chat
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
)

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, evaluate
from matryoshka_lora.adapter.saving import opened_from
from matryoshka_lora.cli.main import app
from matryoshka_lora.data.questions import ExactMatch, Row
from matryoshka_lora.engine import generation
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.evaluation import tasks
from matryoshka_lora.evaluation.cost import adapter_bytes, token_latency
from matryoshka_lora.evaluation.harness import judge
from matryoshka_lora.evaluation.results import summed
from matryoshka_lora.evaluation.select import read_evaluation
from matryoshka_lora.evaluation.store import Store, mark_of_weights, request_key
from matryoshka_lora.evaluation.tasks import Asked, Preset, QuestionsTask, ask
from matryoshka_lora.formats.beside import fingerprint
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.models import load_on_accelerator, load_tokenizer

RANKS = (1, 2, 4)
HARNESS_TASKS = Path(lm_eval.__file__).parent / "tasks"
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, with a context that holds few-shot prompts of one token a character."""
    folder = save_tiny_chat(tmp_path_factory.mktemp("base"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> NestedAdapter:
    nesting = Nesting(RANKS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(nesting))
    randomize(model, size=1.0)
    return nest_as(model.eval(), nesting, deploy="paper")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def slices(base: Path, adapter: NestedAdapter, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What the harness is given for each rank: plain PEFT on an exported adapter."""
    folder, found = tmp_path_factory.mktemp("slices"), {}
    for rank in RANKS:
        adapter.export(folder / str(rank), rank)
        found[rank] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / str(rank)).eval()
    return found


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> str:
    files = {"test": write_rows(folder / f"{name}-test.jsonl", rows)}
    files["train"] = write_rows(folder / f"{name}-train.jsonl", rows[::-1][:8])
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    shots = {"fewshot_split": "train", "training_split": "train"}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"task": name, **data, **shots, "metadata": {"version": 1}, **config}))
    return str(file)


def local_copy(folder: Path, task: str, rows: list[dict[str, Any]], splits: dict[str, str]) -> str:
    """A task as the harness ships it, on local files of the same schema."""
    source = HARNESS_TASKS / {"arc_challenge": "arc/arc_easy.yaml"}.get(task, f"{task}/{task}.yaml")
    lines = source.read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("dataset_path", "dataset_name", "task:"))]
    files = {split: write_rows(folder / f"{task}-{split}.jsonl", rows) for split in splits.values()}
    lines += [f"task: {task}", "dataset_path: json", f"dataset_kwargs: {json.dumps({'data_files': files})}"]
    (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n")
    if (source.parent / "utils.py").exists():
        (folder / "utils.py").write_text((source.parent / "utils.py").read_text())
    return str(folder / f"{task}.yaml")


def gsm8k(count: int) -> list[dict[str, str]]:
    return [{"question": f"{i} apples and {i + 1}?", "answer": f"{i}+{i + 1} #### {2 * i + 1}"} for i in range(count)]


def arc(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    found = []
    for i in range(count):
        choices = {"text": draw.sample(WORDS, 4), "label": ["A", "B", "C", "D"]}
        found.append({"id": str(i), "question": f"Which is {i}?", "choices": choices, "answerKey": draw.choice("ABCD")})
    return found


def hellaswag(count: int) -> list[dict[str, Any]]:
    draw = random.Random(1)
    return [
        {
            "activity_label": draw.choice(WORDS),
            "ctx_a": f"The {draw.choice(WORDS)} goes {i}.",
            "ctx_b": "then it",
            "endings": [f"{draw.choice(WORDS)} {word}." for word in draw.sample(WORDS, 4)],
            "label": str(draw.randrange(4)),
            "split": "x",
            "ind": i,
            "split_type": "x",
            "source_id": "x",
            "ctx": "",
        }
        for i in range(count)
    ]


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Preset]:
    """The paper's protocol, on local files of the schemas of the hub's datasets."""
    files = {
        "gsm8k": local_copy(tmp_path, "gsm8k", gsm8k(10), {"a": "train", "b": "test"}),
        "arc_challenge": local_copy(tmp_path, "arc_challenge", arc(30), {"a": "train", "b": "validation", "c": "test"}),
        "hellaswag": local_copy(tmp_path, "hellaswag", hellaswag(14), {"a": "train", "b": "validation"}),
    }
    assert {preset.task for preset in tasks.PRESETS.values()} == set(files)
    local = {
        name: Preset(files[preset.task], preset.num_fewshot, preset.metric) for name, preset in tasks.PRESETS.items()
    }
    monkeypatch.setattr(tasks, "PRESETS", local)
    return local


def by_the_harness(model: Any, tokenizer: Any, asked: Asked, limit: int | None, batch_size: int = 3) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It describes the machine with pip and git, for seconds.
    lm_eval.evaluator.add_env_info = lambda results: None
    backend = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager(include_defaults=False)  # else it reads thousands of files
    options = {"num_fewshot": asked.num_fewshot, "limit": limit, "task_manager": manager}
    return simple_evaluate(backend, tasks=list(asked.tasks), **options)


def assert_same(found: Any, expected: Any) -> None:
    """The same prompts, texts, choices and metrics, and log-likelihoods within 1e-3."""
    for name, rows in expected["samples"].items():
        for mine, theirs in zip(found["samples"][name], rows, strict=True):
            assert mine["arguments"] == theirs["arguments"]
            for answer, other in zip(mine["resps"], theirs["resps"], strict=True):
                if isinstance(other[0], tuple):
                    assert answer[0][0] == pytest.approx(other[0][0], abs=1e-3)
                    assert answer[0][1] == other[0][1]
                else:
                    assert answer[0] == (pytest.approx(other[0], abs=1e-3) if isinstance(other[0], float) else other[0])
        for key, value in expected["results"][name].items():
            assert found["results"][name][key] == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("name", list(tasks.PRESETS))
def test_the_papers_protocol_is_the_harness_own(
    name: str, presets: Any, adapter: NestedAdapter, tokenizer: Any, slices: dict[int, Any]
) -> None:
    shots = presets[name].num_fewshot
    limit = 3 if shots > 8 else 5
    asked = ask(name, tokenizer)
    judged = judge(Engine(adapter, tokenizer), asked.tasks, RANKS, Store(None, {}), asked.num_fewshot, limit)
    for rank in RANKS:
        again = ask(name, tokenizer)
        expected = by_the_harness(slices[rank], tokenizer, again, limit)
        assert next(iter(expected["n-shot"].values())) == shots
        assert_same(judged.results[rank], expected)
    ((own, called),) = asked.names.items()
    entry = summed(own, asked.kind, asked.metric, judged.results)
    assert (called, entry["metric"], entry["num_fewshot"]) == (name, presets[name].metric, shots)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "one-token choices", "generate"])
def test_every_kind_of_request(
    kind: str, tmp_path: Path, adapter: NestedAdapter, tokenizer: Any, slices: dict[int, Any]
) -> None:
    rows = [{"text": " ".join(WORDS[i:]), "label": i % 2} for i in range(6)]
    mean = {"aggregation": "mean", "higher_is_better": True}
    config: dict[str, dict[str, Any]] = {
        "loglikelihood": {
            "doc_to_text": "Say",
            "doc_to_target": " {{text}}",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "loglikelihood_rolling": {
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
        "one-token choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}} ",  # the harness moves the space to the choice
            "doc_to_target": "label",
            "doc_to_choice": ["A", "B"],
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "generate": {
            "output_type": "generate_until",
            "doc_to_text": "<s>{{text}}",  # begins with the tokenizer's own first token
            "doc_to_target": "x",
            "generation_kwargs": {"until": ["e", "</s>"], "max_gen_toks": 20},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
    settings = {"output_type": kind, **config[kind]}
    file = write_task(tmp_path, "mine", rows, **settings)
    judged = judge(Engine(adapter, tokenizer), ask(file, tokenizer).tasks, RANKS, Store(None, {}), None)
    for rank in RANKS:
        assert_same(judged.results[rank], by_the_harness(slices[rank], tokenizer, ask(file, tokenizer), None))


def test_fixed_shots_are_the_same_for_every_question(presets: Any, adapter: NestedAdapter, tokenizer: Any) -> None:
    def prompts(fixed: bool) -> list[str]:
        chosen = ask("gsm8k-3shot", tokenizer, fixed_shots=fixed)
        judged = judge(Engine(adapter, tokenizer), chosen.tasks, [1], Store(None, {}), chosen.num_fewshot, 4)
        return [row["arguments"][0][0] for row in next(iter(judged.results[1]["samples"].values()))]

    begin = {prompt.rpartition("\n\n")[0] for prompt in prompts(fixed=True)}
    assert len(begin) == 1
    assert begin.pop().count("Question:") == 3
    assert len({prompt.rpartition("\n\n")[0] for prompt in prompts(fixed=False)}) > 1


def test_answers_are_given_once_and_found_again(tmp_path: Path, presets: Any, adapter: Any, tokenizer: Any) -> None:
    file, asked = tmp_path / "answers.jsonl", []

    class Counting(Engine):
        def generate(self, prompts: Any, *args: Any, **kwargs: Any) -> list[str]:
            asked.append(len(prompts))
            return super().generate(prompts, *args, **kwargs)

    def run() -> Any:
        chosen = ask("gsm8k-3shot", tokenizer)
        store = Store(file, {"model": "m"})
        try:
            return judge(Counting(adapter, tokenizer), chosen.tasks, RANKS, store, chosen.num_fewshot, 4)
        finally:
            store.close()

    first = run()
    assert asked == [4 * len(RANKS)]
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 4 * len(RANKS)
    file.write_text("\n".join(lines[:6]) + "\n" + lines[6][:20])  # killed in the middle of a line
    second = run()
    assert asked == [12, 7]
    assert first.prompts == second.prompts
    assert {r: x["results"] for r, x in first.results.items()} == {r: x["results"] for r, x in second.results.items()}
    keys = [(entry["key"], entry["rank"]) for entry in map(json.loads, file.read_text().splitlines()[1:])]
    assert len(keys) == len(set(keys)) == 12
    run()
    assert asked == [12, 7]


def test_a_fingerprint_is_of_what_the_answers_depend_on(adapter: NestedAdapter, tmp_path: Path) -> None:
    """In memory and in a folder, in this process and another; and of no other file of the folder."""
    adapter.save(tmp_path)
    forget_weights(tmp_path)  # it would refuse others
    before = fingerprint(open_adapter(tmp_path))
    assert fingerprint(opened_from(adapter.model, adapter.name)) == before
    code = (
        "import sys\nfrom matryoshka_lora.formats.beside import fingerprint\n"
        "from matryoshka_lora.formats.opened import open_adapter\nprint(fingerprint(open_adapter(sys.argv[1])))"
    )
    again = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert again.stdout.split()[-1] == before
    (tmp_path / "evaluation.json").write_text("{}")  # `matryoshka eval A --out A` writes its own there
    assert fingerprint(open_adapter(tmp_path)) == before
    weights = load_file(tmp_path / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    changed = {"adapter_model.safetensors": (tmp_path / "other.safetensors").read_bytes()}
    for name, field in {"adapter_config.json": {"lora_alpha": 8}, "nesting.json": {"ranks": [2, 4]}}.items():
        changed[name] = json.dumps(json.loads((tmp_path / name).read_text()) | field).encode()
    for name, content in changed.items():
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        assert fingerprint(open_adapter(tmp_path)) != before
        (tmp_path / name).write_bytes(kept)
    assert fingerprint(open_adapter(tmp_path)) == before


def test_bytes_are_those_of_the_exported_file_whatever_else_is_on_the_model(tmp_path: Path) -> None:
    nesting = Nesting([1, 2, 4])
    model = get_peft_model(tiny_llama(), lora_config(nesting, modules_to_save=["lm_head"]))
    adapter = nest_as(model, nesting, deploy="paper")
    model.add_adapter("default_2", lora_config(Nesting([8])))
    adapter.save(tmp_path / "all")
    for opened in (open_adapter(tmp_path / "all"), opened_from(model, "default")):
        for rank, size in zip((1, 4), adapter_bytes(opened, (1, 4)), strict=True):
            adapter.export(tmp_path / str(rank), rank, overwrite=True)
            tensors = load_file(tmp_path / str(rank) / "adapter_model.safetensors").values()
            assert size == sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_bytes_are_in_the_dtype_of_the_file(tmp_path: Path) -> None:
    nested_llama(Nesting([1, 2, 4])).save(tmp_path)
    opened = open_adapter(tmp_path)
    assert [2 * size for size in adapter_bytes(opened.cast(torch.bfloat16), (1, 3))] == adapter_bytes(opened, (1, 3))


def test_latencies_of_all_ranks_take_no_more_memory_than_two_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = nested_llama(Nesting([1, 2, 4, 8]))
    adapter.reorder()
    model, held = adapter.model, []
    load_adapter = model.load_adapter

    def watched(*arguments: Any, **options: Any) -> Any:
        found = load_adapter(*arguments, **options)
        held.append(sum(config.r for name, config in model.peft_config.items() if name != adapter.name))
        return found

    monkeypatch.setattr(model, "load_adapter", watched)
    assert all(time > 0 for time in token_latency(adapter, range(1, 9)))
    assert len(held) == 8
    assert max(held) <= 16
    assert list(model.peft_config) == [adapter.name]


def test_an_answer_ends_where_the_template_ends_a_turn(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<unk>"  # as Qwen's base models, whose turns end with another token than texts
    rows = [Row([{"role": "user", "content": "1?"}], [{"role": "assistant", "content": "2"}])]
    task = QuestionsTask(ExactMatch("mine"), rows, other)
    assert task.config.generation_kwargs["until"] == ["</s>"]


def test_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    store = Store(file, {"adapter": "a", "dtype": "float32"})
    store.put(request_key("x"), 1, "y")
    with pytest.raises(MatryoshkaError, match="another evaluation is writing"):
        Store(file, {"adapter": "a", "dtype": "float32"})
    store.close()
    with pytest.raises(MatryoshkaError, match=r"holds answers of another adapter.*: give another folder"):
        Store(file, {"adapter": "b", "dtype": "float32"})
    again = Store(file, {"adapter": "a", "dtype": "float32"})
    assert again[request_key("x"), 1] == "y"
    again.close()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{", lines[1]]) + "\n")
    with pytest.raises(MatryoshkaError, match=r"line 2 of .* is damaged"):
        Store(file, {"adapter": "a", "dtype": "float32"})
    file.write_text("torn")
    store = Store(file, {"adapter": "b"})
    assert len(store) == 0
    store.close()


def test_a_full_disk_is_named_and_lets_the_store_go(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    store = Store(file, {})
    store._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    with pytest.raises(MatryoshkaError, match="cannot write the answers: No space left on device"):
        store.put(request_key("x"), 1, "y")
    store.close()
    Store(file, {}).close()


def own_adapter(base: Path) -> NestedAdapter:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(Nesting(RANKS)))
    randomize(model, size=1.0)
    return nest_as(model.eval(), Nesting(RANKS), deploy="paper")


def choices(folder: Path, name: str = "choices", **config: Any) -> str:
    rows = [{"text": word, "choices": [f" {other}" for other in WORDS[:4]]} for word in WORDS]
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return write_task(folder, name, rows, **{**settings, **config})


def test_answers_of_another_base_model_are_never_given_again(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Its name is the same: it was trained further, in memory or on the disk."""
    adapter, file = own_adapter(base), choices(tmp_path)

    def evaluated(out: str, **options: Any) -> list[Any]:
        found = evaluate(adapter, file, out=tmp_path / out, tokenizer=tokenizer, latency=False, **options)
        return [store.strip() for store in (tmp_path / out / "answers.jsonl").read_text().splitlines()[1:]] + [found]

    before = evaluated("one")
    assert evaluated("one")[:-1] == before[:-1]
    with torch.no_grad():
        for name, weight in adapter.model.get_base_model().named_parameters():
            if "lora_" not in name:
                weight += torch.randn_like(weight) / 4
    with pytest.raises(MatryoshkaError, match=r"holds answers of another base: give another folder .* or begin anew"):
        evaluated("one")
    fresh = evaluated("another")
    assert fresh[:-1] != before[:-1]
    assert evaluated("one", overwrite=True)[:-1] == fresh[:-1]


def test_the_mark_of_a_base_model_is_of_nothing_else(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    mark = mark_of_weights(model)
    nesting = Nesting(RANKS)
    adapter = nest_as(get_peft_model(model, lora_config(nesting, modules_to_save=["lm_head"])), nesting)
    randomize(adapter.model)
    adapter.set_rank(2)
    assert mark_of_weights(adapter.model.get_base_model()) == mark
    assert mark_of_weights(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)) != mark


def test_a_task_that_shuffles_while_it_loads_is_the_harness_own(
    base: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shuffling.py").write_text(
        "import random\n\n\ndef docs(dataset):\n    def one(doc):\n        choices = list(doc['choices'])\n"
        "        random.shuffle(choices)\n        return {'choices': choices}\n\n    return dataset.map(one)\n"
    )
    file = choices(tmp_path, "shuffled")
    text = Path(file).read_text() + "process_docs: !function shuffling.docs\n"
    Path(file).write_text(text)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def order(load: Any) -> Any:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        random.seed(time.time_ns())
        return [doc["choices"] for doc in load().eval_docs]

    def of_the_harness() -> Any:
        random.seed(0)  # as simple_evaluate does before it loads
        return next(iter(TaskManager(include_defaults=False).load([file])["tasks"].values()))

    assert order(lambda: ask(file, tokenizer).tasks[0]) == order(of_the_harness)


def test_a_special_token_that_the_tokenizer_only_added_ends_an_answer(adapter: NestedAdapter, tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    prompt = tokenizer("red")["input_ids"]
    adapter.set_rank(4)
    written = adapter.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    made = written[0, len(prompt) :].tolist()
    place = next(n for n in range(2, len(made)) if made[n] not in made[:n])
    end, expected = own.convert_ids_to_tokens(made[place]), own.decode(made[:place])
    own.add_tokens([AddedToken(end, special=True)])
    assert own.convert_tokens_to_ids(end) == made[place]
    assert end not in own.all_special_tokens
    assert Engine(adapter, own).generate([prompt], 4, max_new_tokens=12, until=[end]) == [expected]
    limits = generation.Limits.of(adapter.model, own, 12, [own.decode(made[place - 1 : place + 1])], 1.0)
    assert [limits.over(made[:count]) for count in range(1, place + 2)] == [False] * place + [True]


def test_an_answer_is_cut_by_one_text_after_the_other_as_the_harness_does(adapter: Any) -> None:
    tokenizer = load_tokenizer()
    for text, until in (("42\n\nQuestion: what", ["Question:", "\n\nQuestion:"]), ("ab\n\nc", ["\n\n", "b\n"])):
        limits = generation.Limits.of(adapter.model, tokenizer, 50, until, 1.0)
        made = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert limits.text(made) == postprocess_generated_text(text, until, None)


def test_texts_are_cut_by_the_models_own_context(tokenizer: Any, tmp_path: Path) -> None:
    """Of a longrope model the rows may be shorter: then a text is refused, and not cut where the harness would not."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={**rope, "original_max_position_embeddings": 64, "factor": 4.0},
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    model = get_peft_model(Phi3ForCausalLM(config), LoraConfig(r=4, target_modules=["qkv_proj"]))
    adapter = nest_as(model.eval(), Nesting(RANKS), deploy="paper")
    file = write_task(
        tmp_path,
        "rolling",
        [{"text": "the quick brown fox jumps over the lazy dog and so it goes on " * 2}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    with pytest.raises(MatryoshkaError, match="from 64 on this model turns all positions of a row otherwise"):
        judge(Engine(adapter, tokenizer), ask(file, tokenizer).tasks, [4], Store(None, {}))


def test_what_another_command_has_written_meanwhile_stays(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_adapter(base).save(tmp_path / "adapter")
    first, second = choices(tmp_path, "first"), choices(tmp_path, "second")
    options = {"model": str(base), "dtype": "fp32", "latency": False, "base": False}
    loads = [load_on_accelerator]

    def load(*given: Any) -> Any:
        if len(loads) == 1:
            loads.append(load_on_accelerator)
            evaluate(tmp_path / "adapter", first, **options)
        return load_on_accelerator(*given)

    monkeypatch.setattr("matryoshka_lora.evaluation.evaluate.load_on_accelerator", load)
    evaluate(tmp_path / "adapter", second, **options)
    assert set(read_evaluation(tmp_path / "adapter").tasks) == {"first.yaml", "second.yaml"}


def test_tasks_that_cannot_be_run(tmp_path: Path, adapter: NestedAdapter, tokenizer: Any) -> None:
    rows = [{"text": word} for word in WORDS]
    base = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x"}
    mean = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]

    def task(name: str, rows: list[dict[str, Any]] = rows, **config: Any) -> str:
        settings = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 5}, **config}
        return write_task(tmp_path, name, rows, **base, metric_list=mean, **settings)

    def run(file: str, shots: int | None = None) -> None:
        judge(Engine(adapter, tokenizer), ask(file, tokenizer, shots).tasks, [1], Store(None, {}), shots)

    with pytest.raises(MatryoshkaError, match=r"there is no file no\.yaml"):
        run("no.yaml")
    with pytest.raises(MatryoshkaError, match="has 8 examples for 9 shots"):
        run(task("shots"), 9)
    with pytest.raises(MatryoshkaError, match="defined without shots"):
        run(task("none", num_fewshot=0), 2)
    with pytest.raises(MatryoshkaError, match="num-fewshot is -1"):
        run(task("minus"), -1)
    with pytest.raises(MatryoshkaError, match="its data file is empty"):
        run(task("empty", rows=[]))
    with pytest.raises(MatryoshkaError, match="decodes greedily"):
        run(task("sampling", generation_kwargs={"do_sample": True, "until": ["x"]}))
    for name, value in {"num_beams": 2, "no_repeat_ngram_size": 1, "min_new_tokens": 1, "bad_words_ids": [[5]]}.items():
        with pytest.raises(MatryoshkaError, match=f"task searching sets {name} to .*its generation_kwargs, or export"):
            run(task("searching", generation_kwargs={name: value, "until": ["x"]}))
    with pytest.raises(MatryoshkaError, match="task unknown sets topk, which is no setting of greedy decoding"):
        run(task("unknown", generation_kwargs={"topk": 3, "until": ["x"]}))
    with pytest.raises(MatryoshkaError, match=r"is too long.*few-shot"):
        run(task("long", generation_kwargs={"max_gen_toks": 5000, "until": ["x"]}))
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\n")
    with pytest.raises(MatryoshkaError, match=r"task .* cannot be loaded"):
        run(str(broken))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "num_beams": 1, "no_repeat_ngram_size": 0},
        {"temperature": 0.0, "length_penalty": 2.0},
        {"repetition_penalty": 1.7},
        {"max_new_tokens": 7},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("own", [{}, {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3}])
def test_a_tasks_generation_settings_are_heeded_on_top_of_the_models(
    settings: dict[str, Any], own: dict[str, Any], base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    nesting = Nesting(RANKS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(nesting))
    randomize(model, size=1.0)
    adapter = nest_as(model.eval(), nesting, deploy="paper")
    adapter.export(tmp_path / "4", 4)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "4").eval()
    for each in (adapter.model.get_base_model(), plain.get_base_model()):
        each.generation_config.update(**own)
    file = write_task(
        tmp_path,
        "mine",
        [{"text": word} for word in WORDS[:4]],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="x",
        generation_kwargs={"until": ["x"], "max_gen_toks": 12, **settings}
        if "max_new_tokens" not in settings
        else {"until": ["x"], **settings},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    judged = judge(Engine(adapter, tokenizer), ask(file, tokenizer).tasks, [4], Store(None, {}))
    assert_same(judged.results[4], by_the_harness(plain, tokenizer, ask(file, tokenizer), None, batch_size=1))


CHANGING = {
    "num_beams": 3,
    "no_repeat_ngram_size": 1,
    "min_length": 4,
    "min_new_tokens": 4,
    "bad_words_ids": [[5]],
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "forced_eos_token_id": 0,
    "exponential_decay_length_penalty": (2, 1.1),
    "sequence_bias": [[[5], 2.0]],
    "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.5,
    "stop_strings": ["a"],
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_would_change_a_greedy_answer_and_is_not_known_is_refused(name: str, tokenizer: Any) -> None:
    adapter = nested_llama(Nesting([1, 2, 4]))
    model: Any = adapter.model.get_base_model()
    model.generation_config.update(**{name: CHANGING[name]})
    with pytest.raises(MatryoshkaError, match=rf"config sets {name} to .*generation_config\.json, or export"):
        Engine(adapter, tokenizer).generate([[5, 6]], 4, 4)
    model.generation_config.update(**{name: GenerationConfig().to_dict()[name]})
    assert Engine(adapter, tokenizer).generate([[5, 6]], 4, 4)


def test_every_setting_of_transformers_is_refused_heeded_or_without_effect() -> None:
    """A new version of transformers may bring a setting that nobody has looked at."""
    without_effect = {
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("early_stopping", "length_penalty", "low_memory", "renormalize_logits", "remove_invalid_values"),
        *("use_mtp", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "transformers_version"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "_from_model_config"),
        *("pad_token_id", "bos_token_id", "decoder_start_token_id"),
    }
    heeded = {"repetition_penalty", "eos_token_id", "max_length", "max_new_tokens"}
    assert set(GenerationConfig().to_dict()) - without_effect - heeded <= set(generation._CHANGES)


def without_latency(text: str) -> list[str]:
    """The lines but for those of the one list that is measured anew each time."""
    head, _, tail = text.partition('"latency_ms"')
    return [head, tail.partition("]")[2]]


def test_a_killed_evaluation_goes_on(base: Path, adapter: NestedAdapter, tmp_path: Path) -> None:
    """SIGKILL in the middle, in a process of its own; then the same command again."""
    saved = tmp_path / "adapter"
    adapter.save(saved)
    file = write_task(
        tmp_path,
        "mine",
        [{"text": f"{i} {word}"} for i in range(3) for word in WORDS],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="x",
        generation_kwargs={"until": ["~~"], "max_gen_toks": 60},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )

    def arguments(out: str) -> list[str]:
        options = ["--tasks", file, "--dtype", "fp32", "--batch-size", "8", "--model", str(base)]
        return ["eval", str(saved), *options, "-o", str(tmp_path / out)]

    answers = tmp_path / "killed" / "answers.jsonl"
    command = [sys.executable, "-m", "matryoshka_lora", *arguments("killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answers.read_bytes().rpartition(b"\n")[0]
    kept = before.count(b"\n")
    assert 19 <= kept < 3 * 12 * 4
    assert not (tmp_path / "killed" / "evaluation.json").exists()
    app(arguments("killed"), standalone_mode=False)
    assert answers.read_bytes().startswith(before)  # none was asked for again
    keys = [(entry["key"], entry["rank"]) for entry in map(json.loads, answers.read_text().splitlines()[1:])]
    assert len(keys) == len(set(keys)) == 3 * 12 * 4
    app(arguments("whole"), standalone_mode=False)
    for name in ("evaluation.json", "examples.jsonl"):
        one, other = (without_latency((tmp_path / out / name).read_text()) for out in ("killed", "whole"))
        assert one == other


@pytest.mark.slow
def test_the_real_model_answers_as_the_harness_does(tmp_path: Path) -> None:
    """SmolLM2 in float32, three tasks, few questions, at three ranks."""
    import torch

    from matryoshka_lora.models import embedded_folder, load_model

    tokenizer = load_tokenizer()
    nesting = Nesting([1, 8, 32])
    peft = get_peft_model(load_model(dtype=torch.float32), lora_config(nesting))
    randomize(peft, size=0.02)
    adapter = nest_as(peft.eval(), nesting, deploy="paper")
    draw = random.Random(5)
    choices = [
        {
            "text": f"The {word} is",
            "choices": [f" {a} and {b}" for a, b in zip(draw.sample(WORDS, 4), WORDS, strict=False)],
        }
        for word in WORDS[:4]
    ]
    mean = {"aggregation": "mean", "higher_is_better": True}
    kinds: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": 0,
            "target_delimiter": "",
            "num_fewshot": 2,
            "fewshot_config": {"sampler": "first_n"},
            "metric_list": [{"metric": "acc", **mean}],
        },
        "words": {
            "output_type": "generate_until",
            "doc_to_target": "x",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "sentence": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{choices[0]}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **mean}],
        },
    }
    say = "Say what you see. {{text}}"
    files = [write_task(tmp_path, name, choices, doc_to_text=say, **settings) for name, settings in kinds.items()]
    found = [judge(Engine(adapter, tokenizer), ask(f, tokenizer).tasks, nesting.ranks, Store(None, {})) for f in files]
    for rank in nesting.ranks:
        adapter.export(tmp_path / str(rank), rank)
        plain = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, tmp_path / str(rank)).eval()
        for file, judged in zip(files, found, strict=True):
            assert_same(judged.results[rank], by_the_harness(model, tokenizer, ask(file, tokenizer), None, 4))


def test_the_package_imports_without_the_harness() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None; import matryoshka_lora.evaluation, matryoshka_lora.cli.main\n"
        "from matryoshka_lora import MatryoshkaError\n"
        "try:\n    import matryoshka_lora.evaluation.harness\n"
        "except MatryoshkaError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install -e '.[eval]'" in found.stdout


TIED = {
    "whole-embeddings": {"modules_to_save": ["embed_tokens"]},
    "whole-head": {"modules_to_save": ["lm_head"]},
    "lora-on-the-head": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
    "lora-on-the-embeddings": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "lora-on-both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("lora", TIED.values(), ids=TIED)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_embeddings_are_evaluated_as_peft_computes_them_and_left_as_they_were(lora: Any, tokenizer: Any) -> None:
    nesting = Nesting(RANKS)
    base = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=512)
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    peft = get_peft_model(base, lora_config(nesting, **lora))
    randomize(peft)
    for number, (name, parameter) in enumerate(peft.named_parameters()):
        if "modules_to_save" in name:
            torch.manual_seed(number)
            torch.nn.init.normal_(parameter, std=0.2)
    adapter = nest_as(peft.eval(), nesting, deploy="paper")
    weights = {name: (value.data_ptr(), value.clone()) for name, value in adapter.model.state_dict().items()}
    pad = tokenizer.pad_token
    rows = [Row(f"{word} is", f" {word[::-1]}") for word in WORDS]
    asked = [*([0] if adapter.has_base else []), *RANKS]
    found = judge(
        Engine(adapter, tokenizer), [QuestionsTask(ExactMatch("mine"), rows, tokenizer)], asked, Store(None, {})
    )
    for name, value in adapter.model.state_dict().items():
        assert value.data_ptr() == weights[name][0]
        assert torch.equal(value, weights[name][1])
    assert tokenizer.pad_token == pad
    for rank in asked:
        loss = torch.tensor(0.0, dtype=torch.float64)
        count = 0
        for row in rows:
            prompt = tokenizer(row.prompt)["input_ids"]
            whole = tokenizer(str(row.prompt) + str(row.completion) + tokenizer.eos_token)["input_ids"]
            with torch.no_grad(), adapter.rows([rank]):
                logprobs = adapter.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
            answer = range(len(prompt), len(whole))
            loss -= sum(logprobs[place - 1, whole[place]] for place in answer)
            count += len(answer)
        assert found.results[rank]["results"]["mine"]["loss,none"] == pytest.approx(float(loss / count), abs=1e-4)
