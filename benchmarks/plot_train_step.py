"""Draw the cells of `train_step.py`, and print them as a table in Markdown.

python benchmarks/plot_train_step.py docs/train_step.json docs/train_step.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

NAMES = {
    "peft": "PEFT LoRA",
    "peft-autocast": "PEFT LoRA, bf16 autocast",
    "published": "the paper's form, A P made anew",
    "matryoshka": "ours, matryoshka",
    "stratified": "ours, stratified",
    "dylora": "ours, dylora",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="what train_step.py --out wrote")
    parser.add_argument("picture", type=Path, help="a PNG file to write")
    args = parser.parse_args()
    read = json.loads(args.cells.read_text())
    cells = {(cell["dtype"], cell["rank"]): cell["variants"] for cell in read["cells"]}
    ranks = sorted({rank for _, rank in cells})
    print(f"{read['machine']}\n")
    for dtype in ("bf16", "fp32"):
        there = [rank for rank in ranks if (dtype, rank) in cells]
        print(f"| {dtype}: time (min to max), saved | " + " | ".join(f"R = {rank}" for rank in there) + " |")
        print("|---" * (len(there) + 1) + "|")
        for variant, name in NAMES.items():
            row = [cells[dtype, rank][variant] for rank in there]
            texts = []
            for cell in row:
                low, high = cell["time_min_max"]
                texts.append(f"{cell['time']:.2f} ({low:.2f} to {high:.2f}), {cell['saved']:.2f}")
            print(f"| {name} | " + " | ".join(texts) + " |")
        print()
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for row, (key, title) in enumerate({"time": "time of a step", "saved": "saved activations"}.items()):
        for column, dtype in enumerate(("bf16", "fp32")):
            ax = axes[row][column]
            there = [rank for rank in ranks if (dtype, rank) in cells]
            for variant, name in NAMES.items():
                values = [cells[dtype, rank][variant][key] for rank in there]
                ours = name.startswith("ours")
                style = {"marker": "o", "linewidth": 2} if ours else {"marker": "s", "linestyle": "--"}
                ax.plot(there, values, label=name, markersize=4, **style)
            ax.axhline(1, color="gray", linewidth=1)
            ax.set_xscale("log", base=2)
            ax.set_xticks(there, [str(rank) for rank in there])
            ax.set_title(f"{title}, {dtype}", fontsize=10)
            ax.set_ylabel("multiple of the frozen model")
            ax.grid(alpha=0.3)
    axes[1][0].set_xlabel("R")
    axes[1][1].set_xlabel("R")
    axes[0][0].legend(fontsize=8)
    figure.savefig(args.picture, dpi=130)


if __name__ == "__main__":
    main()
