"""The model card, README.md, of an adapter in PEFT's format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka_lora.formats import ANSWERS_CAVEAT
from matryoshka_lora.lora_file.hub import BUNDLED_MODEL, split_hub_id
from matryoshka_lora.lora_file.lora import NESTING_KEY, OutputPlan
from matryoshka_lora.lora_file.source_card import (
    CREATED_WITH,
    LICENSES_HEADING,
    ORIGINAL_HEADING,
    SourceCard,
)

_BUNDLED_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_CITATION = (
    "Nested LoRA adapters are from MatryoshkaLoRA "
    "([arXiv 2605.07850](https://arxiv.org/abs/2605.07850))."
)
# The Hub's name for what a model of a task type computes.
_PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# The fields of a source's card that stay if all sources agree, and the lists that are united.
_KEPT_FIELDS = ("license_name", "license_link", "pipeline_tag", "instance_prompt")
_UNITED_FIELDS = ("datasets", "language")
_ADAPTER_TAG = "base_model:adapter:"


def model_card(
    plan: OutputPlan,
    config: Mapping[str, Any],
    errors: Mapping[int, float],
    sources: Sequence[SourceCard] = (),
) -> str:
    """Return the model card of an output.

    Of the config it shows only fields that are known to be public, and no local path. The licenses,
    datasets, languages and tags of the sources stay. So does the text of a single source's card.

    Args:
        plan: The output.
        config: The output's ``adapter_config.json``.
        errors: The relative error of each rank of a nested adapter.
        sources: The cards of the sources.
    """
    base_model = str(config.get("base_model_name_or_path") or "an unknown base model")
    if base_model == BUNDLED_MODEL:
        base_model = _BUNDLED_MODEL_ID
    title, hub_id = base_model, None
    parts = split_hub_id(base_model)
    if parts and not parts.filename:
        hub_id = base_model
    else:
        # Do not publish a local path, nor let a name add text to the card.
        title = re.sub(r"[^\w. -]", "?", Path(base_model).name)

    # vLLM and others read only the factors.
    runtimes = "PEFT" if plan.other_tensors else "PEFT, vLLM and other runtimes"
    paragraphs = [
        f"# LoRA of rank {plan.rank} for {title}",
        f"A LoRA adapter of rank {plan.rank} for {runtimes}. {CREATED_WITH}",
    ]
    if NESTING_KEY in plan.metadata:
        paragraphs += _nested_paragraphs(plan, errors)
        paragraphs.append(_CITATION)
    if len(sources) > 1 and any(source.values("license") for source in sources):
        paragraphs += [LICENSES_HEADING, _license_list(sources)]
    if len(sources) == 1 and sources[0].text:
        text = sources[0].text
        if hub_id is None:
            text = text.replace(base_model, title)
        paragraphs += [ORIGINAL_HEADING, text]
    return "\n\n".join([_front_matter(config, hub_id, sources), *paragraphs]) + "\n"


def _front_matter(
    config: Mapping[str, Any], hub_id: str | None, sources: Sequence[SourceCard]
) -> str:
    """Return the fields at the start of the card, between lines of dashes."""
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {}
    for key in _KEPT_FIELDS:
        values = {value for source in sources for value in source.values(key)}
        if len(values) == 1:
            fields[key] = values.pop()
    for key in _UNITED_FIELDS:
        fields[key] = _united(sources, key) or None
    task_type = str(config.get("task_type"))
    fields["pipeline_tag"] = fields.get("pipeline_tag") or _PIPELINE_TAGS.get(task_type)
    tags = [tag for tag in _united(sources, "tags") if not tag.startswith(_ADAPTER_TAG)]
    tags += ["lora", "matryoshka-lora"]
    if hub_id is not None:
        tags.append(f"{_ADAPTER_TAG}{hub_id}")
    data = ModelCardData(
        license=_common_license(sources),
        library_name="peft",
        base_model=hub_id,
        tags=sorted(set(tags)),
        **fields,
    )
    return f"---\n{data.to_yaml()}\n---"


def _united(sources: Sequence[SourceCard], key: str) -> list[str]:
    """Return the values of a field of all sources, each once."""
    return list(dict.fromkeys(value for source in sources for value in source.values(key)))


def _common_license(sources: Sequence[SourceCard]) -> str | None:
    """Return the license of all sources, ``other`` if theirs differ, or None if none has one."""
    licenses = {", ".join(source.values("license")) for source in sources}
    if len(licenses) > 1:
        return "other"
    return next(iter(licenses), None) or None


def _license_list(sources: Sequence[SourceCard]) -> str:
    lines = ["The factors are those of a sum of LoRAs, whose licenses all apply:", ""]
    for source in sources:
        names = source.values("license_name") or source.values("license") or ["not named"]
        # A name must not add text to the card.
        words = [re.sub(r"[^\w./ -]", "?", word) for word in (source.name, ", ".join(names))]
        lines.append(f"- {words[0]}: {words[1]}")
    return "\n".join(lines)


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
    rows += ["", ANSWERS_CAVEAT]
    return [
        f"The adapter is nested: it can be deployed at {available}. To write another rank:",
        "```\nmatryoshka export THIS_FOLDER --rank RANK --output OUTPUT\n```",
        "\n".join(rows),
    ]
