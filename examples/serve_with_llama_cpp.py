"""A rank of an adapter in llama.cpp, on the GGUF file of the embedded base model.

    python examples/serve_with_llama_cpp.py runs/trl/adapter --rank 8

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
parser.add_argument("adapter", type=Path)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--prompt", default="17 + 25 =")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    file = f"{folder}/rank.gguf"
    export(args.adapter, file, args.rank)  # as: matryoshka export ADAPTER --rank 8 -o rank-8.gguf
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(embedded_gguf()), 512, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more where cores are free
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0)]
    server = xllamacpp.Server(params)  # as: llama-server -m BASE.gguf --lora rank-8.gguf
    asked = {"prompt": args.prompt, "max_tokens": 8, "temperature": 0}
    print(server.handle_completions(asked)["choices"][0]["text"])
