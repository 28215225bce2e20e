"""Makes what stands beside it, with matryoshka-lora 0.1: adapters, an evaluation and runs as its users have them.

Run with the sources of version 0.1.0 (the last commit whose ``pyproject.toml`` has that version and whose package
has ``export_adapter``)::

    PYTHONPATH=SOURCES_OF_0_1/src:SOURCES_OF_0_1/tests HF_HUB_OFFLINE=1 python make.py

``expected.safetensors`` holds what the old code computed: for each adapter the logits after the last token of
``PROMPT``, as ``NAME/RANK`` in eval mode and as ``NAME/training`` in training mode. ``expected.json`` holds what it
printed: how an adapter was reordered, the share of its squared singular values by rank, and the chosen rank.
"""

# ruff: noqa: I001 - the modules of that version are not there today, so that no order of imports would last

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_chat import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from matryoshka_lora import Nesting, load, nest
from matryoshka_lora.adapter.sidecar import write_sidecar
from matryoshka_lora.adapter.source import open_adapter
from matryoshka_lora.deploy.export import cut, export_directions
from matryoshka_lora.deploy.info import describe
from matryoshka_lora.deploy.reorder import Moments, reorder_adapter, reweigh_adapter, rewrite_learned
from matryoshka_lora.evaluate.reading import read_measured
from matryoshka_lora.evaluate.select import Wish, choose
from matryoshka_lora.train import make_config, train

HERE = Path(__file__).parent
PROMPT = [[5, 40, 17, 62, 8]]
TARGETS = ["q_proj", "down_proj"]
NESTINGS = {
    "none": Nesting([1, 2, 4]),
    "rank": Nesting([1, 2, 4], "rank", alpha=3.0),
    "sqrt": Nesting([1, 2, 4], "sqrt", alpha=1.7),
}
EXPECTED: dict[str, Tensor] = {}
SAID: dict[str, Any] = {}


def make_base() -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained("base")
    tokenizer.save_pretrained("base")


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()


def nested(nesting: Nesting, number: int, **options: Any) -> Any:
    """An adapter of random factors."""
    config = LoraConfig(r=4, lora_alpha=nesting.lora_alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapter = nest(get_peft_model(base(), config), nesting, **options)
    generator = torch.Generator().manual_seed(number)
    for name, parameter in adapter.model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    adapter.model.eval()
    return adapter


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(PROMPT)).logits[0, -1].clone()


def record(name: str) -> None:
    """What the old code makes of a folder that it has written."""
    adapter = load(base(), name)
    for rank in adapter.ranks:
        adapter.set_rank(rank)
        EXPECTED[f"{name}/{rank}"] = logits(adapter.model)
    adapter = load(base(), name, trainable=True)
    adapter.draw(step=3, rows=len(PROMPT))
    EXPECTED[f"{name}/training"] = logits(adapter.model)
    found = describe(name)
    SAID[name] = {"by": found.spectra.metric, "kept": {rank: found.kept(rank) for rank in (1, 2, 4)}}


def save(name: str, adapter: Any, checkpoint: bool = False) -> None:
    """As `save` does, or as a Trainer's checkpoint has it: the factors as they are trained."""
    if checkpoint:
        adapter.model.save_pretrained(name)
        write_sidecar(Path(name), adapter.state)
    else:
        adapter.save(name)


def make_adapters() -> list[str]:
    for number, (scaling, nesting) in enumerate(NESTINGS.items()):
        save(f"prefix-{scaling}", nested(nesting, number, inference="prefix"))
        save(f"keep-{scaling}", nested(nesting, number, inference="keep"))
        save(f"checkpoint-{scaling}", nested(nesting, number, inference="keep"), checkpoint=True)
        adapter = nested(nesting, number)
        adapter.reorder()
        save(f"reordered-{scaling}", adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "none" has no alpha
        save("prefix-none-alpha", nested(Nesting([1, 2, 4], alpha=2.0), 3, inference="prefix"))
    save("checkpoint-prefix", nested(NESTINGS["sqrt"], 4, inference="prefix"), checkpoint=True)
    save("lora", nested(NESTINGS["sqrt"], 5, rule="lora"))
    save("lora-checkpoint", nested(NESTINGS["rank"], 6, rule="lora"), checkpoint=True)
    save("stratified", nested(NESTINGS["sqrt"], 7, rule="stratified", seed=11))
    save("stratified-checkpoint", nested(NESTINGS["rank"], 8, rule="stratified", seed=11), checkpoint=True)
    save("dylora-all", nested(NESTINGS["sqrt"], 9, rule="dylora-all"))
    # Rules that only studies used.
    save("mean", nested(NESTINGS["sqrt"], 10, rule="mean"))
    save("mean-checkpoint", nested(NESTINGS["sqrt"], 10, rule="mean"), checkpoint=True)
    adapter = nested(NESTINGS["sqrt"], 10, rule="geometric-0.9")
    adapter.reorder()
    save("geometric", adapter)

    # File to file.
    spectra = reorder_adapter("checkpoint-sqrt", "frobenius")
    rewrite_learned("frobenius", "learned", spectra)
    generator, moments = torch.Generator().manual_seed(12), {}
    for layer in open_adapter("frobenius").layers:
        hidden, gradients = (torch.randn(30, 4, generator=generator).double() for _ in range(2))
        moments[layer.name] = Moments(hidden.T @ hidden, gradients.T @ gradients)
    reweigh_adapter("frobenius", "loss", "loss", moments)
    reweigh_adapter("frobenius", "activations", "activations", {k: Moments(m.inner) for k, m in moments.items()})
    plain = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=TARGETS, rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base(), plain)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    model.save_pretrained("plain")
    reorder_adapter("plain", "stranger")
    shutil.rmtree("plain")
    export_directions(cut("frobenius", 4), "directions")
    export_directions(cut("frobenius", 2), "directions-2")
    return sorted(path.parent.name for path in Path().glob("*/nesting.json"))


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: [a, b, c]
doc_to_target: target
metric_list: [{metric: acc}]
"""


def evaluate(adapter: str, targets: list[int]) -> None:
    rows = [{"prompt": f"{n} + {n} =", "target": target} for n, target in enumerate(targets)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("letters.yaml").write_text(TASK)
    command = [sys.executable, "-m", "matryoshka_lora", "eval", adapter, "--tasks", "letters.yaml", "--dtype", "fp32"]
    subprocess.run([*command, "--ranks", "1,2,4"], check=True)
    Path("rows.jsonl").unlink()
    Path("letters.yaml").unlink()


def make_evaluation() -> None:
    """Of the adapter ``loss``. A model of random weights is right where its own answers are what is asked for."""
    shutil.copytree("loss", "asked")
    evaluate("asked", [0] * 24)
    lines = Path("asked", "evaluation", "examples.jsonl").read_text().splitlines()
    said = [json.loads(line)["answers"] for line in lines]
    shutil.rmtree("asked")
    evaluate("loss", ["abc".index(answers["4" if n % 8 else "1"].strip()) for n, answers in enumerate(said)])
    measured = read_measured(Path("loss", "evaluation", "evaluation.json"))[1]
    choices = {str(within): choose(measured, Wish(within)) for within in (0.01, 0.1, 0.3, 0.5)}
    SAID["choices"] = {
        within: {"rank": choice.rank, "best": choice.best, "ties": choice.ties} for within, choice in choices.items()
    }
    SAID["values"] = dict(zip(measured.ranks, measured.values, strict=True))
    for name in ("curve.png", "report.html", "answers.jsonl.lock"):
        Path("loss", "evaluation", name).unlink(missing_ok=True)
    measured = read_measured(Path("loss", "evaluation", "evaluation.json"))[1]
    choices = {str(within): choose(measured, Wish(within)) for within in (0.01, 0.1, 0.3, 0.5)}
    SAID["choices"] = {
        within: {"rank": choice.rank, "best": choice.best, "ties": choice.ties} for within, choice in choices.items()
    }
    SAID["values"] = dict(zip(measured.ranks, measured.values, strict=True))


RUNS: dict[str, dict[str, Any]] = {
    "run-learned": {"nesting": {"ranks": [1, 2, 4]}},
    "run-svd": {"nesting": {"ranks": [1, 2, 4], "scaling": "sqrt", "alpha": 1.7, "reorder": "svd"}},
    "run-paper": {"recipe": "paper", "nesting": {"ranks": [1, 2, 4], "scaling": "rank", "alpha": 4.0}},
    "run-kept": {"nesting": {"ranks": [1, 2, 4], "reorder": False}},
}
WITH_CHECKPOINT = "run-learned"


def make_runs() -> None:
    for name, changes in RUNS.items():
        settings = {
            "model": "base",
            "dtype": "fp32",
            "data": {"task": "chain_sum", "size": 20},
            "output_dir": name,
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            "lora": {"target_modules": TARGETS},
        }
        train(make_config({**settings, **changes}))
        for checkpoint in Path(name).glob("checkpoint-*"):
            if (name, checkpoint.name) != (WITH_CHECKPOINT, "checkpoint-2"):
                shutil.rmtree(checkpoint)


def main() -> None:
    os.chdir(HERE)
    torch.set_num_threads(1)
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    make_base()
    names = make_adapters()
    make_evaluation()
    make_runs()
    for name in [*names, *RUNS]:
        record(name)
    # Cards stand beside one adapter and one run only: they are all alike.
    for card in HERE.glob("**/README.md"):
        if card.parent.name not in ("loss", "run-learned"):
            card.unlink()
    save_file({name: tensor.contiguous() for name, tensor in EXPECTED.items()}, "expected.safetensors")
    Path("expected.json").write_text(json.dumps(SAID, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
