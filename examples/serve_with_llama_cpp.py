"""One rank of an adapter in llama.cpp, on the GGUF file of the bundled base model.

    python examples/serve_with_llama_cpp.py runs/trl/adapter --rank 8

Needs llama.cpp: pip install xllamacpp
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import xllamacpp

from matryoshka_lora import export
from matryoshka_lora.bundled_model import bundled_gguf_path

parser = argparse.ArgumentParser()
parser.add_argument("adapter", type=Path)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--prompt", default="17 + 25 =")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    # Equivalent: matryoshka export ADAPTER --rank 8 -o rank-8.gguf
    lora_path = f"{folder}/rank-{args.rank}.gguf"
    export(args.adapter, lora_path, args.rank)

    # Equivalent: llama-server -m BASE.gguf --lora rank-8.gguf
    params = xllamacpp.CommonParams()
    params.model.path = str(bundled_gguf_path())
    params.n_ctx = 512
    params.verbosity = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora_path, 1.0)]
    server = xllamacpp.Server(params)
    request = {"prompt": args.prompt, "max_tokens": 8, "temperature": 0}
    print(server.handle_completions(request)["choices"][0]["text"])
