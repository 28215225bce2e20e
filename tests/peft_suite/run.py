"""Run PEFT's own tests with every LoRA adapter nested once it is created: ``make test-peft``.

The tests are those of the installed version, from its source distribution. None may fail.
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
MIN_NESTED = 1900
"""Of about 2,340 adapters: with a nest() that rejects everything, this would test PEFT alone."""

# Where LoRA adapters are created without a model on the hub. The plugin deselects other methods.
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
DESELECTED = "test_initialization.py::TestHotSwapping::test_hotswap_works[True-"


def main() -> int:
    """Run the tests. The exit status is 0 if none fails and enough adapters were nested."""
    version = importlib.metadata.version("peft")
    source = download_tests(version)
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.json")
        python_path = [str(HERE), str(source)]
        if "PYTHONPATH" in os.environ:
            python_path.append(os.environ["PYTHONPATH"])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(python_path),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{temporary}/no-hub",
            "PEFT_SUITE_REPORT": str(report),
        }
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "nest_all"]
        command += ["--rootdir", str(source), f"--deselect=tests/{DESELECTED}"]
        command += [f"tests/{test}" for test in SELECTED]
        exit_status = subprocess.run(command, cwd=source, env=environment).returncode
        counts = json.loads(report.read_text())
    print(f"PEFT {version}: {counts}; at least {MIN_NESTED} must be nested")
    if exit_status == 0 and counts["nested"] < MIN_NESTED:
        return 1
    return exit_status


def download_tests(version: str) -> Path:
    """Return the folder with the tests of a version, downloaded once for each environment."""
    cache = Path(sys.prefix) / "peft-suite"
    source = cache / f"peft-{version}"
    if source.is_dir():
        return source
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--no-binary", "peft", f"peft=={version}"]
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        subprocess.run([*command, "-d", temporary], check=True)
        (archive_path,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive_path) as archive:
            archive.extractall(temporary, filter="data")
        unpacked = Path(temporary) / source.name
        (unpacked / "tests" / "__init__.py").touch()  # they import each other as a package
        # Last, so that an interrupted download does not count as complete.
        unpacked.rename(source)
    return source


if __name__ == "__main__":
    sys.exit(main())
