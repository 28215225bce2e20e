"""The training config: what is filled in, what is refused and what the refusal says."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import LINEAR_LAYERS, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, nest, reorder
from matryoshka_lora.cli.demo import demo_config
from matryoshka_lora.cli.verbs import reorder as command
from matryoshka_lora.training import TrainConfig, load_config, make_config
from matryoshka_lora.training.checks import parse_yaml
from matryoshka_lora.training.resume import plan

ROOT = Path(__file__).parent.parent


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(MatryoshkaError) as caught:
        make_config(config)
    return str(caught.value)


def test_defaults() -> None:
    config = make_config({"data": "family_relationships"})
    assert (config.model, config.dtype, config.quantization) == ("smollm2-135m", "bf16", None)
    assert not config.trust_remote_code
    assert config.nesting == Nesting.powers_of_two(32)
    assert (config.rule, config.deploy, config.reorder, config.rank_seed) == ("matryoshka", "reordered", "trained", 42)
    lora = config.lora_config()
    assert (lora.r, lora.lora_alpha, lora.target_modules, lora.task_type) == (32, 32, "all-linear", "CAUSAL_LM")
    sft = config.sft_config()
    assert (sft.bf16, sft.fp16, sft.report_to, sft.seed) == (False, False, [], 42)
    assert not sft.activation_checkpointing


def test_every_door_has_the_same_defaults() -> None:
    """A function, a file and a command that say nothing make the same adapter, but that training has data."""
    config = make_config({"data": "chain_sum", "lora": {"r": 12}})
    adapter = nest(get_peft_model(tiny_llama(), LoraConfig(r=12, lora_alpha=12, target_modules=LINEAR_LAYERS)))
    state = adapter.state
    assert (config.nesting, config.rule, config.deploy) == (state.nesting, state.rule.name, state.deploy)
    assert (state.nesting, state.deploy) == (Nesting([1, 2, 4, 8, 12], "none", 1.0), "reordered")
    demo = demo_config(Path("demo"), steps=1, dtype="fp32")
    reordering = [
        inspect.signature(verb).parameters["by"].default for verb in (NestedAdapter.reorder, reorder, command)
    ]
    assert (config.reorder, demo.reorder) == ("trained", "trained")
    assert reordering == ["svd"] * 3
    assert (demo.nesting, demo.rule, demo.deploy) == (Nesting.powers_of_two(32), config.rule, config.deploy)


def test_the_paper_s_deployment_is_one_word() -> None:
    config = make_config({"data": "chain_sum", "nesting": {"deploy": "paper"}})
    assert (config.rule, config.deploy, config.reorder) == ("matryoshka", "paper", None)
    assert make_config(config.to_dict()) == config


def test_one_rank_has_no_order_to_learn() -> None:
    nesting = {"ranks": [8], "reorder": "learned"}
    assert make_config({"data": "chain_sum", "nesting": nesting}).reorder == "svd"
    assert make_config({"data": "chain_sum", "nesting": {**nesting, "ranks": [4, 8]}}).reorder == "learned"


def test_every_field_of_the_libraries_is_known() -> None:
    ours = ("trust_remote_code", "output_dir")
    for field in dataclasses.fields(SFTConfig):
        if field.init and field.default is not dataclasses.MISSING and field.name not in ours:
            config = make_config({"data": "chain_sum", "use_cpu": True, field.name: field.default})
            assert config.training[field.name] == field.default, field.name
    for field in dataclasses.fields(LoraConfig):
        if field.init and field.default is not dataclasses.MISSING and field.name not in ("r", "lora_alpha"):
            value = getattr(field.default, "value", field.default)
            assert make_config({"data": "chain_sum", "lora": {field.name: value}}).lora[field.name] == value


def test_what_the_user_writes_counts() -> None:
    config = make_config(
        {
            "data": "chain_sum",
            "learning_rate": 1e-3,
            "gradient_checkpointing": True,
            "report_to": "tensorboard",
            "max_length": None,
            "seed": 7,
            "lora": {"target_modules": ["q_proj"], "lora_dropout": 0.1},
        }
    )
    sft, lora = config.sft_config(), config.lora_config()
    assert (sft.learning_rate, sft.report_to, sft.max_length) == (1e-3, ["tensorboard"], None)
    assert sft.activation_checkpointing
    assert (lora.target_modules, lora.lora_dropout) == ({"q_proj"}, 0.1)
    assert config.rank_seed == 7


def test_fp16_trains_with_loss_scaling() -> None:
    assert make_config({"data": "chain_sum", "dtype": "fp16"}).sft_config().fp16
    assert not make_config({"data": "chain_sum", "dtype": "fp16", "fp16": False}).sft_config().fp16


@pytest.mark.parametrize(
    ("lora", "nesting", "expected", "alpha"),
    [
        ({"r": 8}, {}, Nesting([1, 2, 4, 8]), 8),
        ({}, {"ranks": [2, 5]}, Nesting([2, 5]), 5),
        ({"r": 5}, {"ranks": [2, 5]}, Nesting([2, 5]), 5),
        ({"r": 6}, {}, Nesting([1, 2, 4, 6]), 6),
        ({"r": 16, "lora_alpha": 32}, {}, Nesting.powers_of_two(16, "none", 2.0), 32),
        ({"r": 16, "lora_alpha": 24}, {"scaling": "rank"}, Nesting.powers_of_two(16, "rank", 1.5), 24),
        ({"r": 16}, {"scaling": "sqrt"}, Nesting.powers_of_two(16, "sqrt"), 16),
        ({"r": 16, "lora_alpha": 4}, {"scaling": "sqrt"}, Nesting.powers_of_two(16, "sqrt", 0.25), 4),
        ({"r": 16, "use_rslora": True}, {"scaling": "sqrt"}, Nesting.powers_of_two(16, "sqrt"), 4),
        (
            {"r": 16, "use_rslora": True, "lora_alpha": 1},
            {"scaling": "sqrt"},
            Nesting.powers_of_two(16, "sqrt", 0.25),
            1,
        ),
    ],
)
def test_lora_and_nesting_agree(lora: Any, nesting: Any, expected: Nesting, alpha: float) -> None:
    config = make_config({"data": "chain_sum", "lora": lora, "nesting": nesting})
    assert config.nesting == expected
    made = config.lora_config()
    assert (made.r, made.lora_alpha) == (expected.max_rank, pytest.approx(alpha))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "data is missing"),
        ({"learing_rate": 1}, "no key 'learing_rate' at the top level; did you mean 'learning_rate'?"),
        ({"r": 8}, "no key 'r' at the top level; write it in section 'lora'"),
        ({"rule": "lora"}, "no key 'rule' at the top level; write it in section 'nesting'"),
        ({"xyzzy": 8}, "no key 'xyzzy' at the top level; it is near to none"),
        ({"lora": {"rank": 8}}, "no key 'rank' in section 'lora'"),
        ({"lora": {"lora_alfa": 8}}, "no key 'lora_alfa' in section 'lora'; did you mean 'lora_alpha'?"),
        ({"lora": {"learning_rate": 1}}, "no key 'learning_rate' in section 'lora'; write it at the top level"),
        ({"nesting": {"rank": [1]}}, "no key 'rank' in section 'nesting'; did you mean 'ranks'?"),
        ({"nesting": {"r": 4}}, "no key 'r' in section 'nesting'; write it in section 'lora'"),
        ({"nesting": {"xyzzy": 4}}, "in section 'nesting'; the keys are ranks, scaling"),
        ({"nesting": [1, 2]}, "nesting is [1, 2]; write a mapping"),
        ({"nesting": {"ranks": [4, 2]}}, "write [2, 4] instead of [4, 2]"),
        ({"nesting": {"ranks": [0, 2]}}, "rank 0 is not positive"),
        ({"nesting": {"ranks": [0]}}, "rank 0 is not positive"),
        ({"nesting": {"ranks": []}}, "ranks is empty"),
        ({"nesting": {"ranks": "1,2"}}, "ranks is '1,2'"),
        ({"nesting": {"scaling": "log"}}, "scaling is 'log'"),
        ({"nesting": {"rule": "matrioshka"}}, "did you mean 'matryoshka'"),
        ({"nesting": {"deploy": "p"}}, "nesting.deploy is 'p'; write one of reordered, paper"),
        ({"nesting": {"deploy": "paper", "reorder": "svd"}}, "nesting.deploy: paper deploys the factors as they were"),
        ({"nesting": {"reorder": "no"}}, "nesting.reorder is 'no'; write one of svd, activations, loss, learned"),
        ({"nesting": {"reorder": False}}, "nesting.deploy: paper leaves the factors as they were trained"),
        ({"nesting": {"reorder": "none"}}, "nesting.deploy: paper leaves the factors as they were trained"),
        ({"nesting": {"alpha": 2.0}}, "nesting.alpha is of version 0.1: the scale of the largest rank is"),
        ({"nesting": {"inference": "keep"}}, "nesting.inference is of version 0.1: leave it out"),
        ({"recipe": "paper"}, "recipe is of version 0.1: write nesting.deploy: paper"),
        ({"nesting": {"form": 2.0}}, "no key 'form' in section 'nesting'; the keys are ranks, scaling"),
        ({"nesting": {"lora_alpha": 2.0}}, "no key 'lora_alpha' in section 'nesting'; write it in section 'lora'"),
        ({"nesting": {"seed": 1.5}}, "nesting.seed is 1.5; write an integer"),
        ({"lora": {"r": 8}, "nesting": {"ranks": [1, 4]}}, "lora.r is 8, but the largest of nesting.ranks is 4"),
        ({"lora": {"r": 0}}, "lora.r is 0; write a positive integer"),
        ({"lora": {"r": -4, "use_rslora": True}}, "lora.r is -4; write a positive integer"),
        ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha is 0; write a positive number"),
        ({"lora": {"lora_alpha": float("inf")}}, "lora.lora_alpha is inf; write a positive number"),
        ({"lora": {"r": "8"}}, "lora.r is '8'; expected an integer"),
        ({"lora": {"bias": 3}}, "lora.bias is 3; expected none, all, lora_only"),
        ({"lora": {"bias": "some"}}, "bias"),
        ({"lora": {"inference_mode": True}}, "lora.inference_mode is true, with which PEFT trains nothing"),
        ({"output_dir": None}, "output_dir is None; write a folder"),
        ({"output_dir": ""}, "output_dir is ''; write a folder"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; write a positive integer"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; write a positive integer"),
        ({"dtype": "float32"}, "dtype is 'float32'; write one of bf16, fp32, fp16"),
        ({"quantization": "int4"}, "quantization is 'int4'; write one of nf4, int8, none"),
        ({"trust_remote_code": "yes"}, "trust_remote_code is 'yes'; write true or false"),
        ({"model": 3}, "model is 3"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected a number"),
        ({"learning_rate": None}, "learning_rate is None; expected a number"),
        ({"max_steps": 1.5}, "max_steps is 1.5; expected an integer"),
        ({"max_steps": True}, "max_steps is True; expected an integer"),
        ({"packing": "no"}, "packing is 'no'; expected true or false"),
        ({"optim": "adam_w"}, "adam_w is not a valid OptimizerNames"),
        ({"eval_strategy": False}, "eval_strategy is False"),
        ({"eval_strategy": "steps", "data": "a.jsonl"}, "eval_strategy needs eval_data"),
        ({"eval_data": "chain_sum"}, "eval_data is used by eval_strategy only"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"data": {"task": "chain_sum", "mim_terms": 2}}, "no setting 'mim_terms'; did you mean 'min_terms'?"),
        ({"data": "chain_som"}, "did you mean the task 'chain_sum'?"),
    ],
)
def test_wrong_configs(config: dict[str, Any], message: str) -> None:
    data = {} if message.startswith("data is missing") else {"data": "chain_sum"}
    assert message in refused({**data, **config})


def test_evaluation_while_training_never_sees_training_questions() -> None:
    config = make_config({"data": {"task": "chain_sum", "seed": 3}, "eval_strategy": "steps", "eval_steps": 5})
    assert config.eval_data == {"split": "validation", "task": "chain_sum", "seed": 3, "size": 200}
    named = make_config({"data": "a.jsonl", "eval_data": "chain_sum", "eval_strategy": "epoch"})
    assert named.eval_data is not None
    assert named.eval_data["split"] == "validation"


def test_files_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "data: family_relationships\nlearning_rate: 2e-4\nsave_strategy: no\nlora:\n  r: 16\nmax_steps: 10\n",
    )
    config = load_config(path)
    assert config.training["learning_rate"] == 2e-4
    assert config.training["save_strategy"] == "no"
    changed = load_config(
        path,
        [
            "lora.r=8",
            "nesting.ranks=[1, 3, 8]",
            "learning_rate=5e-05",
            "data.size=12",
            "nesting.rule=stratified",
            "output_dir=a=b",
            "model_init_kwargs.attn_implementation=eager",
        ],
    )
    assert changed.nesting == Nesting([1, 3, 8])
    assert changed.rule == "stratified"
    assert changed.training["learning_rate"] == 5e-5
    assert changed.data == {"split": "train", "task": "family_relationships", "size": 12}
    assert changed.output_dir == Path("a=b")
    assert changed.sft_config().model_init_kwargs == {"attn_implementation": "eager"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", [], "holds no keys"),
        ("- a\n", [], "holds no keys"),
        ("a: [1\n", [], "cannot read the config"),
        ("data: chain_sum\nmax_steps: 1\nmax_steps: 2\n", [], "the key max_steps is there twice"),
        ("data: chain_sum\n", ["max_steps"], "'max_steps' is no override; write key=value"),
        ("data: chain_sum\n", ["max_steps=[1"], "is no YAML"),
        ("data: chain_sum\n", ["max_steps.x=1"], "max_steps is {'x': 1}; expected an integer"),
        ("data: chain_sum\nmax_steps: 1\n", ["max_steps.x=1"], "max_steps is 1, which has nothing below it"),
        ("data: chain_sum\n", ["lora.rr=1"], "no key 'rr' in section 'lora'"),
    ],
)
def test_wrong_files_and_overrides(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(MatryoshkaError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert message in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="there is no config"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(MatryoshkaError, match="cannot read the config"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"data": "family_relationships"},
        {"data": {"path": "a.jsonl", "size": 3}, "dtype": "fp32", "quantization": "nf4", "max_length": None},
        {
            "data": {"task": "chain_sum", "seed": 2},
            "eval_strategy": "steps",
            "lora": {"r": 12, "lora_alpha": 7.3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
            "nesting": {"ranks": [3, 12], "scaling": "sqrt", "rule": "stratified", "seed": 5, "reorder": "learned"},
            "learning_rate": 1e-5,
            "lr_scheduler_kwargs": {"num_cycles": 2},
        },
    ],
)
def test_what_is_written_reads_as_the_same_config(tmp_path: Path, config: dict[str, Any]) -> None:
    made = make_config(config)
    assert load_config(write(tmp_path, made.to_yaml())) == made
    assert make_config(made.to_dict()) == made


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_numbers(value: float) -> None:
    for text in (repr(value), f"{value:e}", f"{value:g}", yaml.safe_dump(value)):
        read = parse_yaml(text)
        assert isinstance(read, (int, float))
        assert read == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("1e3", 1000.0),
        ("e3", "e3"),
        ("1.2.3", "1.2.3"),
        ("2026-01-01x", "2026-01-01x"),
        ("null", None),
        ("[1, 2e-1]", [1, 0.2]),
    ],
)
def test_yaml(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/paper/*.yaml")]), ids=lambda path: path.name
)
def test_the_examples_are_valid(path: Path) -> None:
    assert isinstance(load_config(path), TrainConfig)


def test_a_file_with_other_rows_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def config(text: str, **more: str | None) -> TrainConfig:
        Path("my.jsonl").write_text(text)
        return make_config({"data": {"path": "my.jsonl", **more}, "output_dir": "out"})

    one = config('{"text": "a"}\n')
    Path("out").mkdir()
    Path("out/train.yaml").write_text(one.to_yaml())
    Path("out/trainer_state.json").write_text("{}")
    assert plan(one).finished
    assert make_config(one.to_dict()) == one
    two = config('{"text": "b"}\n')
    with pytest.raises(MatryoshkaError, match="another config: the file of data has changed"):
        plan(two)
    assert config('{"text": "b"}\n', sha256=None) == two
    Path("my.jsonl").unlink()
    assert plan(make_config({"data": {"path": "my.jsonl"}, "output_dir": "out"})).finished
    with pytest.raises(MatryoshkaError, match=r"my\.jsonl is not the file that data\.sha256 names"):
        config('{"text": "b"}\n', sha256=one.data["sha256"])
    # A run of version 0.1 did not keep it.
    Path("out/train.yaml").write_text("".join(line for line in one.to_yaml().splitlines(True) if "sha256" not in line))
    assert plan(two).finished
