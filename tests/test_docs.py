"""The pages of docs/, without building them: `make docs` does that."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
STUDY = sorted((ROOT / "research/pages").glob("*.md"))

_LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_PICTURE = re.compile(r'<picture>\n<source [^>]*srcset="([^"]+)">\n<img alt="[^"]+" src="([^"]+)">\n</picture>')
_BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def in_nav(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
            yield from in_nav(part)


def anchors(page: Path) -> set[str]:
    """Of its headings, as mkdocs and GitHub make them, and those that it names itself."""
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    made = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', prose))


def test_every_page_is_in_the_nav_once() -> None:
    listed = list(in_nav(yaml.safe_load(text(ROOT / "mkdocs.yml"))["nav"]))
    ours = [name for name in listed if not name.startswith("research/")]
    assert sorted(ours) == [page.relative_to(DOCS).as_posix() for page in PAGES]
    for name in set(listed) - set(ours):
        assert (ROOT / "research/pages" / name.removeprefix("research/")).is_file()


@pytest.mark.parametrize("page", [*PAGES, *OTHERS, *STUDY], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_has_its_target(page: Path) -> None:
    for target, anchor in _LINK.findall(text(page)):
        file = page.parent / target if target else page
        assert file.exists(), f"{target} does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_is_there_for_white_and_for_dark_ground(page: Path) -> None:
    found = text(page)
    pairs = _PICTURE.findall(found)
    assert len(pairs) == found.count("<picture>") == found.count("</picture>")
    for dark, light in pairs:
        assert dark == light.replace("-light.", "-dark.") != light
        assert (page.parent / light).is_file()
        assert (page.parent / dark).is_file()


def test_every_picture_is_used() -> None:
    used = {name for page in [*PAGES, ROOT / "README.md"] for name in re.findall(r"figures/([\w.-]+)", text(page))}
    there = {path.name for path in (DOCS / "figures").iterdir()}
    assert {name for name in there if name.endswith(".svg")} <= used <= there


def test_pages_that_code_and_configs_name_exist() -> None:
    files = [file for folder in ("src", "research", "configs", "benchmarks") for file in (ROOT / folder).rglob("*")]
    named = {
        name
        for file in [*files, ROOT / "CHANGELOG.md"]
        if file.suffix in (".py", ".yaml", ".md")
        for name in re.findall(r"(?<![\w/.])docs/[\w/-]+\.\w+", text(file))
    }
    assert "docs/reorder.md" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def messages() -> str:
    """Every text in the package, with … where a value stands."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(text(file))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_error_on_the_help_page_is_one_of_the_package() -> None:
    quoted = re.findall(r"^\* `(.+?)`:", text(DOCS / "faq.md"), re.MULTILINE)
    assert len(quoted) > 30
    said = messages()
    assert [quote for quote in quoted if quote not in said] == []


def test_python_that_can_run_alone_runs(tmp_path: Path) -> None:
    """Page by page, beside a small adapter called some-lora; the memory table says what its block computes."""
    shutil.copytree(ROOT / "tests/adapters_0_1/lora", tmp_path / "some-lora")
    pages = {page: [code for mark, code in _BLOCK.findall(text(page)) if not mark] for page in PAGES}
    pages = {page: blocks for page, blocks in pages.items() if blocks}
    assert {page.name for page in pages} >= {"shrink.md", "qlora.md"}
    for page, blocks in pages.items():
        script = tmp_path / f"{page.stem}.py"
        script.write_text("\n".join(blocks))
        done = subprocess.run([sys.executable, script.name], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, f"{page.name}: {done.stderr[-2000:]}"
        if page.name == "qlora.md":
            for line in done.stdout.splitlines():
                name, figures = line.split(": ")
                assert re.search(rf"^\| {name} .*\| {' [|] '.join(figures.split(', '))} \|$", text(page), re.MULTILINE)


def test_every_block_of_python_is_whole_code_or_marked() -> None:
    for page in PAGES:
        for _, code in _BLOCK.findall(text(page)):
            ast.parse(code)
