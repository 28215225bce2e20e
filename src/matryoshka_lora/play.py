"""`matryoshka play`: a page of Gradio's own parts that asks two ranks the same question."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile
from matryoshka_lora.files.peft import open_adapter
from matryoshka_lora.models import load_model, tokenizer_beside
from matryoshka_lora.nested import load

if TYPE_CHECKING:
    import gradio as gr

    from matryoshka_lora.adapter import NestedAdapter

LONGEST = 256  # tokens of an answer
_PIECE = 8  # tokens between two looks at an answer


@dataclass(frozen=True)
class Session:
    """An adapter as it was opened, the same in the base model, and the base model's tokenizer."""

    file: AdapterFile
    adapter: NestedAdapter
    tokenizer: PreTrainedTokenizerBase

    def prompt(self, question: str, chat: bool) -> torch.Tensor:
        """Return a question in tokens, shape (1, length), in the chat template or as it is."""
        if chat := bool(chat and self.tokenizer.chat_template):
            messages = [{"role": "user", "content": question}]
            question = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        found = self.tokenizer(question, return_tensors="pt", add_special_tokens=not chat)
        tokens: torch.Tensor = found["input_ids"]
        return tokens.to(self.adapter.model.device)

    def answers(
        self, question: str, ranks: Sequence[int], chat: bool = True, longest: int = LONGEST
    ) -> Iterator[list[str]]:
        """Yield the greedy answers of several ranks, which grow together.

        Args:
            question: The text that is asked.
            ranks: A rank for each answer; 0 is the base model.
            chat: Whether the question goes into the tokenizer's chat template.
            longest: The most tokens of an answer.

        Raises:
            MatryoshkaError: There is no question, or no such rank.
        """
        if not question.strip():
            raise MatryoshkaError("write a question first")
        said = prompt = self.prompt(question, chat).repeat(len(ranks), 1)
        end = self.adapter.model.generation_config.eos_token_id
        ends = torch.tensor([] if end is None else end).reshape(-1)
        for done in range(0, longest, _PIECE):
            # In pieces, so that the page shows them, and so that Gradio can stop between two.
            with self.adapter.rows(ranks):
                said = self.adapter.model.generate(
                    input_ids=said,
                    attention_mask=torch.ones_like(said),
                    do_sample=False,
                    max_new_tokens=min(_PIECE, longest - done),
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            answers = said[:, prompt.shape[1] :].cpu()
            over = torch.isin(answers, ends).cumsum(dim=1) > 0  # what follows an end is no answer
            texts = [row[~after] for row, after in zip(answers, over, strict=True)]
            yield self.tokenizer.batch_decode(texts, skip_special_tokens=True)
            if over[:, -1].all():
                return


def open_session(
    folder: str | os.PathLike[str],
    model: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Session:
    """Load an adapter onto its base model. Args: as `matryoshka_lora.evaluate`."""
    file = open_adapter(folder)
    name, revision = file.base_model(model, revision)
    adapter = load(load_model(name, dtype, revision), folder)
    return Session(file, adapter, tokenizer_beside(file, name, revision))


def page(session: Session) -> gr.Blocks:
    """Return the page. It writes nothing and takes no files."""
    import gradio as gr

    folder, ranks = Path(session.file.name), list(session.adapter.ranks)
    has_template = bool(session.tokenizer.chat_template)

    def ask(question: str, chat: bool, one: int, other: int) -> Iterator[list[Any]]:
        at = [int(one), int(other), 0]
        names = [f"Rank {at[0]}", f"Rank {at[1]}", "Base model"]
        try:
            for texts in session.answers(question, at, chat):
                yield [gr.Textbox(t, label=name) for t, name in zip(texts, names, strict=True)]
        except MatryoshkaError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="matryoshka play", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {folder.resolve().name} at two ranks")
        with gr.Row():
            first = gr.Dropdown(ranks, value=session.file.ranks[0], label="Rank")
            second = gr.Dropdown(ranks, value=ranks[-1], label="Compare with rank")
        question = gr.Textbox(label="Question", lines=2)
        with gr.Row():
            button = gr.Button("Ask", variant="primary")
            stop = gr.Button("Stop")
            name = "Chat template (off for an adapter that plain prompts have trained)"
            chat = gr.Checkbox(has_template, label=name, visible=has_template)
        with gr.Row():
            boxes = [gr.Textbox(label=name, lines=4) for name in ("Rank", "Rank", "Base model")]
        asking = gr.on([button.click, question.submit], ask, [question, chat, first, second], boxes)
        stop.click(None, cancels=[asking])
    return blocks


def play(session: Session, port: int | None = None) -> None:
    """Show the page on this machine's loopback until Ctrl-C; no other machine reaches it."""
    import gradio as gr

    page(session).queue(default_concurrency_limit=1, api_open=False).launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        max_file_size=0,  # no uploads
        footer_links=[],
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        # Fonts of the system: Gradio's own come from another host.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
