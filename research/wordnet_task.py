"""Make the study's classification task from WordNet 3.0: given a noun's gloss, name its class, one of 25.

The classes are WordNet's lexicographer files ("animal", "feeling", "shape", ...), without the one that holds the tops
of the hierarchy. 16 glosses of each class are for training, 2 for validation, 4 for test. Sister terms have almost the
same gloss, so no gloss is taken that shares half of its words with one that is taken already. The files are in the
repository; this script is how they were made, from Debian's package wordnet-base:

    python -m research.wordnet_task /usr/share/wordnet/data.noun research/configs/wordnet
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

CLASSES = (
    *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
"""Lexicographer files 04 to 28, in WordNet's order."""

SPLITS = {"test": 4, "validation": 2, "train": 16}
"""Glosses of each class, in the order in which they are drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nouns", type=Path, help="WordNet's data.noun")
    parser.add_argument("out", type=Path, help="folder for train.jsonl, validation.jsonl and test.jsonl")
    given = parser.parse_args()
    draw = random.Random(0)
    glosses = read_glosses(given.nouns)
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    taken: list[set[str]] = []
    for name, pool in glosses.items():
        draw.shuffle(pool)
        rest = iter(pool)
        for split, count in SPLITS.items():
            for _ in range(count):
                gloss = next(gloss for gloss in rest if is_new(gloss, taken))
                taken.append(words(gloss))
                splits[split].append({"prompt": f"Definition: {gloss}\nClass:", "completion": f" {name}"})
    for split, rows in splits.items():
        draw.shuffle(rows)
        (given.out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_glosses(path: Path) -> dict[str, list[str]]:
    """The glosses of each class, without examples, of 4 to 20 words."""
    found: dict[str, list[str]] = {name: [] for name in CLASSES}
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        data, _, text = line.partition(" | ")
        number, gloss = int(data.split()[1]), text.split("; ")[0].strip()
        if 4 <= number <= 28 and 4 <= len(gloss.split()) <= 20 and gloss.isascii():
            found[CLASSES[number - 4]].append(gloss)
    return found


def words(gloss: str) -> set[str]:
    """A gloss's words of four letters or more."""
    return set(re.findall(r"[a-z]{4,}", gloss.lower()))


def is_new(gloss: str, taken: list[set[str]]) -> bool:
    """Whether it shares less than half of its words, or of theirs, with each of those."""
    mine = words(gloss)
    return len(mine) > 1 and all(2 * len(mine & other) < min(len(mine), len(other)) for other in taken)


if __name__ == "__main__":
    main()
