"""README and docs/: links lead somewhere, commands exist, configs are read, Python runs."""

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
from conftest import nested_llama, tiny_llama
from strangers import plain_adapter

from matryoshka_lora import Nesting, load
from matryoshka_lora.cli import app
from matryoshka_lora.train import read_config

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md")
PAGES = [*(ROOT / name for name in NAMES), *DOCS]
# serve.md goes on with what training.md has saved.
RUN = [ROOT / "README.md", ROOT / "docs/training.md", *(p for p in DOCS if p.stem != "training")]

_LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_PICTURE = re.compile(r'(?:srcset|src)="([^"]+)"')
_BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`(matryoshka [a-z][^`]*)`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the blocks of a language that are to be run."""
    for left_out, kind, block in _BLOCK.findall(text(page)):
        if kind == language and not left_out:
            yield block


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and mkdocs make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", text(page)), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pages
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(_BLOCK.sub("", text(page))):
        file = page.parent / target if target else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target} has no heading #{anchor}"
    for picture in _PICTURE.findall(text(page)):
        assert (page.parent / picture).is_file()
        assert (page.parent / picture.replace("-light.", "-dark.")).is_file()


def test_every_page_is_in_the_nav_once() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, (dict, list)):
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from files(part)

    listed = files(yaml.safe_load(text(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(listed) == [page.name for page in DOCS]


@pages
def test_commands_exist_with_their_options(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    for block in (found[2] for found in _BLOCK.findall(text(page)) if found[1] == "sh"):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["matryoshka"]:
                for word in words:  # typer wants the inputs to exist
                    (tmp_path / word).mkdir(parents=True, exist_ok=True)
                verbs[words[1]].make_context(words[1], words[2:])  # raises where typer would
            elif words[:1] == ["make"]:
                assert words[1] in targets
    for command in _INLINE.findall(_BLOCK.sub("", text(page))):
        _, verb, *words = " ".join(command.split()).split(" -- ")[0].split()
        known = {name for parameter in verbs[verb].params for name in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= known, command
    assert set(re.findall(r"`make ([a-z-]+)`", text(page))) <= targets


@pages
def test_configs_are_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        file = tmp_path / "config.yaml"
        file.write_text(block)
        read_config(file, [] if "data" in yaml.safe_load(block) else ["data=my.jsonl"])


def test_errors_on_the_help_page_are_ours() -> None:
    said = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(text(file))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                said.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    quoted = re.findall(r"^\* `(.+?)`:", text(ROOT / "docs/faq.md"), re.MULTILINE)
    assert len(quoted) > 15
    assert [quote for quote in quoted if not any(quote in one for one in said)] == []


@pytest.mark.slow
def test_python_runs(tmp_path: Path) -> None:
    """Page by page, in a folder that has adapters and a model before and after its tuning."""
    adapter = nested_llama(Nesting.powers_of_two(8))
    adapter.model.save_pretrained(tmp_path / "some-lora")
    plain_adapter(tmp_path / "other-lora", r=4)
    tiny_llama().save_pretrained(tmp_path / "base-model")
    tuned = tiny_llama()
    torch.nn.init.normal_(tuned.model.layers[0].self_attn.q_proj.weight)
    tuned.save_pretrained(tmp_path / "tuned-model")
    rows = [json.dumps({"prompt": f"{n} is", "completion": f" {n}"}) for n in range(32)]
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    scripts = {page: "\n".join(blocks(page, "python")) for page in RUN}
    assert sum(map(bool, scripts.values())) >= 4
    for page, script in scripts.items():
        (tmp_path / "block.py").write_text(script, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "block.py"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, f"{page.name}: {done.stderr[-2000:]}"
    assert load(adapter.model.unload(), tmp_path / "all-ranks").order == "svd"
