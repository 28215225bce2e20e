"""`evaluate` against one question at a time and against TRL; what it returns, prints and draws."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from conftest import lora_config, nest_as, nested_llama, randomize, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_chat import save_tiny_chat, tiny_tokenizer
from tokenizers import decoders
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError, evaluate, load, nest, select
from matryoshka_lora.cli.main import app
from matryoshka_lora.data.questions import ExactMatch, Row, rows_from, tokenize
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.evaluation.evaluate import Progress
from matryoshka_lora.evaluation.report import draw_tasks, print_tasks
from matryoshka_lora.evaluation.results import Evaluation
from matryoshka_lora.evaluation.select import find_adapter, read_evaluation
from matryoshka_lora.evaluation.tasks import EXTRA_TOKENS, QuestionsTask
from matryoshka_lora.models import load_tokenizer

RANKS = (1, 2, 4)
EXACT = ExactMatch("words")
ROWS = [
    Row([{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}])
    for prompt, answer in (("a", "no"), ("how much?", "12"), ("which of the three is it?", "b"), ("x y", "yes"))
]
MERGED = [
    Row("Answer: ", "four"),  # SmolLM2 writes " four" as one token
    Row("say: ", "xy"),
    Row("z", "z"),  # of the whole's first token, nothing is predicted
    Row("two\n", "\nlines"),
    Row("the end ", " of it"),
]
TEXTS = [Row("1 + 1 = ", "2"), Row("the capital of France is ", "Paris"), Row("z", "z z z")]


def chat_adapter(rule: str = "matryoshka") -> NestedAdapter:
    """In fp64, so that only a wrong computation makes a difference."""
    adapter = nested_llama(Nesting(RANKS), rule=rule, seed=3)
    adapter.model.double()
    return adapter


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def given(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As `evaluate` takes them."""
    return [{"prompt": row.prompt, "completion": row.completion} for row in rows]


def measured(adapter: NestedAdapter, tokenizer: Any, rows: Sequence[Row] = ROWS, **options: Any) -> Evaluation:
    return evaluate(adapter, data=given(rows), tokenizer=tokenizer, **{"latency": False, **options})


def answers(evaluation: Evaluation, rank: int = 4) -> list[str]:
    return [example["answers"][str(rank)] for example in evaluation.examples]


def one_by_one(model: Any, tokenizer: Any, rows: Sequence[Row] = ROWS) -> tuple[float, list[str]]:
    """Each question alone, without padding, by transformers' own loss and generation: loss per token, and answers."""
    nll, texts, count = 0.0, [], 0
    limit = max(len(tokenize(tokenizer, row).completion) for row in rows) + EXTRA_TOKENS
    for row in rows:
        tokens = tokenize(tokenizer, row)
        ids = torch.tensor([tokens.context + tokens.completion])
        labels = ids.clone()
        labels[:, : len(tokens.context)] = -100
        with torch.no_grad():
            nll += model(input_ids=ids, labels=labels).loss.item() * len(tokens.completion)
        count += len(tokens.completion)
        prompt = torch.tensor([tokens.prompt])
        out = model.generate(input_ids=prompt, max_new_tokens=limit, do_sample=False, eos_token_id=2, pad_token_id=2)
        texts.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
    return nll / count, texts


@pytest.mark.parametrize("rows", [ROWS, TEXTS], ids=["chat", "text"])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_every_rank_is_measured_as_each_question_alone(tokenizer: Any, rows: list[Row], batch_size: int | None) -> None:
    """And the base model as it is without any adapter."""
    adapter = chat_adapter()
    found = measured(adapter, tokenizer, rows, batch_size=batch_size)
    assert found.ranks == RANKS
    losses = found.values(metric="loss")
    for rank in RANKS:
        adapter.set_rank(rank)
        loss, texts = one_by_one(adapter.model, tokenizer, rows)
        assert losses[rank] == pytest.approx(loss, rel=1e-5)
        assert answers(found, rank) == texts
    loss, texts = one_by_one(tiny_llama(seed=3).double(), tokenizer, rows)
    assert found.tasks["data"]["metrics"]["loss,none"]["base"]["value"] == pytest.approx(loss, rel=1e-5)
    assert answers(found, 0) == texts
    assert len(set(losses.values()) | {loss}) == 4
    assert len(set(texts)) > 1


def test_the_base_model_is_left_out_where_it_is_not_wanted(tokenizer: Any) -> None:
    adapter = chat_adapter()
    found, both = measured(adapter, tokenizer, base=False), measured(adapter, tokenizer)
    assert found.tasks["data"]["metrics"]["loss,none"]["base"] is None
    assert found.values(metric="loss") == pytest.approx(both.values(metric="loss"), rel=1e-9)
    assert [set(example["answers"]) for example in found.examples] == [set(map(str, RANKS))] * len(ROWS)


def test_accuracy_is_the_share_of_right_answers(tokenizer: Any) -> None:
    adapter = chat_adapter()
    right = one_by_one(adapter.model, tokenizer)[1]
    rows = [Row(row.prompt, [{"role": "assistant", "content": right[n].strip()}]) for n, row in enumerate(ROWS)]
    rows = [*rows[:1], *ROWS[1:3], *rows[3:]]
    assert [bool(right[n].strip()) for n in (0, 3)] == [True, True]
    found = measured(adapter, tokenizer, rows)
    said = one_by_one(adapter.model, tokenizer, rows)[1]
    expected = [float(EXACT.is_correct(answer, row)) for answer, row in zip(said, rows, strict=True)]
    assert 0 < sum(expected) < 4
    assert found.values()[4] == found.values("data", "accuracy,none")[4] == sum(expected) / 4
    assert [example["metrics"]["accuracy,none"]["4"] for example in found.examples] == expected


def test_a_template_that_opens_answers_otherwise_than_it_writes_them(tokenizer: Any) -> None:
    thinking = tiny_tokenizer()
    thinking.chat_template = thinking.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokens = tokenize(thinking, ROWS[0])
    assert tokens.prompt == tokens.context + thinking("<think>")["input_ids"]
    adapter = chat_adapter()
    loss, texts = one_by_one(adapter.model, thinking)
    found = measured(adapter, thinking)
    assert found.values(metric="loss")[4] == pytest.approx(loss, rel=1e-5)
    assert answers(found) == texts
    assert found.values(metric="loss") == measured(adapter, tokenizer).values(metric="loss")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny one, where ": x" is a token: the end of a prompt and the begin of an answer."""
    merging = tiny_tokenizer()
    merging.add_tokens([": x", "zz"])
    return merging


@pytest.mark.parametrize("rows", [ROWS, TEXTS, MERGED], ids=["chat", "text", "merged"])
@pytest.mark.parametrize("name", ["characters", "merging", "smollm2"])
def test_tokens_and_loss_are_those_of_trl(name: str, rows: list[Row], tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = {"characters": tiny_tokenizer, "merging": merging_tokenizer, "smollm2": load_tokenizer}[name]()
    nesting = Nesting(RANKS)
    model: Any = get_peft_model(tiny_llama(3, vocab_size=len(tokenizer)), lora_config(nesting))
    randomize(model)
    adapter = nest_as(model.eval(), nesting)
    data = Dataset.from_list(given(rows))
    arguments = SFTConfig(
        output_dir=str(tmp_path), per_device_eval_batch_size=8, report_to="none", bf16=False, use_cpu=True
    )
    trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    for row, trained in zip(rows, trainer.train_dataset, strict=True):
        tokens = tokenize(tokenizer, row)
        assert tokens.context + tokens.completion == list(trained["input_ids"])
        labels = [-100] * len(tokens.context) + tokens.completion
        assert labels[1:] == list(trained["labels"])[1:]  # nothing predicts the first token
    loss = trainer.evaluate()["eval_loss"]
    assert measured(adapter, tokenizer, rows).values(metric="loss")[4] == pytest.approx(loss, rel=1e-4)


def test_an_answer_ends_where_the_references_end(tokenizer: Any) -> None:
    """Here a turn ends with another token than the tokenizer's end of sequence."""
    other = tiny_tokenizer()
    other.add_special_tokens({"eos_token": "<s>"})
    adapter = chat_adapter()
    assert answers(measured(adapter, other)) == answers(measured(adapter, tokenizer))


def test_a_models_own_generation_settings_bend_the_answers_as_those_of_transformers(tokenizer: Any) -> None:
    adapter = chat_adapter()
    plain = answers(measured(adapter, tokenizer))
    settings: Any = adapter.model.get_base_model().generation_config
    settings.do_sample = True
    settings.temperature = 9.0
    settings.top_p = 0.5
    assert answers(measured(adapter, tokenizer)) == plain
    settings.repetition_penalty = 5.0
    bent = answers(measured(adapter, tokenizer))
    assert bent == one_by_one(adapter.model, tokenizer)[1]
    assert bent != plain
    settings.no_repeat_ngram_size = 2
    with pytest.raises(MatryoshkaError, match=r"generation config sets no_repeat_ngram_size to 2.*generation_config.j"):
        measured(adapter, tokenizer)


@pytest.mark.parametrize("reordered", [False, True])
def test_an_adapter_in_memory_is_the_same_afterwards(tokenizer: Any, reordered: bool) -> None:
    """Modes, ranks, what learns, adapters and numbers; and nothing is warned of that nobody has asked for."""
    adapter = nested_llama(Nesting(RANKS), deploy="reordered", seed=3)
    model: Any = adapter.model
    if reordered:
        adapter.reorder()
    model.get_base_model().model.layers[1].train()
    adapter.set_rank({"layers.1.mlp.up_proj": 1, "v_proj": 2})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name and "layers.0" in name

    def all_of_it() -> Any:
        modules = [(name, module.training) for name, module in model.named_modules()]
        parameters = [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
        return modules, parameters, adapter.rank, list(model.peft_config), model.active_adapter

    before = all_of_it()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "3 of 4 reference answers")  # the tiny tokenizer puts spaces into them
        found = measured(adapter, tokenizer, latency=True)
    assert all(time > 0 for time in found.about["latency_ms"])
    after = all_of_it()
    assert after[0] == before[0]
    assert len({training for _, training in before[0]}) == 2
    assert [each[:2] for each in after[1]] == [each[:2] for each in before[1]]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(after[1], before[1], strict=True))
    assert after[2:] == before[2:]


def test_a_built_in_task_is_asked_as_chat_and_judged_by_its_verifier(tokenizer: Any) -> None:
    task = get_task("family_relationships")
    example = task.examples("test", 1)[0]
    tokens = tokenize(tokenizer, example)
    as_row = Row([{"role": "user", "content": example.prompt}], [{"role": "assistant", "content": example.completion}])
    assert tokens == tokenize(tokenizer, as_row)
    assert tokenizer.decode(tokens.completion).replace(" ", "").startswith(example.completion.replace(" ", ""))


def test_what_cannot_be_evaluated(tokenizer: Any) -> None:
    adapter = chat_adapter()
    with pytest.raises(MatryoshkaError, match=r"give either tasks, .* or data"):
        evaluate(adapter)
    with pytest.raises(MatryoshkaError, match=r"give either tasks, .* or data"):
        evaluate(adapter, "chain_sum", given(ROWS))
    with pytest.raises(MatryoshkaError, match="data has no rows to ask"):
        measured(adapter, tokenizer, [])
    for shots in ({"num_fewshot": 5}, {"fixed_shots": True}):
        with pytest.raises(MatryoshkaError, match="data is asked without shots"):
            measured(adapter, tokenizer, **shots)
    with pytest.raises(MatryoshkaError, match="batch_size is 0; write 1 or more"):
        measured(adapter, tokenizer, batch_size=0)
    with pytest.raises(MatryoshkaError, match="empty prompt"):
        measured(adapter, tokenizer, [Row("", "x")])
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(MatryoshkaError, match="no chat template"):
        measured(adapter, bare)
    with pytest.raises(MatryoshkaError, match="there are no ranks"):
        measured(adapter, tokenizer, ranks=[])
    with pytest.raises(MatryoshkaError, match=r"the ranks must increase; write \[1, 4\]"):
        measured(adapter, tokenizer, ranks=[4, 1])
    with pytest.raises(MatryoshkaError, match="does not say which base model"):
        evaluate(adapter, data=given(ROWS))


def test_vllm_is_asked_for_where_it_can_be(tokenizer: Any) -> None:
    adapter = chat_adapter()
    for options, why in (
        ({"engine": "sglang"}, "engine is 'sglang'; write 'own' or 'vllm'"),
        ({"vllm_options": {"max_model_len": 64}}, "write 'own' or 'vllm', which alone has vllm_options"),
        ({"engine": "vllm", "vllm_options": {"trust_remote_code": True}}, "would run code that comes with the model"),
        ({"engine": "vllm", "vllm_options": {"dtype": "half"}}, "dtype is no option of vLLM here"),
    ):
        with pytest.raises(MatryoshkaError, match=why):
            measured(adapter, tokenizer, **options)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(MatryoshkaError, match="this needs vLLM, which is not installed"):
            measured(adapter, tokenizer, engine="vllm")


def test_rows_of_a_file() -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    answer = {"role": "assistant", "content": " 4 "}
    chat, text = rows_from([{"messages": [system, user, answer]}, {"prompt": "p", "completion": "4"}], "f.jsonl")
    assert chat == Row([system, user], [answer])
    assert text == Row("p", "4")
    assert EXACT.is_correct("4\n", chat)
    assert EXACT.is_correct("4", text)
    assert not EXACT.is_correct("44", text)
    assert not EXACT.is_correct("", chat)
    for row in ({"messages": [user]}, {"messages": [user, user]}, {"text": "t"}):
        with pytest.raises(MatryoshkaError, match=r"f.jsonl, row 2 has no answer to compare with"):
            rows_from([{"prompt": "p", "completion": "c"}, row], "f.jsonl")
    with pytest.raises(MatryoshkaError, match="row 1 has tools"):
        rows_from([{"messages": [user, answer], "tools": ["t"]}], "f.jsonl")


def test_which_ranks_are_asked(tokenizer: Any) -> None:
    adapter = chat_adapter()

    def never(name: str) -> Any:
        raise AssertionError(f"{name} was begun")

    progress: Progress = never
    with pytest.raises(MatryoshkaError, match="rank 3 was not trained; the trained ranks are 1, 2, 4"):
        measured(adapter, tokenizer, ranks=[1, 3], progress=progress)
    adapter.reorder()
    assert measured(adapter, tokenizer, ROWS[:1]).ranks == RANKS
    found = measured(adapter, tokenizer, ROWS[:1], ranks=np.array([3]))
    assert json.loads(json.dumps(found.to_dict()))["ranks"] == [3]
    assert measured(adapter, tokenizer, ROWS[:1], ranks="all").ranks == (1, 2, 3, 4)


def test_limit_takes_the_first_rows(tokenizer: Any) -> None:
    found = measured(chat_adapter(), tokenizer, limit=3, ranks=[1])
    assert found.tasks["data"]["items"] == len(found.examples) == 3


def test_numbers_that_are_not_finite(tokenizer: Any, tmp_path: Path) -> None:
    """A weight is refused; a loss has no value, and no rank is chosen by it."""
    adapter = nested_llama(Nesting(RANKS), seed=3)
    weights = {name: weight for name, weight in adapter.model.named_parameters() if "layers.0.mlp.down_proj" in name}
    B = next(weight for name, weight in weights.items() if "lora_B" in name)
    with torch.no_grad():
        B[:, 3] = torch.finfo(torch.float32).max
    found = measured(adapter, tokenizer, out=tmp_path / "out")
    assert [value is None for value in found.values(metric="loss").values()] == [False, False, True]
    assert "NaN" not in (tmp_path / "out" / "evaluation.json").read_text()
    found.tasks["data"]["metric"] = "loss,none"
    assert select(found, within=1.0).rank in (1, 2)
    with torch.no_grad():
        B[:, 3] = math.nan
    with pytest.raises(NotFiniteError, match=r"down_proj.*holds NaN or infinity"):
        measured(adapter, tokenizer)


# In memory, in a folder, from the command line.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("base"))


def on_base(base: Path, deploy: Any, size: float = 1.0) -> NestedAdapter:
    nesting = Nesting(RANKS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(nesting))
    randomize(model, size=size)
    return nest_as(model.eval(), nesting, deploy=deploy)


def numbers(evaluation: Evaluation) -> Any:
    """All that is measured, but for the time of a token."""
    own = ("latency_ms", "adapter")
    about = {key: value for key, value in evaluation.to_dict().items() if key not in own}
    return about | {"sha256": evaluation.about["adapter"]["sha256"]}, evaluation.examples


@pytest.mark.parametrize("how", ["reordered", "paper"])
def test_memory_folder_and_command_give_the_same_numbers(base: Path, tmp_path: Path, how: str) -> None:
    adapter = on_base(base, how)
    if how == "reordered":
        adapter.reorder()
    adapter.save(tmp_path / "adapter")
    options: dict[str, Any] = {"tasks": "chain_sum", "ranks": [1, 4], "limit": 5}
    memory = evaluate(adapter, **options)
    folder = evaluate(tmp_path / "adapter", dtype="fp32", out=tmp_path / "out", **options)
    assert numbers(memory) == numbers(folder) == numbers(read_evaluation(tmp_path / "out"))
    command = ["eval", str(tmp_path / "adapter"), "--tasks", "chain_sum", "--ranks", "1,4", "--limit", "5"]
    app([*command, "--dtype", "fp32"], standalone_mode=False)
    assert numbers(read_evaluation(tmp_path / "adapter")) == numbers(folder)
    assert len(set(memory.values(metric="loss").values())) == 2
    # And those of plain PEFT on an exported rank.
    adapter.export(tmp_path / "one", 1)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one").eval()
    questions: Any = get_task("chain_sum").examples("test", 5)
    loss = one_by_one(plain, load_tokenizer(str(base)), questions)[0]
    assert memory.values(metric="loss")[1] == pytest.approx(loss, rel=1e-4)


def test_an_adapter_that_was_not_reordered_is_measured_as_it_is_and_called_so(base: Path, tmp_path: Path) -> None:
    """P is kept in memory. What is saved is reordered: the same at full rank only."""
    adapter = on_base(base, "reordered", size=0.3)
    options: dict[str, Any] = {"tasks": "chain_sum", "limit": 3, "latency": False}
    memory = evaluate(adapter, **options)
    with pytest.warns(UserWarning, match="reordered by SVD"):
        adapter.save(tmp_path)
    saved = evaluate(tmp_path, dtype="fp32", **options)
    assert memory.about["adapter"]["name"] == "matryoshka, as it is trained"
    assert saved.about["adapter"]["name"] == "matryoshka, reordered by svd"
    of = [evaluation.values(metric="loss") for evaluation in (memory, saved)]
    assert of[0][4] == pytest.approx(of[1][4], rel=1e-4)
    assert of[0][1] != pytest.approx(of[1][1], rel=1e-3)
    assert memory.about["adapter"]["sha256"] != saved.about["adapter"]["sha256"]


def test_an_evaluation_is_of_the_adapter_around_it(base: Path, tmp_path: Path) -> None:
    """Whatever was loaded and saved again in between; and of no other weights."""
    adapter = on_base(base, "paper")
    adapter.save(tmp_path)
    evaluate(tmp_path, "chain_sum", limit=2, ranks=[1, 4], dtype="fp32", latency=False)
    load(AutoModelForCausalLM.from_pretrained(base), tmp_path).save(tmp_path)
    assert select(tmp_path, "100%").rank == 1
    assert find_adapter(tmp_path) == find_adapter(tmp_path / "evaluation" / "evaluation.json") == tmp_path
    randomize(adapter.model, seed=9)
    adapter.save(tmp_path)
    for path in (tmp_path, tmp_path / "evaluation", tmp_path / "evaluation" / "evaluation.json"):
        with pytest.raises(MatryoshkaError, match=r"was measured on other weights than .* has now.*--force"):
            select(path, "100%")
    evaluate(tmp_path, "chain_sum", limit=2, ranks=[1, 4], dtype="fp32", latency=False, overwrite=True)
    assert select(tmp_path, "100%").rank == 1


def test_the_values_of_a_task(tokenizer: Any) -> None:
    found = measured(chat_adapter(), tokenizer, ROWS[:2])
    with pytest.raises(MatryoshkaError, match="has no task 'other'; write --task and one of: data"):
        found.values("other")
    with pytest.raises(MatryoshkaError, match=r"no metric 'los'; the metrics are accuracy,none, loss,none"):
        found.values(metric="los")
    two = copy.deepcopy(found)
    two.tasks["more"] = two.tasks["data"]
    with pytest.raises(MatryoshkaError, match="has 2 tasks; write --task and one of: data, more"):
        two.values()
    assert two.values("more") == found.values()


# What people see.


def made_evaluation(ranks: Sequence[int] = (1, 2, 4), **tasks: Sequence[float | None]) -> dict[str, Any]:
    """The file's content, with the values of each task."""

    def task(values: Sequence[float | None]) -> dict[str, Any]:
        errors = [None if value is None else 0.125 for value in values]
        first = {"value": list(values), "stderr": errors, "higher_is_better": True}
        metrics = {"acc,none": {**first, "base": {"value": 0.25, "stderr": None}}}
        return {"metric": "acc,none", "items": 10, "num_fewshot": None, "metrics": metrics}

    about = {"model": "m", "dtype": "float32", "mode": "exact", "adapter": {"name": "matryoshka, reordered by svd"}}
    return {**about, "ranks": list(ranks), "tasks": {name: task(values) for name, values in tasks.items()}}


def test_the_table_shows_every_number_however_narrow_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_tasks(made_evaluation(a_task_of_a_long_name=(0.2, 0.6, 0.5), another_one=(0.1, None, 1.0)))
    lines = [re.sub(r"\s+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    assert "matryoshka, reordered by svd on m (float32, exact)" in " ".join(lines)
    assert "rank a_task_of_a_long_name another_one" in lines
    rows = [line for line in lines if re.match(r"(none|\d) ", line)]
    assert [row.split()[0] for row in rows] == ["none", "1", "2", "4"]
    assert rows[1] == "1 0.200 ± 0.125 0.100 ± 0.125"
    assert rows[2].startswith("2 0.600 ± 0.125 ")
    assert rows[3] == "4 0.500 ± 0.125 1.000 ± 0.125"


def test_the_picture_is_drawn_where_a_rank_has_no_value(tmp_path: Path) -> None:
    draw_tasks(made_evaluation(a=(0.2, None, 0.5), b=(None, None, None)), tmp_path / "curve.png")
    png = (tmp_path / "curve.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") >= 1200


def test_a_file_in_the_way_stays(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(MatryoshkaError, match="a file stands where a folder is needed"):
        measured(chat_adapter(), tokenizer, out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("qwen2_5", "no"),
        ("qwen3", "<think>\n\n</think>\n\nno"),
        ("qwen3_6", "\n</think>\n\nno"),
        ("glm4moe", "\n<think></think>\nno"),
        ("gptoss", "<|channel|>final<|message|>no"),
    ],
)
def test_what_a_template_puts_before_an_answer_is_no_part_of_it(template: str, written: str) -> None:
    """It is trained, so a model that has learned the rows writes it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # texts without white space between tokens
    special = ["<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (Path(trl.__file__).parent / f"chat_templates/{template}.jinja").read_text()
    row = Row([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "no"}])
    task = QuestionsTask(EXACT, [row], tokenizer)
    assert all(answer not in written for answer in task.config.generation_kwargs["until"])
    for text in (written, written.replace("<|channel|>", "").replace("<|message|>", ""), "no"):
        assert task.process_results({"index": 0}, [text, (-1.0, True)])["accuracy"] == 1.0, text
    for text in (written.replace("no", "yes"), "", "final"):
        assert task.process_results({"index": 0}, [text, (-1.0, True)])["accuracy"] == 0.0, text


def test_an_answer_that_is_lost_in_its_tokens_is_told(tokenizer: Any) -> None:
    """The tiny tokenizer puts white space between its tokens."""
    with pytest.warns(UserWarning, match=r"1 of 2 reference answers of rows are not judged right themselves"):
        QuestionsTask(ExactMatch("rows"), [Row("a", "b"), Row("a", "bb")], tokenizer)


def test_an_answer_without_text_is_refused(tokenizer: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(MatryoshkaError, match="has no text to compare with"):
        QuestionsTask(EXACT, [Row([{"role": "user", "content": "a"}], [call])], tokenizer)


def test_adapters_that_are_active_together_are_not_evaluated_as_one(tokenizer: Any) -> None:
    adapter = chat_adapter()
    adapter.model.add_adapter("style", adapter.model.peft_config["default"])
    adapter.model.base_model.set_adapter(["default", "style"])
    with pytest.raises(MatryoshkaError, match=r"default, style are active together, .*set_adapter\('default'\)"):
        measured(adapter, tokenizer)


def test_an_adapter_with_biases_is_timed(tokenizer: Any) -> None:
    """PEFT takes one adapter that has some."""
    base = tiny_llama(vocab_size=len(tokenizer), attention_bias=True)
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", bias="all")
    adapter = nest(get_peft_model(base, config), RANKS)
    randomize(adapter.model)
    found = measured(adapter, tokenizer, ROWS[:1], latency=True)
    assert len(found.about["latency_ms"]) == len(RANKS)
    assert list(adapter.model.peft_config) == ["default"]
