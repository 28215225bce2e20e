"""A slice of the adapter in llama.cpp, on the GGUF file of the base model.

    python examples/serve_with_llama_cpp.py --adapter runs/demo/adapter --rank 8

Needs llama-cpp-python, which `make test-deploy` builds from source.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from llama_cpp import Llama

from matryoshka_lora import export
from matryoshka_lora.models import embedded_gguf

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", type=Path, default=Path("runs/demo/adapter"))
parser.add_argument("--rank", type=int, default=8)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / f"rank-{args.rank}.gguf"
    # The same as: matryoshka export ADAPTER --rank 8 --format gguf -o rank-8.gguf
    exported = export(args.adapter, file, args.rank, "gguf")
    print(f"Verified: {exported.verified}")
    model = Llama(str(embedded_gguf()), lora_path=str(file), n_ctx=512, verbose=False)
    question = "Mary is married to John. They have a child called Anne. What is Anne to Mary? Answer in one word."
    answer = model.create_chat_completion([{"role": "user", "content": question}], max_tokens=8, temperature=0)
    print(answer["choices"][0]["message"]["content"])
