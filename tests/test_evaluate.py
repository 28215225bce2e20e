"""Scores against one question at a time and against TRL; curves, comparison, table, file and picture."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lora_config, nested_llama, randomize, tiny_llama
from datasets import Dataset
from peft import get_peft_model
from tiny_chat import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, nest
from matryoshka_lora.evaluation import (
    Curve,
    Evaluation,
    ExactMatch,
    Row,
    Scores,
    accuracy_table,
    compare,
    evaluate_base,
    evaluate_ranks,
    in_words,
    print_tables,
    rows_from,
    score,
    write_evaluation,
)
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.data.questions import tokenize
from matryoshka_lora.evaluation.reading import find_evaluation, read_evaluation, read_measured
from matryoshka_lora.evaluation.scoring import EXTRA_TOKENS
from matryoshka_lora.evaluation.select import Wish, choose
from matryoshka_lora.models import load_tokenizer
from matryoshka_lora.data.tasks import get_task

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


def chat_model() -> Any:
    """An adapter at its full rank as a plain model: fp64, so that only a wrong computation makes a difference."""
    return chat_adapter().model


def only(model: Any, *arguments: Any, **options: Any) -> Scores:
    """The scores at the largest rank."""
    return score(NestedAdapter(model), *arguments, ranks=[4], **options)[0]


def chat_adapter(rule: str = "matryoshka") -> NestedAdapter:
    adapter = nested_llama(Nesting([1, 2, 4]), rule=rule, seed=3)
    adapter.model.double()
    return adapter


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def one_by_one(model: Any, tokenizer: Any, rows: list[Row]) -> tuple[list[float], list[str]]:
    """Each question alone, without padding, by transformers' own loss and generation."""
    nll, answers = [], []
    limit = max(len(tokenize(tokenizer, row).completion) for row in rows) + EXTRA_TOKENS
    for row in rows:
        tokens = tokenize(tokenizer, row)
        ids = torch.tensor([tokens.context + tokens.completion])
        labels = ids.clone()
        labels[:, : len(tokens.context)] = -100
        with torch.no_grad():
            nll.append(model(input_ids=ids, labels=labels).loss.item() * len(tokens.completion))
        prompt = torch.tensor([tokens.prompt])
        out = model.generate(input_ids=prompt, max_new_tokens=limit, do_sample=False, eos_token_id=2, pad_token_id=2)
        answers.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
    return nll, answers


@pytest.mark.parametrize("rows", [ROWS, TEXTS], ids=["chat", "text"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_padded_batch_scores_like_each_question_alone(tokenizer: Any, rows: list[Row], batch_size: int) -> None:
    model = chat_model()
    nll, answers = one_by_one(model, tokenizer, rows)
    done: list[int] = []
    found = only(model, tokenizer, EXACT, rows, batch_size=batch_size, on_result=lambda: done.append(1))
    torch.testing.assert_close(torch.tensor(found.nll), torch.tensor(nll), rtol=1e-5, atol=1e-5)
    assert list(found.answers) == answers
    assert len(set(answers)) > 1
    assert found.tokens == sum(len(tokenize(tokenizer, row).completion) for row in rows)
    assert found.loss == pytest.approx(sum(nll) / found.tokens, rel=1e-5)
    assert sum(done) == 2 * len(rows)


def test_a_template_that_opens_answers_otherwise_than_it_writes_them(tokenizer: Any) -> None:
    thinking = tiny_tokenizer()
    thinking.chat_template = thinking.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokens = tokenize(thinking, ROWS[0])
    assert tokens.prompt == tokens.context + thinking("<think>")["input_ids"]
    model = chat_model()
    nll, answers = one_by_one(model, thinking, ROWS)
    found = only(model, thinking, EXACT, ROWS)
    torch.testing.assert_close(torch.tensor(found.nll), torch.tensor(nll), rtol=1e-5, atol=1e-5)
    assert list(found.answers) == answers
    assert found.nll == only(model, tokenizer, EXACT, ROWS).nll


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny one, where ": x" is a token: the end of a prompt and the begin of an answer."""
    merging = tiny_tokenizer()
    merging.add_tokens([": x", "zz"])
    return merging


@pytest.mark.parametrize("rows", [ROWS, TEXTS, MERGED], ids=["chat", "text", "merged"])
@pytest.mark.parametrize("name", ["characters", "merging", "smollm2"])
def test_tokens_and_loss_are_those_of_trl(name: str, rows: list[Row], tmp_path: Path) -> None:
    """Of `score`, and of the harness's task that ``matryoshka eval`` makes of rows."""
    from trl import SFTConfig, SFTTrainer

    from matryoshka_lora.evaluation.harness import judge
    from matryoshka_lora.evaluation.questions_task import QuestionsTask
    from matryoshka_lora.evaluation.store import Store

    tokenizer = {"characters": tiny_tokenizer, "merging": merging_tokenizer, "smollm2": load_tokenizer}[name]()
    nesting = Nesting([1, 2, 4])
    model: Any = get_peft_model(tiny_llama(3, vocab_size=len(tokenizer)), lora_config(nesting))
    randomize(model)
    adapter = nest(model.eval(), nesting)
    data = Dataset.from_list([{"prompt": row.prompt, "completion": row.completion} for row in rows])
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
    assert only(model, tokenizer, EXACT, rows).loss == pytest.approx(loss, rel=1e-4)
    judged = judge(Engine(adapter, tokenizer), [QuestionsTask(EXACT, rows, tokenizer)], [4], Store(None, {}))
    assert judged.results[4]["results"]["words"]["loss,none"] == pytest.approx(loss, rel=1e-4)


def test_an_answer_ends_where_the_references_end(tokenizer: Any) -> None:
    """Here a turn ends with another token than the tokenizer's end of sequence."""
    other = tiny_tokenizer()
    other.add_special_tokens({"eos_token": "<s>"})
    model = chat_model()
    stopped = only(model, other, EXACT, ROWS).answers
    assert stopped == only(model, tokenizer, EXACT, ROWS).answers


def test_a_models_own_generation_settings_bend_the_answers_as_those_of_transformers(tokenizer: Any) -> None:
    model = chat_model()
    plain = only(model, tokenizer, EXACT, ROWS).answers
    settings = model.get_base_model().generation_config
    settings.do_sample = True
    settings.temperature = 9.0
    settings.top_p = 0.5
    assert only(model, tokenizer, EXACT, ROWS).answers == plain
    settings.repetition_penalty = 5.0
    bent = only(model, tokenizer, EXACT, ROWS).answers
    assert list(bent) == one_by_one(model, tokenizer, ROWS)[1]
    assert bent != plain
    settings.no_repeat_ngram_size = 2
    with pytest.raises(MatryoshkaError, match=r"generation config sets no_repeat_ngram_size to 2.*generation_config.j"):
        only(model, tokenizer, EXACT, ROWS)


def test_the_mode_of_every_module_is_restored(tokenizer: Any) -> None:
    model = chat_model()
    model.get_base_model().model.layers[1].train()
    before = [module.training for module in model.modules()]
    only(model, tokenizer, EXACT, ROWS)
    assert [module.training for module in model.modules()] == before
    assert any(before)
    assert not all(before)


def test_a_built_in_task_is_asked_as_chat_and_judged_by_its_verifier(tokenizer: Any) -> None:
    task = get_task("family_relationships")
    example = task.examples("test", 1)[0]
    tokens = tokenize(tokenizer, example)
    as_row = Row([{"role": "user", "content": example.prompt}], [{"role": "assistant", "content": example.completion}])
    assert tokens == tokenize(tokenizer, as_row)
    assert tokenizer.decode(tokens.completion).replace(" ", "").startswith(example.completion.replace(" ", ""))


def test_questions_that_cannot_be_scored(tokenizer: Any) -> None:
    model = chat_model()
    with pytest.raises(MatryoshkaError, match="no questions"):
        only(model, tokenizer, EXACT, [])
    with pytest.raises(MatryoshkaError, match="batch_size is 0; write 1 or more"):
        only(model, tokenizer, EXACT, ROWS, batch_size=0)
    with pytest.raises(MatryoshkaError, match="empty prompt"):
        only(model, tokenizer, EXACT, [Row("", "x")])
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(MatryoshkaError, match="no chat template"):
        only(model, bare, EXACT, ROWS)


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


def test_a_curve_is_the_score_at_each_rank_and_the_rank_is_restored(tokenizer: Any) -> None:
    adapter = chat_adapter()
    adapter.set_rank(2)
    curve = evaluate_ranks(adapter, tokenizer, EXACT, ROWS)
    assert curve.ranks == (1, 2, 4)
    assert adapter.rank == 2
    for rank, scores in zip(curve.ranks, curve.scores, strict=True):
        adapter.set_rank(rank)
        nll, answers = one_by_one(adapter.model, tokenizer, ROWS)
        torch.testing.assert_close(torch.tensor(scores.nll), torch.tensor(nll), rtol=1e-5, atol=1e-5)
        assert list(scores.answers) == answers
    adapter.set_rank(2)
    assert len(set(curve.loss)) == 3
    assert adapter.rank == 2


def test_a_rank_for_each_layer_is_restored(tokenizer: Any) -> None:
    adapter = chat_adapter()
    adapter.set_rank({"layers.1.mlp.up_proj": 1, "v_proj": 2})
    before = adapter.rank
    evaluate_ranks(adapter, tokenizer, EXACT, ROWS[:1], ranks=[4])
    assert isinstance(before, dict)
    assert adapter.rank == before


def test_an_untrained_rank_is_refused_before_anything_runs(tokenizer: Any) -> None:
    adapter = chat_adapter()
    with pytest.raises(MatryoshkaError, match="rank 3 was not trained; the trained ranks are 1, 2, 4"):
        evaluate_ranks(adapter, tokenizer, EXACT, ROWS, ranks=[1, 3])
    adapter.reorder()
    assert evaluate_ranks(adapter, tokenizer, EXACT, ROWS[:1], ranks=[3]).ranks == (3,)


def test_a_loss_that_is_not_finite_names_the_rank(tokenizer: Any) -> None:
    adapter = chat_adapter()
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if "layers.0.mlp.down_proj.lora_B" in name:
                parameter[:, 3] = math.nan
    with pytest.raises(MatryoshkaError, match=r"mine, rank 4: the loss is nan.*lower learning rate"):
        evaluate_ranks(adapter, tokenizer, EXACT, ROWS, ranks=[4], name="mine")
    assert adapter.rank == 4


def test_the_base_model_is_scored_without_the_adapter(tokenizer: Any) -> None:
    adapter = chat_adapter()
    found = evaluate_base(adapter, tokenizer, EXACT, ROWS)
    nll, answers = one_by_one(tiny_llama(seed=3).double(), tokenizer, ROWS)
    torch.testing.assert_close(torch.tensor(found.nll), torch.tensor(nll), rtol=1e-5, atol=1e-5)
    assert list(found.answers) == answers
    assert found.loss != only(adapter.model, tokenizer, EXACT, ROWS).loss


def made_scores(correct: list[bool], loss: float = 1.0) -> Scores:
    n = len(correct)
    return Scores(loss, sum(correct) / n, 2 * n, (2 * loss,) * n, ("",) * n, tuple(correct))


def made_curve(shares: list[int], of: int = 10, ranks: tuple[int, ...] = (1, 2, 4)) -> Curve:
    return Curve(ranks, tuple(made_scores([i < share for i in range(of)]) for share in shares))


def made_evaluation(**curves: Curve) -> Evaluation:
    return Evaluation("t", "test", "m", "bfloat16", made_scores([True] + [False] * 9, 2.0), dict(curves))


def test_the_numbers_that_sum_up_a_curve() -> None:
    curve = made_curve([2, 6, 5])
    assert curve.accuracy == (0.2, 0.6, 0.5)
    assert curve.aurac == pytest.approx({"log2": (0.4 + 0.55) / 2, "linear": (0.4 + 2 * 0.55) / 3})
    assert curve.mean_accuracy == pytest.approx(1.3 / 3)
    assert curve.full_accuracy == 0.5
    assert curve.worst_rank_gap == pytest.approx(0.3)
    assert made_curve([5, 6, 5]).worst_rank_gap == 0
    with pytest.raises(MatryoshkaError, match="2 scores for 3 ranks"):
        Curve((1, 2, 4), curve.scores[:2])
    with pytest.raises(MatryoshkaError, match="ranks must increase"):
        replace(curve, ranks=(1, 4, 2))


def test_the_file_has_the_agreed_form(tmp_path: Path) -> None:
    evaluation = made_evaluation(a=made_curve([2, 6, 5]), b=made_curve([1, 1, 1]))
    (tmp_path / "other").write_text("stays")
    write_evaluation(evaluation, tmp_path)
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert data["task"] == "t"
    assert data["items"] == 10
    assert data["split"] == "test"
    assert data["base"] == {"loss": 2.0, "accuracy": 0.1}
    assert list(data["curves"]) == ["a", "b"]
    curve = data["curves"]["a"]
    assert curve["ranks"] == [1, 2, 4]
    assert curve["accuracy"] == [0.2, 0.6, 0.5]
    assert curve["loss"] == [1.0] * 3
    assert set(curve["aurac"]) == {"log2", "linear"}
    assert {"torch", "peft", "python"} <= set(data["versions"])
    assert (tmp_path / "other").read_text() == "stays"
    png = (tmp_path / "curve.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") >= 1200


def test_select_reads_what_the_demo_writes(tmp_path: Path) -> None:
    """One of the curves, in the form that `matryoshka eval` gives to its own."""
    evaluation = made_evaluation(other=made_curve([9, 9, 9]), mine=made_curve([2, 6, 5]))
    questions = [Row(f"question {number}", "aunt") for number in range(10)]
    adapter = {"name": "mine", "path": "runs/demo/adapter"}
    deployed = evaluation.deployed("mine", adapter, sizes=[100, 200, 400], latencies=[1.0, 2.0, 4.0])
    write_evaluation(evaluation, tmp_path, deployed, evaluation.examples("mine", questions))
    name, measured = read_measured(find_evaluation(tmp_path))
    assert (name, measured.metric, measured.items) == ("t", "accuracy,none", 10)
    assert (measured.ranks, measured.bytes, measured.latency_ms) == ([1, 2, 4], [100, 200, 400], [1.0, 2.0, 4.0])
    assert measured.values == [0.2, 0.6, 0.5]
    # The standard error of a share as the harness has it, with n - 1.
    assert measured.errors == pytest.approx([math.sqrt(p * (1 - p) / 9) for p in measured.values])
    assert measured.by_question[2] == [1.0] * 6 + [0.0] * 4
    found = measured.difference(2, 4)
    assert found is not None
    assert found.paired
    assert choose(measured, Wish(max_bytes=200)).rank == 2
    data = read_evaluation(tmp_path / "evaluation.json")
    assert list(data["curves"]) == ["other", "mine"]
    assert data["tasks"]["t"]["metrics"]["loss,none"]["base"] == {"value": 2.0, "stderr": None}
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert lines[0]["prompt"] == "question 0"
    assert lines[0]["metrics"]["accuracy,none"] == {"0": 1.0, "1": 1.0, "2": 1.0, "4": 1.0}


def test_results_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(MatryoshkaError, match="a file stands where a folder is needed"):
        write_evaluation(made_evaluation(a=made_curve([2, 6, 5])), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_the_table_shows_every_number_however_narrow_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    long = made_curve([2, 6, 5])
    print_tables(made_evaluation(**{"matryoshka-reordered": long, "b": made_curve([10], ranks=(8,))}))
    lines = [re.sub(r"\s+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    assert "matryoshka-reordered 20.0 60.0 50.0 47.5 50.0 43.3 30.0" in lines
    assert "b 100.0 100.0 100.0 100.0 0.0" in lines
    assert "matryoshka-reordered 1.000 1.000 1.000" in lines
    assert accuracy_table(made_evaluation(a=long))


def test_two_curves_are_compared_question_by_question() -> None:
    better, worse = made_curve([8, 8, 8]), made_curve([5, 5, 5])
    difference, error = compare(better, worse)
    assert difference == pytest.approx(0.3)
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 * 10 / 9) / math.sqrt(10))
    assert compare(better, better) == (0, 0)
    with pytest.raises(MatryoshkaError, match="same ranks"):
        compare(better, made_curve([5, 5], ranks=(1, 2)))
    with pytest.raises(MatryoshkaError, match="same questions"):
        compare(better, made_curve([5, 5, 5], of=11))


def test_losses_are_compared_question_by_question() -> None:
    # Three questions of two tokens each; the second curve is worse by 0.5 in the loss of the first and last.
    low = replace(made_scores([True] * 3), nll=(1.0, 2.0, 3.0), loss=1.0)
    high = replace(low, nll=(2.0, 2.0, 4.0), loss=8 / 6)
    difference, error = compare(Curve((1, 2), (high, high)), Curve((1, 2), (low, low)), by="loss")
    assert difference == pytest.approx(high.loss - low.loss)
    assert error == pytest.approx(math.sqrt(1 / 12) / math.sqrt(3))


def test_the_reading_follows_the_numbers() -> None:
    best, close, far = made_curve([80] * 3, of=100), made_curve([79] * 3, of=100), made_curve([10] * 3, of=100)
    low = Curve(far.ranks, tuple(replace(scores, nll=(1.0,) * 100, loss=0.5) for scores in far.scores))
    text = in_words(made_evaluation(far=low, best=best, close=close))
    assert "By accuracy, best is best, with AURAC (log2) 80.0 %: ahead of far (+70.0 ± 9.2)" in text
    assert "not surely ahead of close (+1.0 ± 2.0)" in text
    assert "By loss, far is best, with 0.500 in the mean over the ranks: ahead of best (-0.500 ± 0.000)" in text
    assert in_words(made_evaluation(far=far)) == "far has AURAC 10.0 %."
