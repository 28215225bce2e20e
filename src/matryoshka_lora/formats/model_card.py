"""The model card, README.md, of an adapter in PEFT's format, and the licenses of its sources."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from matryoshka_lora.atomic import CREATED_WITH
from matryoshka_lora.formats.hub import CARD_NAME, LICENSE_FILES, is_foreign_link, split_hub_id
from matryoshka_lora.lora.convert import part_of_pipeline
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.registry import ANSWERS_CAVEAT, FORMATS, PICTURES_CAVEAT
from matryoshka_lora.text import format_value
from matryoshka_lora.units import pluralize

ORIGINAL_HEADING = "# Original model card"
"""The heading of the text of the source's card."""
LICENSES_HEADING = "# Licenses"
"""The heading of the licenses of the sources of a sum."""

_FRONT_MATTER = re.compile(r"\s*---\s*\n(?P<yaml>.*?)\n---\s*(\n|$)", re.DOTALL)
# The title of the template that PEFT saves if nobody has written a card.
_UNFILLED_TEMPLATE = "# Model Card for Model ID"
_CITATION = (
    "Nested LoRA adapters are from MatryoshkaLoRA "
    "([arXiv 2605.07850](https://arxiv.org/abs/2605.07850))."
)
# The Hub's pipeline tag by PEFT's task type.
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


@dataclass(frozen=True)
class SourceCard:
    """The model card of a source.

    Attributes:
        name: The name of its folder, or its id on the Hugging Face Hub.
        front_matter: The fields at the start of its README.md.
        text: The text after them; empty if it is an unfilled template.
    """

    name: str
    front_matter: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def values(self, key: str) -> list[str]:
        """Return a field as a list of strings; empty if the card does not have it."""
        value = self.front_matter.get(key)
        values = value if isinstance(value, list) else [value]
        return [item for item in values if isinstance(item, str)]


def read_source_card(folder: Path) -> SourceCard:
    """Return the model card of a folder; an empty one if it has none."""
    name = _source_name(folder)
    file = folder / CARD_NAME
    if not file.is_file() or is_foreign_link(file, folder):
        return SourceCard(name)
    text = file.read_text(encoding="utf-8", errors="replace")
    match = _FRONT_MATTER.match(text)
    front_matter: dict[str, Any] = {}
    if match:
        text = text[match.end() :]
        front_matter = _parse_yaml(match["yaml"], file)
    if CREATED_WITH in text:  # keep only the texts of earlier sources
        _, heading, licenses = text.partition(f"\n{LICENSES_HEADING}\n")
        original = text.partition(f"\n{ORIGINAL_HEADING}\n")[2]
        text = original or heading + licenses
    if _UNFILLED_TEMPLATE in text:
        text = ""
    return SourceCard(name, front_matter, text.strip())


def _parse_yaml(text: str, file: Path) -> dict[str, Any]:
    import yaml

    try:
        return dict(yaml.safe_load(text) or {})
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"The front matter of {file} is damaged ({reason}), so license and tags are not kept.",
            stacklevel=2,
        )
        return {}


def _source_name(folder: Path) -> str:
    # In the Hub's cache, a repository is in models--OWNER--NAME/snapshots/COMMIT.
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def copy_license_files(folders: Sequence[Path], output_folder: Path) -> None:
    """Copy the license files of all sources. Different files of one name get the source's name."""
    for folder in folders:
        for pattern in LICENSE_FILES:
            for file in sorted(folder.glob(pattern)):
                if not file.is_file() or is_foreign_link(file, folder):
                    continue
                output_file = output_folder / file.name
                text = file.read_bytes()
                source_name = _source_name(folder).replace("/", "-")
                names = chain([source_name], (f"{source_name}-{i}" for i in count(2)))
                while output_file.exists() and output_file.read_bytes() != text:
                    output_file = output_folder / f"{file.stem}-{next(names)}{file.suffix}"
                output_file.write_bytes(text)


# The card


def model_card(
    lora: Lora,
    config: Mapping[str, Any],
    errors: Mapping[int, float],
    original_error: float,
    sources: Sequence[SourceCard] = (),
) -> str:
    """Return the model card of an output.

    Of the config it shows only fields that are known to be public, and no local path. The licenses,
    datasets, languages and tags of the sources stay. So does the text of a single source's card.
    """
    base_model = str(config.get("base_model_name_or_path") or "an unknown base model")
    title, hub_id = base_model, None
    parts = split_hub_id(base_model)
    if parts and not parts.filename:
        hub_id = base_model
    else:
        # Do not publish a local path, nor let a name add text to the card.
        title = _plain(Path(base_model).name)

    # vLLM and others read only the factors.
    runtimes = "PEFT" if lora.other_tensors else "PEFT, vLLM and other runtimes"
    paragraphs = [
        f"# LoRA of rank {lora.max_rank} for {title}",
        f"A LoRA adapter of rank {lora.max_rank} for {runtimes}. {CREATED_WITH}",
    ]
    if original_error > 0:
        paragraphs.append(
            f"Its update has a relative error of {original_error:.1%} against the original, which "
            "it was truncated from."
        )
    if part_of_pipeline(lora):
        paragraphs.append(
            "diffusers and ComfyUI load a single file:\n\n```\nmatryoshka export THIS_FOLDER "
            f"--rank {lora.max_rank} --output lora.safetensors\n```"
        )
    else:
        load = FORMATS["peft"].load.format(path='"THIS_FOLDER"')
        lines = ["from peft import PeftModel", "", f"model = {load}"]
        if hub_id is not None and config.get("task_type") == "CAUSAL_LM":
            lines.insert(1, "from transformers import AutoModelForCausalLM")
            lines.insert(3, f'base_model = AutoModelForCausalLM.from_pretrained("{hub_id}")')
        paragraphs.append("\n".join(["```python", *lines, "```"]))
    scores = _score_table(lora)
    if lora.nesting is not None:
        available = f"every rank from 1 to {lora.max_rank}, in the order `{lora.order}`"
        if lora.deploy == "paper":
            available = f"the ranks {', '.join(map(str, lora.nesting.ranks))}"
        elif lora.small is not None:
            available += f"; the ranks up to {lora.small_rank} were trained, and are in `small`"
        rows = ["| rank | relative error of the update |", "|---|---|"]
        for rank, error in errors.items():
            trained = " (trained)" if rank <= lora.small_rank else ""
            rows.append(f"| {rank} | {error:.1%}{trained} |")
        paragraphs += [
            f"The adapter is nested: PEFT loads rank {lora.max_rank}, and it can be deployed at "
            f"{available}. To write another rank:",
            "```\nmatryoshka export THIS_FOLDER --rank RANK --output OUTPUT\n```",
            "\n".join(rows),
        ]
        if not scores:
            paragraphs.append(PICTURES_CAVEAT if part_of_pipeline(lora) else ANSWERS_CAVEAT)
    paragraphs += scores
    if lora.nesting is not None:
        paragraphs.append(_CITATION)
    if len(sources) > 1 and any(source.values("license") for source in sources):
        paragraphs += [LICENSES_HEADING, _license_list(sources)]
    if len(sources) == 1 and sources[0].text:
        text = sources[0].text
        if hub_id is None:
            text = text.replace(base_model, title)
        paragraphs += [ORIGINAL_HEADING, text]
    front_matter = _front_matter(lora, config, hub_id, sources)
    return "\n\n".join([front_matter, *paragraphs]) + "\n"


def _score_table(lora: Lora) -> list[str]:
    """Return paragraphs with the scores of each rank that the output has; none without scores."""
    ranks = {rank for scores in lora.scores for rank in scores.values if rank > 0}
    if lora.nesting is None:
        ranks &= {lora.max_rank}
    if not ranks:
        return []
    names = [_plain(f"{scores.task} {scores.metric}") for scores in lora.scores]
    lines = [f"| rank | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for rank in (0, *sorted(ranks)):
        cells = [
            format_value(scores.values.get(rank), scores.standard_errors.get(rank))
            for scores in lora.scores
        ]
        if any(cells):
            lines.append(f"| {rank or 'base model'} | {' | '.join(cells)} |")
    counts = {
        f"{_plain(scores.task)}: {pluralize(scores.num_questions, 'question')}"
        for scores in lora.scores
    }
    dtypes = ", ".join(sorted({_plain(scores.dtype) for scores in lora.scores}))
    questions = ", ".join(sorted(counts))
    note = f"± is one standard error. {questions}. Dtype of the base model: {dtypes}."
    return ["\n".join(lines), note]


def _plain(name: str) -> str:
    """Return a name that cannot add markup to the card."""
    return re.sub(r"[^\w. -]", "?", name)


def _front_matter(
    lora: Lora, config: Mapping[str, Any], hub_id: str | None, sources: Sequence[SourceCard]
) -> str:
    """Return the fields at the start of the card, between lines of dashes."""
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {}
    for key in _KEPT_FIELDS:
        values = {tuple(source.values(key)) for source in sources}
        if len(values) == 1 and (value := values.pop()):
            fields[key] = value[0]
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
    """Return the license of all sources: ``other`` if they differ, None if no source has one."""
    licenses = {", ".join(source.values("license")) for source in sources}
    if len(licenses) > 1:
        return "other"
    return next(iter(licenses), None) or None


def _license_list(sources: Sequence[SourceCard]) -> str:
    lines = ["This adapter is a sum of LoRAs. The license of each of them applies:", ""]
    for source in sources:
        names = source.values("license_name") or source.values("license") or ["not named"]
        # A name must not add text to the card.
        words = [re.sub(r"[^\w./ -]", "?", word) for word in (source.name, ", ".join(names))]
        lines.append(f"- {words[0]}: {words[1]}")
    return "\n".join(lines)
