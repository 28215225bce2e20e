"""Training data: a built-in task, a file, or a dataset of the Hugging Face hub, as TRL wants to see it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_lora.data.tasks import get_task, is_task, nearest_tasks
from matryoshka_lora.errors import MatryoshkaError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet")
DEFAULT_SIZE = 1000
"""Questions of a built-in task, where ``size`` says nothing."""

# What each source may be told besides its name; a built-in task also takes its generator's settings.
_KEYS = {
    "task": ("split", "size", "seed"),
    "path": ("size", "template", "sha256"),
    "dataset": ("config", "revision", "split", "size", "template"),
}

# The columns that make a schema, in order of precedence, and how to tell it.
_SCHEMAS = {
    ("prompt", "completion"): "prompt and completion (both text, or both chat messages)",
    ("messages",): "messages (chat)",
    ("instruction", "output"): "instruction, output and perhaps input (alpaca)",
    ("question", "answer"): "question and answer",
    ("query", "response"): "query and response",
    ("text",): "text",
}

_QUESTIONS = (("instruction", "output"), ("question", "answer"), ("query", "response"))
"""Schemas of one question and its answer as text, which become chat messages or fill a template."""


def parse_data(spec: str | Mapping[str, Any], split: str = "train") -> dict[str, Any]:
    """Where data comes from, as a mapping that says so explicitly; nothing is loaded.

    Args:
        spec: The name of a built-in task, a ``.jsonl``, ``.json`` or ``.parquet`` file, the id of a hub dataset, or a
            mapping with one of ``task``, ``path`` and ``dataset``. Besides, a mapping may have ``size`` (how many of
            the first rows), for tasks and datasets ``split``, for tasks ``seed`` and the generator's settings, for
            datasets ``config`` and ``revision``, for files and datasets ``template``: text with ``{prompt}`` in it,
            such as ``"Question: {prompt} Answer:"``, for base models without a chat template. For files ``sha256``,
            which training alone checks.
        split: Of a task or dataset, where the mapping says nothing.

    Raises:
        MatryoshkaError: It is none of these, or a key is wrong.
    """
    if isinstance(spec, str):
        spec = _parse_name(spec)
    if not isinstance(spec, Mapping):
        raise MatryoshkaError(f"data is {spec!r}; write the name of a task, a file or a dataset, or a mapping")
    sources = [key for key in _KEYS if key in spec]
    if len(sources) != 1:
        raise MatryoshkaError(f"data needs exactly one of task, path and dataset, and has {sources or 'none'}")
    source, parsed = sources[0], dict(spec)
    if not isinstance(parsed[source], str):
        raise MatryoshkaError(f"data.{source} is {parsed[source]!r}; write its name")
    size = parsed.get("size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise MatryoshkaError(f"data.size is {size!r}; write how many rows are wanted, for example 200")
    if source == "task":
        _task(parsed)
        return {"split": split, **parsed, "size": size or DEFAULT_SIZE}
    for key in parsed:
        if key not in (source, *_KEYS[source]):
            close = get_close_matches(str(key), _KEYS[source], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"with {source} it may have {', '.join(_KEYS[source])}"
            raise MatryoshkaError(f"data has no key {key!r}; {hint}")
    template = parsed.get("template")
    if template is not None and (not isinstance(template, str) or template.count("{prompt}") != 1):
        raise MatryoshkaError(
            f"data.template is {template!r}; write text with {{prompt}} in it once, such as 'Q: {{prompt}} A:'"
        )
    return {"split": split, **parsed} if source == "dataset" else parsed


def with_hash(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """What `parse_data` returns, with the SHA-256 of a file, by which a run knows whether its rows are the same.

    Raises:
        MatryoshkaError: The file has another one than ``sha256`` says.
    """
    file = Path(os.path.expanduser(parsed.get("path", "")))
    if "path" not in parsed or not file.is_file():  # which `load_data` will say
        return dict(parsed)
    try:
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise MatryoshkaError(f"cannot read {parsed['path']}: {one_line(error)}") from error
    if parsed.get("sha256") not in (None, found):
        raise MatryoshkaError(
            f"{parsed['path']} is not the file that data.sha256 names: take that one, or write data.sha256=null"
        )
    return {**parsed, "sha256": found}


def load_data(spec: str | Mapping[str, Any], template: str | None = None) -> Dataset:
    """The rows to train on, with the columns that TRL's ``SFTTrainer`` knows and no others.

    Tasks, alpaca rows, question/answer rows and query/response rows become one user's and one assistant's message, so
    that the model's chat template applies and only the answer is trained. With a ``template`` of the source's own they
    become text, the answer after a space. ``prompt`` and ``completion`` as text stay as they are.

    Args:
        spec: As for `parse_data`.
        template: For questions and answers of a file or a dataset where ``spec`` has none. Other rows stay as they are.

    Returns:
        Columns ``prompt`` and ``completion``, ``messages``, or ``text``. Chat has ``tools`` too, as JSON text, if any
        row has some; where a row has none it is None.

    Raises:
        MatryoshkaError: The data cannot be found or read, or a row has another form; the message names the file and
            the row, and says what was expected.
    """
    from datasets import Dataset

    parsed = parse_data(spec)
    size, own = parsed.get("size"), parsed.get("template")
    if "task" in parsed:
        examples = _task(parsed).examples(parsed["split"], parsed["size"])
        rows = [_as_chat(example.prompt, example.completion) for example in examples]
    elif "path" in parsed:
        path = Path(os.path.expanduser(parsed["path"]))
        rows = list(_convert(parsed["path"], _read(path), size, own, template))
    else:
        rows = list(_convert(f"dataset {parsed['dataset']}", _download(parsed), size, own, template))
    if any("tools" in row for row in rows):
        for row in rows:  # the columns are those of the first row, whatever the others have
            row.setdefault("tools", None)
    return Dataset.from_list(rows)


def _parse_name(name: str) -> dict[str, Any]:
    if name.endswith(SUFFIXES) or Path(os.path.expanduser(name)).is_file():
        return {"path": name}
    if is_task(name):
        return {"task": name}
    if "/" in name and not Path(os.path.expanduser(name)).exists() and not name.startswith((".", "/", "~")):
        return {"dataset": name}
    close = nearest_tasks(name)
    hint = f"did you mean the task {close[0]!r}? " if close else ""
    raise MatryoshkaError(
        f"data {name!r} is no built-in task; {hint}A file ends in {', '.join(SUFFIXES)}; a hub dataset is written "
        "owner/name, or {dataset: name}"
    )


def _task(parsed: Mapping[str, Any]) -> Any:
    settings = {key: value for key, value in parsed.items() if key not in ("task", *_KEYS["task"])}
    return get_task({"name": parsed["task"], **settings}, parsed.get("seed", 0))


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with the words that point to it."""
    if path.suffix not in SUFFIXES:
        raise MatryoshkaError(f"{path} is no data file: its name must end in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from _numbered(pyarrow.parquet.read_table(path).to_pylist())
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise MatryoshkaError(f"{path} holds no list: a .json file is a list of rows, a .jsonl one row a line")
            yield from _numbered(rows)
        else:
            yield from _read_lines(path)
    except FileNotFoundError as error:
        raise MatryoshkaError(f"there is no file {path}; write its path from here, or the whole path") from error
    except MatryoshkaError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 and Arrow
        raise MatryoshkaError(f"cannot read {path}: {one_line(error)}") from error


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise MatryoshkaError(
                    f"{path}, line {number} is no JSON ({error.msg}, column {error.colno}); each line of a .jsonl "
                    'file is an object such as {"prompt": "...", "completion": "..."}'
                ) from error


def _download(parsed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    import datasets

    name, split = parsed["dataset"], parsed["split"]
    try:
        rows = datasets.load_dataset(name, parsed.get("config"), split=split, revision=parsed.get("revision"))
    except Exception as error:  # offline, no such name, config or split, gated: no common class
        raise MatryoshkaError(
            f"cannot load split {split!r} of the dataset {name!r} from the Hugging Face hub: {one_line(error)} Check "
            "the name and the network, or give a file with data.path"
        ) from error
    yield from _numbered(rows)


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _convert(
    source: str, rows: Iterable[tuple[str, Any]], size: int | None, template: str | None, usual: str | None
) -> Iterator[dict[str, Any]]:
    schema: tuple[str, ...] | None = None
    kinds: dict[str, str] = {}
    for count, (place, row) in enumerate(rows):
        if size is not None and count == size:
            return
        if not isinstance(row, Mapping):
            raise MatryoshkaError(f"{source}, {place} is {_short(row)}, not an object with columns")
        if schema is None:
            schema = next((names for names in _SCHEMAS if all(name in row for name in names)), None)
            if schema is None:
                raise MatryoshkaError(
                    f"{source} has the columns {', '.join(map(str, row)) or 'none'}; expected "
                    f"{'; or '.join(_SCHEMAS.values())}"
                )
            if template is not None and schema not in _QUESTIONS:
                raise MatryoshkaError(
                    f"{source} has {' and '.join(schema)}, which a template does not fit: leave it out"
                )
            if template is None and schema in _QUESTIONS:
                template = usual
        try:
            converted = _convert_row(schema, row, template)
            for name, value in converted.items():
                if kinds.setdefault(name, type(value).__name__) != type(value).__name__:
                    raise MatryoshkaError(f"{name} is text in some rows and chat messages in others; make them alike")
        except MatryoshkaError as error:
            raise MatryoshkaError(f"{source}, {place}: {error}") from error
        yield converted
    if schema is None:
        raise MatryoshkaError(f"{source} has no rows; expected {'; or '.join(_SCHEMAS.values())}")


def _convert_row(schema: tuple[str, ...], row: Mapping[str, Any], template: str | None) -> dict[str, Any]:
    if row.get("chat_template_kwargs"):
        raise MatryoshkaError("chat_template_kwargs of a row is not read: change the chat template instead")
    is_pair = schema == ("prompt", "completion")
    is_chat = schema == ("messages",) or (is_pair and all(isinstance(row.get(name), list) for name in schema))
    tools = row.get("tools")
    if tools and not is_chat:
        raise MatryoshkaError("tools belong to chat messages: write the row as messages, or leave them out")
    if is_chat:
        # Tools as TRL reads them too: in a column of mappings, each one would get the keys of all others.
        text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        return {**{name: _messages(row, name) for name in schema}, **({"tools": text} if tools else {})}
    if is_pair:
        if any(isinstance(row.get(name), list) for name in schema):
            raise MatryoshkaError("prompt and completion must both be text, or both chat messages")
        return {name: _text(row, name) for name in schema}
    if schema == ("text",):
        return {"text": _text(row, "text")}
    question, answer = (_text(row, name) for name in schema)
    if "instruction" in schema and row.get("input"):
        question = f"{question}\n\n{_text(row, 'input')}"
    if template is not None:
        return {"prompt": template.replace("{prompt}", question), "completion": f" {answer}"}
    return _as_chat(question, answer)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise MatryoshkaError(f"{name} is {_short(value)}; expected text")
    return value


def _messages(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = row.get(name)
    good = isinstance(value, list) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str) or message.get("tool_calls"))
        for message in value
    )
    if not good or not value:
        raise MatryoshkaError(f"{name} is {_short(value)}; expected a list of {{role: ..., content: ...}}")
    return [dict(message) for message in value]


def _as_chat(prompt: str, completion: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
