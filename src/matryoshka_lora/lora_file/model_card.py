"""The model card, README.md, of an adapter in PEFT's format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matryoshka_lora.formats import ERROR_CAVEAT
from matryoshka_lora.lora_file.hub import BUNDLED_MODEL, split_hub_id
from matryoshka_lora.lora_file.lora import NESTING_KEY, OutputPlan

_BUNDLED_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_CITATION = "Method: MatryoshkaLoRA ([arXiv 2605.07850](https://arxiv.org/abs/2605.07850))."


def model_card(plan: OutputPlan, config: Mapping[str, Any], errors: Mapping[int, float]) -> str:
    """Return the model card of an output.

    It shows only fields that are known to be public: no other field of the config, no local path.

    Args:
        plan: The output.
        config: The output's ``adapter_config.json``.
        errors: The relative error of each rank of a nested adapter.
    """
    base_model = str(config.get("base_model_name_or_path") or "an unknown base model")
    if base_model == BUNDLED_MODEL:
        base_model = _BUNDLED_MODEL_ID
    front_matter = ["library_name: peft", "tags:", "- lora", "- matryoshka-lora"]
    hub_id = split_hub_id(base_model)
    if hub_id and not hub_id.filename:
        front_matter.append(f"base_model: {base_model}")
    else:
        # Do not publish a local path, nor let a name add text to the card.
        base_model = re.sub(r"[^\w. -]", "?", Path(base_model).name)

    # vLLM and others read only the factors.
    runtimes = "PEFT" if plan.other_tensors else "PEFT, vLLM and other runtimes"
    paragraphs = [
        "\n".join(["---", *front_matter, "---"]),
        f"# LoRA of rank {plan.rank} for {base_model}",
        f"A LoRA adapter of rank {plan.rank} for {runtimes}. Created with matryoshka-lora.",
    ]
    if NESTING_KEY in plan.metadata:
        paragraphs += _nested_paragraphs(plan, errors)
        paragraphs.append(_CITATION)
    return "\n\n".join(paragraphs) + "\n"


def _nested_paragraphs(plan: OutputPlan, errors: Mapping[int, float]) -> list[str]:
    """Return how to deploy another rank, and the table of errors."""
    nesting = json.loads(plan.metadata[NESTING_KEY])
    ranks = nesting["ranks"]
    if nesting["deploy"] == "paper":
        available = f"the ranks {', '.join(map(str, ranks))}"
    else:
        available = f"every rank from 1 to {plan.rank}, in the order `{nesting['order']}`"
    rows = ["| rank | relative error of the update |", "|---|---|"]
    rows += [f"| {rank} | {error:.1%} |" for rank, error in errors.items()]
    rows += ["", ERROR_CAVEAT]
    return [
        f"The adapter is nested: it can be deployed at {available}. To write another rank:",
        "```\nmatryoshka export THIS_FOLDER --rank RANK --output OUTPUT\n```",
        "\n".join(rows),
    ]
