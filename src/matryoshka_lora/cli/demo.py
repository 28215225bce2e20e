"""``matryoshka demo``: train once, deploy at any rank, on this machine and without network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from matryoshka_lora.adapter import NestedAdapter
    from matryoshka_lora.evaluation import Evaluation
    from matryoshka_lora.data.tasks import Example, Task
    from matryoshka_lora.training import TrainConfig

TASK = "family_relationships"
MAX_RANK = 32
EXPORTED_RANK = 4
BATCH_SIZE = 12
STEPS = 80
# The better of two rates by validation loss: benchmarks/learning_rates.py.
LEARNING_RATES = {"matryoshka": 2e-3, "lora": 2e-3}
DEPLOYED = "matryoshka-learned"
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

THREE_LINES = f"""\
    from matryoshka_lora import Nesting, learn_from_trainer, nest
    adapter = nest(peft_model, Nesting.powers_of_two({MAX_RANK}))   # of LoraConfig(r={MAX_RANK}, lora_alpha={MAX_RANK})
    trainer.add_callback(adapter.callback())
"""


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each adapter.")] = STEPS,
    items: Annotated[int, typer.Option(min=2, help="Test questions.")] = 100,
) -> None:
    """Train one adapter for every rank, beside plain LoRA, and draw what each rank is worth.

    The model is SmolLM2-135M, the questions are about family relationships; both come inside packages, so no network
    is needed. Takes about a quarter of an hour on two cores. A run that was stopped goes on at the next adapter.

    Example: matryoshka demo --out runs/demo
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    typer.echo(
        f"Trains two adapters of rank {MAX_RANK} on {TASK}, {steps} steps each (about two minutes each on two cores),\n"
        f"then answers {items} test questions with 5 x 6 versions of them (about ten minutes). Writes to {out}/."
    )
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.evaluation import in_words, print_tables
    from matryoshka_lora.models import load_tokenizer
    from matryoshka_lora.data.tasks import get_task
    from matryoshka_lora.training import train

    _check_folder(out)
    task = get_task(TASK)
    questions, tokenizer = task.examples("test", items), load_tokenizer()
    adapters = {}
    for number, rule in enumerate(LEARNING_RATES, start=1):
        _say(began, f"{number}/4  Training: rule {rule}")
        try:
            adapters[rule] = train(demo_config(rule, steps, out / f"train-{rule}", LEARNING_RATES[rule]))
        except MatryoshkaError as error:
            raise MatryoshkaError(f"{error}\nFor the demo: delete {out}, or give another folder with --out") from error

    _say(began, f"3/4  Evaluating {items} test questions")
    evaluation = _evaluate(adapters, tokenizer, task, questions, task.examples("train", steps * BATCH_SIZE))
    nested = adapters["matryoshka"]
    nested.save(out / "adapter")
    nested.export(out / f"rank-{EXPORTED_RANK}", EXPORTED_RANK, overwrite=True)
    _write(evaluation, nested, questions, out)

    _say(began, f"4/4  Loading rank {EXPORTED_RANK} with plain PEFT, in a process without this package")
    verdict = _check_export(out, tokenizer, questions[:CHECKED_QUESTIONS])

    _say(began, "Done\n")
    print_tables(evaluation)
    typer.echo(f"\n{in_words(evaluation)}\n\n{verdict}\n")
    typer.echo(
        f"{out}/curve.png        every rank in one picture\n"
        f"{out}/evaluation.json  the numbers, and what `matryoshka select {out}` reads\n"
        f"{out}/adapter/         the matryoshka adapter with learned order, for any rank from 1 to {MAX_RANK}\n"
        f"{out}/rank-{EXPORTED_RANK}/          rank {EXPORTED_RANK} of it as a plain LoRA adapter\n\n"
        f"In a training script of your own, before trainer.train():\n{THREE_LINES}"
        "and after it: learn_from_trainer(adapter, trainer); adapter.save(path)\n\n"
        f"Next: matryoshka eval {out}/adapter --task {TASK} --ranks 3,6,12"
    )


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds another's adapters: those of a demo are beside the runs that it trained."""
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.files import check_writable, kinds_in

    check_writable(out)
    for folder in (out, out / "adapter"):
        if not (out / "train-matryoshka").is_dir() and (kinds := kinds_in(folder)):
            raise MatryoshkaError(f"{folder} holds {' and '.join(kinds)} that no demo has made: choose another --out")


def _write(evaluation: Evaluation, nested: NestedAdapter, questions: Sequence[Example], out: Path) -> None:
    """The curves, and what ``matryoshka select`` reads of the adapter that was saved."""
    from matryoshka_lora.adapter import read_adapter
    from matryoshka_lora.evaluation import write_evaluation
    from matryoshka_lora.evaluation.cost import adapter_bytes, token_latency
    from matryoshka_lora.evaluation.reading import weights_hash

    state, _, tensors = read_adapter(out / "adapter")
    ranks = evaluation.curves[DEPLOYED].ranks
    about = {
        "name": DEPLOYED,
        "path": str(out / "adapter"),
        "rule": state.rule.name,
        "inference": state.inference,
        "form": state.form,
        "sha256": weights_hash(out / "adapter"),
    }
    sizes = adapter_bytes(tensors, state.nesting.max_rank, ranks)
    deployed = evaluation.deployed(DEPLOYED, about, sizes, token_latency(nested, ranks))
    write_evaluation(evaluation, out, deployed, evaluation.examples(DEPLOYED, questions))


def demo_config(rule: str, steps: int, folder: Path, learning_rate: float) -> TrainConfig:
    """The training config of one of the demo's adapters."""
    from matryoshka_lora.training import make_config

    return make_config(
        {
            "data": {"task": TASK, "size": steps * BATCH_SIZE},
            # Not reordered, so that the curves can show what reordering does, and the paper's inference.
            "nesting": {"rule": rule, "reorder": False, "inference": "prefix"},
            "lora": {"r": MAX_RANK, "target_modules": "all-linear"},
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": BATCH_SIZE,
            "learning_rate": learning_rate,
            "logging_steps": 10,
            "save_strategy": "no",
        }
    )


def _evaluate(
    adapters: dict[str, NestedAdapter],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Example],
    rows: Sequence[Example],
) -> Evaluation:
    """All curves; the order of the adapters is learned afterwards, from the training rows."""
    from matryoshka_lora.serving.calibrate import learn_order_from
    from matryoshka_lora.evaluation import Evaluation, evaluate_base, evaluate_ranks
    from matryoshka_lora.models import EMBEDDED

    base = evaluate_base(adapters["matryoshka"], tokenizer, task, questions)
    evaluation = Evaluation(TASK, "test", EMBEDDED, "bfloat16", base)

    def curve(adapter: NestedAdapter, name: str) -> None:
        evaluation.curves[name] = evaluate_ranks(adapter, tokenizer, task, questions, name=name)

    for rule, adapter in adapters.items():
        if rule == "matryoshka":
            curve(adapter, "matryoshka-prefix")  # the paper's inference
        adapter.reorder()
        curve(adapter, f"{rule}-svd")
        learn_order_from(adapter, tokenizer, rows, batch_size=BATCH_SIZE)
        curve(adapter, f"{rule}-learned")
    return evaluation


def _check_export(out: Path, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Example]) -> str:
    """Compare the exported rank as plain PEFT loads it with that rank of the adapter, and say what came out."""
    import tempfile

    import torch
    from safetensors.torch import load_file

    from matryoshka_lora.adapter import load
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.data.questions import tokenize
    from matryoshka_lora.models import EMBEDDED, embedded_folder, load_model

    exported = out / f"rank-{EXPORTED_RANK}"
    prompts = [tokenize(tokenizer, question).prompt for question in questions]
    # In float32: in bfloat16 a difference of rounding would decide where two answers are equally likely.
    adapter = load(load_model(EMBEDDED, torch.float32), out / "adapter", rank=EXPORTED_RANK)
    answers, logits = _answer(adapter, prompts)
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
    same = sum(ours == theirs for ours, theirs in zip(answers, plain_answers, strict=True))
    for question, answer in list(zip(questions, plain_answers, strict=True))[:3]:
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        typer.echo(f"  {question.prompt.splitlines()[-1]}\n    plain PEFT: {text}   (right: {question.completion})")
    difference = (logits - plain_logits).abs().max().item()
    return (
        f"Plain PEFT, without this package, gives the same answer to {same} of {len(questions)} questions from the "
        f"exported rank {EXPORTED_RANK} (both in float32); the largest difference of a logit is {difference:.1g}, "
        f"the largest logit {logits.abs().max().item():.0f}."
    )


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
