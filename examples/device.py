"""A device that reads only the ranks that it has room for, from a file that holds them all.

python examples/device.py --adapter runs/demo/adapter --rank 4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from matryoshka_lora import export, load
from matryoshka_lora.models import load_model

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", type=Path, default=Path("runs/demo/adapter"))
parser.add_argument("--rank", type=int, default=4)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    # On your machine; the same as: matryoshka export ADAPTER --format directions -o FOLDER
    whole = load(load_model(dtype=torch.float32), args.adapter, rank=args.rank)
    export(args.adapter, folder, format="directions")
    size = (Path(folder) / "directions.safetensors").stat().st_size

    # On the device: the first rows of one matrix are the adapter of that rank, and nothing else is read.
    part = load(load_model(dtype=torch.float32), folder, max_rank=args.rank)
    numbers = sum(p.numel() for name, p in part.model.named_parameters() if "lora_" in name)
    print(f"{numbers:,} numbers were read; the file has {size:,} bytes and ranks up to {whole.nesting.max_rank}")
    ids = torch.arange(100, 132)[None]
    with torch.no_grad():
        difference = (whole.model(input_ids=ids).logits - part.model(input_ids=ids).logits).abs().max()
    print(f"At rank {args.rank} the logits differ by {difference:.1g} from those of the whole adapter")
