"""Compare PEFT's conversion of LoRA to another rank with the one from the factors.

    python reproduce_factor_conversion.py [--size 3072] [--rank 64] [--threads 1]

It needs PEFT, transformers and PyTorch only, and no network.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from factor_conversion import (
    combine_adapters,
    conversion,
    convert_module_to_lora,
    original_convert_module,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

THRESHOLDS = (0.1, 0.5, 0.9, 0.99, 0.999)


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.linear(x)


def lora_config(rank: int, targets: list[str], use_rslora: bool = True) -> peft.LoraConfig:
    """Return a config with random factors."""
    return peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        use_rslora=use_rslora,
        target_modules=targets,
        init_lora_weights=False,
    )


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a function's result and its CPU time in seconds."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def fastest(function: Callable[[], Any], repeats: int = 5) -> tuple[Any, float]:
    """Return a function's result and its shortest CPU time in seconds."""
    results = [timed(function) for _ in range(repeats)]
    return min(results, key=lambda result: result[1])


def difference(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """Return the relative difference of two updates, given as (lora_A, lora_B)."""
    product = left[1].double() @ left[0].double()
    other = right[1].double() @ right[0].double()
    return float(torch.linalg.norm(product - other) / torch.linalg.norm(product))


def compare_layer(size: int, rank: int) -> None:
    """Convert one layer to a quarter of its rank, and by thresholds."""
    model = peft.get_peft_model(OneLayer(size), lora_config(rank, ["linear"]))
    module = model.base_model.model.linear
    new_rank = rank // 4
    dense, dense_seconds = timed(lambda: original_convert_module(module, new_rank))
    factors, factor_seconds = fastest(lambda: convert_module_to_lora(module, new_rank))
    print(f"layer {size} x {size}, rank {rank} to {new_rank}:")
    print(f"  PEFT {dense_seconds:.2f} s, factors {factor_seconds:.4f} s: ", end="")
    print(f"{dense_seconds / factor_seconds:.0f} times faster")
    print(f"  relative difference of lora_B @ lora_A: {difference(dense, factors):.1e}")
    half_size = max(size // 4, rank)
    model = peft.get_peft_model(OneLayer(half_size), lora_config(rank, ["linear"]))
    module = model.base_model.model.linear
    for threshold in THRESHOLDS:
        ranks = [
            convert(module, threshold)[2]
            for convert in (original_convert_module, convert_module_to_lora)
        ]
        print(f"  threshold {threshold}, {half_size} x {half_size}: rank {ranks[0]}, {ranks[1]}")


def compare_model() -> None:
    """Convert all linear layers of a small model."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    base_model = LlamaForCausalLM(config).eval()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(copy.deepcopy(base_model), lora_config(16, targets)).eval()
    logits = []
    seconds = []
    for convert in (original_convert_module, convert_module_to_lora):
        conversion._convert_module_to_lora = convert
        (new_config, state_dict), cpu = timed(lambda: peft.convert_to_lora(model, rank=8))
        converted = peft.get_peft_model(copy.deepcopy(base_model), new_config).eval()
        peft.set_peft_model_state_dict(converted, state_dict)
        with torch.inference_mode():
            logits.append(converted(torch.arange(32)[None]).logits)
        seconds.append(cpu)
    conversion._convert_module_to_lora = original_convert_module
    print("convert_to_lora, Llama of two layers with hidden size 512, rank 16 to 8:")
    print(f"  PEFT {seconds[0]:.2f} s, factors {seconds[1]:.4f} s: ", end="")
    print(f"{seconds[0] / seconds[1]:.0f} times faster")
    print(f"  largest difference of the logits: {float((logits[0] - logits[1]).abs().max()):.1e}")


def compare_combination(size: int, rank: int) -> None:
    """Add two adapters of one layer with `combination_type="svd"`."""
    # Before 0.21, PEFT applies the scaling twice. With alpha = rank and no rsLoRA it is 1.
    config = lora_config(rank, ["linear"], use_rslora=False)
    model = peft.get_peft_model(OneLayer(size), config, adapter_name="first")
    model.add_adapter("second", config)
    module = model.base_model.model.linear
    original = peft.LoraModel._svd_generalized_task_arithmetic_weighted_adapter

    def combine(function: Callable[..., Any], full_matrices: bool) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = function(
            model.base_model,
            "svd",
            ["first", "second"],
            [0.7, -0.4],
            rank,
            module,
            module.lora_A["first"].weight,
            module.lora_B["first"].weight,
            None,
            "total",
            full_matrices=full_matrices,
        )
        return lora_A.detach(), lora_B.detach()

    full, full_seconds = timed(lambda: combine(original, True))
    _, reduced_seconds = timed(lambda: combine(original, False))
    factors, factor_seconds = fastest(lambda: combine(combine_adapters, True))
    print(f"add_weighted_adapter, svd, two adapters of rank {rank}, {size} x {size}:")
    print(
        f"  PEFT {full_seconds:.2f} s (svd_full_matrices=False: {reduced_seconds:.2f} s), ", end=""
    )
    print(f"factors {factor_seconds:.4f} s: {full_seconds / factor_seconds:.0f} times faster")
    print(f"  relative difference of lora_B @ lora_A: {difference(full, factors):.1e}")


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=3072, help="Side of the layer's weight.")
    parser.add_argument("--rank", type=int, default=64, help="Rank of the adapters.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # that the adapter is LoRA already
    versions = f"PEFT {peft.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, PyTorch {torch.__version__}, {options.threads} thread(s), CPU time")
    if conversion is None:
        print("This PEFT has no convert_to_lora. It came with 0.19.")
    else:
        compare_layer(options.size, options.rank)
        compare_model()
    compare_combination(options.size, options.rank)


if __name__ == "__main__":
    main()
