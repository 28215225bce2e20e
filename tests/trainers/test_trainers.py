"""Other trainers, with a tiny model: our recipes, and our commands on what the trainers save.

`make test-trainers` installs each trainer in an environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import tiny_llama
from helpers.plain_peft import by_peft, distance, logits
from helpers.tiny_chat import tiny_tokenizer
from transformers import AutoModelForCausalLM

from matryoshka_lora import info, load

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "trainers"
RANK = 8
BATCH_SIZE = 4
LEARNING_RATE = 0.01

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Trainer:
    """A trainer in an environment of its own.

    Attributes:
        name: Its name in the ids of the tests.
        variable: The environment variable with the path of its Python.
        example: The file in examples/trainers.
        start: Starts the training in a folder with inputs, and returns the folder of the trainer's
            own adapter, and the nested one. Takes the Python, the example and the folder.
    """

    name: str
    variable: str
    example: str
    start: Callable[[Path, Path, Path], tuple[Path, Path]]


@dataclass(frozen=True)
class Run:
    """What a trainer has saved, with the recipe as it is, or with P and without trained ranks.

    Attributes:
        folder: The working directory, with the inputs.
        plain: The trainer's own adapter.
        nested: The adapter that the recipe has saved.
        has_trained_ranks: Whether the recipe is as it is.
    """

    folder: Path
    plain: Path
    nested: Path
    has_trained_ranks: bool

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)


def write_inputs(folder: Path) -> None:
    """Write a tiny chat model, and examples of a chat."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines: list[str] = []
    for number in range(32):
        messages = [
            {"role": "user", "content": f"{number} times 3"},
            {"role": "assistant", "content": f"{number * 3}"},
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "my.jsonl").write_text("".join(lines))


def run_process(command: list[Any], folder: Path, **variables: str) -> None:
    process = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]


def start_llama_factory(python: Path, example: Path, folder: Path) -> tuple[Path, Path]:
    tags = {"role_tag": "role", "content_tag": "content"}
    roles = {"user_tag": "user", "assistant_tag": "assistant"}
    dataset = {
        "file_name": "my.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, **roles},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"chat": dataset}))
    config = {
        "model_name_or_path": "base",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "dataset_dir": ".",
        "dataset": "chat",
        "template": "default",
        "output_dir": "output",
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "max_steps": 60,
        "use_cpu": True,
        "report_to": "none",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_process([python, example, "config.yaml"], folder)
    return folder / "output", folder / "output" / "nested"


def start_swift(python: Path, example: Path, folder: Path) -> tuple[Path, Path]:
    options = {
        "model": "base",
        "model_type": "llama",
        "template": "chatml",
        "dataset": "my.jsonl",
        "tuner_type": "lora",
        "lora_rank": RANK,
        "torch_dtype": "float32",
        "use_cpu": "true",
        "use_hf": "true",
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "max_steps": 60,
        "output_dir": "output",
        "add_version": "false",
        "report_to": "none",
        "external_plugins": example,
        "callbacks": "matryoshka",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run_process([python, "-m", "swift.cli.main", "sft", *words], folder)
    return folder / "output" / "checkpoint-60", folder / "output" / "nested"


def start_axolotl(python: Path, example: Path, folder: Path) -> tuple[Path, Path]:
    config = {
        "base_model": "base",
        "datasets": [{"path": "my.jsonl", "ds_type": "json", "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "sequence_len": 128,
        "adapter": "lora",
        "lora_r": RANK,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "plugins": [f"{example.stem}.NestingPlugin"],
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "output_dir": "output",
        "micro_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        "max_steps": 60,
        "bf16": False,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_process(
        [python, "-m", "axolotl.cli.train", "config.yaml"],
        folder,
        PYTHONPATH=str(example.parent),
        AXOLOTL_DO_NOT_TRACK="1",
    )
    return folder / "output", folder / "output" / "nested"


TRAINERS = [
    Trainer("llamafactory", "LLAMA_FACTORY_PYTHON", "llama_factory.py", start_llama_factory),
    Trainer("swift", "SWIFT_PYTHON", "ms_swift_plugin.py", start_swift),
    Trainer("axolotl", "AXOLOTL_PYTHON", "axolotl_plugin.py", start_axolotl),
]


def with_p_and_reorder(recipe: str) -> str:
    """Return a recipe that trains with P, and reorders in place of training the ranks."""
    recipe = re.sub(r"nest\((\w.+)\)", r'nest(\1, rule="matryoshka")', recipe)
    return re.sub(r"train_ranks\(.+\)", "reorder()", recipe)


@pytest.fixture(scope="module", params=[True, False], ids=["trained", "reordered"])
def has_trained_ranks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=TRAINERS, ids=lambda trainer: trainer.name)
def run(
    request: pytest.FixtureRequest,
    has_trained_ranks: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    trainer: Trainer = request.param
    python = os.environ.get(trainer.variable)
    if python is None:
        pytest.skip(f"{trainer.variable} is not set; `make test-trainers` sets it")
    folder = tmp_path_factory.mktemp(trainer.name)
    write_inputs(folder)
    recipe = (EXAMPLES / trainer.example).read_text()
    example = folder / trainer.example
    example.write_text(recipe if has_trained_ranks else with_p_and_reorder(recipe))
    plain, nested = trainer.start(Path(python).absolute(), example, folder)
    return Run(folder, plain, nested, has_trained_ranks)


def matryoshka(run: Run, *words: object) -> None:
    run_process([sys.executable, "-m", "matryoshka_lora", *words], run.folder)


def test_nested_folder_has_every_rank(run: Run, tmp_path: Path) -> None:
    """PEFT loads each rank, and R is the trainer's own adapter."""
    adapter = load(run.base(), run.nested)
    assert (adapter.order, adapter.small_rank > 0) == ("svd", run.has_trained_ranks)
    for rank in adapter.nesting.ranks:
        exported = tmp_path / str(rank)
        matryoshka(run, "export", run.nested, "--rank", rank, "-o", exported)
        adapter.set_rank(rank)
        assert distance(logits(adapter.model), by_peft(exported, run.base)) < 1e-4
    expected = by_peft(run.plain, run.base)
    assert distance(expected, logits(run.base())) > 0.05  # the adapter has an effect
    assert distance(by_peft(run.nested, run.base), expected) < 1e-4


def test_commands_read_the_folder_of_the_trainer(run: Run, tmp_path: Path) -> None:
    expected = by_peft(run.plain, run.base)
    reordered = tmp_path / "reordered"
    trained = tmp_path / "trained"
    matryoshka(run, "info", run.plain)
    matryoshka(run, "reorder", run.plain, "-o", reordered)
    matryoshka(
        run, "train-ranks", run.plain, "--data", "my.jsonl", "--dtype", "fp32", "-o", trained
    )
    matryoshka(run, "export", run.plain, "--rank", "2", "-o", tmp_path / "rank-2")

    assert info(run.plain).lora.order is None
    assert distance(by_peft(reordered, run.base), expected) < 1e-4
    by_peft(trained, run.base)
    adapter = load(run.base(), reordered)
    adapter.set_rank(2)
    assert distance(by_peft(tmp_path / "rank-2", run.base), logits(adapter.model)) < 1e-4
