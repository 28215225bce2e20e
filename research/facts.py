"""The memory task: made-up names, each with a random number. The test asks what was trained.

It measures how much an adapter of a rank can store: rank matters, and nothing can be guessed. The
seed of a run chooses its facts, so learning rates are chosen on other facts than those of the test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

CONSONANTS = "bcdfghjklmnpqrstvwz"
VOWELS = "aeiou"


def facts(count: int, seed: int | str) -> list[dict[str, str]]:
    """Return names of four syllables, all different, each with a number of four digits."""
    rng = random.Random(f"facts {seed}")
    numbers: dict[str, str] = {}
    while len(numbers) < count:
        syllables = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(4)]
        numbers.setdefault("".join(syllables).capitalize(), f"{rng.randrange(10_000):04}")
    return [{"prompt": f"{name}:", "completion": f" {number}"} for name, number in numbers.items()]


def truncate_model(model: Any, tokenizer: Any, num_layers: int) -> tuple[Any, Any]:
    """Return a model's first layers with the tokens that the task needs, and the tokenizer.

    They are enough for the task, and faster. The model is changed in place.
    """
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    texts = [fact["prompt"] + fact["completion"] for fact in facts(50_000, -1)]
    tokenizer, kept_ids = truncate_vocabulary(tokenizer, texts)
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight[kept_ids].detach().clone())
    embedding.num_embeddings = len(kept_ids)
    model.tie_weights()
    model.vocab_size = len(kept_ids)
    model.config.vocab_size = len(kept_ids)
    model.lm_head.out_features = len(kept_ids)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    return model, tokenizer


def truncate_vocabulary(
    tokenizer: Any, texts: Sequence[str]
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Return a BPE tokenizer with the tokens that some texts need, and the special tokens.

    Returns:
        The tokenizer, and the old id of each new one.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    old_ids = data["model"]["vocab"]
    used_ids = {token_id for ids in tokenizer(list(texts))["input_ids"] for token_id in ids}
    kept = {tokenizer.convert_ids_to_tokens(token_id) for token_id in used_ids}
    kept |= {token["content"] for token in data["added_tokens"]}
    kept |= {character for token in list(kept) for character in token}
    # A merge needs its two parts, which come from earlier merges, so the last merge is first here.
    merges: list[list[str]] = []
    for left, right in reversed(data["model"]["merges"]):
        if left + right in kept:
            kept |= {left, right}
            merges.append([left, right])
    merges.reverse()
    tokens = sorted(kept & set(old_ids), key=old_ids.__getitem__)
    new_ids = {token: new_id for new_id, token in enumerate(tokens)}
    data["model"]["vocab"] = new_ids
    data["model"]["merges"] = merges
    for token in data["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    new_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )
    return new_tokenizer, [old_ids[token] for token in tokens]
