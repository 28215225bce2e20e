"""`matryoshka play`: the answers of two ranks, and a page that only this machine reaches."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import lora_config, randomize
from peft import PeftModel, get_peft_model
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError, Nesting, nest
from matryoshka_lora.play import Session, open_session, page, play

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the base model and a nested adapter on it."""
    folder = tmp_path_factory.mktemp("play")
    base = save_tiny_chat(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), lora_config(Nesting.powers_of_two(8))
    )
    adapter = nest(model)
    randomize(model)
    adapter.save(folder / "family")
    return folder


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return open_session(folder / "family", dtype=torch.float32)


def by_peft(folder: Path, session: Session, rank: int, chat: bool) -> str:
    """Return the greedy answer of a rank that plain PEFT reads; rank 0 is the base model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if rank:
        target = folder / f"rank-{rank}"
        if not target.exists():
            session.adapter.export(target, rank)
        model = PeftModel.from_pretrained(model, target)
    prompt = session.prompt(QUESTION, chat)
    answer = model.eval().generate(input_ids=prompt, do_sample=False, max_new_tokens=12)
    text: str = session.tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("chat", [True, False])
def test_each_answer_is_that_of_its_rank(chat: bool, session: Session, folder: Path) -> None:
    ranks = [3, 8, 0]
    steps = list(session.answers(QUESTION, ranks, chat, longest=12))
    assert steps[-1] == [by_peft(folder, session, rank, chat) for rank in ranks]
    assert len(set(steps[-1])) == 3
    for before, after in pairwise(steps):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize(("asked", "rank"), [(" ", 4), ("Why?", 9)])
def test_what_cannot_be_asked_is_refused(asked: str, rank: int, session: Session) -> None:
    with pytest.raises(MatryoshkaError):
        list(session.answers(asked, [rank]))


@pytest.mark.slow
def test_the_page_offers_the_ranks_and_loads_nothing_from_elsewhere(session: Session) -> None:
    blocks = page(session)
    parts = {part["type"] for part in blocks.config["components"]}
    assert not parts & {"file", "uploadbutton", "image", "multimodaltextbox"}
    lists = [part["props"] for part in blocks.config["components"] if part["type"] == "dropdown"]
    assert [[rank for _, rank in each["choices"]] for each in lists] == [[*range(1, 9)]] * 2
    assert not blocks.analytics_enabled


@pytest.mark.slow
def test_the_server_is_reached_from_this_machine_only_and_takes_no_files(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio as gr

    launched = {}
    launch = gr.Blocks.launch

    def without_waiting(self: gr.Blocks, **options: object) -> None:
        launched["blocks"] = self
        launch(self, **options, prevent_thread_lock=True, quiet=True)

    monkeypatch.setattr(gr.Blocks, "launch", without_waiting)
    monkeypatch.setenv("GRADIO_SHARE", "true")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    play(session, port)
    blocks = launched["blocks"]
    try:
        url = f"http://127.0.0.1:{port}"
        text = urllib.request.urlopen(url).read().decode()
        assert "fonts.googleapis" not in text
        assert blocks.server_name == "127.0.0.1"
        assert not blocks.share
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n'
            b"Content-Type: text/plain\r\n\r\nhello\r\n--x--\r\n"
        )
        upload = urllib.request.Request(
            f"{url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(upload)
        assert refused.value.code == 413
    finally:
        blocks.close()
