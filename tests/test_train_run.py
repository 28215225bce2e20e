"""`train`: what it leaves behind, what it trains on, and what it refuses to overwrite."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import nest_as, randomize, tiny_llama
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_chat import save_tiny_chat, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter
from matryoshka_lora.data.sources import load_data
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.loaded import places
from matryoshka_lora.reordering import checkpoint, trained
from matryoshka_lora.reordering.checkpoint import Checkpoint
from matryoshka_lora.reordering.learned import JUDGED
from matryoshka_lora.training import TrainConfig, load_config, make_config, train
from matryoshka_lora.training.resume import plan
from matryoshka_lora.training.run import _peft_model_of, _trainer
from matryoshka_lora.training.trainer import CompletionTrainer

WEIGHTS, TRAINED, STATE = "adapter_model.safetensors", "trained.safetensors", "trainer_state.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def config_of(model: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": "fp32",
        "data": {"task": "chain_sum", "size": 20},
        "output_dir": str(output),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "lora": {"r": 4},
        "nesting": {"reorder": "svd"},
    }
    return make_config({**settings, **changes})


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    train(config_of(model, output))
    return output


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_what_a_run_leaves(model: Path, finished: Path) -> None:
    state = open_adapter(finished).nested
    assert (state.rule.name, state.nesting.ranks, state.reordered) == ("matryoshka", (1, 2, 4), "svd")
    weights = load_file(finished / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert sorted(path.name for path in finished.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    checkpoint = finished / "checkpoint-2"
    assert open_adapter(checkpoint).nested.reordered == "svd"
    assert open_adapter(checkpoint, trained=True).nested.reordered is None
    assert not (finished / TRAINED).exists()
    assert not list(finished.glob("*.writing")) + list(finished.glob(".*"))
    assert "matryoshka_lora" in (finished / "README.md").read_text()  # and no card of TRL's


def test_the_written_config_is_complete_and_repeats_the_run(model: Path, finished: Path, tmp_path: Path) -> None:
    written = yaml.safe_load((finished / "train.yaml").read_text())
    assert written["lora"] == {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4}
    own = {"seed": 42, "deploy": "reordered", "reorder": "svd"}
    assert written["nesting"] == {"ranks": [1, 2, 4], "scaling": "none", "rule": "matryoshka", **own}
    again = tmp_path / "again"
    with pytest.raises(MatryoshkaError, match=r"model is a path without its folders.* for example model=/where/it/is"):
        load_config(finished / "train.yaml")
    train(load_config(finished / "train.yaml", [f"model={model}", f"output_dir={again}"]))
    assert (again / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_ranks_that_a_stopped_run_was_training_are_trained_to_the_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    written: list[int] = []

    def write(self: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        Checkpoint.write(self, tensors)
        written.append(len(tensors))
        if len(written) == 2:
            raise KeyboardInterrupt

    nesting: dict[str, Any] = {}  # the default
    assert train(config_of(model, tmp_path / "whole", nesting=nesting)).state.reordered == "trained"
    with monkeypatch.context() as stopping:
        stopping.setattr(trained, "Checkpoint", type("Stopping", (Checkpoint,), {"write": write}))
        with pytest.raises(KeyboardInterrupt):
            train(config_of(model, tmp_path / "run", nesting=nesting))
        assert (tmp_path / "run.checkpoint.safetensors").exists()
        assert not (tmp_path / "run" / WEIGHTS).exists()
        train(config_of(model, tmp_path / "run", nesting=nesting))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert len(written) == 3  # after the step of rank 1 and its block; then rank 2 alone, which has no step
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_file_in_the_place_of_a_checkpoint_of_ranks_is_refused_before_training(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.checkpoint.safetensors").write_bytes(b"somebody's")
    with pytest.raises(MatryoshkaError, match=r"run\.checkpoint\.safetensors cannot be read"):
        train(config_of(model, tmp_path / "run", nesting={}))
    assert [path.name for path in tmp_path.iterdir()] == ["run.checkpoint.safetensors"]
    assert train(config_of(model, tmp_path / "run")).state.reordered == "svd"  # which needs no such file


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_without_checkpoints_is_not_lost_while_ranks_are_trained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], killed: bool
) -> None:
    def fails(*args: object) -> None:
        raise KeyboardInterrupt if killed else RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED\nin a kernel")

    monkeypatch.setattr(trained, "gradients_at", fails)
    try:
        train(config_of(model, tmp_path / "run", nesting={}, save_strategy="no"))
    except KeyboardInterrupt:
        assert killed
        with pytest.raises(MatryoshkaError, match="did not finish"):
            train(config_of(model, tmp_path / "run", nesting={}, save_strategy="no"))
    else:
        said = "not by trained: CUDA error: CUBLAS_STATUS_ALLOC_FAILED"
        assert said in capsys.readouterr().out
    assert open_adapter(tmp_path / "run").nested.reordered == "svd"


def test_a_finished_run_is_not_trained_again(model: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    adapter = train(config_of(model, finished, logging_steps=3))
    assert "nothing to train" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert adapter.reordered
    assert adapter.ranks == (1, 2, 3, 4)
    assert adapter.rank == 4


def test_a_finished_run_can_be_made_longer(model: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_of(model, copied, max_steps=6))
    assert f"Going on from {copied / 'checkpoint-4'}, after 4 steps" in capsys.readouterr().out
    assert json.loads((copied / STATE).read_text())["global_step"] == 6
    assert plan(config_of(model, copied, max_steps=6)).finished


@pytest.mark.parametrize("by", ["activations", "loss", "learned"])
def test_a_finished_run_can_get_another_order(
    model: Path, copied: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes after the last step is made anew from the last checkpoint, and no step is taken."""
    svd = load_file(copied / WEIGHTS)
    config = config_of(model, copied, nesting={"reorder": by})
    assert train(config).state.reordered == by
    assert "after 4 steps" in capsys.readouterr().out
    assert open_adapter(copied).nested.reordered == by
    assert plan(config).finished
    found, moved = load_file(copied / WEIGHTS), 0
    for key in (key for key in svd if "lora_A" in key):
        pairs = [(tensors[key.replace("lora_A", "lora_B")], tensors[key]) for tensors in (found, svd)]
        whole = [B @ A for B, A in pairs]
        assert (whole[0] - whole[1]).norm() < 1e-5 * whole[1].norm()
        first = [B[:, :1] @ A[:1] for B, A in pairs]
        moved += bool((first[0] - first[1]).norm() > 1e-3 * first[1].norm())
        # Orthogonal rows: before, it was the SVD's order.
        gram = svd[key] @ svd[key].T
        assert (gram - gram.diag().diag()).abs().max() < 1e-5 * gram.abs().max()
    assert moved > 5


def test_a_finished_run_can_get_the_paper_s_deployment(model: Path, copied: Path) -> None:
    trained = load_file(copied / "checkpoint-4" / TRAINED)
    config = config_of(model, copied, nesting={"deploy": "paper"})
    adapter = train(config)
    assert not adapter.reordered
    assert adapter.ranks == (1, 2, 4)
    assert plan(config).finished
    state, saved = open_adapter(copied).nested, load_file(copied / WEIGHTS)
    assert (state.deploy, state.reordered) == ("paper", None)
    assert saved.keys() == trained.keys()
    assert all(saved[key].equal(trained[key]) for key in trained)


def test_a_stream_has_no_rows_to_learn_an_order_from(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path)
    adapter = nest_as(get_peft_model(AutoModelForCausalLM.from_pretrained(model), config.lora_config()), config.nesting)
    rows = load_data(config.data).to_iterable_dataset()
    trainer = SFTTrainer(adapter.model, config.sft_config(), train_dataset=rows, processing_class=tiny_tokenizer())
    with pytest.raises(MatryoshkaError, match="the Trainer's data are a stream"):
        adapter.reorder("learned", trainer)
    assert not adapter.reordered


@pytest.mark.parametrize("by", ["activations", "loss", "learned"])
def test_no_rows_show_no_order(model: Path, tmp_path: Path, by: Any) -> None:
    trainer = untrained(config_of(model, tmp_path))
    adapter = NestedAdapter(trainer.model)
    with pytest.raises(MatryoshkaError, match="rows is 0; take 1 or more"):
        adapter.reorder(by, trainer, rows=0)
    assert not adapter.reordered


def test_one_rank_is_refused_before_it_is_reordered(model: Path, tmp_path: Path) -> None:
    trainer = untrained(config_of(model, tmp_path, nesting={"ranks": [4]}))
    adapter = NestedAdapter(trainer.model)
    with pytest.raises(MatryoshkaError, match="one nested rank has no order to learn"):
        adapter.reorder("learned", trainer)
    assert not adapter.reordered


def test_an_order_takes_so_many_steps_of_twelve_rows(model: Path, tmp_path: Path) -> None:
    trainer = untrained(config_of(model, tmp_path))
    rows: list[int] = []
    collator = trainer.data_collator

    def counting(examples: list[Any]) -> Any:
        rows.append(len(examples))
        return collator(examples)

    trainer.data_collator = counting
    adapter = NestedAdapter(trainer.model)
    adapter.reorder("learned", trainer, rows=36)
    assert adapter.state.reordered == "learned"
    # The first one shows that there are labels; the last ones are only looked at.
    assert rows == [1, *[4, 4, 4] * (3 + JUDGED)]


@pytest.mark.filterwarnings("error:the learned order is not kept")
def test_an_order_is_learned_without_the_dropout_of_the_training(model: Path, tmp_path: Path) -> None:
    found = []
    for dropout in (0.0, 0.5):
        lora = {"r": 4, "lora_dropout": dropout}
        trainer = untrained(config_of(model, tmp_path, lora=lora, gradient_checkpointing=True))
        adapter = NestedAdapter(trainer.model)
        randomize(adapter.model, size=0.1)
        trainer.model.gradient_checkpointing_enable()
        adapter.reorder("learned", trainer, rows=36)
        found.append([p.detach().clone() for name, p in adapter.model.named_parameters() if "lora_" in name])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps_per_epoch", [5, 4])
def test_a_run_killed_while_it_saved_the_adapter_trains_no_further(
    model: Path, tmp_path: Path, steps_per_epoch: int
) -> None:
    # transformers' Trainer takes one more step when it resumes from the last one within an epoch.
    data = {"task": "chain_sum", "size": 4 * steps_per_epoch}
    config = config_of(model, tmp_path / "run", data=data, lr_scheduler_type="constant")
    train(config)
    weights = (tmp_path / "run" / WEIGHTS).read_bytes()
    for name in (STATE, "nesting.json", WEIGHTS):
        (tmp_path / "run" / name).unlink()
    train(config)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == weights
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_a_run_of_fewer_steps_is_refused(model: Path, copied: Path) -> None:
    before = (copied / "train.yaml").read_bytes(), (copied / STATE).read_bytes()
    with pytest.raises(MatryoshkaError, match="holds a run of 4 steps, and the config asks for 3"):
        train(config_of(model, copied, max_steps=3))
    assert ((copied / "train.yaml").read_bytes(), (copied / STATE).read_bytes()) == before


@pytest.mark.parametrize("damage", ["no state", "half a state", "short optimizer", "short weights"])
def test_an_incomplete_checkpoint_is_skipped(
    model: Path, copied: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / STATE).unlink()
    checkpoint = copied / "checkpoint-4"
    file = {"short optimizer": "optimizer.pt", "short weights": WEIGHTS}.get(damage, STATE)
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    if damage != "no state":
        (checkpoint / file).write_bytes(content[: len(content) // 2])
    assert plan(config_of(model, copied)).checkpoint == copied / "checkpoint-2"
    assert f"{checkpoint} was not written to its end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01 and is now 0.001"),
        ({"data": {"task": "chain_sum", "size": 21}}, "data.size was 20 and is now 21"),
        ({"lora": {"r": 8}}, "lora.r was 4 and is now 8"),
        ({"nesting": {"rule": "dylora"}}, "nesting.rule was matryoshka and is now dylora"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was not set and is now 2"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    model: Path, finished: Path, changes: dict[str, Any], message: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(MatryoshkaError) as caught:
        train(config_of(model, finished, **changes))
    assert message in str(caught.value)
    assert "Choose another output_dir" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_foreign_adapter_or_checkpoint_is_not_overwritten(model: Path, copied: Path) -> None:
    (copied / "train.yaml").unlink()
    with pytest.raises(MatryoshkaError, match="holds checkpoints of another program"):
        train(config_of(model, copied))
    for path in [*copied.glob("checkpoint-*")]:
        shutil.rmtree(path)
    (copied / STATE).unlink()
    with pytest.raises(MatryoshkaError, match="holds an adapter that this run did not make"):
        train(config_of(model, copied))
    with pytest.raises(MatryoshkaError, match="is no complete checkpoint"):
        train(config_of(model, copied, resume_from_checkpoint=str(copied / "checkpoint-9")))


def test_a_named_checkpoint(model: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = str(finished / "checkpoint-2")
    train(config_of(model, tmp_path / "run", resume_from_checkpoint=named))
    assert "after 2 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ([], "learning_rate was 0.01 and is now 0.001.*Choose another output_dir"),
        ([STATE], "learning_rate was 0.01 and is now 0.001"),
        (["train.yaml"], "holds checkpoints of another program"),
        (["train.yaml", STATE, "checkpoint-2", "checkpoint-4"], "holds an adapter that this run did not make"),
    ],
)
def test_a_named_checkpoint_overwrites_no_other_run(
    model: Path, finished: Path, copied: Path, missing: list[str], message: str
) -> None:
    for name in missing:
        shutil.rmtree(copied / name) if (copied / name).is_dir() else (copied / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    named = str(finished / "checkpoint-2")
    with pytest.raises(MatryoshkaError, match=message):
        train(config_of(model, copied, resume_from_checkpoint=named, learning_rate=1e-3))
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_a_run_goes_on_from_its_checkpoint_that_is_named(model: Path, finished: Path) -> None:
    for steps in (4, 5):
        found = plan(config_of(model, finished, resume_from_checkpoint=str(finished / "checkpoint-2"), max_steps=steps))
        assert (found.finished, found.step) == (False, 2)


class BreaksAfterwards(CompletionTrainer):
    """Computes NaN once all steps are done, as a base in float16 may on rows that it had not seen so."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == self.state.max_steps else loss


@pytest.mark.parametrize("by", ["loss", "learned"])
def test_what_was_trained_is_kept_where_its_order_cannot_be_learned(
    model: Path,
    finished: Path,
    tmp_path: Path,
    by: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("matryoshka_lora.training.trainer.CompletionTrainer", BreaksAfterwards)
    train(config_of(model, tmp_path / "broken", nesting={"reorder": by}))
    assert f"The adapter is reordered by its SVD, and not by {by}: " in capsys.readouterr().out
    assert open_adapter(tmp_path / "broken").nested.reordered == "svd"
    assert (tmp_path / "broken" / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_data": {"task": "chain_sum", "seed": 9, "size": 8}}


def test_the_loss_while_training_is_that_of_the_adapter_that_comes_of_it(model: Path, tmp_path: Path) -> None:
    losses = []
    for deploy in ("reordered", "paper"):
        given = {"deploy": deploy} if deploy == "paper" else {"reorder": "svd"}
        config = config_of(model, tmp_path / deploy, nesting=given, **EVALUATED)
        adapter = train(config)
        history = json.loads((tmp_path / deploy / STATE).read_text())["log_history"]
        (told,) = (entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == 4)
        assert config.eval_data is not None
        data = load_data(config.eval_data)
        found = _trainer(adapter, config, config.sft_config(), data, data).evaluate()["eval_loss"]
        assert told == pytest.approx(found, rel=1e-5)
        losses.append(told)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)  # the paper's drops P


def test_the_best_checkpoint_is_taken_where_no_step_is_left(model: Path, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    first, again = (tmp_path / name for name in ("first", "again"))
    for folder in (first, again):
        train(config_of(model, folder, **EVALUATED, **best))
    state = json.loads((first / STATE).read_text())
    assert state["best_global_step"] == 2  # the loss falls: the first is the greatest
    (again / STATE).unlink()  # killed while it was saved
    (again / WEIGHTS).unlink()
    train(config_of(model, again, **EVALUATED, **best))
    saved = [load_file(folder / WEIGHTS) for folder in (first, again)]
    assert all(saved[0][key].equal(saved[1][key]) for key in saved[0])
    # The best one was found by the losses of what is deployed.
    with pytest.raises(MatryoshkaError, match=r"nesting\.deploy was reordered and is now paper"):
        train(config_of(model, again, nesting={"deploy": "paper"}, **EVALUATED, **best))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bf16"},
        {"dtype": "bf16", "bf16": True, "use_cpu": True},
        {"dtype": "fp16", "use_cpu": True},
        {"quantization": "nf4", "dtype": "bf16"},
        {"quantization": "int8", "dtype": "bf16"},
        {"gradient_checkpointing": True},
        {"packing": True},
        {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
    ],
    ids=str,
)
def test_adapters_train_in_float32_under_any_setting(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "quantization" in changes:
        pytest.importorskip("bitsandbytes")
    if changes.get("packing"):
        changes = {**changes, "max_length": 128}
    config = config_of(model, tmp_path / "run", max_steps=2, **changes)
    adapter = train(config)
    factors = {name: p for name, p in adapter.model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in factors.values()} == {torch.float32}
    # No more than float32 can hold in its last places is a sign of a cast to a half dtype on the way.
    raw = load_file(tmp_path / "run" / "checkpoint-2" / TRAINED)
    assert any((value != value.bfloat16().float()).any() for value in raw.values())
    assert "_original_forward" not in vars(adapter.model)
    assert not adapter.model.training


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("lora", "refused"),
    [({"modules_to_save": ["lm_head"]}, True), ({"bias": "all"}, True), ({"trainable_token_indices": [3]}, False)],
    ids=str,
)
def test_what_is_trained_whole_in_half_precision_is_refused(
    tmp_path: Path, dtype: str, lora: dict[str, Any], refused: bool
) -> None:
    """PEFT itself keeps single tokens in float32."""
    tiny_llama(vocab_size=128, attention_bias=True).save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "model", tmp_path / "run", dtype=dtype, lora={"r": 4, **lora})
    if not refused:
        _peft_model_of(config)
        return
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(MatryoshkaError, match=rf"would be trained whole in {dtype}, .*: write dtype: fp32"):
        train(config)
    assert not [*(tmp_path / "run").glob("*")]
    _peft_model_of(replace(config, dtype="fp32"))


def test_layers_that_the_model_has_not_are_refused(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "run", lora={"r": 4, "target_modules": ["c_attn"]})
    with pytest.raises(MatryoshkaError, match=r"PEFT refuses the section lora: Target modules .*c_attn.* not found"):
        train(config)


def test_packing_is_refused_where_rows_have_ranks(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "run", packing=True, nesting={"rule": "stratified"})
    with pytest.raises(MatryoshkaError, match="set packing=False or take another rule"):
        train(config)
    assert not (tmp_path / "run" / "train.yaml").exists()


def untrained(config: TrainConfig) -> SFTTrainer:
    """The trainer of a config before its first step, with the factors that `train` starts from."""
    set_seed(config.seed)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(config.model), config.lora_config())
    adapter = nest_as(peft_model, config.nesting, config.rule, seed=config.rank_seed)
    return _trainer(adapter, config, config.sft_config(), load_data(config.data), None)


def batches(config: TrainConfig) -> Any:
    return next(iter(untrained(config).get_train_dataloader()))


def test_batches_of_like_lengths(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': 'x' * n, 'completion': 'y'})}\n" for n in range(1, 65)))
    padding = {}
    for sampling in ("random", "group_by_length"):
        config = config_of(model, tmp_path / "run", data=str(path), train_sampling_strategy=sampling)
        lengths = [batch["attention_mask"].sum(dim=1) for batch in untrained(config).get_train_dataloader()]
        assert sorted(torch.cat(lengths).tolist()) == list(range(3, 67))
        padding[sampling] = sum(int((batch.max() - batch).sum()) for batch in lengths)
    assert padding["group_by_length"] < padding["random"] / 2


def test_batches_of_different_numbers_of_rows_are_refused_where_rows_have_ranks(model: Path, tmp_path: Path) -> None:
    changes = {"train_sampling_strategy": "batch_rebalance", "nesting": {"rule": "stratified"}}
    with pytest.raises(MatryoshkaError, match="draws the ranks of all rows of a step: take 'group_by_length'"):
        train(config_of(model, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "train.yaml").exists()


def test_accumulated_and_checkpointed_batches_share_the_ranks_of_their_step(model: Path, tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "nesting": {"rule": "stratified"}}
    config = config_of(model, tmp_path / "run", max_steps=1, **changes)
    train(config)
    (logged,) = (
        entry["grad_norm"]
        for entry in json.loads((tmp_path / "run" / STATE).read_text())["log_history"]
        if "grad_norm" in entry
    )

    plain = {**changes, "gradient_checkpointing": False}
    trainer = untrained(config_of(model, tmp_path / "other", max_steps=1, **plain))
    step = list(islice(trainer.get_train_dataloader(), 2))
    trained = sum(int((batch["labels"] != -100).sum()) for batch in step)

    def norm(draw: int) -> float:
        NestedAdapter(trainer.model).draw(draw, rows=4)
        trainer.model.train().zero_grad()
        for batch in step:
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            (cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum") / trained).backward()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        return float(torch.stack([gradient.norm() for gradient in gradients]).norm())

    assert norm(draw=0) == pytest.approx(logged, rel=1e-4)
    assert norm(draw=1) != pytest.approx(logged, rel=1e-2)


def test_logits_are_made_for_labels_alone_and_the_loss_is_that_of_trl(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [("x" * 30, "y"), ("x", "yyyy"), ("xx", "y" * 9), ("x" * 9, "yy")]
    path.write_text("".join(f"{json.dumps({'prompt': prompt, 'completion': end})}\n" for prompt, end in rows))
    trainer = untrained(config_of(model, tmp_path / "run", data=str(path)))
    batch = next(iter(trainer.get_train_dataloader()))
    randomize(trainer.model)
    trainer.model.eval()
    widths: list[int] = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda *_: widths.append(_[2].shape[1]))
    found = []
    for kind in (CompletionTrainer, SFTTrainer):
        trainer.model.zero_grad()
        loss = kind.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=torch.tensor(20))
        loss.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        found.append([loss.detach(), *gradients])
    assert widths[0] == 10 < batch["input_ids"].shape[1]  # nine letters and the end
    assert len(found[0]) > 2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_model_with_code_of_its_own_has_the_loss_of_trl(model: Path, tmp_path: Path) -> None:
    """Older code computes its loss from ``labels``, which it shifts itself, whatever else it is given."""
    trainer = untrained(config_of(model, tmp_path / "run"))
    batch = next(iter(trainer.get_train_dataloader()))
    base = trainer.model.get_base_model()

    class Own(type(base)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **others: Any) -> Any:
            found = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            if labels is not None:
                found.loss = cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return found

    base.__class__ = Own
    ours, theirs = (
        kind.compute_loss(trainer, trainer.model, dict(batch)).item() for kind in (CompletionTrainer, SFTTrainer)
    )
    assert ours == theirs


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_places(wanted: Any) -> None:
    if not wanted.any():
        wanted[0, 0] = True
    positions, which = places(torch.from_numpy(wanted))
    k = wanted.sum(axis=1).max()
    assert positions.shape[1] == k + (k == len(wanted) < wanted.shape[1])
    for row, at, real in zip(wanted, positions, which, strict=True):
        assert at[real].tolist() == [place for place, is_wanted in enumerate(row) if is_wanted]


def test_the_answer_and_its_end_are_trained_and_nothing_else(model: Path, tmp_path: Path) -> None:
    # The token that ends a turn also pads: its label must survive in the answer and be ignored in the padding.
    tokenizer = tiny_tokenizer()
    batch = batches(config_of(model, tmp_path / "run"))
    lengths = batch["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 1, "the rows must need padding"
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        trained = labels != -100
        assert not trained[length:].any()
        text = tokenizer.convert_ids_to_tokens(ids[:length])
        answer = tokenizer.convert_ids_to_tokens(labels[trained])
        assert answer[-1] == "</s>"
        assert "".join(text).endswith("<s>assistant\n" + "".join(answer))
        assert "".join(answer[:-1]).lstrip("-").isdigit()
        assert labels[length - 1] == tokenizer.eos_token_id


def test_each_row_is_trained_with_its_own_tools(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rows: list[dict[str, Any]] = [{"messages": messages}]
    rows += [{"messages": messages, "tools": [{"name": name, "parameters": {name: 1}}]} for name in "fg"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(folder, tmp_path / "run", data=str(tmp_path / "rows.jsonl"))
    texts = [tokenizer.decode(row["input_ids"]) for row in untrained(config).train_dataset]
    for row, text in zip(rows, texts, strict=True):
        tools = row.get("tools")
        assert text == tokenizer.decode(tokenizer.apply_chat_template(messages, tools=tools)["input_ids"])


def test_plain_text_gets_no_template(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    batch = batches(config_of(model, tmp_path / "run", data=str(path)))
    assert tiny_tokenizer().convert_ids_to_tokens(batch["input_ids"][0]) == ["1", "+", "1", "=", "2", "</s>"]
    assert batch["labels"][0].tolist()[:4] == [-100] * 4


def test_rows_without_room_for_an_answer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "x" * n, "completion": "y"} for n in (2, 3, 30)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    batches(config_of(model, tmp_path / "run", data=str(path), max_length=20))
    assert "1 of 3 rows have no token to train on within max_length 20" in capsys.readouterr().out
    with pytest.raises(MatryoshkaError, match="no row leaves a token to train on within max_length 2"):
        batches(config_of(model, tmp_path / "run", data=str(path), max_length=2))


def test_chat_needs_a_template(model: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(MatryoshkaError, match="has no chat template"):
        train(config_of(bare, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MatryoshkaError, match="cannot write"):
        train(config_of(model, tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"


def test_diverged_training_leaves_no_adapter(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="lower the learning rate"):
        train(config_of(model, tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0, save_strategy="no"))
    assert not (tmp_path / "run" / WEIGHTS).exists()
