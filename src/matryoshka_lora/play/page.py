"""How the page of ``matryoshka play`` looks: Gradio's components around a `Session`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.drawing import part
from matryoshka_lora.play.server import App
from matryoshka_lora.play.session import Session

# Gradio runs what stands in these templates as JavaScript: no text of an adapter or of an evaluation goes into them.
_TITLE = "<h1></h1><p class='soft'></p>"
_NOTICE = "<h2></h2><p></p><pre></pre><p></p><pre></pre>"
_SLIDER = (
    "<label class='rank'><span>{{name}} <b></b></span><input type='range' min='0' max='{{last}}' step='1'>"
    "<span class='ends'>{{#each ranks}}<span>{{this}}</span>{{/each}}</span><span class='cost soft'></span></label>"
)
_CURVE = "<h2></h2><div class='chart'><div class='tip' role='status' hidden></div></div><p class='about soft'></p>"
_CHANGED = (
    "<h2></h2><p class='count soft' role='status'></p><table class='questions'><thead><tr><th>Question</th>"
    "<th>Right answer</th><th>Answers, by rank</th></tr></thead><tbody></tbody></table>"
)


def page(session: Session) -> App:
    """The page as an ASGI application, without a gate before it."""
    with gr.Blocks(title="matryoshka play", analytics_enabled=False) as blocks:
        _fill(session)
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    blocks.queue(api_open=False)
    app: App = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        "/",
        theme=theme,
        css=part("drawing.css") + _text("page.css"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        allowed_paths=[],
        show_error=True,
    )
    return app


def _fill(session: Session) -> None:
    ranks = session.ranks
    tokenizer = session.engine.tokenizer
    shown = [0] if session.engine.adapter.has_base else []
    about = f"{session.base} · {session.engine.model.dtype} · any of the ranks {', '.join(map(str, ranks))}"
    _part("title", _TITLE, [f"{session.adapter.resolve().name} at two ranks", about.replace("torch.", "")])
    with gr.Row(elem_classes="stack"):
        first = _slider(session, "Rank", ranks[len(ranks) // 2])
        second = _slider(session, "Compare with rank", ranks[-1])
    asked = gr.Textbox(label="Question", placeholder="Ask the adapter", elem_id="question")
    with gr.Row(elem_classes="tight"):
        ask = gr.Button("Ask", variant="primary", scale=0, min_width=140, elem_id="ask")
        stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop")
        chat = gr.Checkbox(
            bool(tokenizer.chat_template) and session.template is None,
            label="With the chat template",
            container=False,
            min_width=200,
            visible=bool(tokenizer.chat_template),
            elem_id="chat",
        )
    with gr.Row(elem_classes="stack"):
        boxes = [
            gr.Textbox(label=_label(rank), lines=3, max_lines=16, interactive=False, elem_id=f"answer-{number}")
            for number, rank in enumerate([first.value, second.value, *shown])
        ]
    drawn: list[Any] = []
    tasks = session.tasks
    task = gr.Dropdown(tasks, value=tasks[0] if tasks else None, label="Task", visible=len(tasks) > 1, elem_id="task")
    if tasks:
        chosen = tasks[0], [first.value, second.value]
        drawn = [_part("curve", _CURVE, session.curve(*chosen)), _part("changed", _CHANGED, session.changed(*chosen))]
    else:
        _part("title", _NOTICE, _how_to_evaluate(session))
    _heading("Take this rank along")
    with gr.Row(elem_classes="stack"):
        name = gr.Textbox(
            _folder(session, first.value),
            label="New folder",
            info="In the folder that the command was started in",
            elem_id="folder",
        )
        take = gr.Button(_take(first.value), scale=0, min_width=180, elem_id="export")
    taken = gr.Textbox(label="What was written", lines=4, visible=False, interactive=False, elem_id="exported")

    def answer(text: str, as_chat: bool, one: int, other: int) -> Iterator[list[Any]]:
        at = [one, other, *shown]
        try:
            for texts in session.answers(text, at, as_chat):
                yield [gr.Textbox(said, label=_label(rank)) for said, rank in zip(texts, at, strict=True)]
        except MatryoshkaError as error:
            raise _told(error) from error

    def draw(of: str, one: int, other: int) -> list[Any]:
        return [session.curve(of, [one, other]), session.changed(of, [one, other])]

    def write(rank: int, folder: str) -> Any:
        try:
            made, size, line = session.export(rank, folder)
        except MatryoshkaError as error:
            raise _told(error) from error
        checked = f"Verified on {made.base}: {made.verified}." if made.verified else "Verified: the layers."
        text = f"{made.path}\n{size:,} bytes of weights. {checked}\n\nfrom peft import PeftModel\nmodel = {line}"
        return gr.Textbox(text, visible=True)

    hidden: dict[str, Any] = {"api_visibility": "private"}
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model", **hidden}
    asking = gr.on(
        [ask.click, asked.submit], answer, [asked, chat, first, second], boxes, show_progress="hidden", **one_at_a_time
    )
    stop.click(None, cancels=[asking], **hidden)
    if drawn:
        gr.on(
            [first.change, second.change, task.change],
            draw,
            [task, first, second],
            drawn,
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=None,
            **hidden,
        )
    first.change(
        lambda rank: [_folder(session, rank), gr.Button(_take(rank))],
        first,
        [name, take],
        show_progress="hidden",
        concurrency_limit=None,
        **hidden,
    )
    take.click(write, [first, name], taken, **one_at_a_time)


def _part(function: str, template: str, value: Any, **props: Any) -> gr.HTML:
    """A component that ``page.js`` fills."""
    script = f"{part('drawing.js')}\n{_text('page.js')}\n{function}(element, props, watch);"
    return gr.HTML(value, html_template=template, js_on_load=script, apply_default_css=False, **props)


def _slider(session: Session, name: str, rank: int) -> gr.HTML:
    costs = [asdict(session.costs[each]) for each in session.ranks]
    props = {"name": name, "ranks": list(session.ranks), "last": len(session.ranks) - 1, "costs": costs}
    return _part("slider", _SLIDER, rank, min_width=280, elem_id=name.split()[0].lower(), **props)


def _heading(text: str) -> None:
    gr.HTML(f"<h2>{text}</h2>", apply_default_css=False)


def _label(rank: int) -> str:
    return f"Rank {rank}" if rank else "Base model"


def _take(rank: int) -> str:
    return f"Export rank {rank}"


def _folder(session: Session, rank: int) -> str:
    return f"{session.adapter.resolve().name}-rank-{rank}"


def _how_to_evaluate(session: Session) -> Sequence[str]:
    return (
        "This adapter was never evaluated",
        "The curve, and the questions that ranks answer differently, are made by",
        f"matryoshka eval {session.adapter} --tasks family_relationships",
        "with a task of yours. To ask a few questions only, each time the page is started:",
        f"matryoshka play {session.adapter} --tasks family_relationships",
    )


def _told(error: MatryoshkaError) -> gr.Error:
    return gr.Error(escape(str(error)), title="This cannot be done", print_exception=False)


def _text(name: str) -> str:
    return (files("matryoshka_lora.play") / name).read_text(encoding="utf-8")
