"""An adapter that somebody has trained with plain PEFT becomes nested: any rank of it can be deployed.

    python examples/reorder_a_stranger.py --steps 80 --out runs/stranger

Or give --adapter a folder of yours, --model its base model, and --data rows like those that it was trained on.
The same as: matryoshka reorder ADAPTER -o NESTED --metric learned --data DATA
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matryoshka_lora.adapter import load
from matryoshka_lora.serving.calibrate import ROWS, calibration_rows, reorder_with_data
from matryoshka_lora.evaluation import score
from matryoshka_lora.models import EMBEDDED, embedded_folder, load_model, load_tokenizer
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.data.sources import load_data

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", type=Path, help="a LoRA adapter of yours; else one is trained with plain PEFT")
parser.add_argument("--model", default=EMBEDDED, help="the adapter's base model: a folder or a hub id")
parser.add_argument("--data", default="family_relationships", help="a task, a file or a hub dataset")
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--metric", choices=ROWS, default="learned", help="in what sense each prefix is the best")
parser.add_argument("--rows", type=int, help="how many rows of --data; else as many as the metric takes")
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

nested, tokenizer = args.out / "nested", load_tokenizer(args.model)
rows = calibration_rows(args.data, args.rows or ROWS[args.metric])
reorder_with_data(args.adapter, nested, args.metric, load_model(args.model), tokenizer, rows, overwrite=True)

if trained_here:
    adapter, task = load(load_model(args.model), nested), get_task("family_relationships")
    questions, ranks = task.examples("test", args.items), adapter.nesting.ranks
    for rank, scores in zip(ranks, score(adapter, tokenizer, task, questions, ranks), strict=True):
        print(json.dumps({"rank": rank, "loss": round(scores.loss, 3), "accuracy": scores.accuracy}))
    print(f"Next: matryoshka export {nested} --rank 4 -o rank-4")
else:
    print(f"Next: matryoshka eval {nested} --data HELD_OUT.jsonl")
