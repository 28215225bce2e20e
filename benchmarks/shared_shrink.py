"""What one shared product for projections that read the same x would save.

    python benchmarks/shared_shrink.py

q, k and v read one x, as gate and up do. Their three (two) small products with the A's could be one with the A's side
by side. CPU milliseconds on one thread, medians, 1024 tokens of width 576 in bf16: forward `x A^T`, the part of the
gradient of x, and the gradient of A.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

TOKENS, WIDTH, REPEATS = 1024, 576, 60


def medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    x, dx = (torch.randn(TOKENS, WIDTH).bfloat16() for _ in range(2))
    for rank in (8, 32, 128):
        for layers in (2, 3):
            factors = [torch.randn(rank, WIDTH).bfloat16() for _ in range(layers)]
            hidden = [torch.randn(TOKENS, rank).bfloat16() for _ in range(layers)]
            pairs = list(zip(hidden, factors, strict=True))
            found = medians(
                {
                    "forward apart": lambda: [x @ A.t() for A in factors],  # noqa: B023  # called in this turn
                    "forward shared": lambda: (x @ torch.cat(factors).t()).split(rank, 1),  # noqa: B023
                    "dx apart": lambda: [dx.addmm_(h, A) for h, A in pairs],  # noqa: B023
                    "dx shared": lambda: dx.addmm_(torch.cat(hidden, 1), torch.cat(factors)),  # noqa: B023
                    "dA apart": lambda: [h.t() @ x for h in hidden],  # noqa: B023
                    "dA shared": lambda: torch.cat(hidden, 1).t() @ x,  # noqa: B023
                }
            )
            print(f"R = {rank:3}, {layers} layers: " + ", ".join(f"{name} {ms:.3f}" for name, ms in found.items()))


if __name__ == "__main__":
    main()
