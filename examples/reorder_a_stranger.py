"""An adapter that somebody has trained with plain PEFT becomes nested: any rank of it can be deployed.

    python examples/reorder_a_stranger.py --steps 80 --out runs/stranger

Or give --adapter a folder of yours, --model its base model, and --data rows like those that it was trained on.
The same as: matryoshka reorder ADAPTER -o NESTED --by learned --data DATA
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matryoshka_lora import evaluate, reorder
from matryoshka_lora.data.sources import load_data
from matryoshka_lora.models import EMBEDDED, embedded_folder

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", type=Path, help="a LoRA adapter of yours; else one is trained with plain PEFT")
parser.add_argument("--model", default=EMBEDDED, help="the adapter's base model: a folder or a hub id")
parser.add_argument("--data", default="family_relationships", help="a task, a file or a hub dataset")
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--by", choices=("activations", "loss", "learned", "trained"), default="learned")
parser.add_argument("--rows", type=int, help="how many rows of --data; else as many as help")
parser.add_argument("--items", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("runs/stranger"))
args = parser.parse_args()

trained_here = args.adapter is None
if trained_here:
    args.adapter = args.out / "plain"
    args.out.mkdir(parents=True, exist_ok=True)
    load_data({"task": "family_relationships", "size": 12 * args.steps}).to_json(args.out / "rows.jsonl")
    script = Path(__file__).parents[1] / "benchmarks" / "plain_lora.py"
    model = embedded_folder() if args.model == EMBEDDED else args.model
    options = ["--model", model, "--data", args.out / "rows.jsonl", "--out", args.adapter]
    subprocess.run([sys.executable, script, *options, "--steps", str(args.steps)], check=True)

nested = args.out / "nested"
reorder(args.adapter, nested, args.by, args.data, rows=args.rows, model=args.model, overwrite=True)

if trained_here:
    evaluation = evaluate(nested, "family_relationships", limit=args.items, model=args.model, latency=False)
    losses = evaluation.values(metric="loss")
    for rank, accuracy in evaluation.values().items():
        print(json.dumps({"rank": rank, "loss": losses[rank], "accuracy": accuracy}))
    print(f"Next: matryoshka export {nested} --rank 4 -o rank-4")
else:
    print(f"Next: matryoshka eval {nested} --data HELD_OUT.jsonl")
