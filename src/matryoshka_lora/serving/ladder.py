"""The README of a ladder: one adapter per rank, and how vLLM serves them beside each other."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from matryoshka_lora.formats.card import HUB_IDS

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for ``--max-lora-rank``."""


def serve_command(base: str | None, ranks: Sequence[int], path: Path) -> str:
    """The ``vllm serve`` command for all ranks of a ladder; each is a model of its own name in the API."""
    base = HUB_IDS.get(base or "", base)
    largest = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), VLLM_RANKS[-1])
    modules = " ".join(f"rank-{rank}={shlex.quote(str(path / f'rank-{rank}'))}" for rank in ranks)
    return (
        f"vllm serve {shlex.quote(base or 'BASE_MODEL')} --enable-lora --max-lora-rank {largest} "
        f"--max-loras {len(ranks)} --lora-modules {modules}"
    )


def ladder_readme(base: str | None, ranks: Sequence[int], path: Path) -> str:
    """Markdown."""
    folders = "\n".join(f"* `rank-{rank}`" for rank in ranks)
    return f"""# One adapter at {len(ranks)} ranks

Each folder is an ordinary LoRA adapter, cut out of the same nested one by matryoshka-lora:

{folders}

vLLM serves them all on one base model, and each request names its rank:

```sh
{serve_command(base, ranks, path)}
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "rank-{ranks[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
```

PEFT:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "rank-{ranks[0]}")
model.load_adapter("rank-{ranks[-1]}", adapter_name="rank-{ranks[-1]}")
model.set_adapter("rank-{ranks[-1]}")
```
"""
