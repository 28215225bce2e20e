"""Write the bytes that vLLM reserves for one of its slots of adapters.

Arguments: the file to write, and the command of a server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM


def count_bytes(worker: Any) -> int:
    """Return the bytes of the buffers of all adapted modules."""
    total = 0
    for module in worker.model_runner.lora_manager._adapter_manager.modules.values():
        for buffers in (module.lora_a_stacked, module.lora_b_stacked):
            for buffer in buffers if isinstance(buffers, tuple) else (buffers,):
                total += buffer.nbytes
    return total


def main() -> None:
    output, *words = sys.argv[1:]
    modules: list[str] | None = None
    if "--lora-target-modules" in words:
        start = words.index("--lora-target-modules") + 1
        modules = words[start : words.index("--max-loras")]
    (model,) = [word.removeprefix("--model=") for word in words if word.startswith("--model=")]
    engine = LLM(
        model,
        enable_lora=True,
        max_lora_rank=int(words[words.index("--max-lora-rank") + 1]),
        max_loras=2,
        lora_target_modules=modules,
        dtype="bfloat16",
        max_model_len=512,
        enforce_eager=True,
    )
    (total,) = engine.collective_rpc(count_bytes)
    Path(output).write_text(json.dumps(total // 2))


if __name__ == "__main__":
    main()
