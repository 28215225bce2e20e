"""README.md of an adapter: the model card, made of an allow-list of what is known about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD_NAME = "README.md"

_US = "[matryoshka-lora](https://arxiv.org/abs/2605.07850)"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What others call the base model that is embedded in a package."""


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    order: str | None = None,
    errors: Mapping[int, float] | None = None,
) -> None:
    """Write the model card of an adapter into its new folder.

    Args:
        folder: The adapter's.
        config: PEFT's config, of which rank, alpha and the base model's name are shown.
        order: How a nested adapter was reordered; None for an ordinary one.
        errors: What each nested rank leaves out: the norm of it over the norm of the update.
    """
    base = str(config.get("base_model_name_or_path") or "")
    base = _HUB_NAMES.get(base, base)
    is_id = bool(_HUB_ID.fullmatch(base)) and not Path(base).exists()
    shown = base if is_id else Path(base).name  # the folders of this machine are nobody's business
    head = ["library_name: peft", "tags:", "- lora", "- matryoshka-lora"]
    head += [f"base_model: {base}"] if is_id else []
    rank, of = config["r"], f" for `{shown}`" if shown else ""
    if order is None:
        title = f"A LoRA adapter of rank {rank}"
        text = (
            f"An ordinary LoRA adapter{of}, with r={rank} and lora_alpha={config['lora_alpha']:g}. "
            f"PEFT, vLLM and others read it. It was cut out by {_US}."
        )
    else:
        title = "A LoRA adapter for every rank"
        ranks = "its nested ranks" if order == "paper" else "every rank"
        text = (
            f"One adapter{of} that serves {ranks} up to {rank}, made by {_US} (order `{order}`). "
            f"PEFT reads this folder as rank {rank}. A smaller one for PEFT, vLLM or llama.cpp: "
            "`matryoshka export THIS_FOLDER --rank RANK -o OUT`."
        )
        rows = [f"| {r} | {100 * error:.1f} % |" for r, error in (errors or {}).items()]
        text += "\n\n| rank | norm of the update that it leaves out |\n|---|---|\n" + "\n".join(
            rows
        )
    card = "\n".join(["---", *head, "---", "", f"# {title}", "", text, ""])
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
