"""How tokens and paths of a machine look, and that no field of a config carries them into what is written."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any

import pytest
from peft import LoraConfig
from trl import SFTConfig

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.privacy import find_private, marked, shown, tokens_in
from matryoshka_lora.training import make_config

TOKEN, OTHER = ("hf_" + letters * 17 for letters in ("Ab", "xY"))
PLACE = "home_of_alice"
"""In every path of these tests, but never the last part of one."""

PATH = f"/srv/{PLACE}/thing"


# How they look


@pytest.mark.parametrize(
    ("text", "what", "others_see"),
    [
        (TOKEN, "token", ""),
        (f"login({TOKEN!r})", "token", ""),
        ("https://alice:secret@host/x", "token", ""),
        ("-----BEGIN RSA PRIVATE KEY-----", "token", ""),
        ("ghp_" + "a1" * 18, "token", ""),
        ("/home/alice/rows.jsonl", "path", "rows.jsonl"),
        ("/home/alice/", "path", "alice"),
        ("rank=/home/alice/x,lr=1", "path", "rank=x,lr=1"),
        ('{"path": "/home/alice/run"}', "path", '{"path": "run"}'),
        ("in:/home/alice/x:/srv/y/z", "path", "in:x:z"),
        ("file:///home/alice/x", "path", "file://x"),
        ("~alice/models/x", "path", "x"),
        (r"C:\Users\alice\rows.jsonl", "path", "rows.jsonl"),
        (r'{"path": "C:\\Users\\alice"}', "path", '{"path": "alice"}'),
        ("hf_token", "", None),
        ("sk-learn-like-estimators-for-all", "", None),
        ("https://huggingface.co/owner/model", "", None),
        ("owner/model", "", None),
        ("./runs/x/y and ../a/b and ~/runs/x", "", None),
        ("/no_think Is it and/or, 1/2/3? </s></b>", "", None),
        ("curl http://localhost:8000/v1/chat/completions; GET /v1/models", "", None),
        (r'{"template": "Q:\nIs it?\nA:"}', "", None),
    ],
)
def test_how_tokens_and_paths_look(text: str, what: str, others_see: str | None) -> None:
    found = [words for _, words in find_private(text.encode())]
    assert bool(found) == bool(what)
    assert all(what in words for words in found)
    assert shown(text) == (text if others_see is None else others_see)
    assert shown({"key": [text]}) == {"key": [] if others_see == "" else [shown(text)]}


def test_the_place_of_a_finding() -> None:
    assert [start for start, _ in find_private(b"see\n /home/alice/x")] == [5]


def test_a_path_as_a_whole_may_have_spaces() -> None:
    assert shown("/home/al ice/my rows.jsonl") == "my rows.jsonl"
    assert shown("/home/alice is one\n/path/of two") == "alice is one\nof two"


def test_marks_tell_two_places_of_one_name_apart() -> None:
    one, other = marked("/home/alice/model"), marked("/home/bob/model")
    assert one != other
    assert one == marked("/home/alice/model/")
    assert shown(one) == shown(other) == "model"
    assert marked(one) == one
    assert marked("models/mine") == "models/mine"


def test_names_of_tokens() -> None:
    given = {"hub_token": "a", "eos_token": "</s>", "x": {"token": "b", "token_ids": "c"}, "y": [{"api_key": "d"}]}
    assert tokens_in(given | {"use_auth_token": True}) == ["hub_token", "x.token", "y.api_key"]
    assert shown(given) == {"eos_token": "</s>", "x": {"token_ids": "c"}, "y": [{}]}


# Every field of a config


def accepts(hint: Any, kind: type) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        return any(accepts(each, kind) for each in typing.get_args(hint))
    return hint is Any or (origin or hint) is kind


def fields_with_text() -> Iterator[tuple[str, str, Any]]:
    """Section, name and a value with ``MARKER`` in it, of every field that can hold a text."""
    for section, kind in (("", SFTConfig), ("lora", LoraConfig)):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            values = (
                (str, "MARKER"),
                (list, ["MARKER"]),
                (dict, {"a": "MARKER"}),
                (dict, {"a": {"b": ["MARKER"]}}),
                (dict, {"MARKER": 1}),
            )
            yield from ((section, field.name, value) for of, value in values if accepts(hints[field.name], of))
    ours = ("model", "dtype", "quantization", "trust_remote_code", "data", "eval_data", "lora", "nesting")
    yield from (("", name, value) for name in ours for value in ("MARKER", {"a": "MARKER"}, {"MARKER": 1}))
    yield from (("nesting", name, "MARKER") for name in ("ranks", "scaling", "rule", "deploy", "reorder"))
    for source in ({"path": "MARKER.jsonl"}, {"path": "a.jsonl", "template": "MARKER {prompt}"}):
        yield "", "data", source
    for key in ("dataset", "config", "revision", "split", "template"):
        yield "", "data", {"dataset": "a/b", "template": "{prompt}"} | {key: "MARKER {prompt}"}
    yield "", "data", {"task": "chain_sum", "some_setting": "MARKER"}
    yield from (("", "model_init_kwargs", {key: "MARKER"}) for key in ("revision", "cache_dir", "subfolder"))


FIELDS = list(fields_with_text())


def filled(value: Any, marker: str) -> Any:
    return json.loads(json.dumps(value).replace("MARKER", marker))


def config_with(section: str, name: str, value: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"data": "chain_sum", "eval_strategy": "steps" if name == "eval_data" else "no"}
    return {**settings, section: {name: value}} if section else {**settings, name: value}


def written_forms(given: Mapping[str, Any]) -> str:
    """What is written of a config: for the run's folder, for loggers, and into the adapter's."""
    made = make_config(given)
    return made.to_yaml() + made.sft_config().to_json_string() + json.dumps(made.lora_config().to_dict(), default=str)


def test_the_fields_are_found() -> None:
    names = {f"{section}.{name}" for section, name, _ in FIELDS}
    assert {".output_dir", ".hub_token", ".run_name", ".model_init_kwargs", ".chat_template_path"} <= names
    assert {"lora.target_modules", "lora.revision", "lora.rank_pattern", ".data", "nesting.rule"} <= names
    assert len(FIELDS) > 100


@pytest.mark.parametrize(("marker", "hidden"), [(TOKEN, TOKEN), (PATH, PLACE)], ids=["token", "path"])
def test_no_field_carries_a_secret_into_what_is_written(marker: str, hidden: str) -> None:
    """It is refused, and a token is not said again; or it is accepted and written nowhere."""
    accepted = set()
    for section, name, value in FIELDS:
        try:
            text = written_forms(config_with(section, name, filled(value, marker)))
            accepted.add(name)
        except MatryoshkaError as error:
            text = str(error) if marker == TOKEN else ""
        assert hidden not in text, (section, name, value)
    # A test that only sees refusals would show nothing.
    assert accepted == {"hub_token"} if marker == TOKEN else accepted > {"output_dir", "model", "data", "run_name"}


def test_a_token_may_load_the_base_model_and_nothing_else() -> None:
    config = make_config(
        {"data": "chain_sum", "hub_token": TOKEN, "model_init_kwargs": {"token": OTHER, "revision": "v1"}}
    )
    assert config.model_options["token"] == OTHER
    assert config.sft_config().hub_token is None
    assert config.sft_config().model_init_kwargs == {"revision": "v1"}
    for given in (
        {"run_name": f"with {TOKEN}"},
        {"model_init_kwargs": {"token": {"a": TOKEN}}},
        {"model_init_kwargs": json.dumps({"token": "of another kind"})},
        {"dataset_kwargs": {"password": "of another kind"}},
        {"lora": {"target_modules": [TOKEN]}},
    ):
        with pytest.raises(MatryoshkaError) as caught:
            make_config({"data": "chain_sum", **given})
        assert TOKEN not in str(caught.value)
        assert "another kind" not in str(caught.value)


def test_the_trainer_s_own_push_is_refused() -> None:
    with pytest.raises(MatryoshkaError, match=r"push_to_hub would send .*`matryoshka push` afterwards"):
        make_config({"data": "chain_sum", "push_to_hub": True})
