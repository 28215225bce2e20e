"""PEFT's own tests, with every LoRA adapter nested as soon as it is made: ``make test-peft``.

The tests are those of the installed version, from its source package. None may fail.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FEWEST_NESTED = 1900  # of about 2,340; a nest() that refuses everything would test PEFT alone

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
# By the beginning of its name: it compiles, which is slow.
LEFT_OUT = "test_initialization.py::TestHotSwapping::test_hotswap_works[True-"


def main() -> int:
    """Run the tests; the exit code is 0 where none fails and enough adapters were nested."""
    version = importlib.metadata.version("peft")
    source = tests_of_peft(version)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        paths = [str(HERE), str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        environment |= {"HF_HOME": f"{scratch}/no-hub", "PEFT_SUITE_REPORT": str(report)}
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "nest_all"]
        command += ["--rootdir", str(source), f"--deselect=tests/{LEFT_OUT}"]
        command += [f"tests/{test}" for test in SELECTED]
        code = subprocess.run(command, cwd=source, env=environment).returncode
        counts = json.loads(report.read_text())
    print(f"PEFT {version}: {counts}, and at least {FEWEST_NESTED} must be nested")
    return code or int(counts["nested"] < FEWEST_NESTED)


def tests_of_peft(version: str) -> Path:
    """The folder that holds the tests of a version, downloaded once for each environment."""
    home = Path(sys.prefix) / "peft-suite"
    source = home / f"peft-{version}"
    if not source.is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--no-binary", "peft", f"peft=={version}"]
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run([*command, "-d", scratch], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            unpacked = Path(scratch) / source.name
            (unpacked / "tests" / "__init__.py").touch()  # they import one another as a package
            home.mkdir(exist_ok=True)
            # Last, so that a download which was cut off is not taken for a whole one.
            unpacked.rename(source)
    return source


if __name__ == "__main__":
    sys.exit(main())
