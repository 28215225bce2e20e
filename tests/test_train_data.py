"""Training data: every schema, every source, and what is said about a bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.data.sources import DEFAULT_SIZE, load_data, parse_data
from matryoshka_lora.data.tasks import get_task

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SCHEMAS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "text": (
        [{"prompt": "1 + 1 =", "completion": " 2", "id": 1}],
        [{"prompt": "1 + 1 =", "completion": " 2"}],
    ),
    "chat prompt": (
        [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
        [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
    ),
    "messages": ([{"messages": CHAT, "source": "x"}], [{"messages": CHAT}]),
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1 1", "output": "2", "text": "Below is ..."},
            {"instruction": "Greet.", "input": "", "output": "Hi"},
        ],
        [
            {
                "prompt": [{"role": "user", "content": "Add.\n\n1 1"}],
                "completion": [{"role": "assistant", "content": "2"}],
            },
            {
                "prompt": [{"role": "user", "content": "Greet."}],
                "completion": [{"role": "assistant", "content": "Hi"}],
            },
        ],
    ),
    "question": (
        [{"question": "1 + 1?", "answer": "#### 2"}],
        [
            {
                "prompt": [{"role": "user", "content": "1 + 1?"}],
                "completion": [{"role": "assistant", "content": "#### 2"}],
            }
        ],
    ),
    "query": (
        [{"query": "1 + 1?", "response": "2", "type": "GSM_Rephrased"}],
        [
            {
                "prompt": [{"role": "user", "content": "1 + 1?"}],
                "completion": [{"role": "assistant", "content": "2"}],
            }
        ],
    ),
    "plain text": ([{"text": "Once upon a time."}], [{"text": "Once upon a time."}]),
}


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(tmp_path: Path, schema: str, suffix: str) -> None:
    rows, expected = SCHEMAS[schema]
    path = write(tmp_path / f"data{suffix}", rows)
    assert load_data(path).to_list() == expected
    assert load_data({"path": path, "size": 1}).to_list() == expected[:1]


def test_a_built_in_task_becomes_chat() -> None:
    data = load_data({"task": "chain_sum", "size": 7, "seed": 3, "min_terms": 3, "max_terms": 3})
    examples = get_task({"name": "chain_sum", "min_terms": 3, "max_terms": 3}, seed=3).examples("train", 7)
    assert [row["prompt"] for row in data] == [[{"role": "user", "content": e.prompt}] for e in examples]
    assert [row["completion"] for row in data] == [[{"role": "assistant", "content": e.completion}] for e in examples]
    assert load_data({"task": "chain_sum", "split": "test", "size": 2}).to_list() != data.to_list()[:2]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_each_row_keeps_its_own_tools(tmp_path: Path, first: int) -> None:
    """As JSON, which is what TRL reads; None is no tools."""
    tools = [None, *([{"type": "function", "function": {"name": name, "parameters": {name: 1}}}] for name in "fg")]
    tools = tools[first:] + tools[:first]
    rows = [{"messages": CHAT} if own is None else {"messages": CHAT, "tools": own} for own in tools]
    found = load_data(write(tmp_path / "a.jsonl", rows)).to_list()
    assert [row["messages"] for row in found] == [CHAT] * 3
    assert [row["tools"] and json.loads(row["tools"]) for row in found] == tools


def test_blank_lines_and_other_alphabets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "é漢", "completion": "🎉"}\n\n', encoding="utf-8")
    assert load_data(str(path)).to_list() == [{"prompt": "é漢", "completion": "🎉"}]


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("chain_sum", {"split": "train", "task": "chain_sum", "size": DEFAULT_SIZE}),
        ({"task": "chain_sum", "split": "test"}, {"split": "test", "task": "chain_sum", "size": DEFAULT_SIZE}),
        ("some/where.jsonl", {"path": "some/where.jsonl"}),
        ("openai/gsm8k", {"split": "train", "dataset": "openai/gsm8k"}),
        (
            {"dataset": "imdb", "config": "plain", "split": "train[:10%]"},
            {"split": "train[:10%]", "dataset": "imdb", "config": "plain"},
        ),
    ],
)
def test_names(spec: Any, parsed: dict[str, Any]) -> None:
    assert parse_data(spec) == parsed
    assert parse_data(parsed) == parsed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("family_relationship", "did you mean the task 'family_relationships'"),
        ("./missing/folder", "is no built-in task"),
        (3, "data is 3"),
        ({}, "exactly one of task, path and dataset, and has none"),
        ({"task": "chain_sum", "path": "a.jsonl"}, "exactly one of task, path and dataset"),
        ({"path": 3}, "data.path is 3"),
        ({"path": "a.jsonl", "sizes": 3}, "no key 'sizes'; did you mean 'size'"),
        ({"path": "a.jsonl", "split": "test"}, "no key 'split'; with path it may have size"),
        ({"dataset": "a/b", "name": "main"}, "no key 'name'; with dataset it may have config"),
        ({"task": "chain_sum", "sise": 3}, "no setting 'sise'"),
        ({"task": "chain_sum", "size": 0}, "data.size is 0"),
        ({"task": "chain_sum", "size": True}, "data.size is True"),
    ],
)
def test_wrong_specs(spec: Any, message: str) -> None:
    with pytest.raises(MatryoshkaError) as caught:
        parse_data(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "place", "message"),
    [
        ([], "", "has no rows; expected prompt and completion"),
        ([{"input": "a", "target": "b"}], "", "has the columns input, target; expected prompt and completion"),
        ([3], "1", "is 3, not an object with columns"),
        ([{"prompt": "a", "completion": 3}], "1", "completion is 3; expected text"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "2", "completion is None; expected text"),
        ([{"prompt": "a", "completion": CHAT[1:]}], "1", "prompt and completion must both be text, or both chat"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}],
            "2",
            "prompt is text in some rows and chat messages in others",
        ),
        ([{"messages": []}], "1", "messages is []; expected a list of {role: ..., content: ...}"),
        ([{"messages": "Hi"}], "1", "messages is 'Hi'; expected a list of {role: ..., content: ...}"),
        ([{"messages": [{"from": "human", "value": "Hi"}]}], "1", "expected a list of {role: ..., content: ...}"),
        ([{"instruction": 1, "output": "x"}], "1", "instruction is 1; expected text"),
        ([{"instruction": "a", "input": 1, "output": "x"}], "1", "input is 1; expected text"),
        ([{"question": "q", "answer": None}], "1", "answer is None; expected text"),
        ([{"text": ["a"]}], "1", "text is ['a']; expected text"),
    ],
)
@pytest.mark.parametrize(("suffix", "word"), [(".jsonl", "line"), (".json", "row")])
def test_bad_rows(tmp_path: Path, rows: list[Any], place: str, message: str, suffix: str, word: str) -> None:
    path = write(tmp_path / f"data{suffix}", rows)
    with pytest.raises(MatryoshkaError) as caught:
        load_data(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}, {word} {place}" if place else path)


def test_an_unreadable_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    with pytest.raises(MatryoshkaError, match=r"a\.jsonl, line 2 is no JSON"):
        load_data(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"prompt": "a"}', "holds no list"),
        ("a.json", b"[1,", "cannot read"),
        ("a.jsonl", b"\xff\xfe", "cannot read"),
        ("a.parquet", b"PAR1", "cannot read"),
        ("a.csv", b"a,b\n", "must end in .jsonl, .json, .parquet"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MatryoshkaError) as caught:
        load_data(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="there is no file"):
        load_data(str(tmp_path / "a.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(MatryoshkaError, match="cannot read"):
        load_data(str(tmp_path / "folder.jsonl"))


def test_a_hub_dataset_without_network() -> None:
    with pytest.raises(MatryoshkaError, match=r"cannot load split 'train' of the dataset 'no-one/nothing'.*data\.path"):
        load_data("no-one/nothing")


def test_tools_of_a_prompt_are_those_that_trl_trains_with(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
    row = {"prompt": CHAT[:1], "completion": CHAT[1:2], "tools": tools}
    (found,) = load_data(write(tmp_path / "rows.jsonl", [row]))
    assert json.loads(found["tools"]) == tools
    for other in ({"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}, {"text": "a"}):
        with pytest.raises(MatryoshkaError, match=r"line 1: tools belong to chat messages"):
            load_data(write(tmp_path / "other.jsonl", [{**other, "tools": tools}]))
    with pytest.raises(MatryoshkaError, match="chat_template_kwargs of a row is not read"):
        load_data(write(tmp_path / "other.jsonl", [{"messages": CHAT, "chat_template_kwargs": {"thinking": False}}]))


@pytest.mark.parametrize("columns", [("question", "answer"), ("query", "response"), ("instruction", "output")])
def test_a_template_makes_text_of_questions(tmp_path: Path, columns: tuple[str, str]) -> None:
    rows = [dict(zip(columns, ("What is {x} + 1?", "2"), strict=True))]
    source = {"path": write(tmp_path / "rows.jsonl", rows), "template": "Question: {prompt} Think.\nAnswer:"}
    assert list(load_data(source)) == [{"prompt": "Question: What is {x} + 1? Think.\nAnswer:", "completion": " 2"}]


def test_a_template_of_others_is_for_questions_without_one(tmp_path: Path) -> None:
    question = write(tmp_path / "question.jsonl", [{"question": "1?", "answer": "2"}])
    assert list(load_data(question, "Q: {prompt}")) == [{"prompt": "Q: 1?", "completion": " 2"}]
    own = {"path": question, "template": "Own: {prompt}"}
    assert list(load_data(own, "Q: {prompt}")) == [{"prompt": "Own: 1?", "completion": " 2"}]
    text = write(tmp_path / "text.jsonl", [{"prompt": "1?", "completion": "2"}])
    assert list(load_data(text, "Q: {prompt}")) == [{"prompt": "1?", "completion": "2"}]


def test_a_template_that_cannot_be_filled(tmp_path: Path) -> None:
    for template in ("Question:", "{prompt} {prompt}", 3):
        with pytest.raises(MatryoshkaError, match=r"data.template is .*write text with \{prompt\} in it once"):
            parse_data({"path": "rows.jsonl", "template": template})
    source = {"path": write(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "2"}]), "template": "{prompt}"}
    with pytest.raises(MatryoshkaError, match="has prompt and completion, which a template does not fit"):
        load_data(source)
    with pytest.raises(MatryoshkaError, match="data has no key 'templat'; did you mean 'template'"):
        parse_data({"path": "rows.jsonl", "templat": "{prompt}"})
