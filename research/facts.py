"""The study's memory task: made-up names, each with a random number. What is trained is what is asked.

It measures how much an adapter of a rank can hold: rank decides, and nothing is guessed. The seed of a run chooses its
facts, so rates are chosen on other facts than those of the test. Run as a script, this writes the first layers of the
study's model, which are enough for the task and cost less:

    python -m research.facts runs/facts/model --layers 4
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from matryoshka_lora.models import load_model, load_tokenizer

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwz", "aeiou"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--layers", type=int, default=4, help="how many of its first layers")
    given = parser.parse_args()
    model = load_model()
    model.model.layers = model.model.layers[: given.layers]
    model.config.num_hidden_layers = given.layers
    model.save_pretrained(given.out)
    load_tokenizer().save_pretrained(given.out)


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
