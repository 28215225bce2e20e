"""``matryoshka demo``: train once, deploy at any rank, on this machine and without network."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from matryoshka_lora.cli.outputs import output

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from matryoshka_lora.adapter.handle import NestedAdapter
    from matryoshka_lora.data.tasks import Example
    from matryoshka_lora.training.config import TrainConfig

TASK = "family_relationships"
MAX_RANK = 32
EXPORTED_RANK = 4
BATCH_SIZE = 12
STEPS = 80
# The better of two rates by validation loss, with version 0.1.
LEARNING_RATE = 2e-3
CHECKED_QUESTIONS = 8
ANSWER_TOKENS = 12

# Run in a process of its own, in which our package cannot be imported.
PLAIN_PEFT = """
import json, sys
sys.modules["matryoshka_lora"] = None
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, adapter, logits_file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
answers, logits = [], []
for ids in json.load(sys.stdin):
    prompt = torch.tensor([ids])
    with torch.no_grad():
        logits.append(model(input_ids=prompt).logits[0, -1].float())
        answer = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=ANSWER_TOKENS)
    answers.append(answer[0, len(ids):].tolist())
save_file({"logits": torch.stack(logits)}, logits_file)
print(json.dumps(answers))
""".replace("ANSWER_TOKENS", str(ANSWER_TOKENS))

THEIR_LINES = """\
    from matryoshka_lora import nest
    adapter = nest(peft_model)                    # before the Trainer
    trainer.add_callback(adapter.callback())      # before trainer.train()
    adapter.reorder("trained", trainer)           # after it; adapter.reorder() takes seconds
    adapter.save("my-adapter")
"""


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=output, metavar="PATH", help="The folder to write.")
    ] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = STEPS,
    items: Annotated[int, typer.Option(min=2, help="Test questions.")] = 100,
) -> None:
    """Train one adapter, see what each rank of it is worth, and read one rank with plain PEFT.

    The model is SmolLM2-135M, the questions are about family relationships; both come inside packages, so no network
    is needed. Takes less than ten minutes on two cores. A demo that was stopped goes on when it is asked for again.

    Example: matryoshka demo --out runs/demo
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws a bar for each of its steps at each rank
    began = time.monotonic()
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.evaluation.evaluate import bar, evaluate
    from matryoshka_lora.evaluation.report import print_tasks
    from matryoshka_lora.serving.export import export
    from matryoshka_lora.training import train

    adapter, exported = out / "adapter", out / f"rank-{EXPORTED_RANK}"
    _check_folders(out, adapter, exported)
    dtype = fastest_dtype()
    typer.echo(
        f"Trains one adapter of rank {MAX_RANK} on {TASK} for {steps} steps, and asks it {items} test questions\n"
        f"at each nested rank. Computes in {dtype}, which is the faster dtype here. Writes to {out}/."
    )
    _say(began, "1/3  Training")
    try:
        train(demo_config(adapter, steps, dtype))
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{error}\nFor the demo: delete {out}, or give another folder with --out") from error
    _say(began, f"2/3  Asking {items} test questions at each nested rank, and of the base model")
    evaluation = evaluate(adapter, TASK, dtype=dtype, limit=items, overwrite=True, progress=bar)
    _say(began, f"3/3  Rank {EXPORTED_RANK} as an ordinary LoRA adapter, read by PEFT without this package")
    export(adapter, exported, EXPORTED_RANK, verify=False, overwrite=True)
    verdict = _read_by_plain_peft(adapter, exported)
    _say(began, "Done\n")
    print_tasks(evaluation.to_dict())
    typer.echo(
        f"{verdict}\n\n"
        f"{adapter}             the adapter, for any rank from 1 to {MAX_RANK}\n"
        f"{adapter}/evaluation  the curve as a picture, the numbers, every answer\n"
        f"{exported}              rank {EXPORTED_RANK}, an ordinary LoRA adapter\n\n"
        f"In a training script of your own:\n{THEIR_LINES}\n"
        f"Next: matryoshka select {shlex.quote(str(adapter))} --within 5%"
    )


def fastest_dtype() -> Literal["bf16", "fp32"]:
    """The dtype in which this machine multiplies a matrix faster: not every processor knows bfloat16."""
    import torch

    if torch.accelerator.is_available():
        return "bf16"

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - began)
        return min(times)

    return "bf16" if seconds(torch.bfloat16) <= seconds(torch.float32) else "fp32"


def demo_config(folder: Path, steps: int, dtype: str) -> TrainConfig:
    """The training config of the demo's adapter."""
    from matryoshka_lora.training import make_config

    return make_config(
        {
            "data": {"task": TASK, "size": steps * BATCH_SIZE},
            "dtype": dtype,
            "lora": {"r": MAX_RANK, "target_modules": "all-linear"},
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "logging_steps": 10,
            "save_steps": 20,
            "save_total_limit": 1,
        }
    )


def _check_folders(out: Path, adapter: Path, exported: Path) -> None:
    """Refuse a folder that holds another's adapters."""
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.files import check_writable, kinds_in

    check_writable(out)
    ours = (adapter / "train.yaml").is_file()
    for folder in (out, exported) if ours else (out, adapter, exported):
        if (folder == out or not ours) and (kinds := kinds_in(folder)):
            raise MatryoshkaError(f"{folder} holds {' and '.join(kinds)} that no demo has made: choose another --out")


def _read_by_plain_peft(adapter: Path, exported: Path) -> str:
    """Compare the exported rank as plain PEFT reads it with that rank of the adapter, and say what came out."""
    import tempfile

    import torch
    from safetensors.torch import load_file

    from matryoshka_lora.adapter.loading import load
    from matryoshka_lora.data.questions import tokenize
    from matryoshka_lora.data.tasks import get_task
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.models import EMBEDDED, embedded_folder, load_model, load_tokenizer

    questions, tokenizer = get_task(TASK).examples("test", CHECKED_QUESTIONS), load_tokenizer()
    prompts = [tokenize(tokenizer, question).prompt for question in questions]
    with tempfile.TemporaryDirectory() as folder:
        logits_file = Path(folder) / "logits.safetensors"
        process = subprocess.run(
            [sys.executable, "-c", PLAIN_PEFT, str(embedded_folder()), str(exported), str(logits_file)],
            input=json.dumps(prompts),
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise MatryoshkaError(f"plain PEFT could not load {exported}:\n{process.stderr[-2000:]}")
        plain_answers: list[list[int]] = json.loads(process.stdout.splitlines()[-1])
        plain_logits = load_file(logits_file)["logits"]
    # In float32: in bfloat16 a difference of rounding would decide where two answers are equally likely.
    answers, logits = _answer(load(load_model(EMBEDDED, torch.float32), adapter, rank=EXPORTED_RANK), prompts)
    _show(questions, plain_answers, tokenizer)
    same = sum(ours == theirs for ours, theirs in zip(answers, plain_answers, strict=True))
    difference = (logits - plain_logits).abs().max().item()
    return (
        f"PEFT without this package gives the same answer to {same} of {len(questions)} questions from rank "
        f"{EXPORTED_RANK}\n(both in float32); the largest difference of a logit is {difference:.1g}, the largest logit "
        f"{logits.abs().max().item():.0f}."
    )


def _show(questions: Sequence[Example], answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    for question, answer in list(zip(questions, answers, strict=True))[:3]:
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        typer.echo(f"  {question.prompt.splitlines()[-1]}\n    PEFT: {text}   (right: {question.completion})")


def _answer(adapter: NestedAdapter, prompts: Sequence[list[int]]) -> tuple[list[list[int]], Tensor]:
    """Greedy answers, and the logits after each prompt, shape (prompts, vocabulary)."""
    import torch

    answers: list[list[int]] = []
    logits: list[Any] = []
    for ids in prompts:
        prompt = torch.tensor([ids])
        with torch.no_grad():
            logits.append(adapter.model(input_ids=prompt).logits[0, -1].float())
            answer = adapter.model.generate(input_ids=prompt, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        answers.append(answer[0, len(ids) :].tolist())
    return answers, torch.stack(logits)


def _say(began: float, text: str) -> None:
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    typer.echo(f"\n[{minutes}:{seconds:02}] {text}")
