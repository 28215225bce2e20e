"""Each rank trained by itself: it loses less, and what no rank trains stays as it was."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nest_as, nested_llama, randomize, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_chat import tiny_tokenizer
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, OPTConfig, OPTForCausalLM, Trainer, TrainingArguments

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError, export, load, reorder
from matryoshka_lora.adapter.in_model import InModel
from matryoshka_lora.reordering import checkpoint, trained
from matryoshka_lora.reordering.descent import gradients_at, learning, teaches
from matryoshka_lora.reordering.model import Data, Part
from matryoshka_lora.reordering.sources import data_from
from matryoshka_lora.reordering.trained import share_out, train_ranks
from matryoshka_lora.serving.info import describe

NESTING = Nesting([1, 2, 4, 8], "none", 0.7)
ROWS = [{"prompt": f"{name} is", "completion": f" {end}"} for name, end in zip("abcdef", "stuvwx", strict=True)]


class Tokens:
    """Rows of tokens, whose own loss is asked for."""

    quiet, rate, seen, held_out = True, None, None, None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ids = torch.randint(4, 90, (8, 6), generator=torch.Generator().manual_seed(1))
        self.factor = 1.0  # of the loss that gradients are of
        self.asked = 0

    def __len__(self) -> int:
        return len(self.ids)

    def loss(self) -> Tensor:
        self.asked += 1
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss * self.factor if torch.is_grad_enabled() else loss

    def steps(self, rows: int, at_once: int, seed: int) -> Iterator[list[Part]]:
        for _ in range(-(-rows // at_once)):
            yield [Part(len(self.ids), 1.0, None, self.loss)]


def products(adapter: NestedAdapter, rank: int) -> dict[str, np.ndarray[Any, Any]]:
    """``s B A`` of the first columns, by layer."""
    scale, found = adapter.nesting.scale, InModel(adapter.model, adapter.name).factors()
    return {name: scale * (B[:, :rank] @ A[:rank]).double().numpy() for name, (A, B) in found.items()}


def loss_at(adapter: NestedAdapter, data: Tokens, rank: int) -> float:
    adapter.set_rank(rank)
    adapter.model.eval()
    with torch.no_grad():
        return data.loss().item()


@given(st.integers(1, 500), st.integers(1, 8))
def test_steps_are_shared_out(steps: int, count: int) -> None:
    """Each rank gets 0.6 times what the one before has, but for rounding, and nothing is lost."""
    found = share_out(steps, [2**number for number in range(count)])
    assert list(found) == [2**number for number in range(count)]
    assert sum(found.values()) == steps
    first = steps * 0.4 / (1 - 0.6**count)
    for number, share in enumerate(found.values()):
        assert abs(share - first * 0.6**number) <= 1 + 1e-6


def test_every_nested_rank_loses_less() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    data = Tokens(adapter.model)
    before = {rank: loss_at(adapter, data, rank) for rank in NESTING.ranks}
    shares = train_ranks(InModel(adapter.model, "default"), data, 60, 2e-2)
    assert sum(shares.values()) == 60
    after = {rank: loss_at(adapter, data, rank) for rank in NESTING.ranks}
    for rank in NESTING.ranks[:-1]:
        assert after[rank] < before[rank] - 0.1


def test_without_a_rate_it_is_the_svd() -> None:
    """What a block begins from is the best of what is left: at rate 0, each nested prefix is the closest matrix."""
    adapter = nested_llama(NESTING, "lora")
    whole = products(adapter, 8)
    adapter.reorder()
    train_ranks(InModel(adapter.model, "default"), Tokens(adapter.model), 8, 0.0)
    for rank in NESTING.ranks:
        for name, found in products(adapter, rank).items():
            u, s, v = np.linalg.svd(whole[name])
            np.testing.assert_allclose(found, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)


def test_the_last_block_makes_up_for_the_others_as_far_as_it_can() -> None:
    adapter = nested_llama(NESTING, "lora")
    whole = products(adapter, 8)
    adapter.reorder()
    train_ranks(InModel(adapter.model, "default"), Tokens(adapter.model), 40, 2e-2)
    below, full = products(adapter, 4), products(adapter, 8)
    moved = 0.0
    for name, found in full.items():
        u, s, v = np.linalg.svd(whole[name] - below[name])
        np.testing.assert_allclose(found - below[name], (u[:, :4] * s[:4]) @ v[:4], atol=1e-5)
        best = np.linalg.svd(whole[name])[1][4:]
        moved = max(moved, float(np.linalg.norm(whole[name] - below[name]) - np.linalg.norm(best)))
    assert moved > 1e-2  # the prefix is no longer the closest matrix


def test_ranks_between_nested_ones_are_the_best_of_their_block() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    train_ranks(InModel(adapter.model, "default"), Tokens(adapter.model), 40, 2e-2)
    three, two, four = (products(adapter, rank) for rank in (3, 2, 4))
    for name in three:
        u, s, v = np.linalg.svd(four[name] - two[name])
        np.testing.assert_allclose(three[name] - two[name], s[0] * np.outer(u[:, 0], v[0]), atol=1e-5)


def test_a_block_that_loses_more_is_not_kept() -> None:
    """The gradients lead upwards."""
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    data = Tokens(adapter.model)
    data.factor = -1.0
    before = {rank: products(adapter, rank) for rank in NESTING.ranks}
    train_ranks(InModel(adapter.model, "default"), data, 20, 2e-2)
    for rank in NESTING.ranks:
        for name, found in products(adapter, rank).items():
            np.testing.assert_allclose(found, before[rank][name], atol=1e-5)


def test_rank_r_is_not_given_away_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    before = products(adapter, 8)
    monkeypatch.setattr(trained, "MOST_LOST", -9.0)  # no gain is enough
    with pytest.warns(
        UserWarning, match=r"not kept: on rows that are only looked at rank 8 would lose \d.*and that of"
    ):
        assert train_ranks(InModel(adapter.model, "default"), Tokens(adapter.model), 20, 2e-2) == {}
    for name, found in products(adapter, 8).items():
        assert (found == before[name]).all()


def test_a_loss_that_is_not_finite_leaves_the_factors() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    data = Tokens(adapter.model)
    before = products(adapter, 8)
    data.factor = float("nan")
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        train_ranks(InModel(adapter.model, "default"), data, 6)
    for name, found in products(adapter, 8).items():
        assert (found == before[name]).all()


def test_what_cannot_be_trained_is_refused_before_anything_is_touched() -> None:
    one = nest_as(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])), Nesting([4]), "lora")
    with pytest.raises(MatryoshkaError, match="give it smaller ranks too"):
        one.reorder("trained", ROWS, tiny_tokenizer())
    assert not one.reordered
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    with pytest.raises(MatryoshkaError, match="in 0 steps"):
        train_ranks(InModel(adapter.model, "default"), Tokens(adapter.model), 0)
    with pytest.raises(MatryoshkaError, match="needs data"):
        adapter.reorder("trained")


def test_frozen_factors_learn_and_stay_frozen() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    before = products(adapter, 1)
    train_ranks(InModel(adapter.model, "default"), Tokens(adapter.model), 20, 2e-2)
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())
    assert any((found != before[name]).any() for name, found in products(adapter, 1).items())


class KilledError(Exception):
    """In the place of a kill."""


def killed_at(step: int | None) -> Callable[[int], None]:
    """An ``on_step`` that ends the run at a step."""
    steps = count(1)

    def on_step(rows: int) -> None:
        if next(steps) == step:
            raise KilledError

    return on_step


def trained_to(kill_at: int | None, file: Path | None, seed: int = 0) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """What 40 steps make of an adapter, and how often a loss was asked for."""
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    data = Tokens(adapter.model)
    train_ranks(InModel(adapter.model, "default"), data, 40, 2e-2, seed, killed_at(kill_at), file)
    return products(adapter, 1) | {f"{name}, whole": found for name, found in products(adapter, 8).items()}, data.asked


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    return trained_to(None, None)


@pytest.mark.parametrize("step", [1, 20, 21, 36, 40])
@pytest.mark.parametrize("seconds", [0.0, math.inf])
def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any, step: int, seconds: float
) -> None:
    """With a file of each step, and with one of each block: they have 20, 13 and 7 steps."""
    monkeypatch.setattr(checkpoint, "SECONDS", seconds)
    with pytest.raises(KilledError):
        trained_to(step, tmp_path / "file")
    assert (tmp_path / "file").exists() == (seconds == 0 or step > 20)
    (whole, asked), (resumed, asked_again) = uninterrupted, trained_to(None, tmp_path / "file")
    assert all((resumed[name] == found).all() for name, found in whole.items())
    # What was done is not done again: these steps, and the two losses of each finished block.
    ends = [end for end in (20, 33) if end < step]
    assert asked - asked_again == (step if seconds == 0 else max(ends, default=0)) + 2 * len(ends)


def test_the_checkpoint_of_another_training_counts_as_none(tmp_path: Path, uninterrupted: Any) -> None:
    trained_to(None, tmp_path / "file", seed=1)
    found, asked = trained_to(None, tmp_path / "file")
    assert asked == uninterrupted[1]
    assert all((found[name] == whole).all() for name, whole in uninterrupted[0].items())
    (tmp_path / "file").write_bytes(b"no tensors")
    with pytest.raises(MatryoshkaError, match=r"file cannot be read: .* Delete it, and training the ranks begins anew"):
        trained_to(None, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"no tensors"
    save_file({"weight": torch.ones(2)}, tmp_path / "file")
    with pytest.raises(MatryoshkaError, match="file is no checkpoint, and would be written over: move it away"):
        trained_to(None, tmp_path / "file")
    assert list(load_file(tmp_path / "file")) == ["weight"]


def test_a_full_disk_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.warns(UserWarning, match=r"no checkpoint: .*: no space left.* The ranks are trained") as warned:
        found, _ = trained_to(None, tmp_path / "file")
    assert len([one for one in warned if "no space left" in str(one.message)]) == 1
    assert all((found[name] == whole).all() for name, whole in uninterrupted[0].items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["svd", "loss"])
def test_a_file_beside_the_target_that_is_not_ours_stays(tmp_path: Path, by: Any) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    nested_llama(NESTING, "lora").save(tmp_path / "adapter")
    save_file({"weight": torch.ones(2)}, tmp_path / "out.checkpoint.safetensors")
    rows = None if by == "svd" else ROWS
    reorder(tmp_path / "adapter", tmp_path / "out", by, rows, model=str(tmp_path / "base"), dtype="fp32")
    assert (tmp_path / "out.checkpoint.safetensors").exists()


def test_rows_and_files(tmp_path: Path) -> None:
    """From memory and from the file, it is saved and loaded as what it is."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = nested_llama(NESTING, "lora")
    adapter.save(tmp_path / "adapter")
    rows = list(islice(cycle(ROWS), 40))
    spectra = reorder(
        tmp_path / "adapter", tmp_path / "out", "trained", rows, rows=480, model=str(tmp_path / "base"), dtype="fp32"
    )
    loaded = load(tiny_llama(), tmp_path / "out")
    assert loaded.state.reordered == "trained"
    for name, found in products(loaded, 8).items():
        values = np.linalg.svd(found, compute_uv=False)[:8]
        np.testing.assert_allclose(spectra[name], values, rtol=1e-4, atol=1e-6)
    # What the command says to do next.
    assert describe(tmp_path / "out").kept(8) == 1
    assert export(tmp_path / "out", tmp_path / "half", budget=0.5).chosen is not None


KILLED = """
import os, signal, sys
from tests.test_trained import written
from matryoshka_lora.reordering import checkpoint
checkpoint.SECONDS, write, times = 0.0, checkpoint.Checkpoint.write, []

def killed(*arguments):
    write(*arguments)
    times.append(0)
    if len(times) == 7:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoint.write = killed
written(sys.argv[1])
"""


def environment() -> dict[str, str]:
    """For a process that imports this module."""
    path = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent)))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}


def written(folder: str | Path) -> bytes:
    """The weights of an adapter whose ranks a file of rows trains, in a folder that has adapter and base model."""
    folder = Path(folder)
    reorder(
        *(folder / "adapter", folder / "out", "trained", list(islice(cycle(ROWS), 40))),
        rows=96,
        model=str(folder / "base"),
        dtype="fp32",
        overwrite=True,
    )
    return (folder / "out" / "adapter_model.safetensors").read_bytes()


def test_a_killed_command_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    nested_llama(NESTING, "lora").save(tmp_path / "adapter")
    whole = written(tmp_path)
    shutil.rmtree(tmp_path / "out")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    kept = tmp_path / "out.checkpoint.safetensors"
    assert kept.exists()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert written(tmp_path) == whole
    assert not kept.exists()


TOGETHER = """
import sys
import numpy, torch
from pathlib import Path
from torch import distributed
from matryoshka_lora.reordering import checkpoint
from tests.test_trained import trained_to

process, folder, threads = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2)
checkpoint.SECONDS, save, saved = 0.0, checkpoint.save_file, []

def counted(*arguments):
    save(*arguments)
    saved.append(0)

checkpoint.save_file = counted
found, asked = trained_to(None, folder / "file")
numpy.savez(folder / f"{process}.npz", **found, asked=asked, saved=len(saved))
distributed.destroy_process_group()
"""


def test_two_processes_go_on_from_one_file_and_one_of_them_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    """As under torchrun. 25 of 40 steps were done; 15 steps and 2 of 3 blocks are still to be written."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    with pytest.raises(KilledError):
        trained_to(25, tmp_path / "file")
    command = [sys.executable, "-c", TOGETHER]
    both = [
        subprocess.Popen([*command, str(process), tmp_path, str(torch.get_num_threads())], env=environment())
        for process in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    for process in (0, 1):
        found = np.load(tmp_path / f"{process}.npz")
        assert all((found[name] == whole).all() for name, whole in uninterrupted[0].items())
        assert uninterrupted[1] - found["asked"] == 25 + 2
        assert found["saved"] == (17 if process == 0 else 0)


def test_rows_that_come_again_come_in_another_order() -> None:
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(target_modules=["q_proj"]))
    data = data_from(model, [{"prompt": "a", "completion": "b" * count} for count in range(1, 21)], tokenizer)
    found = [part.weight for (part,) in data.steps(60, 1, seed=0)]
    passes = [found[begin : begin + 20] for begin in (0, 20, 40)]
    assert all(sorted(each) == sorted(passes[0]) and len(set(each)) == 20 for each in passes)
    assert len({tuple(each) for each in passes}) == 3


def test_rows_of_unlike_lengths_go_through_the_model_apart() -> None:
    """No row is padded to more than twice its length, and the step's loss is that of its rows."""
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(target_modules=["q_proj"]))
    lengths = [1, 30, 2, 3, 1, 28, 9, 4, *[2] * 20]
    data = data_from(model, [{"prompt": "ab", "completion": "b" * length} for length in lengths], tokenizer)
    (parts,) = data.steps(len(lengths), len(lengths), seed=0)
    rows = [part.mask.sum(dim=1).tolist() for part in parts if part.mask is not None]
    assert sum(map(len, rows)) == sum(part.rows for part in parts) == len(lengths)
    assert all(max(of_part) <= 2 * min(of_part) and len(of_part) <= 12 for of_part in rows)
    assert 1 < len(parts) < 8
    alone = [part for step in data.steps(len(lengths), 1, seed=0) for part in step]
    with torch.no_grad():
        whole, summed = (sum(part.loss().item() * part.weight for part in some) for some in (parts, alone))
    assert whole == pytest.approx(summed, rel=1e-5)


def test_rows_of_like_lengths_keep_their_order() -> None:
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(target_modules=["q_proj"]))
    data = data_from(model, [{"prompt": "a" * 20, "completion": "b" * length} for length in range(1, 13)], tokenizer)
    ((part,),) = data.steps(12, 12, seed=0)
    assert part.mask is not None
    found, drawn = part.mask.sum(dim=1).tolist(), [only.mask.sum().item() for (only,) in data.steps(12, 1, seed=0)]
    assert found == drawn != sorted(drawn)


def trainer_with_a_row_without_labels(folder: Path) -> tuple[NestedAdapter, Trainer]:
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    adapter = nest_as(model, NESTING, "lora")
    ids = torch.randint(5, 60, (40, 20), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * 12 + row[12:]} for row in ids]
    rows[7] = {"input_ids": ids[7][:6], "labels": [-100] * 6}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), per_device_train_batch_size=8, max_steps=2, learning_rate=1e-2, **quiet),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[adapter.callback()],
    )
    trainer.train()
    return adapter, trainer


@pytest.mark.filterwarnings(
    "ignore:the (learned order is|trained ranks are) not kept", "ignore:trained ranks that lose"
)
@pytest.mark.parametrize("by", ["loss", "learned", "trained"])
def test_a_short_row_without_labels_teaches_nothing(tmp_path: Path, by: Any) -> None:
    """Apart from the others, its mean loss is that of no token: 0 / 0."""
    adapter, trainer = trainer_with_a_row_without_labels(tmp_path)
    adapter.reorder(by, trainer, rows=64)
    assert all(
        factor.isfinite().all() for pair in InModel(adapter.model, "default").factors().values() for factor in pair
    )


@pytest.mark.filterwarnings("error:the (learned order is|trained ranks are) not kept")
@pytest.mark.parametrize("by", ["learned", "trained"])
def test_steps_without_labels_are_passed_over(tmp_path: Path, by: Any) -> None:
    """As packing leaves rows of long prompts alone. It is judged on the others, which the Trainer evaluates on."""
    adapter, trainer = trainer_with_a_row_without_labels(tmp_path)
    rows = list(trainer.train_dataset)
    trainer.train_dataset = [rows[7]] * 400 + rows[:7] + rows[8:]
    trainer.eval_dataset = rows
    steps = [teaches(parts) for parts in data_from(adapter.model, trainer).steps(480, 8, 0)]
    assert set(steps) == {False, True}
    adapter.reorder(by, trainer, rows=480)
    assert adapter.state.reordered == by


def test_it_is_judged_on_what_the_trainer_evaluates_on(tmp_path: Path) -> None:
    adapter, trainer = trainer_with_a_row_without_labels(tmp_path)
    rows = list(trainer.train_dataset)
    assert data_from(adapter.model, trainer).held_out is None
    for other in ({"one": rows}, iter(rows), [], [{"input_ids": [1, 2]}]):
        trainer.eval_dataset = other
        assert data_from(adapter.model, trainer).held_out is None
    trainer.eval_dataset = rows[:5]
    data = data_from(adapter.model, trainer)
    assert data.held_out is not None
    assert len(data.held_out) == 5
    assert data.held_out.held_out is None
    looked_at: list[int] = []
    train_ranks(InModel(adapter.model, "default"), Watched(data, looked_at), 4)
    assert looked_at == [5]


class Watched:
    """A Trainer's rows, and how many are asked for to judge by."""

    quiet, rate, seen = True, None, None

    def __init__(self, data: Data, looked_at: list[int]) -> None:
        self.data, self.looked_at = data, looked_at

    @property
    def held_out(self) -> Data | None:
        return None if self.data.held_out is None else Watched(self.data.held_out, self.looked_at)

    def __len__(self) -> int:
        return len(self.data)

    def steps(self, rows: int, at_once: int, seed: int) -> Iterator[Sequence[Part]]:
        if self.held_out is None:
            self.looked_at.append(rows)
        return self.data.steps(rows, at_once, seed)


def test_how_many_rows_a_trainer_has_seen(tmp_path: Path) -> None:
    adapter, trainer = trainer_with_a_row_without_labels(tmp_path)

    def seen() -> int | None:
        return data_from(adapter.model, trainer).seen

    assert seen() == 16  # two steps of eight
    trainer.state.train_batch_size = 2  # as auto_find_batch_size has made it
    assert seen() == 4
    assert [part.rows for part in next(data_from(adapter.model, trainer).steps(4, 4, 0))] == [2, 2]
    trainer.state.train_batch_size, trainer.state.global_step, trainer.state.epoch = 8, 30, 5.0
    assert seen() == 200  # five times forty, and the last batch of an epoch is small
    trainer.state.best_global_step = 6
    assert seen() == 200
    trainer.args.load_best_model_at_end = True
    assert seen() == 40


def test_a_rate_of_another_optimizer_is_none_for_adam(tmp_path: Path) -> None:
    adapter, trainer = trainer_with_a_row_without_labels(tmp_path)
    assert data_from(adapter.model, trainer).rate == 1e-2
    trainer.args.optim = "sgd"
    assert data_from(adapter.model, trainer).rate is None


def test_dft_is_judged_by_the_likelihood(tmp_path: Path) -> None:
    adapter, trainer = trainer_with_a_row_without_labels(tmp_path)
    trainer.compute_loss = lambda model, inputs: -model(**inputs).loss
    trainer.args.loss_type = "dft"
    ((part,),) = data_from(adapter.model, trainer).steps(4, 4, 3)
    assert part.loss() < 0
    with torch.no_grad():
        assert part.loss() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_flatten_their_rows_and_drop_out_themselves(checkpointing: bool) -> None:
    config = OPTConfig(
        vocab_size=99, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.5
    )
    adapter = nest_as(get_peft_model(OPTForCausalLM(config), LoraConfig(r=8, target_modules=["fc1"])), NESTING, "lora")
    randomize(adapter.model)
    adapter.reorder()
    if checkpointing:
        adapter.model.get_base_model().gradient_checkpointing_enable()
    inner, data = InModel(adapter.model, "default"), Tokens(adapter.model)
    with learning(inner):
        one, other = (gradients_at(inner, next(data.steps(8, 8, 0)), [2] * 8) for _ in range(2))
    for name, pair in one.items():
        for found, again in zip(pair, other[name], strict=True):
            torch.testing.assert_close(found, again)
    assert {layer.dropout for layer in adapter.model.get_base_model().model.decoder.layers} == {0.5}


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    adapter, trainer = trainer_with_a_row_without_labels(tmp_path)
    trainer.train_dataset = [{**row, "labels": [-100] * len(row["labels"])} for row in trainer.train_dataset]
    with pytest.raises(MatryoshkaError, match="none of the 12 rows of a step has a token to learn"):
        adapter.reorder("learned", trainer, rows=64)


@pytest.mark.filterwarnings("ignore:the learned order is not kept")
def test_an_order_of_the_output_layer_where_answers_are_as_long_as_there_are_rows() -> None:
    tokenizer = tiny_tokenizer()
    config = LoraConfig(r=8, target_modules=["q_proj", "lm_head"])
    adapter = nest_as(get_peft_model(tiny_llama(vocab_size=len(tokenizer)), config), NESTING, "lora")
    rows = [{"prompt": "a" * (20 + number), "completion": "bcdefghabcd"} for number in range(15)]  # and the end: 12
    adapter.reorder("learned", rows, tokenizer, rows=24)
