"""A chat model that trains in a second: a small Llama whose tokens are characters."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.models import tiny_llama

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of printable ASCII.

    ``</s>`` both ends a turn and pads, as ``<|im_end|>`` of SmolLM2.
    """
    tokens = ["<unk>", "<s>", "</s>", "\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    fast_tokenizer.chat_template = TEMPLATE
    return fast_tokenizer


def save_tiny_chat(folder: Path) -> Path:
    """Save the model and its tokenizer, and return the folder."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(
        vocab_size=len(tokenizer), initializer_range=0.02, max_position_embeddings=512
    )
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
