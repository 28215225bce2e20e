"""Installs a wheel into an empty environment, and runs the README's first commands there: `make test-wheel`.

python tests/from_wheel.py dist/matryoshka_lora-*.whl
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ADAPTER = Path(__file__).parent / "adapters_0_1/lora"
COMMANDS = (
    "info some-lora",
    "export some-lora --rank 2 -o rank-2",
    "reorder some-lora -o nested",
    "info nested",
    "export nested --format ladder -o ladder",
    "export nested --format directions -o directions",
)


def main() -> None:
    """Fails at the first command that does."""
    wheel = Path(sys.argv[1]).resolve()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")

        def run(program: str, *arguments: str) -> None:
            print(f"$ {program} {' '.join(arguments)}", flush=True)
            subprocess.run([scripts / program, *arguments], check=True, cwd=folder, env=environment)

        run("python", "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel))
        shutil.copytree(ADAPTER, folder / "some-lora")
        for command in COMMANDS:
            run("matryoshka", *command.split())
        assert json.loads((folder / "rank-2/adapter_config.json").read_text())["r"] == 2
        where = "import matryoshka_lora; print(matryoshka_lora.__file__); assert 'env' in matryoshka_lora.__file__"
        run("python", "-c", where)


if __name__ == "__main__":
    main()
