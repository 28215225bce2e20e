"""PEFT's own tests, with every LoRA adapter nested as soon as it is made.

The tests are those of the installed version, from its source package. What fails must be what
`expected.txt` lists, no more and no less.

    python tests/peft_suite/run.py            # `make test-peft`
    python tests/peft_suite/run.py --plain    # without nesting: only the lines of `peft` may fail
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FEWEST_NESTED = (
    1900  # of about 2,140; a nest() that refuses everything would leave PEFT's tests to PEFT
)

# Where LoRA adapters are made without a model of the hub. The plugin drops PEFT's other methods.
SELECTED = (
    "test_custom_models.py",
    "test_helpers.py::TestDisableInputDtypeCasting",
    "test_initialization.py::TestHotSwapping",
    "test_initialization.py::TestLoadPeftKeyMapping",
    "test_initialization.py::TestLoraInitialization",
    "test_loraplus.py",
    "test_other.py",
    "test_riemannian_lora.py",
    "test_target_parameters.py::TestTargetParameters",
    "test_tuners_utils.py::TestModelAndLayerStatus",
)
# Each by the beginning of its name.
LEFT_OUT = (
    "test_initialization.py::TestHotSwapping::test_hotswap_works[True-",  # compiles, which is slow
)


def main() -> int:
    """Run them and compare; the exit code is 0 where nothing is unexpected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plain", action="store_true", help="do not nest")
    plain = parser.parse_args().plain
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as scratch:
        found = run(tests_of_peft(version), Path(scratch), nested=not plain)
    expected = {test: reason for who, test, reason in read_expected() if who == "peft" or not plain}
    failed: dict[str, str] = found["failed"]
    more = sorted(failed.keys() - expected.keys())
    fewer = sorted(expected.keys() - failed.keys())
    print(
        f"PEFT {version}: {found['passed']} passed, {len(failed)} failed, {found['needs_hub']} "
        f"need the hub, {found['nested']} adapters nested, {found['refused']} refused"
    )
    for test in more:
        print(f"FAILED, and is not listed: {test}\n    {failed[test]}")
    for test in fewer:
        print(f"PASSED OR GONE, and is listed: {test}\n    {expected[test]}")
    few = not plain and found["nested"] < FEWEST_NESTED
    if few:
        print(f"only {found['nested']} adapters were nested, fewer than {FEWEST_NESTED}")
    return 1 if more or fewer or few else 0


def tests_of_peft(version: str) -> Path:
    """The folder that holds the tests of a version, downloaded once for each environment."""
    home = Path(sys.prefix) / "peft-suite"
    source = home / f"peft-{version}"
    if not source.is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(
                [*command, "--no-binary", "peft", f"peft=={version}", "-d", scratch], check=True
            )
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            unpacked = Path(scratch) / source.name
            (unpacked / "tests" / "__init__.py").touch()  # they import one another as a package
            home.mkdir(exist_ok=True)
            # Last, so that a download which was cut off is not taken for a whole one.
            unpacked.rename(source)
    return source


def run(source: Path, scratch: Path, nested: bool) -> dict[str, Any]:
    """Run the selected tests; what the plugin counted."""
    report = scratch / "report.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "no-hub"),
        "PEFT_SUITE_REPORT": str(report),
        "PEFT_SUITE_NEST": "1" if nested else "",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(HERE / "pytest.ini"),
        "--rootdir",
        str(source),
    ]
    deselected = [f"--deselect=tests/{test}" for test in LEFT_OUT]
    done = subprocess.run(
        [*command, "-p", "nest_all", *deselected, *(f"tests/{test}" for test in SELECTED)],
        cwd=source,
        env=environment,
    )
    if done.returncode not in (0, 1) or not report.is_file():  # 1 is: some tests failed
        sys.exit(f"pytest ended with {done.returncode}")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def read_expected() -> list[tuple[str, str, str]]:
    """Who is at fault, the test and the reason, from each line."""
    lines = [
        line
        for line in (HERE / "expected.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    found = []
    for line in lines:
        test, _, reason = line.partition(" # ")
        who, _, test = test.partition(" ")
        if who not in ("peft", "ours") or not reason:
            sys.exit(
                f"expected.txt: write 'peft' or 'ours', a test, ' # ' and a reason, not {line!r}"
            )
        found.append((who, test, reason))
    return found


if __name__ == "__main__":
    sys.exit(main())
