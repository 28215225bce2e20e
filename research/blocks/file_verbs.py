"""The blocks of docs/combine.md and docs/extract.md."""

from __future__ import annotations

from statistics import fmean

from research.blocks.shared import block, read, table
from research.curves import accuracies, of_method
from research.study import LORA_EACH


@block
def combine_ways() -> str:
    """The sum of two adapters, five ways."""
    names = {
        "`combine`, from files to a file": "combine, from file to file",
        "PEFT's `add_weighted_adapter`, `svd`": "PEFT, svd",
        "PEFT's `cat`, which keeps rank 32": "PEFT, cat",
        "PEFT's `linear`": "PEFT, linear",
        "full SVD of the dense sum, as kohya's script does": "full SVD of the dense sum",
    }
    measured = read("benchmarks/results/combine.json")["sum"]
    rows = [
        [label, f"{measured[name]['cpu_seconds']:.3f}", f"{measured[name]['error']:.3f}"]
        for label, name in names.items()
    ]
    return table(["", "CPU seconds", "relative error"], rows)


@block
def extract_ways() -> str:
    """One layer of a fine-tuned model, three ways."""
    names = {
        "`extract`": "extract",
        "full SVD, as mergekit does": "full SVD",
        "full SVD, factors clamped at their 0.99 quantile, as kohya does": (
            "full SVD, clamped at 0.99"
        ),
    }
    measured = read("benchmarks/results/combine.json")["layer"]
    rows: list[list[str]] = []
    for label, name in names.items():
        seconds = measured[name].get("cpu_seconds")
        cell = "" if seconds is None else f"{seconds:.1f}"
        rows.append([label, cell, f"{measured[name]['error']:.4f}"])
    return table(["", "CPU seconds", "relative error"], rows)


@block
def extract_model() -> str:
    """Extracting all layers of a model."""
    model = read("benchmarks/results/combine.json")["model"]
    above = 100 * (model["error"] / model["best"] - 1)
    return (
        f"All layers of SmolLM2-135M take {model['seconds']:.0f} seconds at rank 64 and "
        f"{model['peak_MiB'] / 1024:.1f} GiB of memory. The error is {above:.3f} % above the\n"
        "smallest possible one."
    )


@block
def finetune() -> str:
    """How low the rank of a fine-tune is."""
    runs = [run for run in read("research/runs/finetune.jsonl") if run["split"] == "test"]
    ranks = runs[0]["ranks"]
    rows: list[list[str]] = []
    for label, key, unit, digits in (
        ("relative error of the change, %", "error", 100, 1),
        ("loss, nats", "loss", 1, 2),
        ("right answers, %", "accuracy", 100, 1),
    ):
        cells = [
            f"{unit * fmean(run['extracted'][index][key] for run in runs):.{digits}f}"
            for index in range(len(ranks))
        ]
        tuned = ""
        if key != "error":
            tuned = f"{unit * fmean(run['tuned'][key] for run in runs):.{digits}f}"
        rows.append([label, *cells, tuned])
    heading = ["rank", *map(str, ranks), "the tuned model"]
    with_modules = 100 * fmean(run["whole"]["accuracy"] for run in runs)
    seeds = {run["seed"] for run in runs}
    references = of_method("headline", LORA_EACH, "family_relationships")
    at_rank_1 = fmean(accuracies([curve for curve in references if curve.seed in seeds], 1))
    return table(heading, rows) + (
        f"\nWith the changed norms and embeddings, rank 64 has {with_modules:.1f} % right answers. "
        f"LoRA trained at rank 1, at the best of a\ncoarse grid of rates, has {at_rank_1:.1f} %."
    )
