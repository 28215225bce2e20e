"""Open a page where two ranks of an adapter and the base model answer the same question.

    python examples/play.py runs/my/adapter

Needs gradio: pip install 'gradio>=6,<7'. Only this machine reaches the page, and it takes no files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import torch
from transformers import PreTrainedTokenizerBase

from matryoshka_lora import MatryoshkaError, NestedAdapter, load
from matryoshka_lora.formats.open import open_adapter
from matryoshka_lora.formats.peft_folder import base_model_of
from matryoshka_lora.peft.base_model import load_adapter_tokenizer, load_model

MAX_NEW_TOKENS = 256
TOKENS_PER_UPDATE = 8


@dataclass(frozen=True)
class Session:
    """An adapter in its base model.

    Attributes:
        name: The name of the adapter, for the title of the page.
        adapter: The adapter in the base model.
        tokenizer: The base model's tokenizer.
    """

    name: str
    adapter: NestedAdapter
    tokenizer: PreTrainedTokenizerBase

    def encode(self, question: str, use_chat_template: bool) -> torch.Tensor:
        """Return the tokens of a prompt, shape (1, length)."""
        use_chat_template = use_chat_template and bool(self.tokenizer.chat_template)
        if use_chat_template:
            question = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        encoding = self.tokenizer(
            question, return_tensors="pt", add_special_tokens=not use_chat_template
        )
        return encoding["input_ids"].to(self.adapter.model.device)

    def answer(
        self,
        question: str,
        ranks: Sequence[int],
        use_chat_template: bool = True,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Iterator[list[str]]:
        """Yield the greedy answers of several ranks as they grow.

        Args:
            question: The question.
            ranks: The rank of each answer; 0 is the base model.
            use_chat_template: Whether to put the question into the tokenizer's chat template.
            max_new_tokens: The largest number of tokens of an answer.

        Raises:
            MatryoshkaError: The question is empty, or a rank is not available.
        """
        if not question.strip():
            raise MatryoshkaError("The question is empty.")
        prompt = self.encode(question, use_chat_template).repeat(len(ranks), 1)
        eos_token_id = self.adapter.model.generation_config.eos_token_id
        eos_tokens = torch.tensor([] if eos_token_id is None else eos_token_id).reshape(-1)
        tokens = prompt
        for num_tokens in range(0, max_new_tokens, TOKENS_PER_UPDATE):
            # Generating in steps lets the page show the answer, and Gradio stop in between.
            with self.adapter.rows(ranks):
                tokens = self.adapter.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    max_new_tokens=min(TOKENS_PER_UPDATE, max_new_tokens - num_tokens),
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            answers = tokens[:, prompt.shape[1] :].cpu()
            has_ended = torch.isin(answers, eos_tokens).cumsum(dim=1) > 0
            yield [
                self.tokenizer.decode(answer[~ended], skip_special_tokens=True)
                for answer, ended in zip(answers, has_ended, strict=True)
            ]
            if has_ended[:, -1].all():
                return


def open_session(
    path: str | Path,
    base_model: str | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Session:
    """Load an adapter into its base model."""
    lora = open_adapter(path)
    base_model, base_revision = base_model_of(lora, base_model, base_revision)
    adapter = load(load_model(base_model, dtype, base_revision), path)
    tokenizer = load_adapter_tokenizer(lora, base_model, base_revision)
    return Session(Path(path).resolve().name, adapter, tokenizer)


def build_page(session: Session) -> gr.Blocks:
    """Return the page."""
    ranks = list(session.adapter.ranks)
    has_template = bool(session.tokenizer.chat_template)

    def ask(
        question: str, use_chat_template: bool, first_rank: int, second_rank: int
    ) -> Iterator[list[gr.Textbox]]:
        first_rank, second_rank = int(first_rank), int(second_rank)
        labels = [f"Rank {first_rank}", f"Rank {second_rank}", "Base model"]
        try:
            for answers in session.answer(
                question, [first_rank, second_rank, 0], use_chat_template
            ):
                yield [
                    gr.Textbox(answer, label=label)
                    for answer, label in zip(answers, labels, strict=True)
                ]
        except MatryoshkaError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="Matryoshka LoRA", analytics_enabled=False) as page:
        gr.Markdown(f"# {session.name} at two ranks")
        with gr.Row():
            first_rank = gr.Dropdown(ranks, value=ranks[0], label="Rank")
            second_rank = gr.Dropdown(ranks, value=ranks[-1], label="Compare with rank")
        question = gr.Textbox(label="Question", lines=2)
        with gr.Row():
            ask_button = gr.Button("Ask", variant="primary")
            stop_button = gr.Button("Stop")
            use_chat_template = gr.Checkbox(
                has_template,
                label="Chat template (off for an adapter that was trained on plain prompts)",
                visible=has_template,
            )
        with gr.Row():
            answers = [gr.Textbox(label=label, lines=4) for label in ("Rank", "Rank", "Base model")]
        asking = gr.on(
            [ask_button.click, question.submit],
            ask,
            [question, use_chat_template, first_rank, second_rank],
            answers,
        )
        stop_button.click(None, cancels=[asking])
    return page


def launch(session: Session, port: int | None = None) -> None:
    """Serve the page on this machine's loopback interface until Ctrl-C."""
    build_page(session).queue(default_concurrency_limit=1, api_open=False).launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        max_file_size=0,  # no uploads
        footer_links=[],
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        # The system's fonts, since Gradio loads its own from another host.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter")
    parser.add_argument("--base-model", help="default: the one that the adapter names")
    parser.add_argument("--base-revision", help="its revision on the hub")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"))
    parser.add_argument("--port", type=int, help="default: a free port from 7860")
    args = parser.parse_args()
    launch(open_session(args.adapter, args.base_model, args.base_revision, args.dtype), args.port)
