"""An adapter that somebody has trained with plain PEFT becomes nested: any rank of it can be deployed.

    python examples/reorder_a_stranger.py --steps 80 --out runs/stranger

Give --adapter a folder of your own instead, and --data rows like those that it was trained on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matryoshka_lora.adapter import load
from matryoshka_lora.deploy.calibrate import calibration_rows, reorder_with_data
from matryoshka_lora.evaluate import score
from matryoshka_lora.models import embedded_folder, load_model, load_tokenizer
from matryoshka_lora.tasks import get_task
from matryoshka_lora.train.data import load_data

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", type=Path, help="a LoRA adapter of yours; else one is trained with plain PEFT")
parser.add_argument("--data", default="family_relationships", help="a task, a file or a hub dataset")
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--rows", type=int, default=128)
parser.add_argument("--items", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("runs/stranger"))
args = parser.parse_args()

if args.adapter is None:
    args.adapter = args.out / "plain"
    args.out.mkdir(parents=True, exist_ok=True)
    load_data({"task": "family_relationships", "size": 12 * args.steps}).to_json(args.out / "rows.jsonl")
    script = Path(__file__).parents[1] / "benchmarks" / "plain_lora.py"
    options = ["--model", embedded_folder(), "--data", args.out / "rows.jsonl", "--out", args.adapter]
    subprocess.run([sys.executable, script, *options, "--steps", str(args.steps)], check=True)

tokenizer, rows = load_tokenizer(), calibration_rows(args.data, args.rows)
reorder_with_data(args.adapter, args.out / "nested", "loss", load_model(), tokenizer, rows)

adapter, task = load(load_model(), args.out / "nested"), get_task("family_relationships")
questions = task.examples("test", args.items)
ranks = adapter.nesting.ranks
for rank, scores in zip(ranks, score(adapter, tokenizer, task, questions, ranks), strict=True):
    print(json.dumps({"rank": rank, "loss": round(scores.loss, 3), "accuracy": scores.accuracy}))
print(f"Next: matryoshka export {args.out / 'nested'} --budget 0.1 -o small")
