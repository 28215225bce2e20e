"""The page of ``matryoshka play``: a real server, a real browser where there is one, and a tiny adapter."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import an_evaluation
import pytest
import torch
from a_browser import look, requests
from conftest import lora_config, nest_as, randomize
from peft import PeftModel, get_peft_model
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError, Nesting, load
from matryoshka_lora.cli.main import app, main
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.evaluation.cost import adapter_bytes
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.models import load_tokenizer

pytest.importorskip("gradio", reason="matryoshka play was not tested: gradio is not installed")

import itertools

from matryoshka_lora.play.page import page
from matryoshka_lora.play.server import address, gated, listen, run
from matryoshka_lora.play.session import MOST_QUESTIONS, Session, open_session

RANKS = [1, 2, 4, 8]
QUESTION = "which of <b>them</b> is it?"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested adapter that was never evaluated."""
    nesting = Nesting(RANKS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(nesting))
    randomize(model)
    folder = tmp_path_factory.mktemp("plain")
    nest_as(model, nesting).save(folder)
    return folder


@pytest.fixture(scope="module")
def session(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same adapter with an evaluation beside it, in a folder of its own that exports go to."""
    home = tmp_path_factory.mktemp("home")
    os.symlink(plain / "adapter_config.json", home / "unused")
    adapter = home / "family"
    adapter.mkdir()
    for file in plain.iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    an_evaluation.write(adapter / "evaluation", an_evaluation.some_examples() + an_evaluation.some_examples("other", 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return open_session(adapter, dtype="fp32")


@pytest.fixture(scope="module")
def served(session: Session) -> Iterator[str]:
    """The address of the page, served as the command does it."""
    listening = listen("127.0.0.1", 0)
    threading.Thread(target=run, args=(gated(page(session), only_here=True), listening), daemon=True).start()
    yield address(listening)
    listening.close()


def prompt_of(session: Session, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    tokenizer = load_tokenizer(session.base)
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids: list[int] = found["input_ids"]
    return ids


@cache
def engine_of(base: str, adapter: Path) -> Engine:
    """Of its own: the page has another."""
    return Engine(load(AutoModelForCausalLM.from_pretrained(base), adapter), load_tokenizer(base))


def said(session: Session, question: str, rank: int) -> str:
    """What another engine answers at a rank, alone."""
    engine = engine_of(session.base, session.adapter)
    return engine.generate([prompt_of(session, question)], rank, 128, until=["</s>"])[0]


# What the page is about, without one.


def test_answers_come_token_by_token_and_are_the_engines(session: Session) -> None:
    steps = list(session.answers(QUESTION, [2, 8, 0], chat=True))
    assert steps[0] == ["", "", ""]
    assert len(steps) > 20
    for before, after in itertools.pairwise(steps):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
    assert steps[-1] == [said(session, QUESTION, rank) for rank in (2, 8, 0)]
    assert len(set(steps[-1])) == 3


def test_a_question_without_chat_template_is_asked_as_text(session: Session) -> None:
    texts = list(session.answers("how much?", [4], chat=False))[-1]
    assert texts == session.engine.generate(["how much?"], 4, 128, until=["</s>"])
    assert texts != list(session.answers("how much?", [4], chat=True))[-1]


def test_the_text_that_an_adapter_was_trained_with_stands_around_a_question(session: Session) -> None:
    (session.adapter / "train.yaml").write_text('data: {path: rows.jsonl, template: "Q: {prompt} A:"}\n')
    try:
        found = open_session(session.adapter, dtype="fp32")
    finally:
        (session.adapter / "train.yaml").unlink()
    assert found.template == "Q: {prompt} A:"
    texts = list(found.answers("how much?", [4], chat=False))[-1]
    assert texts == session.engine.generate(["Q: how much? A:"], 4, 128, until=["</s>"])


def test_who_listens_no_more_ends_the_work(session: Session) -> None:
    listening = session.answers(QUESTION, [2, 8, 0], chat=True)
    assert [next(listening) for _ in range(3)]
    listening.close()  # type: ignore[attr-defined]
    # The lock is free again, so another question is answered.
    assert list(session.answers(QUESTION, [2], chat=True))[-1] == [said(session, QUESTION, 2)]


@pytest.mark.parametrize(("question", "rank", "problem"), [(" ", 2, "write one"), ("x" * 600, 2, "too long")])
def test_questions_that_cannot_be_asked(session: Session, question: str, rank: int, problem: str) -> None:
    with pytest.raises(MatryoshkaError, match=problem):
        list(session.answers(question, [rank], chat=True))
    with pytest.raises(MatryoshkaError, match="rank 9"):
        list(session.answers("a", [9], chat=True))


def test_costs_are_those_of_the_evaluation_and_of_the_file(session: Session, plain: Path) -> None:
    sizes = adapter_bytes(open_adapter(plain), RANKS)
    for rank, size in zip(RANKS, sizes, strict=True):
        cost = session.costs[rank]
        assert (cost.bytes, cost.milliseconds) == (size, 34 + rank / 10)
        assert cost.measured == "from evaluation.json"


def test_without_an_evaluation_the_time_is_measured_or_tasks_are_asked(plain: Path) -> None:
    found = open_session(plain, dtype="fp32")
    assert found.evaluation is None
    assert all(cost.milliseconds > 0 and cost.measured.startswith("measured") for cost in found.costs.values())
    asked = open_session(plain, "family_relationships", items=3, dtype="fp32")
    assert asked.tasks == ["family_relationships"]
    changed = asked.changed("family_relationships", [1, 8])
    assert (changed["asked"], changed["differ"]) == (3, 3)
    for row in changed["rows"]:
        assert row["answers"]["1"] != row["answers"]["8"]
    drawn = asked.curve("family_relationships", [1, 8])
    assert drawn["evaluation"]["ranks"] == RANKS
    assert drawn["evaluation"]["latency_ms"] == [asked.costs[rank].milliseconds for rank in RANKS]
    assert not (plain / "evaluation").exists()


def test_the_questions_that_two_ranks_answer_differently(session: Session) -> None:
    rows = an_evaluation.some_examples()
    differ = [row["doc_id"] for row in rows if row["answers"]["1"] != row["answers"]["8"]]
    found = session.changed("family", [1, 8])
    assert found["differ"] == len(differ)
    assert [row["id"] for row in found["rows"]] == differ[:MOST_QUESTIONS]
    assert session.changed("family", [4, 4])["rows"] == []


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../beside", "/etc/a", "family", "unused"])
def test_an_export_goes_nowhere_else_and_over_nothing(session: Session, name: str) -> None:
    before = sorted(session.home.rglob("*"))
    with pytest.raises(MatryoshkaError, match=r"is no folder in|exists already: choose another place"):
        session.export(2, name)
    assert sorted(session.home.rglob("*")) == before


# The command.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that fails says on stderr."""

    def failing(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["matryoshka", "play", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error.splitlines()[-1]

    return failing


def test_errors_are_one_sentence(
    command: Callable[..., str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(tmp_path / "nothing", "--port", 0).startswith("error: ")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        said = command(plain, "--port", port)
    assert said.startswith(f"error: cannot listen at port {port} of 127.0.0.1: Address already in use. Choose another")
    assert command(plain, "--host", "192.0.2.1", "--port", 0).startswith("error: cannot listen at port 0 of 192.0.2.1")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install -e '.[play]'" in command(plain)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_says_where_the_page_is_and_ends_at_ctrl_c(
    plain: Path, host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pages: list[str] = []
    streams: list[Any] = []

    def visit() -> None:
        for _ in range(600):
            try:
                with urlopen(f"http://127.0.0.1:{port}/") as answer:
                    pages.append(answer.read().decode())
                # Stays open, as that of a page that waits for an answer.
                streams.append(urlopen(f"http://127.0.0.1:{port}/gradio_api/heartbeat/page"))
                break
            except OSError:
                time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    threading.Thread(target=visit, daemon=True).start()
    app(["play", str(plain), "--port", str(port), "--host", host, "--dtype", "fp32"], standalone_mode=False)
    captured = capsys.readouterr()
    assert "matryoshka play" in pages[0]
    assert captured.out.splitlines()[-1] == f"Open http://{host}:{port} in a browser. Ctrl-C ends it."
    assert ("Warning: whoever can reach" in captured.err) == (host == "0.0.0.0")
    assert captured.err.splitlines()[-1] == "Stopped."
    assert "Traceback" not in captured.err
    assert len(streams) == 1


def test_the_gate_lets_through_only_what_the_page_asks(served: str) -> None:
    def status(path: str, **headers: str) -> int:
        try:
            with urlopen(Request(served + path, headers=headers)) as answer:
                assert "default-src 'self'" in answer.headers["content-security-policy"]
                return int(answer.status)
        except HTTPError as error:
            return error.code

    assert status("/") == status("/config") == status("/", Origin=served) == 200
    closed = ["file=/etc/passwd", "upload", "proxy=http://example.com", "info", "run/answer", "call/answer"]
    assert {status(f"/gradio_api/{path}") for path in closed} | {status("/docs"), status("/monitoring")} == {404}
    assert status("/", Host="example.com") == status("/", Origin="http://example.com") == 403
    assert status("/", Origin="null") == 403


# A browser.


def wait(browser: Any, found: Callable[[], Any], seconds: float = 60) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.1).until(lambda _: found())


def text(browser: Any, selector: str) -> str:
    found: str = browser.execute_script(
        "const found = document.querySelector(arguments[0]); return found ? found.value ?? found.textContent : ''",
        selector,
    )
    return found


def slide(browser: Any, slider: str, rank: int) -> None:
    """As a hand does it, with the arrow keys."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    handle = browser.find_element(By.CSS_SELECTOR, f"#{slider} input")
    handle.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * RANKS.index(rank))
    assert text(browser, f"#{slider} b") == str(rank)


def attributes(browser: Any, selector: str, name: str) -> list[str]:
    """All at once: the page may draw them anew at any time."""
    script = "return [...document.querySelectorAll(arguments[0])].map(each => each.getAttribute(arguments[1]))"
    found: list[str] = browser.execute_script(script, selector, name)
    return found


def marked(browser: Any) -> list[str]:
    return attributes(browser, ".chart .marked", "data-rank")


def test_slide_ask_compare_export(browser: Any, served: str, session: Session) -> None:
    from selenium.webdriver.common.by import By

    browser.get_log("browser")
    look(browser, served)
    wait(browser, lambda: marked(browser) == ["4", "8"])
    assert text(browser, "h1") == "family at two ranks"
    size = session.costs[4].bytes / 1000
    wait(browser, lambda: text(browser, "#rank .cost") == f"{size:.1f} kB · 34.4 ms per token, from evaluation.json")

    slide(browser, "rank", 2)
    slide(browser, "compare", 1)
    wait(browser, lambda: marked(browser) == ["2", "1"])
    rows = an_evaluation.some_examples()
    differ = [row["doc_id"] for row in rows if row["answers"]["2"] != row["answers"]["1"]]
    wait(browser, lambda: text(browser, ".count") == f"{len(differ)} of 60 questions")
    assert attributes(browser, ".questions tbody tr", "data-id") == list(map(str, differ))

    browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys(QUESTION)
    browser.find_element(By.ID, "ask").click()
    expected = [said(session, QUESTION, rank) for rank in (2, 1, 0)]
    boxes = [f"#answer-{number} textarea" for number in range(3)]
    wait(browser, lambda: [text(browser, box) for box in boxes] == expected)
    labels = [browser.find_element(By.ID, f"answer-{number}").text.splitlines()[0] for number in range(3)]
    assert labels == ["Rank 2", "Rank 1", "Base model"]

    assert text(browser, "#folder input, #folder textarea") == "family-rank-2"
    browser.find_element(By.ID, "export").click()
    written = wait(browser, lambda: text(browser, "#exported textarea"))
    folder = session.home / "family-rank-2"
    assert written.splitlines()[0] == str(folder.resolve())
    weights = (folder / "adapter_model.safetensors").stat().st_size
    assert written.splitlines()[1].startswith(f"{weights:,} bytes of weights. Verified on ")
    assert written.splitlines()[-1] == f'model = PeftModel.from_pretrained(base_model, "{folder.resolve()}")'
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(session.base), folder).eval()
    whole = load(AutoModelForCausalLM.from_pretrained(session.base), session.adapter, rank=2)
    ids = torch.tensor([prompt_of(session, QUESTION)])
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=ids).logits, whole.model(input_ids=ids).logits)

    browser.find_element(By.ID, "export").click()
    wait(browser, lambda: "exists already: choose another place" in browser.find_element(By.TAG_NAME, "body").text)
    asked = {url for url in requests(browser) if not url.startswith(("data:", "blob:"))}
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith(f"{served}/")] == []
    assert browser.get_log("browser") == []


def test_the_curve_is_that_of_the_report(browser: Any, served: str, session: Session, tmp_path: Path) -> None:
    """The same line through the same points, as far as the marks leave it the same room."""
    from matryoshka_lora.evaluation.report import page as report

    assert session.evaluation is not None
    (tmp_path / "report.html").write_text(report(session.evaluation.to_dict(), session.evaluation.examples))
    look(browser, served)
    wait(browser, lambda: marked(browser))
    ours = attributes(browser, ".chart .point", "aria-label")
    look(browser, (tmp_path / "report.html").as_uri())
    assert attributes(browser, ".chart .point", "aria-label") == ours
    assert len(ours) == len(RANKS)
    assert marked(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk(browser: Any, served: str, tmp_path: Path, width: int, scheme: str) -> None:
    look(browser, served, width, scheme)
    wait(browser, lambda: marked(browser))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Gradio cuts what does not fit into its boxes, so that nothing scrolls.
    cut = """return [...document.querySelectorAll('label, button, h1, h2, p')]
        .filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.outerHTML.slice(0, 80))"""
    assert browser.execute_script(cut) == []
    assert browser.execute_script("return document.body.classList.contains('dark')") == (scheme == "dark")
    # To look at: pytest keeps the folders of its last runs.
    browser.save_screenshot(str(tmp_path / f"{width}-{scheme}.png"))


def test_an_adapter_that_was_never_evaluated_says_how(browser: Any, plain: Path) -> None:
    listening = listen("127.0.0.1", 0)
    found = open_session(plain, dtype="fp32")
    threading.Thread(target=run, args=(gated(page(found), only_here=True), listening), daemon=True).start()
    look(browser, address(listening))
    wait(browser, lambda: text(browser, "pre"))
    assert text(browser, "pre") == f"matryoshka eval {plain} --tasks family_relationships"
    assert browser.find_elements("css selector", ".chart") == []


def test_hostile_text_is_only_text(browser: Any, session: Session, tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=\"document.title='broken'\">${document.title='broken'}{{value}}"
    rows = [an_evaluation.example(hostile, n, {0: 1.0, 1: 0.0, 2: 1.0, 4: 0.0, 8: 1.0}) for n in range(2)]
    for row in rows:
        row.update(prompt=hostile, target=hostile, answers={rank: hostile + rank for rank in row["answers"]})
    found = json.loads(json.dumps(an_evaluation.evaluation(rows)))
    evaluation = type(session.evaluation)  # type: ignore[type-abstract]
    about = {key: value for key, value in found.items() if key not in ("format", "ranks", "tasks")}
    changed = {**vars(session), "evaluation": evaluation(about, found["ranks"], found["tasks"], rows)}
    listening = listen("127.0.0.1", 0)
    app = gated(page(Session(**{**changed, "base": hostile})), only_here=True)
    threading.Thread(target=run, args=(app, listening), daemon=True).start()
    look(browser, address(listening))
    wait(browser, lambda: marked(browser))
    assert browser.title == "matryoshka play"
    assert hostile in text(browser, ".questions tbody")
    assert hostile in text(browser, "h1 + p")
    assert browser.find_elements("css selector", ".html-container img, .questions img") == []
