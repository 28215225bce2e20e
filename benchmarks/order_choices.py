"""How an order is learned best: rate and number of steps, or a row-wise polish of the factors, on validation data only.

    python benchmarks/order_choices.py --task chain_sum    # some 8 minutes on one core; the adapter is kept in --out

Trains the adapter that the study trains to choose learning rates (P, seed 100), and prints its validation loss
and accuracy at each rank after each way of spending some steps more on the training rows. Test questions are not looked
at. A way is written as in `WAYS`: `order` moves M by the loss of the answers and leaves full rank as it is, `distil`
does the same by the KL divergence from full rank, `polish` trains the factors, each row of a batch at a nested rank of
its own, full rank among them.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from matryoshka_lora.adapter.factors import get_parameters
from matryoshka_lora.serving.calibrate import learn_order_from
from matryoshka_lora.data.questions import pad_rows, tokenize
from matryoshka_lora.models import load_tokenizer
from matryoshka_lora.rules import stratified_ranks
from research.config import Study, load_study
from research.cuts import Trained
from research.measure import measure
from research.records import Job
from research.run import train_job
from matryoshka_lora.training.trainer import CompletionTrainer

WAYS = (
    *("order 20 0.01", "order 20 0.03", "order 40 0.02", "order 40 0.03", "order 60 0.02"),
    *("distil 40 0.02", "distil 40 0.01"),
    *("polish 20 0.0003", "polish 40 0.0005", "order 40 0.02, polish 20 0.0003"),
)
"""Kind, steps and peak learning rate; several one after the other with commas between."""

SEED, ROWS = 100, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="chain_sum", help="one of the study's tasks")
    parser.add_argument("--items", type=int, default=150, help="validation questions (default: 150; wordnet has 50)")
    parser.add_argument("--rank", type=int, default=32, help="R of the adapter (default: 32)")
    parser.add_argument("--rate", type=float, default=1e-3, help="that it is trained at (default: 1e-3)")
    parser.add_argument("--out", type=Path, default=Path("runs/order-choices"), help="folder of trained factors")
    parser.add_argument("--way", action="append", help="instead of all: such as 'order 40 0.02'")
    given = parser.parse_args()
    study = load_study(Path(__file__).parents[1] / "configs" / "studies" / "headline.yaml")
    study = replace(study, rank=given.rank)
    held_out = study.tasks[given.task].rows("validation", given.items)
    job = Job("matryoshka", given.task, given.rank, given.rate, SEED, "validation")
    trained = make_adapter(study, job, given.out / f"{given.task}-r{given.rank}-lr{given.rate:g}.safetensors")
    for way in ("as it is", *(given.way or WAYS)):
        begin = time.perf_counter()
        trained.svd()
        if way != "as it is":
            for part in way.split(", "):
                kind, steps, rate = part.split()
                SPEND[kind](trained, int(steps), float(rate))
        seconds = time.perf_counter() - begin
        found = measure(trained.adapter, trained.tokenizer, held_out, trained.adapter.nesting.ranks)
        losses = " ".join(f"{loss:.3f}" for loss in found.loss)
        accuracies = " ".join(f"{100 * share:3.0f}" for share in found.accuracy)
        mean = sum(found.loss) / len(found.loss)
        print(f"{given.task:20}  {way:32}  {mean:.4f}  {losses}  | {accuracies}  | {seconds:4.0f} s", flush=True)


def make_adapter(study: Study, job: Job, file: Path) -> Trained:
    """The adapter as it was trained, from the file where there is one."""
    rows = study.train_set(job.recipe, job.task, SEED)
    adapter = train_job(study, job, rows, Untrained if file.exists() else None)
    factors = {}
    for name, module, _ in adapter._layers():
        for letter, factor in zip("AB", get_parameters(module, adapter.name), strict=True):
            factors[f"{name}.{letter}"] = factor.requires_grad_()
    if file.exists():
        with torch.no_grad():
            for name, value in load_file(file).items():
                factors[name].copy_(value)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: factor.detach().clone() for name, factor in factors.items()}, file.with_suffix(".writing"))
        file.with_suffix(".writing").rename(file)
    return Trained(adapter, load_tokenizer(study.model), rows, ROWS, SEED)


class Untrained(CompletionTrainer):
    """Leaves the factors as they begin."""

    def train(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        return None


def learn(trained: Trained, steps: int, rate: float) -> None:
    learn_order_from(trained.adapter, trained.tokenizer, trained.rows, steps, ROWS, rate, seed=SEED)


def distil(trained: Trained, steps: int, rate: float) -> None:
    learn_order_from(trained.adapter, trained.tokenizer, trained.rows, steps, ROWS, rate, seed=SEED, distil=True)


def polish(trained: Trained, steps: int, rate: float) -> None:
    """Adam on the factors themselves, with rows at all nested ranks; the rate falls to 0."""
    adapter = trained.adapter
    questions = [tokenize(trained.tokenizer, row) for row in trained.rows]
    random.Random(SEED).shuffle(questions)
    endless, draws = cycle(questions), random.Random(f"polish {SEED}")
    factors = [factor for _, module, _ in adapter._layers() for factor in get_parameters(module, adapter.name)]
    optimizer = torch.optim.Adam(factors, rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    pad = trained.tokenizer.pad_token_id
    adapter.model.train()
    for _ in range(steps):
        ids, mask, is_answer = pad_rows(list(islice(endless, ROWS)), pad, adapter.model.device)
        labels = ids.masked_fill(~is_answer, -100)
        with adapter.rows(stratified_ranks(adapter.nesting.ranks, ROWS, draws), exact=False):
            adapter.model(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    adapter.model.eval()


SPEND = {"order": learn, "distil": distil, "polish": polish}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main()
