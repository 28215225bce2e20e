"""250 generated hostile adapters: each is refused in bounded time and memory, and nothing is written by it.

`tests/test_bad_adapters.py` has the cases that people meet, each with its message. Here a fixed seed draws from ways to
do harm, alone and in pairs, on a plain adapter and on a nested one, and hands the folder to every way in.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nested_llama, tiny_llama
from safetensors.torch import load_file, save_file
from strangers import plain_adapter
from test_bad_adapters import fingerprint

from matryoshka_lora import MatryoshkaError, Nesting, export, load, reorder
from matryoshka_lora.formats.config import check_config
from matryoshka_lora.serving.info import describe

CASES = 250
SECONDS = 20
WEIGHTS, CONFIG, SIDECAR, INDEX = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "nesting.json",
    "adapter_model.safetensors.index.json",
)
TARGETS = ["q_proj", "down_proj"]

Harm = Callable[[Path, random.Random], None]


SLOW = [
    *("(a+)+b", "(x*)*y", "(.*.*.*)*z", ".*" * 600, ".*.*.*.*.*x", ".?" * 17 + "x", "(?:.*.*.*|.*.*.*)"),
    *("(a|a)*b", "(?:.|.)+x", "(?:(?:a+)())*x", "((a?))*x", r"\(?" * 17 + "x", "|".join([".*.*.*x"] * 3)),
    # What a careless reading takes for two alternatives, for a letter or for a comment.
    *("[]|].*.*.*.*.*", ".*.*.*[^]|].*.*", r".*.*.*\|.*.*", "(?x)(.*.*.*.* # )\n|b).*.*.*.*", "(?#[).*.*.*.*.*(?#])"),
]

QUICK = [
    # Unsloth's, of Gemma and of models that see.
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj"
    r"|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn"
    r"|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    *(
        r"^(?!.*visual).*(?:q_proj|k_proj).*",
        r"(.*\.)?layers\.\d+\.(self_attn\.)?(q|v)_proj",
        "(?i).*q_proj",
        r".*layers?\.\d+\.(self_)?attn\.(q|k|v|o)(_proj)?",
        r"[*+]\*\+\{\?",
    ),
]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_could_take_for_ever_is_refused(pattern: str) -> None:
    for field in ({"target_modules": pattern}, {"rank_pattern": {pattern: 2}}):
        with pytest.raises(MatryoshkaError, match="could take for ever"):
            check_config({"peft_type": "LORA", "target_modules": ["q_proj"], **field}, "it")


@pytest.mark.parametrize("pattern", QUICK)
def test_a_pattern_that_is_used_is_quick(pattern: str) -> None:
    check_config({"peft_type": "LORA", "target_modules": pattern}, "it")
    begin = time.process_time()
    for name in ("model.language_model.layers.11.mlp.q_pro." * 12, "text.attn." * 50, "a" * 500):
        re.fullmatch(pattern, f"{name}\n")
    assert time.process_time() - begin < 0.5


# Ways to do harm


def a_pickle(folder: Path, draw: random.Random) -> None:
    """One that would leave a trace if it were read."""
    content = b"cos\nsystem\n(S'touch " + str(folder.parent / "owned").encode() + b"'\ntR."
    name = draw.choice([WEIGHTS, "adapter_model.bin", "adapter_model.safetensors.bin"])
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def header_bomb(folder: Path, draw: random.Random) -> None:
    length = draw.choice([2**63 - 1, 2**40, 2**31, 10**9, 10**8 + 1])
    text = draw.choice([b"{", b"[" * 10_000, b'{"a":' * 10_000, b" " * 10_000])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + text)


def absurd_shape(folder: Path, draw: random.Random) -> None:
    shape = draw.choice([[2**40, 2**30], [2**63, 2], [-8, 64], [0, 64], [8] * 500, [], [8, 2**62], [1.5, 2], ["8", 64]])
    _change_header(folder, draw, shape=shape)


def overlapping_data(folder: Path, draw: random.Random) -> None:
    _change_header(folder, draw, data_offsets=draw.choice([[0, 2**40], [100, 0], [-8, 8], [0, 0], [0, 10**12], [3, 3]]))


def unknown_dtype(folder: Path, draw: random.Random) -> None:
    _change_header(folder, draw, dtype=draw.choice(["F128", "I64", "BOOL", "", "F8_E4M3", "../F32", 5]))


def path_in_a_name(folder: Path, draw: random.Random) -> None:
    name = draw.choice(
        ["../../owned", "/etc/passwd", "a\0b", "..\\owned", "__class__", "base_model.model." + "x." * 5000]
    )
    tensors = load_file(folder / WEIGHTS)
    for key in list(tensors)[: draw.choice([1, 2])]:
        tensors[f"{name}.lora_A.weight" if "lora_A" in key else f"{name}.lora_B.weight"] = tensors.pop(key)
    save_file(tensors, folder / WEIGHTS)


def not_finite(folder: Path, draw: random.Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensor = tensors[draw.choice(sorted(tensors))]
    tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([math.nan, math.inf, -math.inf])
    save_file(tensors, folder / WEIGHTS)


def other_tensors(folder: Path, draw: random.Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = draw.choice(sorted(tensors))
    new = draw.choice([None, torch.ones(1), torch.ones(3, 3), tensors[key].T, tensors[key].int()])
    if new is None:
        del tensors[key]
    else:
        tensors[key] = new.contiguous()
    save_file(tensors, folder / WEIGHTS)


def other_config(folder: Path, draw: random.Random) -> None:
    changes: list[dict[str, Any]] = [
        {"r": draw.choice([0, -1, 4, 10**15, "8", 8.5, None, [8], True])},
        {"lora_alpha": draw.choice([math.nan, math.inf, "x", None, [1], 1e400, {}])},
        {"target_modules": draw.choice(["(a+)+b", ".*" * 600, "([", "(x*)*y", r"(.*.*)*z"])},
        {"rank_pattern": draw.choice([{"(q+)+_proj": 2}, {"q_proj": 10**15}, {"q_proj": -2}, {"(": 2}])},
        {"peft_type": draw.choice(["LOHA", "IA3", "PROMPT_TUNING", "NONE", 5, None, "../LORA"])},
        {draw.choice(["use_dora", "lora_bias"]): True},
        {"layer_replication": [[0, 10**9]]},
        {"init_lora_weights": draw.choice(["pissa", "olora", "corda", "loftq"])},
        {"auto_mapping": {"base_model_class": "x"}, "r": 3},
        {"alora_invocation_tokens": [1, 2]},
    ]
    _change_json(folder / CONFIG, draw.choice(changes))


def broken_json(folder: Path, draw: random.Random) -> None:
    content = draw.choice(
        [b"", b"null", b"[]", b"[" * 100_000, b'{"r":', b"\xff\xfe\x00", b"1" * 99_999, b'{"r": 1e999}']
    )
    name = SIDECAR if (folder / SIDECAR).exists() and draw.random() < 0.5 else CONFIG
    (folder / name).write_bytes(content)


def symbolic_link(folder: Path, draw: random.Random) -> None:
    name = draw.choice(_names(folder))
    target = draw.choice(["/dev/zero", "/dev/urandom", "/proc/self/environ", "/etc", "nowhere", name, "/dev/stdin"])
    (folder / name).unlink()
    os.symlink(target, folder / name)


def a_pipe(folder: Path, draw: random.Random) -> None:
    """Whoever opens it waits for ever."""
    name = draw.choice(_names(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)


def shards_elsewhere(folder: Path, draw: random.Random) -> None:
    secret = folder.parent / "secret.safetensors"
    secret.write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    name = draw.choice(["../secret.safetensors", str(secret), "..", "", "a\0b", "x/../../secret.safetensors", 5, None])
    content = draw.choice([{"weight_map": {"a": name}}, {"weight_map": [name]}, [], {"weight_map": {}}, {}])
    (folder / INDEX).write_text(json.dumps(content))


def cut_short(folder: Path, draw: random.Random) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: draw.randrange(len(content))])


def appended(folder: Path, draw: random.Random) -> None:
    with open(folder / WEIGHTS, "ab") as file:
        file.write(draw.randbytes(draw.choice([1, 7, 4096])))


HARMS: list[Harm] = [
    a_pickle,
    header_bomb,
    absurd_shape,
    overlapping_data,
    unknown_dtype,
    path_in_a_name,
    not_finite,
    other_tensors,
    other_config,
    broken_json,
    symbolic_link,
    a_pipe,
    shards_elsewhere,
    cut_short,
    appended,
]


def _names(folder: Path) -> list[str]:
    return [name for name in (WEIGHTS, CONFIG, SIDECAR) if (folder / name).exists()]


def _change_header(folder: Path, draw: random.Random, **changes: Any) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = draw.choice(sorted(key for key in header if key != "__metadata__"))
    header[key] = {**header[key], **changes}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _change_json(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Ways in


BASE = tiny_llama()
WAYS_IN: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda folder, out: load(BASE, folder),
    "export": lambda folder, out: export(folder, out, 1),
    "directions": lambda folder, out: export(folder, out, 2, "directions"),
    "reorder": lambda folder, out: reorder(folder, out),
    "info": lambda folder, out: describe(folder),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    plain_adapter(folder / "plain", target_modules=TARGETS)
    adapter = nested_llama(Nesting([1, 2, 8]), target_modules=TARGETS)
    adapter.reorder()
    adapter.save(folder / "nested")
    (folder / "nested" / "spectra.safetensors").unlink()  # else `info` has no need to read the factors
    # A set has another order in every process.
    for kind in ("plain", "nested"):
        _change_json(folder / kind / CONFIG, {"target_modules": TARGETS})
    return {"plain": folder / "plain", "nested": folder / "nested"}


@contextmanager
def bounded() -> Iterator[None]:
    """No more than 1 GB beyond what the process has, and no more than some seconds."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    began = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - began < SECONDS


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does")
@pytest.mark.timeout(SECONDS + 10)
@pytest.mark.parametrize("case", range(CASES))
def test_a_hostile_adapter_is_refused(good: dict[str, Path], tmp_path: Path, case: int) -> None:
    draw = random.Random(case)
    kind = draw.choice(sorted(good))
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in good[kind].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    harms = [HARMS[case % len(HARMS)]]
    harms[0](folder, draw)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    weights = {name: tensor.clone() for name, tensor in BASE.state_dict().items()}
    # What has no nesting is refused by `load` for that reason alone.
    ways = {name: way_in for name, way_in in WAYS_IN.items() if kind == "nested" or name != "load"}
    for name, way_in in ways.items():
        with bounded(), pytest.raises(MatryoshkaError) as caught:
            way_in(folder, tmp_path / "out")
        assert len(str(caught.value)) < 2000, name
        assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before, name
    now = BASE.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.items())
    assert not (tmp_path / "owned").exists()


def test_the_good_ones_are_taken(good: dict[str, Path], tmp_path: Path) -> None:
    for name, way_in in WAYS_IN.items():
        with bounded():
            if name != "load":
                way_in(good["nested"], tmp_path / name)
    reorder(good["plain"], tmp_path / "plain")
    assert fingerprint(tmp_path / "plain").keys() >= {WEIGHTS, CONFIG, SIDECAR}
