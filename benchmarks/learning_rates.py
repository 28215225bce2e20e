"""Choose the demo's learning rates, on validation data only.

    python benchmarks/learning_rates.py --out runs/learning-rates

Trains each of the demo's two adapters at each rate of a grid, reorders it and prints its held-out loss on the
*validation* split, as the mean over all ranks. The demo's constants are this table's minima; its test questions are not
looked at here. Finished runs are kept in the output folder and skipped when the script is started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matryoshka_lora.cli.demo import LEARNING_RATES, STEPS, TASK, demo_config
from matryoshka_lora.evaluation import evaluate_ranks
from matryoshka_lora.files import write_text
from matryoshka_lora.models import load_tokenizer
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.training import train

RATES = (1e-3, 2e-3, 3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learning-rates"))
    parser.add_argument("--items", type=int, default=200, help="validation questions (default: 200)")
    args = parser.parse_args()
    for method in LEARNING_RATES:
        for rate in RATES:
            file = args.out / f"{method}-{rate:g}.json"
            if not file.exists():
                write_text(file, json.dumps(measure(method, rate, args.out / f"{method}-{rate:g}", args.items)))
    print("\nMean validation loss over the ranks, then the loss of each rank:")
    for method in LEARNING_RATES:
        for rate in RATES:
            curve = json.loads((args.out / f"{method}-{rate:g}.json").read_text())
            losses = "  ".join(f"{loss:.3f}" for loss in curve["loss"])
            print(f"{method:10}  {rate:.0e}  {sum(curve['loss']) / len(curve['loss']):.3f}  |  {losses}")


def measure(method: str, rate: float, folder: Path, items: int) -> dict[str, Any]:
    adapter = train(demo_config(method, STEPS, folder, rate))
    adapter.reorder()
    task, tokenizer = get_task(TASK), load_tokenizer()
    questions = task.examples("validation", items)
    return evaluate_ranks(adapter, tokenizer, task, questions, name=f"{method} at {rate:g}").to_dict()


if __name__ == "__main__":
    main()
