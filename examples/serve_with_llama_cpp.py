"""A slice of the adapter in llama.cpp, on the GGUF file of the base model.

    python examples/serve_with_llama_cpp.py --adapter runs/demo/adapter --rank 8

Needs llama.cpp: pip install xllamacpp
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import xllamacpp

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
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(embedded_gguf()), 512, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more where cores are free
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0)]
    server = xllamacpp.Server(params)  # the same as: llama-server -m BASE.gguf --lora rank-8.gguf
    question = "Mary is married to John. They have a child called Anne. What is Anne to Mary? Answer in one word."
    messages = [{"role": "user", "content": question}]
    answer = server.handle_chat_completions({"messages": messages, "max_tokens": 8, "temperature": 0})
    print(answer["choices"][0]["message"]["content"])
