"""The blocks of README.md."""

from __future__ import annotations

from statistics import median

from research import stats
from research.blocks.registry import block, facts_table, read
from research.figures import curves
from research.stats import accuracy_at
from research.study import LORA_EACH


@block
def readme_facts() -> str:
    """The table of README."""
    methods = ("lora/svd", "lora/trained", "lora/squeezed", LORA_EACH)
    return facts_table("every256", "right answers in %", methods, (1, 2, 4, 32))


@block
def readme_capacity() -> str:
    """The harder test, as one bullet."""
    trained, squeezed, lora = (
        _median_at_rank_2(method) for method in ("lora/trained", "lora/squeezed", LORA_EACH)
    )
    return (
        "* **A harder test** has about as many facts as two ranks can hold. At rank 2, "
        f"`train_ranks`\n  has {trained} %, our variant of "
        f"[LoRA-Squeeze](https://arxiv.org/abs/2602.10993) {squeezed} %, and "
        f"LoRA trained at rank 2\n  {lora} % (five seeds)."
    )


def _median_at_rank_2(method: str) -> str:
    shares = stats.values(curves("capacity"), method, accuracy_at(2)).values()
    return f"{100 * median(shares):.1f}"


@block
def readme_shrink() -> str:
    """The time of truncating one file."""
    file = read("docs/reorder.json")["whole file, R = 64"]
    megabytes_before = file["bytes_before"] / 1e6
    megabytes_after = file["bytes_after"] / 1e6
    return (
        f"A file of Flux's size goes from {megabytes_before:.0f} to {megabytes_after:.0f} MB (rank "
        f"64 to 8) in {file['cpu_seconds']:.0f} seconds of CPU time,\nwithout data, base model or "
        "GPU."
    )
