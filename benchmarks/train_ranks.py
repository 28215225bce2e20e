"""Measure the time of `train_ranks`, relative to the run that it follows.

    python benchmarks/train_ranks.py --repeats 3    # fifteen minutes of one core

`train_ranks` takes half as many examples as the run, so the ideal is 1.5 times the run's time in
all. It can be more for two reasons: its steps have 8 examples, which is slower than large batches
of short examples, and it measures the loss of every nested rank. So there are two settings: batches
of 8 examples of about 48 tokens, and of 32 examples of about 12 tokens, as in the studies of facts.

Time is CPU time of one thread. The model is SmolLM2-135M with its first layers only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import nest
from matryoshka_lora.peft.base_model import load_model, load_tokenizer

SETTINGS = {"8 x 48": (8, 48, 80), "32 x 12": (32, 12, 80)}
"""The examples of a batch of the run, the tokens of an example, and the steps."""
NUM_LAYERS = 2
NUM_EXAMPLES = 64


def measure(batch_size: int, num_tokens: int, num_steps: int) -> dict[str, float]:
    """Return the seconds of a run, and of `train_ranks` after it."""
    tokenizer = load_tokenizer()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (NUM_EXAMPLES, num_tokens), generator=generator)
    prompts = tokenizer.batch_decode(ids[:, : num_tokens - 4])
    completions = tokenizer.batch_decode(ids[:, num_tokens - 4 :])
    examples = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    model = load_model()
    del model.model.layers[NUM_LAYERS:]
    model.config.num_hidden_layers = NUM_LAYERS
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder,
                max_steps=num_steps,
                per_device_train_batch_size=batch_size,
                learning_rate=4e-3,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"),
        )
        adapter = nest(trainer.model)
        trainer.add_callback(adapter.callback())
        start = time.process_time()
        trainer.train()
        seconds_of_run = time.process_time() - start
        adapter.reorder()
        start = time.process_time()
        result = adapter.train_ranks(trainer)
        seconds = time.process_time() - start
    assert result.num_examples == num_steps * batch_size // 2, result
    return {"run": seconds_of_run, "train_ranks": seconds}


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for setting, arguments in SETTINGS.items():
        runs = [measure(*arguments) for _ in range(options.repeats)]
        total = median((run["run"] + run["train_ranks"]) / run["run"] for run in runs)
        print(f"batches of {setting} tokens: {total:.2f} times the run's time", flush=True)


if __name__ == "__main__":
    main()
