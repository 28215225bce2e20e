"""Damaged and hostile input works, or is one clear error: 10,000 cases in a few minutes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.evaluations import new_evaluation
from helpers.fuzzing import edited, edited_json, edited_text, run_command, works_or_fails_clearly
from helpers.models import tiny_llama
from helpers.tiny_chat import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save

from matryoshka_lora import reorder
from matryoshka_lora.evaluation.results import EVALUATION_NAME, EXAMPLES_NAME
from matryoshka_lora.examples import prompt_and_completion, read_examples
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from matryoshka_lora.formats.safetensors_io import NESTING_KEY
from matryoshka_lora.training.data import read_training_data

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PEFT_NAMES = ["base_model.model.layers.0.self_attn.q_proj", "base_model.model.v_proj"]
KOHYA_NAMES = ["lora_unet_a_b", "lora_te_c"]
DIFFUSERS_NAMES = ["unet.a.b", "text_encoder.c"]
DIFFUSERS_METADATA = {
    "unet.r": 4,
    "unet.lora_alpha": 8,
    "unet.rank_pattern": {"x": 2},
    "unet.alpha_pattern": {"x": 2},
    "text_encoder.r": 4,
    "text_encoder.lora_alpha": 4,
}
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "owner/base",
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {"never": 2},
    "alpha_pattern": {"never": 2},
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "modules_to_save": None,
    "init_lora_weights": True,
    "use_dora": False,
    "layer_replication": None,
    "revision": None,
}
TRAINING_CONFIG: dict[str, Any] = {
    "base_model": "missing/model",
    "base_revision": None,
    "dtype": "fp32",
    "data": "missing.jsonl",
    "eval_data": None,
    "output_dir": "run",
    "learning_rate": 1e-3,
    "max_steps": 4,
    "eval_strategy": "no",
    "lora": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": False},
    "nesting": {
        "ranks": [2, 8],
        "scaling": "none",
        "rule": "lora",
        "seed": 1,
        "deploy": "reordered",
        "train_ranks": True,
    },
}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
EXAMPLES: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    {"messages": MESSAGES, "tools": "[]", "chat_template_kwargs": {"x": 1}},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
]
FOLDER_COMMANDS = st.sampled_from(
    [["info"], ["reorder"], ["export", "--rank", "2"], ["export", "--keep", "90%"]]
)
SINGLE_COMMANDS = st.sampled_from(
    [
        ["info"],
        ["export", "--rank", "2"],
        ["export", "--key-format", "kohya"],
        ["export", "--key-format", "diffusers"],
    ]
)


def factors(names: list[str], suffix_A: str, suffix_B: str) -> dict[str, np.ndarray]:
    """Return random factors of rank 4."""
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors[name + suffix_A] = generator.normal(size=(4, 6)).astype(np.float32)
        tensors[name + suffix_B] = generator.normal(size=(5, 4)).astype(np.float32)
    return tensors


def write_nested(folder: Path) -> Path:
    """Write a nested adapter, and return its folder."""
    plain = folder / "plain"
    plain.mkdir()
    (plain / CONFIG_NAME).write_text(json.dumps(CONFIG))
    tensors = factors(PEFT_NAMES, ".lora_A.weight", ".lora_B.weight")
    (plain / WEIGHTS_NAME).write_bytes(save(tensors, {"format": "pt"}))
    reorder(plain, folder / "lora")
    shutil.rmtree(plain)
    return folder / "lora"


def lycoris_matrices() -> dict[str, np.ndarray]:
    """Return a layer of LoHa, a convolution of LoKr with a core, and the change of a norm."""
    shapes: dict[str, tuple[int, ...]] = {
        "x.hada_w1_a": (6, 2),
        "x.hada_w1_b": (2, 5),
        "x.hada_w2_a": (6, 2),
        "x.hada_w2_b": (2, 5),
        "x.alpha": (),
        "y.lokr_w1": (3, 2),
        "y.lokr_w2_a": (2, 4),
        "y.lokr_w2_b": (2, 3),
        "y.lokr_t2": (2, 2, 3, 3),
        "y.alpha": (),
        "z.w_norm": (6,),
    }
    generator = np.random.default_rng(0)
    return {
        key: np.array(generator.normal(size=shape), np.float32) for key, shape in shapes.items()
    }


def write_single(file: Path, key_format: str) -> Path:
    """Write a single file, and return its path."""
    if key_format == "kohya":
        tensors = factors(KOHYA_NAMES, ".lora_down.weight", ".lora_up.weight")
        tensors |= {f"{name}.alpha": np.array(2.0, np.float32) for name in KOHYA_NAMES}
        metadata = {"ss_network_dim": "4", "ss_network_alpha": "2", "sshs_model_hash": "0"}
    elif key_format == "lycoris":
        tensors = lycoris_matrices()
        metadata = {"ss_network_module": "lycoris.kohya"}
    else:
        tensors = factors(DIFFUSERS_NAMES, ".lora_A.weight", ".lora_B.weight")
        metadata = {"lora_adapter_metadata": json.dumps(DIFFUSERS_METADATA)}
    file.write_bytes(save(tensors, metadata))
    return file


def split_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors of a safetensors file."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_header(header: bytes, tensors: bytes, length: int | None = None) -> bytes:
    """Return the bytes of a safetensors file."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + tensors


@st.composite
def damaged_files(draw: st.DrawFn, header: dict[str, Any], tensors: bytes) -> bytes:
    """Return a safetensors file with an edited header, and with other tensors now and then."""
    new_header = draw(edited_json(header, max_edits=2))
    if draw(st.integers(0, 3)) == 0:
        bits = st.sampled_from([0, 0xFF, 0x7F, 0x80, 0x3F])
        tensors = bytes(draw(st.lists(bits, min_size=8, max_size=8))) * (len(tensors) // 8)
    if draw(st.integers(0, 7)) == 0:
        tensors = tensors[: draw(st.integers(0, len(tensors)))]
    length = draw(st.one_of(st.none(), st.none(), st.none(), st.sampled_from([0, 7, 2**40, 2**63])))
    return join_header(new_header, tensors, length)


def use(folder: Path, lora: Path, command: list[str]) -> None:
    """Run a command on a LoRA in a folder, and delete its output."""
    name, *arguments = command
    output = folder / "output"
    if name == "info":
        run_command(folder, name, lora)
    elif lora.is_dir():
        if run_command(folder, name, lora, "-o", output, *arguments):
            shutil.rmtree(output)
    elif run_command(folder, name, lora, "-o", output.with_suffix(".safetensors"), *arguments):
        output.with_suffix(".safetensors").unlink()


def test_configs(tmp_path: Path) -> None:
    lora = write_nested(tmp_path)

    @settings(max_examples=400)
    @given(edited_json(json.loads((lora / CONFIG_NAME).read_text())), FOLDER_COMMANDS)
    def check(config: bytes, command: list[str]) -> None:
        (lora / CONFIG_NAME).write_bytes(config)
        use(tmp_path, lora, command)

    check()


def test_headers_of_folders(tmp_path: Path) -> None:
    lora = write_nested(tmp_path)

    @settings(max_examples=400)
    @given(damaged_files(*split_header(lora / WEIGHTS_NAME)), FOLDER_COMMANDS)
    def check(data: bytes, command: list[str]) -> None:
        (lora / WEIGHTS_NAME).write_bytes(data)
        use(tmp_path, lora, command)

    check()


@pytest.mark.parametrize("key_format", ["kohya", "diffusers", "lycoris"])
def test_headers_of_single_files(key_format: str, tmp_path: Path) -> None:
    lora = write_single(tmp_path / "lora.safetensors", key_format)

    @settings(max_examples=400)
    @given(damaged_files(*split_header(lora)), SINGLE_COMMANDS)
    def check(data: bytes, command: list[str]) -> None:
        lora.write_bytes(data)
        use(tmp_path, lora, command)

    check()


def test_nesting_metadata(tmp_path: Path) -> None:
    lora = write_nested(tmp_path)
    header, tensors = split_header(lora / WEIGHTS_NAME)

    @settings(max_examples=400)
    @given(edited_json(json.loads(header["__metadata__"][NESTING_KEY])), FOLDER_COMMANDS)
    def check(nesting: bytes, command: list[str]) -> None:
        header["__metadata__"][NESTING_KEY] = nesting.decode(errors="replace")
        (lora / WEIGHTS_NAME).write_bytes(join_header(json.dumps(header).encode(), tensors))
        use(tmp_path, lora, command)

    check()


def test_metadata_of_diffusers(tmp_path: Path) -> None:
    lora = write_single(tmp_path / "lora.safetensors", "diffusers")
    header, tensors = split_header(lora)

    @settings(max_examples=400)
    @given(edited_json(DIFFUSERS_METADATA), SINGLE_COMMANDS)
    def check(configs: bytes, command: list[str]) -> None:
        header["__metadata__"]["lora_adapter_metadata"] = configs.decode(errors="replace")
        lora.write_bytes(join_header(json.dumps(header).encode(), tensors))
        use(tmp_path, lora, command)

    check()


def test_examples(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    file = tmp_path / "examples.jsonl"

    @settings(max_examples=400)
    @given(st.lists(st.sampled_from(EXAMPLES).flatmap(edited_json), max_size=2))
    def check(lines: list[bytes]) -> None:
        file.write_bytes(b"\n".join(lines))
        with works_or_fails_clearly():
            data = read_training_data(model, file, tokenizer)
            list(data.batches(range(len(data.examples))))
        with works_or_fails_clearly():
            for index, example in enumerate(read_examples(file)):
                prompt_and_completion(example, index)

    check()


def test_evaluations(tmp_path: Path) -> None:
    new_evaluation().write(tmp_path)
    fields = json.loads((tmp_path / EVALUATION_NAME).read_text())
    first_lines = (tmp_path / EXAMPLES_NAME).read_text().split("\n")[:2]
    examples = [json.loads(line) for line in first_lines]

    @settings(max_examples=600)
    @given(
        edited_json(fields),
        st.tuples(edited_json(examples[0]), edited_json(examples[1])),
        st.sampled_from([("--within", "10%"), ("--max-bytes", "500")]),
    )
    def check(evaluation: bytes, lines: tuple[bytes, ...], condition: tuple[str, str]) -> None:
        (tmp_path / EVALUATION_NAME).write_bytes(evaluation)
        (tmp_path / EXAMPLES_NAME).write_bytes(b"\n".join(lines))
        run_command(tmp_path, "select", tmp_path, *condition)

    check()


def test_training_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without a mistake fail at the data, which do not exist."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    insertions = [": ", "\t", "&a ", "*a ", "!!python/object:os.system ", "[" * 5000, "2001-99-99"]

    @settings(max_examples=500)
    @given(
        edited(TRAINING_CONFIG).flatmap(
            lambda config: edited_text(yaml.safe_dump(config, sort_keys=False), insertions)
        )
    )
    def check(config: bytes) -> None:
        file.write_bytes(config)
        assert not run_command(tmp_path, "train", file)

    check()
