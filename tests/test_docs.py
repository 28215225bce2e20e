"""README and docs/: links resolve, commands exist, configs are valid, Python blocks run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
import yaml
from helpers.models import nested_llama, tiny_llama
from helpers.plain_peft import plain_adapter

from matryoshka_lora import Nesting, load
from matryoshka_lora.cli import app
from matryoshka_lora.sft import read_config

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHER_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "comfyui/README.md",
    "examples/README.md",
    "research/README.md",
)
PAGES = [*(ROOT / name for name in OTHER_PAGES), *DOCS]
# The blocks of other pages load the adapter that training.md saves.
PAGES_WITH_PYTHON = [
    ROOT / "README.md",
    ROOT / "docs/training.md",
    *(page for page in DOCS if page.stem != "training"),
]

_LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_PICTURE = re.compile(r'(?:srcset|src)="([^"]+)"')
_BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE_COMMAND = re.compile(r"`(matryoshka [a-z][^`]*)`")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=page_name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_blocks(page: Path) -> str:
    return _BLOCK.sub("", read(page))


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the blocks of a language that are to be run."""
    for not_run, block_language, block in _BLOCK.findall(read(page)):
        if block_language == language and not not_run:
            yield block


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and mkdocs make of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", word) for word in words}


@pages
def test_links_resolve(page: Path) -> None:
    for target, anchor in _LINK.findall(without_blocks(page)):
        file = page.parent / target if target else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target} has no heading #{anchor}"


@pages
def test_pictures_exist_for_light_and_dark_mode(page: Path) -> None:
    for picture in _PICTURE.findall(read(page)):
        assert (page.parent / picture).is_file()
        assert (page.parent / picture.replace("-light.", "-dark.")).is_file()


def test_every_page_is_in_the_navigation_once() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from files(list(entry.values()))
        elif isinstance(entry, list):
            for item in entry:
                yield from files(item)

    navigation = yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"]
    assert sorted(files(navigation)) == [page.name for page in DOCS]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))


def commands() -> dict[str, typer.core.TyperCommand]:
    group = typer.main.get_command(app)
    return group.commands  # type: ignore[attr-defined, no-any-return]


@pages
def test_commands_in_blocks_are_valid(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _, language, block in _BLOCK.findall(read(page)):
        if language != "sh":
            continue
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["matryoshka"]:
                for word in words:  # typer checks that the inputs exist
                    (tmp_path / word).mkdir(parents=True, exist_ok=True)
                commands()[words[1]].make_context(words[1], words[2:])  # raises for wrong usage
            elif words[:1] == ["make"]:
                assert words[1] in make_targets()


@pytest.mark.parametrize(
    # The changelog names options of earlier versions.
    "page",
    [page for page in PAGES if page.stem != "CHANGELOG"],
    ids=page_name,
)
def test_commands_in_the_text_have_these_options(page: Path) -> None:
    text = without_blocks(page)
    for command in _INLINE_COMMAND.findall(text):
        _, verb, *words = " ".join(command.split()).split(" -- ")[0].split()
        known = {name for parameter in commands()[verb].params for name in parameter.opts}
        options = {word for word in words if word.startswith("-")}
        assert options <= known | {"--help"}, command
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= make_targets()


@pages
def test_configs_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        file = tmp_path / "config.yaml"
        file.write_text(block)
        read_config(file, [] if "data" in yaml.safe_load(block) else ["data=my.jsonl"])


def messages_of_the_package() -> list[str]:
    """Return all texts of the source, with … for values."""
    messages: list[str] = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                messages.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    return messages


def test_quoted_errors_are_messages_of_the_package() -> None:
    quotes = re.findall(r"^\* `(.+?)`:", read(ROOT / "docs/faq.md"), re.MULTILINE)
    assert len(quotes) > 15
    messages = messages_of_the_package()
    assert [quote for quote in quotes if not any(quote in text for text in messages)] == []


def write_inputs(folder: Path) -> None:
    """Write two adapters, a base model and a fine-tuned one, and examples."""
    adapter = nested_llama(Nesting.powers_of_two(8))
    adapter.model.save_pretrained(folder / "some-lora")
    plain_adapter(folder / "other-lora", r=4)
    base_model = tiny_llama()
    base_model.save_pretrained(folder / "base-model")
    torch.nn.init.normal_(base_model.model.layers[0].self_attn.q_proj.weight)
    base_model.save_pretrained(folder / "tuned-model")
    examples = [{"prompt": f"{number} is", "completion": f" {number}"} for number in range(32)]
    lines = [json.dumps(example) + "\n" for example in examples]
    (folder / "my.jsonl").write_text("".join(lines))


@pytest.mark.slow
def test_python_blocks_run(tmp_path: Path) -> None:
    """Each page is one script, in a common folder."""
    write_inputs(tmp_path)
    scripts = {page: "\n".join(blocks(page, "python")) for page in PAGES_WITH_PYTHON}
    assert sum(script != "" for script in scripts.values()) >= 4
    for page, script in scripts.items():
        (tmp_path / "block.py").write_text(script, encoding="utf-8")
        process = subprocess.run(
            [sys.executable, "block.py"], capture_output=True, text=True, cwd=tmp_path
        )
        assert process.returncode == 0, f"{page.name}: {process.stderr[-2000:]}"
    assert load(tiny_llama(), tmp_path / "all-ranks").order == "svd"
