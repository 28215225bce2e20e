"""Model cards: what the sources' cards say stays, as far as it is true of the output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluations import NUM_CORRECT, NUM_EXAMPLES, new_evaluation
from helpers.models import nested_llama
from helpers.plain_peft import plain_adapter
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from matryoshka_lora import Nesting, combine, export, reorder
from matryoshka_lora.formats.open import open_lora
from matryoshka_lora.formats.safetensors_io import NESTING_KEY

BASE_MODEL = "org/base"
FIELDS = {
    "license": "apache-2.0",
    "datasets": ["org/data"],
    "language": "de",
    "tags": ["poems", "base_model:adapter:/home/somebody/base"],
    "base_model": "/home/somebody/base",
    "model-index": [{"name": "x", "results": []}],
}
TEXT = "# Poems\n\nA LoRA that writes poems."


def save_adapter(folder: Path, card: str | None, base_model: str = BASE_MODEL) -> Path:
    plain_adapter(folder, target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base_model, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def card_with(text: str = TEXT, **fields: Any) -> str:
    return f"---\n{json.dumps({**FIELDS, **fields})}\n---\n\n{text}\n"


def export_ladder(source: Path, output: Path) -> None:
    export(source, output.with_name("ladder"), [2, 4], format="ladder")
    output.with_name("ladder").joinpath(f"{source.name}@4").rename(output)


OPERATIONS: dict[str, Callable[[Path, Path], object]] = {
    "export": lambda source, output: export(source, output, 4),
    "ladder": export_ladder,
    "reorder": reorder,
    "twice": lambda source, output: export(reorder_beside(source), output, 4),
}


def reorder_beside(source: Path) -> Path:
    reorder(source, source.with_name("nested"))
    return source.with_name("nested")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_card_and_the_license_of_the_source_stay(operation: str, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "poems", card_with())
    (source / "LICENSE.txt").write_text("Do what you like.")
    OPERATIONS[operation](source, tmp_path / "output")
    assert (tmp_path / "output" / "LICENSE.txt").read_text() == "Do what you like."
    card = ModelCard.load(tmp_path / "output" / "README.md")
    data = card.data
    assert (data.license, data.datasets, data.language) == ("apache-2.0", ["org/data"], ["de"])
    assert data.to_dict()["library_name"] == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == BASE_MODEL
    assert {"poems", "lora", f"base_model:adapter:{BASE_MODEL}"} < set(data.tags)
    assert data.eval_results is None  # they are not those of another rank
    assert "somebody" not in card.content
    ours, _, original = card.text.partition("# Original model card")
    assert "Created with matryoshka-lora." in ours
    assert original.strip() == TEXT


def test_a_local_base_model_is_named_without_its_path(tmp_path: Path) -> None:
    base_model = "/home/somebody/base"
    text = f"Fine-tuned from {base_model}."
    source = save_adapter(tmp_path / "lora", card_with(text), base_model)
    export(source, tmp_path / "output", 4)
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert "somebody" not in card.content
    assert "Fine-tuned from base." in card.text
    assert card.data.base_model is None


def test_a_template_that_nobody_has_filled_in_is_left_out(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "lora", None)
    assert "More Information Needed" in (source / "README.md").read_text()
    export(source, tmp_path / "output", 4)
    assert "Original" not in (tmp_path / "output" / "README.md").read_text()


def test_a_field_of_the_source_is_preferred_to_a_default(tmp_path: Path) -> None:
    fields = {"pipeline_tag": "summarization", "license": "other", "license_name": "poetic"}
    source = save_adapter(tmp_path / "lora", card_with(**fields))
    export(source, tmp_path / "output", 4)
    data = ModelCard.load(tmp_path / "output" / "README.md").data.to_dict()
    assert {key: data[key] for key in fields} == fields


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (("mit", "mit"), "mit"),
        (("mit", "cc-by-4.0"), "other"),
        (("mit", None), "other"),
        ((None, None), None),
    ],
)
def test_a_sum_names_the_licenses_of_all_its_sources(
    licenses: tuple[str | None, ...], expected: str | None, tmp_path: Path
) -> None:
    sources = []
    for number, license_id in enumerate(licenses):
        fields = {"license": license_id, "datasets": [f"org/data-{number}"]}
        source = save_adapter(tmp_path / f"lora-{number}", card_with(**fields))
        (source / "LICENSE").write_text(f"The terms of {license_id}")
        sources.append(source)
    combine(sources, tmp_path / "sum")
    export(tmp_path / "sum", tmp_path / "output", 4)
    for folder in ("sum", "output"):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert card.data.license == expected
        assert card.data.datasets == ["org/data-0", "org/data-1"]
        assert TEXT not in card.text  # no text is true of the sum
        for number, license_id in enumerate(licenses):
            line = f"lora-{number}: {license_id or 'not named'}\n"
            assert (line in card.text) == any(licenses)
        terms = {file.read_text() for file in (tmp_path / folder).glob("LICENSE*")}
        assert terms == {f"The terms of {license_id}" for license_id in licenses}


def test_sources_of_one_name_keep_their_licenses(tmp_path: Path) -> None:
    fields = [{"license": "other", "license_name": "poetic"}, {"license": "gpl-3.0"}, {}]
    sources = []
    for number, values in enumerate(fields):
        source = save_adapter(tmp_path / str(number) / "adapter", card_with(**values))
        (source / "LICENSE").write_text(f"terms {number}")
        sources.append(source)
    combine(sources, tmp_path / "sum")
    data = ModelCard.load(tmp_path / "sum" / "README.md").data
    assert (data.license, data.get("license_name")) == ("other", None)
    terms = sorted(file.read_text() for file in (tmp_path / "sum").glob("LICENSE*"))
    assert terms == ["terms 0", "terms 1", "terms 2"]


@pytest.mark.parametrize(
    "front_matter", ["license: [", "- a", "? [a]\n: b", "[" * 5000, "a: &x [*x]\ntags: *x"]
)
def test_a_damaged_front_matter_does_not_stop_an_export(front_matter: str, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "lora", f"---\n{front_matter}\n---\n{TEXT}\n")
    if front_matter.startswith("a:"):  # refers to itself, and is valid
        export(source, tmp_path / "output", 4)
    else:
        with pytest.warns(UserWarning, match="front matter"):
            export(source, tmp_path / "output", 4)
    data = ModelCard.load(tmp_path / "output" / "README.md").data
    assert data.to_dict()["library_name"] == "peft"


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_a_link_out_of_the_folder_is_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    source = save_adapter(tmp_path / "lora", None)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../private")
    with pytest.warns(UserWarning, match="symbolic link"):
        export(source, tmp_path / "output", 4)
    assert not (tmp_path / "output" / "LICENSE").exists()
    assert "secret" not in (tmp_path / "output" / "README.md").read_text()


def test_the_scores_of_an_evaluation_are_in_the_card(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting((1, 2, 4)))
    evaluation = new_evaluation("family", "a|b", dtype="bfloat16")
    folder = adapter.save_pretrained(tmp_path / "adapter", evaluation=evaluation)
    card = ModelCard.load(folder / "README.md")
    assert "| base model | 0.333 ± 0.061 | 0.333 ± 0.061 |" in card.text
    assert all(word in card.text for word in ("family: 60 questions", "bfloat16"))
    assert "Run `matryoshka eval`" not in card.text
    assert "a|b" not in card.text
    for rank, count in NUM_CORRECT.items():
        if rank > 0:
            assert f"| {rank} | {count / NUM_EXAMPLES:.3f} ± " in card.text
    adapter.save(tmp_path / "without")
    text = (tmp_path / "without" / "README.md").read_text()
    assert "one standard error" not in text
    assert "Run `matryoshka eval`" in text


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"rank": 2}, 2),
        ({"rank": 4}, 4),
        ({"rank": 3}, None),  # was not evaluated
        ({"rank": 2, "scale": {"*": 0.5}}, None),  # computes something else
        ({"rank": 2, "keep": "99%"}, None),
        ({"rank": 8, "pad": True}, None),
    ],
    ids=str,
)
def test_an_exported_rank_has_its_scores_and_says_how_to_load_it(
    options: dict[str, Any], rank: int | None, tmp_path: Path
) -> None:
    adapter = nested_llama(Nesting((1, 2, 4)))
    adapter.save(tmp_path / "adapter", evaluation=new_evaluation())
    export(tmp_path / "adapter", tmp_path / "output", **options)
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert 'PeftModel.from_pretrained(base_model, "THIS_FOLDER")' in card.text
    rows = [line.split()[1] for line in card.text.splitlines() if "±" in line and "|" in line]
    assert rows == ([] if rank is None else ["base", str(rank)])


def test_other_factors_have_no_scores(tmp_path: Path) -> None:
    folder = nested_llama(Nesting((1, 2, 4))).save(tmp_path / "a", evaluation=new_evaluation())
    combine([folder, folder], tmp_path / "sum")
    open_lora(folder).map(lambda factors: factors._replace(B=2 * factors.B)).save(tmp_path / "map")
    for name in ("sum", "map"):
        assert "one standard error" not in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("scores", [3, [{"task": "x"}], [{"values": 1, "standard_errors": 2}]])
def test_damaged_scores_are_not_read(scores: Any, tmp_path: Path) -> None:
    nested_llama(Nesting((1, 2, 4))).save(tmp_path / "adapter", evaluation=new_evaluation())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "np") as tensors:
        metadata = tensors.metadata()
    metadata[NESTING_KEY] = json.dumps({**json.loads(metadata[NESTING_KEY]), "scores": scores})
    save_file(load_file(file), file, metadata)
    with pytest.warns(UserWarning, match="damaged"):
        assert open_lora(tmp_path / "adapter").nesting is None
