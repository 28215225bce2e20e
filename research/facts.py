"""The study's memory task: made-up names, each with a random number. What is trained is what is asked.

It measures how much an adapter of a rank can hold: rank decides, and nothing is guessed. The seed of a run chooses its
facts, so rates are chosen on other facts than those of the test. Run as a script, this writes the first layers of the
study's model, with the tokens that names and numbers need, which are enough for the task and cost less:

    python -m research.facts runs/facts/model --layers 4
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from matryoshka_lora.models import load_model, load_tokenizer

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwz", "aeiou"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--layers", type=int, default=4, help="how many of its first layers")
    given = parser.parse_args()
    model, tokenizer = load_model(), load_tokenizer()
    model.model.layers = model.model.layers[: given.layers]
    model.config.num_hidden_layers = given.layers
    tokenizer, kept = cut_vocabulary(tokenizer, [fact["prompt"] + fact["completion"] for fact in facts(50_000, -1)])
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight[kept].detach().clone())
    embedding.num_embeddings = len(kept)
    model.tie_weights()
    model.config.vocab_size = model.lm_head.out_features = len(kept)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


def cut_vocabulary(tokenizer: Any, texts: list[str]) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A BPE tokenizer with the special tokens of another and those of some texts, with all that these are merged of.

    Returns:
        The tokenizer, and the old ids by the new ones.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    ids, merges = data["model"]["vocab"], data["model"]["merges"]
    kept = {tokenizer.convert_ids_to_tokens(i) for ids_of in tokenizer(texts)["input_ids"] for i in ids_of}
    kept |= {token["content"] for token in data["added_tokens"]} | {c for token in list(kept) for c in token}
    # A token comes from the first merge that makes it, so later merges are looked at before.
    used = []
    for left, right in reversed(merges):
        if left + right in kept:
            kept |= {left, right}
            used.append([left, right])
    order = sorted(kept & set(ids), key=ids.__getitem__)
    new = {token: number for number, token in enumerate(order)}
    data["model"] |= {"vocab": new, "merges": used[::-1]}
    data["added_tokens"] = [{**token, "id": new[token["content"]]} for token in data["added_tokens"]]
    special = tokenizer.special_tokens_map
    smaller = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), chat_template=tokenizer.chat_template, **special
    )
    return smaller, [ids[token] for token in order]


def facts(count: int, seed: int) -> list[dict[str, str]]:
    """Names of four syllables, all different, each with a number of four digits."""
    draw = random.Random(f"facts {seed}")
    numbers: dict[str, str] = {}
    while len(numbers) < count:
        name = "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(4)).capitalize()
        numbers.setdefault(name, f"{draw.randrange(10_000):04}")
    return [{"prompt": f"{name}:", "completion": f" {number}"} for name, number in numbers.items()]


if __name__ == "__main__":
    main()
