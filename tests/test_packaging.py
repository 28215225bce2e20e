"""The files that are shipped, and the extras that they need."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import matryoshka_lora
from tools.release_metadata import project_urls, readme_for_index

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def package_name(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0].lower().replace("-", "_")


def imported_packages(file: Path) -> Iterator[str]:
    """Yield the top-level package of every import in a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert matryoshka_lora.__version__ == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    requirements = (ROOT / "examples/space/requirements.txt").read_text()
    assert f"matryoshka_lora-{version}-" in requirements


def test_the_nodes_for_comfyui_have_this_version_and_install_nothing() -> None:
    nodes = tomllib.loads((ROOT / "comfyui/pyproject.toml").read_text())["project"]
    assert nodes["version"] == PROJECT["version"].partition(".dev")[0]
    assert nodes["requires-python"] == PROJECT["requires-python"]
    # Before the first release, anyone may register the name of the package.
    assert nodes["dependencies"] == []
    assert not (ROOT / "comfyui/requirements.txt").exists()


def test_the_nodes_for_comfyui_say_how_to_install_the_package() -> None:
    without_packages = [sys.executable, "-I", "-S", "-c"]
    code = f"import sys; sys.path.append({str(ROOT)!r}); import comfyui"
    run = subprocess.run([*without_packages, code], capture_output=True, text=True)
    assert "ImportError" in run.stderr
    assert f"{sys.executable} -m pip install PATH_OF_THE_CLONE" in run.stderr


def test_the_base_install_does_not_bring_torch() -> None:
    names = {package_name(requirement) for requirement in PROJECT["dependencies"]}
    assert names == {
        "safetensors",
        "numpy",
        "ml_dtypes",
        "threadpoolctl",
        "typer",
        "tqdm",
        "huggingface_hub",
        "pyyaml",
    }


def test_every_import_of_the_package_is_declared() -> None:
    requirements = list(PROJECT["dependencies"])
    for extra in ("peft", "train", "eval", "image", "gguf", "demo"):
        requirements += EXTRAS[extra]
    declared = {package_name(requirement) for requirement in requirements}
    declared |= {"yaml", "PIL", "matryoshka_lora"}
    # Dependencies of lm_eval, transformers and typer; deepspeed, which has sharded the factors; and
    # vllm, which loads the plugin.
    declared |= {"jinja2", "tokenizers", "rich", "deepspeed", "vllm"}
    for file in (ROOT / "src").rglob("*.py"):
        undeclared = set(imported_packages(file)) - declared - sys.stdlib_module_names
        assert not undeclared, file.name


def test_readme_of_an_index_has_absolute_links_to_files_of_the_repository() -> None:
    page = readme_for_index(
        (ROOT / "README.md").read_text(encoding="utf-8"), "https://x.org/a/b", "v1"
    )
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert "<" not in re.sub(r"<!--.*?-->", "", page)  # an index removes tags that it does not know
    assert all(target.startswith(("https://", "#")) for target in targets)
    paths = [
        match[1]
        for target in targets
        if (match := re.match(r"https://x.org/a/b/\w+/v1/([^#]+)", target))
    ]
    assert paths
    assert all((ROOT / path).exists() for path in paths)
    assert set(tomllib.loads(project_urls("https://x.org/a/b", "v1"))) == {"project"}


@pytest.mark.parametrize("name", matryoshka_lora.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    value = getattr(matryoshka_lora, name)
    assert value.__module__.startswith("matryoshka_lora.")
    assert value.__doc__


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError):
        matryoshka_lora.unknown  # noqa: B018


@pytest.mark.parametrize(
    "file",
    [ROOT / ".ci/run", *sorted((ROOT / ".github/workflows").glob("*.yml"))],
    ids=lambda file: file.name,
)
def test_ci_calls_existing_make_targets(file: Path) -> None:
    text = file.read_text()
    targets = set(re.findall(r"^\s*(?:- run: |.*\s)?make ([a-z-]+)", text, re.MULTILINE))
    assert targets
    assert targets <= MAKE_TARGETS
    if file.suffix == ".yml":
        assert yaml.safe_load(text)["jobs"]


@pytest.mark.slow
def test_wheel_and_sdist_contain_the_package_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    source = ROOT / "src"
    files = [*source.glob("matryoshka_lora/**/*.py"), *source.glob("matryoshka_lora/**/*.json")]
    modules = {file.relative_to(source).as_posix() for file in files}
    packaged = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert packaged == {*modules, "matryoshka_lora/py.typed"}
    with tarfile.open(sdist) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert not folders & {"comfyui", "contrib", "research", "runs", ".venv", "site"}
