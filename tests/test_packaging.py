"""What pyproject.toml promises about Python and PEFT is what the packages allow."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from setuptools import find_packages  # type: ignore[import-untyped]

import matryoshka_lora

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = {
    requirement.name: requirement
    for text in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    for requirement in [Requirement(text)]
}


def lowest_python() -> str:
    (bound,) = SpecifierSet(PROJECT["requires-python"])
    assert bound.operator == ">="
    return bound.version


def versions_named() -> list[str]:
    named = [line.rsplit("::", 1)[1].strip() for line in PROJECT["classifiers"] if line.startswith("Programming")]
    return [version for version in named if "." in version]


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_every_requirement_can_be_installed_on_the_oldest_python_that_is_promised(name: str) -> None:
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    needed = found["Requires-Python"]
    assert needed is None or SpecifierSet(needed).contains(lowest_python()), f"{name} needs Python {needed}"
    assert REQUIREMENTS[name].specifier.contains(found["Version"], prereleases=True)


def test_the_classifiers_begin_with_the_oldest_python_that_is_promised() -> None:
    assert versions_named()[0] == lowest_python()


def test_the_version_is_that_of_the_package() -> None:
    assert PROJECT["version"] == matryoshka_lora.__version__


def test_all_rooms_and_what_they_read_are_packed() -> None:
    package = ROOT / "src/matryoshka_lora"
    assert all((file.parent / "__init__.py").is_file() for file in package.rglob("*.py"))
    data = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    data = {name for name in data if not name.endswith((".py", ".pyc"))}
    assert set(PYPROJECT["tool"]["setuptools"]["package-data"]["matryoshka_lora"]) == data


def test_the_next_peft_can_be_installed_beside_this_package() -> None:
    assert REQUIREMENTS["peft"].specifier.contains("0.22.0")


def test_the_study_is_no_part_of_the_wheel() -> None:
    find = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    packages = {name for where in find["where"] for name in find_packages(str(ROOT / where))}
    assert {name.partition(".")[0] for name in packages} == {"matryoshka_lora"}
    assert "research" in find_packages(str(ROOT))  # which would be packaged from there
