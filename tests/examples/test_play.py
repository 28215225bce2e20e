"""examples/play.py: the answers of two ranks, and a page that only this machine reaches."""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.models import lora_config, randomize
from helpers.tiny_chat import save_tiny_chat
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError, Nesting, nest

gr = pytest.importorskip("gradio")
sys.path.append(str(Path(__file__).parents[2] / "examples"))
import play  # noqa: E402

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model and a nested adapter."""
    folder = tmp_path_factory.mktemp("play")
    base_path = save_tiny_chat(folder / "base")
    base_model = AutoModelForCausalLM.from_pretrained(base_path)
    model = get_peft_model(base_model, lora_config(Nesting.powers_of_two(8)))
    adapter = nest(model)
    randomize(model)
    adapter.reorder()
    adapter.save(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def session(folder: Path) -> play.Session:
    return play.open_session(folder / "adapter", dtype=torch.float32)


def peft_answer(
    folder: Path, session: play.Session, rank: int, use_chat_template: bool, num_tokens: int
) -> str:
    """Return the greedy answer of a rank that plain PEFT loads; rank 0 is the base model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if rank > 0:
        rank_path = folder / f"rank-{rank}"
        if not rank_path.exists():
            session.adapter.export(rank_path, rank)
        model = PeftModel.from_pretrained(model, rank_path)
    prompt = session.encode(QUESTION, use_chat_template)
    tokens = model.eval().generate(input_ids=prompt, do_sample=False, max_new_tokens=num_tokens)
    answer: str = session.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    return answer


@pytest.mark.parametrize("use_chat_template", [True, False])
def test_each_answer_is_that_of_its_rank(
    use_chat_template: bool, session: play.Session, folder: Path
) -> None:
    ranks = [3, 8, 0]
    updates = list(session.answer(QUESTION, ranks, use_chat_template, max_new_tokens=12))
    expected = [peft_answer(folder, session, rank, use_chat_template, 12) for rank in ranks]
    assert updates[-1] == expected
    assert len(set(expected)) == 3
    for earlier, later in pairwise(updates):
        assert all(text.startswith(start) for start, text in zip(earlier, later, strict=True))


@pytest.mark.parametrize(("question", "rank"), [(" ", 4), ("Why?", 9)])
def test_invalid_questions_and_ranks(question: str, rank: int, session: play.Session) -> None:
    with pytest.raises(MatryoshkaError):
        list(session.answer(question, [rank]))


@pytest.mark.slow
def test_the_page_offers_every_rank_and_no_uploads(session: play.Session) -> None:
    page = play.build_page(session)
    components = page.config["components"]
    types = {component["type"] for component in components}
    assert not types & {"file", "uploadbutton", "image", "multimodaltextbox"}
    dropdowns = [c["props"]["choices"] for c in components if c["type"] == "dropdown"]
    assert [[rank for _, rank in choices] for choices in dropdowns] == [[*range(1, 9)]] * 2
    assert not page.analytics_enabled


@pytest.mark.slow
def test_only_this_machine_reaches_the_server_which_takes_no_files(
    session: play.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[gr.Blocks] = []
    launch = gr.Blocks.launch

    def launch_in_background(self: gr.Blocks, **options: object) -> None:
        pages.append(self)
        launch(self, **options, prevent_thread_lock=True, quiet=True)

    monkeypatch.setattr(gr.Blocks, "launch", launch_in_background)
    monkeypatch.setenv("GRADIO_SHARE", "true")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    play.launch(session, port)
    (page,) = pages
    try:
        url = f"http://127.0.0.1:{port}"
        text = urllib.request.urlopen(url).read().decode()
        assert "fonts.googleapis" not in text
        assert page.server_name == "127.0.0.1"
        assert not page.share
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n'
            b"Content-Type: text/plain\r\n\r\nhello\r\n--x--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        upload = urllib.request.Request(f"{url}/gradio_api/upload", body, headers)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(upload)
        assert error.value.code == 413
    finally:
        page.close()
