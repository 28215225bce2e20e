"""The peak memory of a whole training process, measured from outside.

    python benchmarks/peak_memory.py --out runs/peak_memory.json

Each variant trains SmolLM2-135M (bf16 base, fp32 adapters, R = 32, all linear layers) in a process of its own: two
optimizer steps of AdamW on 8 rows of 256 tokens, of which the last 64 of each row have a label. The figure is the
operating system's largest resident set of that process, libraries, weights and optimizer included.

* `peft`: TRL's SFTTrainer and PEFT, as they come.
* `peft-labels`: the same adapter with the trainer of `matryoshka train`, which computes logits only where a token has a
  label: what is gained by the loss alone.
* `matryoshka`, `stratified`: nested adapters with that trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from matryoshka_lora.files import write_text

ROWS, TOKENS, LABELLED, STEPS, RANK = 8, 256, 64, 2, 32
VARIANTS = ("peft", "peft-labels", "matryoshka", "stratified")


def train(variant: str, folder: str) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig, SFTTrainer

    from matryoshka_lora import nest
    from matryoshka_lora.models import load_model, load_tokenizer
    from matryoshka_lora.training.trainer import CompletionTrainer

    torch.manual_seed(0)
    model = get_peft_model(
        load_model(dtype=torch.bfloat16), LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    )
    callbacks = []
    if not variant.startswith("peft"):
        callbacks.append(nest(model, rule=variant).callback())
    ids = torch.randint(100, 40000, (ROWS * STEPS, TOKENS)).tolist()
    mask = [0] * (TOKENS - LABELLED) + [1] * LABELLED
    trainer = (SFTTrainer if variant == "peft" else CompletionTrainer)(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "completion_mask": [mask] * len(ids)}),
        processing_class=load_tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()


def peak(variant: str) -> float:
    """GiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--variant", variant, "--folder", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(errors)
    return usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--variant", choices=VARIANTS, help="train this one, here; without it, measure all")
    parser.add_argument("--folder", help="of a single training")
    args = parser.parse_args()
    if args.variant:
        train(args.variant, args.folder or "runs/peak-memory")
        return
    found = {}
    for variant in VARIANTS:
        found[variant] = round(peak(variant), 2)
        print(f"{variant:12} {found[variant]:5.2f} GiB   {found[variant] / found['peft']:.2f} x PEFT", flush=True)
    if args.out:
        write_text(args.out, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
