"""Run in a process of its own: what PEFT alone makes of adapter directories, on a machine without this package.

Usage: ``python plain_peft_reader.py JOB.json``. The job names a saved base model, the dtypes to read it in, a file
with ``input_ids``, the adapters by name and a folder for the answers: ``answers.safetensors`` holds the logits and the
greedy continuations of each adapter in each dtype, ``warnings.json`` what PEFT had to say.
"""

# Nothing may be imported before the package is barred.
# ruff: noqa: E402

from __future__ import annotations

import sys

sys.modules["matryoshka_lora"] = None  # type: ignore[assignment]
try:
    import matryoshka_lora  # noqa: F401
except ImportError:
    pass
else:
    raise SystemExit("this process can import matryoshka_lora, so it shows nothing")

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(job: dict[str, Any]) -> None:
    # As in the tests: the order of a sum depends on the number of threads.
    torch.set_num_threads(1)
    ids = load_file(job["input_ids"])["input_ids"]
    answers: dict[str, torch.Tensor] = {}
    said: dict[str, list[str]] = {}
    for dtype in job["dtypes"]:
        base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, dtype)).eval()
        for name, path in {"base": None, **job["adapters"]}.items():
            with warnings.catch_warnings(record=True) as caught, torch.no_grad():
                warnings.simplefilter("always")
                model = copy.deepcopy(base)
                if path is not None:
                    model = PeftModel.from_pretrained(model, path).eval()
                answers[f"{dtype}/{name}/logits"] = model(input_ids=ids).logits
                generated = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=job["new_tokens"],
                    do_sample=False,
                )
                answers[f"{dtype}/{name}/text"] = generated[:, ids.shape[1] :].contiguous()
            said[f"{dtype}/{name}"] = sorted({f"{warning.category.__name__}: {warning.message}" for warning in caught})
    loaded = [name for name in sys.modules if name.split(".")[0] == "matryoshka_lora"]
    if loaded != ["matryoshka_lora"]:
        raise SystemExit(f"{loaded} crept in")
    out = Path(job["out"])
    save_file(answers, out / "answers.safetensors")
    (out / "warnings.json").write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
