"""Show that PEFT's conversion of DoRA to LoRA loses the magnitude.

    python reproduce_dora_conversion.py [--learning-rate 1e-3]

It trains a small DoRA adapter, which takes seconds. It needs PEFT, transformers and PyTorch only,
and no network.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import peft
import torch
import transformers
from dora_conversion import (
    conversion,
    convert_module_to_lora,
    dora_delta_weight,
    original_convert_module,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN_SIZE = 64
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def small_model() -> Any:
    """Return a random Llama of two layers, whose weights have at least 64 rows and columns."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def train(model: Any, tokens: Tensor, learning_rate: float, num_steps: int = 100) -> None:
    """Train an adapter to repeat random tokens."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    model.train()
    for _ in range(num_steps):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.inference_mode()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Return a model's logits."""
    return model(tokens).logits


def share_lost(logits: Tensor, expected: Tensor, base: Tensor) -> float:
    """Return how much of the adapter's change of the logits is missing, as a share of its norm."""
    return float(torch.linalg.norm(logits - expected) / torch.linalg.norm(expected - base))


def compare_delta_weights(model: Any) -> None:
    """Compare `get_delta_weight` with what merging adds, for the first layer."""
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = module.get_base_layer().weight.detach().clone()
    delta_weight = module.get_delta_weight("default").detach()
    corrected = dora_delta_weight(module)
    merged = copy.deepcopy(module)
    merged.merge()
    added = merged.get_base_layer().weight.detach() - weight
    print("first q_proj, relative to what merge() adds to the weight:")
    for name, delta in (("get_delta_weight", delta_weight), ("with the magnitude", corrected)):
        error = torch.linalg.norm(delta - added) / torch.linalg.norm(added)
        print(f"  {name}: error {float(error):.2g}")


def compare_conversions(base_model: Any, model: Any, tokens: Tensor) -> None:
    """Convert at full rank with PEFT's function and with the corrected one."""
    print(f"supports_lora_conversion() is {model.supports_lora_conversion()}")
    expected = logits_of(model, tokens)
    base = logits_of(base_model, tokens)
    converters = (("PEFT", original_convert_module), ("with the magnitude", convert_module_to_lora))
    for name, convert in converters:
        conversion._convert_module_to_lora = convert
        config, state_dict = peft.convert_to_lora(model, rank=HIDDEN_SIZE)
        converted = peft.get_peft_model(copy.deepcopy(base_model), config).eval()
        peft.set_peft_model_state_dict(converted, state_dict)
        logits = logits_of(converted, tokens)
        largest = float((logits - expected).abs().max())
        print(f"  {name}, at full rank: largest difference of the logits {largest:.1e}, ", end="")
        print(f"share of their change that is lost {share_lost(logits, expected, base):.2g}")
    conversion._convert_module_to_lora = original_convert_module


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Of AdamW, 100 steps.")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # that the adapter is LoRA already
    versions = f"PEFT {peft.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, PyTorch {torch.__version__}")
    base_model = small_model()
    tokens = torch.randint(0, 128, (8, 32))
    config = peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(base_model), config)
    train(model, tokens, options.learning_rate)
    compare_delta_weights(model)
    if conversion is None:
        print("This PEFT has no convert_to_lora. It came with 0.19.")
    else:
        compare_conversions(base_model, model, tokens)


if __name__ == "__main__":
    main()
