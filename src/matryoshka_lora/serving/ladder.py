"""The README of a ladder: one adapter per rank, and how vLLM serves them beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka_lora.files import WRITTEN_BY_US
from matryoshka_lora.formats.card import hub_name, hub_revision
from matryoshka_lora.formats.config import AdapterConfig

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for ``--max-lora-rank``."""


def serve_command(config: AdapterConfig, ranks: Sequence[int]) -> str:
    """The ``vllm serve`` command for all ranks of a ladder; each is a model of its own name in the API.

    It is for the ladder's own folder: no path of the machine that made it is in it.
    """
    base = hub_name(config.base_model) or "BASE_MODEL"
    revision = f" --revision {hub_revision(config)}" if hub_revision(config) else ""
    largest = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), VLLM_RANKS[-1])
    modules = " ".join(f"rank-{rank}=rank-{rank}" for rank in ranks)
    return (
        f"vllm serve {base}{revision} --enable-lora --max-lora-rank {largest} "
        f"--max-loras {len(ranks)} --lora-modules {modules}"
    )


def ladder_readme(config: AdapterConfig, ranks: Sequence[int]) -> str:
    """Markdown."""
    missing = "" if hub_name(config.base_model) else " (BASE_MODEL is the base model's folder, or its id)"
    folders = "\n".join(f"* `rank-{rank}`" for rank in ranks)
    return f"""{WRITTEN_BY_US}: delete this line to keep your own. -->

# One adapter at {len(ranks)} ranks

Each folder is an ordinary LoRA adapter, cut out of the same nested one by matryoshka-lora:

{folders}

vLLM serves them all on one base model, and each request names its rank. In this folder{missing}:

```sh
{serve_command(config, ranks)}
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
