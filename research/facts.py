"""Make the memory task: made-up names, each with a random number. What is trained is what is asked.

It measures how much an adapter of a rank can hold: rank decides, and nothing is guessed. The seed
of a run chooses its facts, so rates are chosen on other facts than those of the test.
"""

from __future__ import annotations

import json
import random
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwz", "aeiou"


def facts(count: int, seed: int | str) -> list[dict[str, str]]:
    """Return names of four syllables, all different, each with a number of four digits."""
    draw = random.Random(f"facts {seed}")
    numbers: dict[str, str] = {}
    while len(numbers) < count:
        syllables = (draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(4))
        numbers.setdefault("".join(syllables).capitalize(), f"{draw.randrange(10_000):04}")
    return [{"prompt": f"{name}:", "completion": f" {n}"} for name, n in numbers.items()]


def cut(model: Any, tokenizer: Any, layers: int) -> tuple[Any, Any]:
    """Return a model's first layers, with the tokens that the task needs, and the tokenizer.

    They are enough for the task and cost less. The model is changed in place.
    """
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    texts = [fact["prompt"] + fact["completion"] for fact in facts(50_000, -1)]
    tokenizer, kept = cut_vocabulary(tokenizer, texts)
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight[kept].detach().clone())
    embedding.num_embeddings = len(kept)
    model.tie_weights()
    model.vocab_size = model.config.vocab_size = model.lm_head.out_features = len(kept)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    return model, tokenizer


def cut_vocabulary(tokenizer: Any, texts: list[str]) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Return a BPE tokenizer with another's special tokens, and those that some texts need.

    Returns:
        The tokenizer, and the old ids by the new ones.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    ids, merges = data["model"]["vocab"], data["model"]["merges"]
    used = {i for ids_of in tokenizer(texts)["input_ids"] for i in ids_of}
    kept = {tokenizer.convert_ids_to_tokens(i) for i in used}
    kept |= {token["content"] for token in data["added_tokens"]}
    kept |= {character for token in list(kept) for character in token}
    # A token comes from the first merge that makes it, so later merges are looked at before.
    needed = []
    for left, right in reversed(merges):
        if left + right in kept:
            kept |= {left, right}
            needed.append([left, right])
    order = sorted(kept & set(ids), key=ids.__getitem__)
    new = {token: number for number, token in enumerate(order)}
    data["model"] |= {"vocab": new, "merges": needed[::-1]}
    data["added_tokens"] = [{**one, "id": new[one["content"]]} for one in data["added_tokens"]]
    smaller = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )
    return smaller, [ids[token] for token in order]
