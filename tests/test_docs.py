"""README and docs/: links resolve, commands exist, configs are valid, blocks run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from helpers.page_inputs import write_inputs

import matryoshka_lora
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
    "research/earlier.md",
)
PAGES = [*(ROOT / name for name in OTHER_PAGES), *DOCS]
_LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_PICTURE = re.compile(r'(?:srcset|src)="([^"]+)"')
_BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE_COMMAND = re.compile(r"`(matryoshka [a-z][^`]*)`")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=page_name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_blocks(page: Path) -> str:
    return _BLOCK.sub("", read(page))


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of the blocks that are to be run, in their order."""
    for not_run, language, block in _BLOCK.findall(read(page)):
        if language in languages and not not_run:
            yield language, block


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
def test_every_block_is_recognised(page: Path) -> None:
    matches = _BLOCK.findall(read(page))
    assert len(re.findall(r"^ *```", read(page), re.MULTILINE)) == 2 * len(matches)
    comments = re.findall(r"^<!-- not run: ", read(page), re.MULTILINE)
    assert len(comments) == sum(not_run != "" for not_run, _, _ in matches)


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


def test_the_reference_has_every_public_name() -> None:
    names = re.findall(r"^::: matryoshka_lora\.(\w+)$", read(ROOT / "docs/api.md"), re.MULTILINE)
    assert set(matryoshka_lora.__all__) <= set(names)


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
    for _, block in blocks(page, "yaml"):
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


# Every rank becomes better than the base model.
TRAIN = """
matryoshka train config.yaml base_model=smollm2-135m output_dir=runs/mine max_steps=20 \\
    learning_rate=1e-3 lora.r=16 lora.target_modules=[v_proj,down_proj] \\
    lora.layers_to_transform=[26,27,28,29] nesting.train_ranks=false
"""
# The commands of research/README.md take hours.
PAGES_THAT_RUN = [
    page for page in PAGES if page.parent != ROOT / "research" and any(blocks(page, "sh", "python"))
]


def run_block(language: str, block: str, folder: Path) -> None:
    """Run a block in a folder, with this environment's commands, on CPUs, without a network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", block]
    if language == "python":
        (folder / "block.py").write_text(block, encoding="utf-8")
        command = [sys.executable, "block.py"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    output = process.stdout[-1000:] + process.stderr[-2000:]
    assert process.returncode == 0, f"{block}\n{output}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the blocks read."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def inputs_with_run(inputs: Path) -> Path:
    """The same folder after a short run on the bundled model, in ``runs/mine``."""
    run_block("sh", TRAIN, inputs)
    return inputs


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on a busy machine
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=page_name)
def test_blocks_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each page has a folder of its own, and each of its blocks a process, in their order."""
    page_blocks = list(blocks(page, "sh", "python"))
    needs_run = any("runs/mine" in block for _, block in page_blocks)
    inputs = request.getfixturevalue("inputs_with_run" if needs_run else "inputs")
    folder = shutil.copytree(inputs, tmp_path / "page")
    for language, block in page_blocks:
        run_block(language, block, folder)
