"""Single files that somebody made to do harm, or that a disk has damaged: a clear error, and nothing is written."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from matryoshka_lora import MatryoshkaError, export, reorder
from matryoshka_lora.serving.info import describe

NAME = "lora_unet_a"


def good(name: str = NAME, rank: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn(rank, 6),
        f"{name}.lora_up.weight": torch.randn(5, rank),
        f"{name}.alpha": torch.tensor(2.0),
    }


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pair(A: dict[str, Any], B: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {f"{NAME}.lora_down.weight": A, f"{NAME}.lora_up.weight": B, **more}


def headers() -> Iterator[tuple[str, bytes]]:
    """Damaged and lying headers."""
    whole = save(good())
    yield "empty", b""
    for count in (1, 7, 8, 9, 20, 60, 100, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        yield f"cut short after {count}", whole[:count]
    yield "longer than said", whole + b"x"
    for length in (0, 1, 2**20, 2**25 + 1, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"header of {length}", raw({}, b"\0" * 64, length)
    for text in (b"", b"{", b"[]", b"1", b"null", b'"x"', b"{}", b"\xff\xfe", b'{"a":', b"{}" * 9, b'{"a": null}'):
        yield f"header {text!r}", raw(text)
    yield "deep", raw(b'{"a":' * 5000 + b"1" + b"}" * 5000)
    yield "deep list", raw(b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}")
    yield "a million keys", raw(b'{"__metadata__":{' + b",".join(b'"%d":1' % n for n in range(10**6)) + b"}}")
    yield "many tensors", raw({f"t{n}": entry([0], 0, 0) for n in range(20000)})
    yield "metadata of numbers", raw({"__metadata__": {"a": 1}})
    yield "metadata a list", raw({"__metadata__": [1]})
    yield "a key twice", raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2 + b'"b":1}', b"\0" * 8)


def offsets() -> Iterator[tuple[str, bytes]]:
    data = b"\0" * 400
    for name, (first, second) in {
        "overlap": ((0, 96), (48, 128)),
        "the same": ((0, 80), (0, 80)),
        "a gap": ((0, 96), (100, 180)),
        "beyond": ((0, 96), (96, 2**40)),
        "backwards": ((96, 0), (96, 176)),
        "negative": ((-96, 0), (0, 80)),
        "floats": ((0.0, 96.0), (96.0, 176.0)),
        "words": (("0", "96"), ("96", "176")),
        "2**63": ((2**63, 2**63 + 96), (96, 176)),
        "2**70": ((2**70, 2**70 + 96), (96, 176)),
        "too long": ((0, 200), (200, 400)),
        "too short": ((0, 40), (40, 80)),
    }.items():
        yield f"offsets {name}", raw(pair(entry([4, 6], *first), entry([5, 4], *second)), data)
    for dtype in ("F8_E8M0", "F4", "C64", "F128", "", None, 7, "U64"):
        yield f"dtype {dtype}", raw(pair(entry([4, 6], 0, 96, dtype), entry([5, 4], 96, 176, dtype)), data[:176])


def shapes() -> Iterator[tuple[str, bytes]]:
    for A, B in (
        *(([0, 6], [5, 0]), ([4, 0], [5, 4]), ([4, 6], [0, 4]), ([], []), ([4], [4]), ([24], [5, 4])),
        *(([4, 6], [4, 5]), ([4, 6], [5, 3]), ([3, 6], [5, 4]), ([4, 6], [20]), ([4, 6, 1, 1], [5, 4])),
        *(([4, 6], [5, 4, 1, 1]), ([4, 6, 3, 3], [5, 4, 3, 3]), ([4, 6, 1, 1, 1, 1], [5, 4, 1, 1, 1, 1])),
        *(([5000, 1], [1, 5000]), ([2**20, 1], [1, 2**20]), ([4097, 2], [2, 4097])),
    ):
        state = {f"{NAME}.lora_down.weight": torch.zeros(A), f"{NAME}.lora_up.weight": torch.zeros(B)}
        yield f"shapes {A} {B}", save(state)
    for shape in ([2**40, 6], [2**63, 2**63], [-4, 6], [4.0, 6], ["4", 6], [4, None], [True, 6], [2**32, 2**32]):
        yield f"claims {shape}", raw(pair(entry(shape, 0, 96), entry([5, 4], 96, 176)), b"\0" * 176)


def tensors() -> Iterator[tuple[str, bytes]]:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for key in ("lora_down.weight", "lora_up.weight"):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                state = {name: tensor.to(dtype) for name, tensor in good().items()}
                state[f"{NAME}.{key}"][1, 2] = bad
                yield f"{bad} in {key} of {dtype}", save(state)
    for value in (0.0, -1.0, -0.0, float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            yield f"alpha {value} of {dtype}", save({**good(), f"{NAME}.alpha": torch.tensor(value, dtype=dtype)})
    for alpha in (
        torch.ones(2),
        torch.ones(0),
        torch.ones(3, 3),
        torch.tensor(True),
        torch.tensor(0),
        torch.tensor(-3),
    ):
        yield f"alpha {alpha}", save({**good(), f"{NAME}.alpha": alpha})
    for key in ("lora_down.weight", "lora_up.weight"):
        for dtype in (torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float16):
            yield f"{key} in {dtype}", save({**good(), f"{NAME}.{key}": good()[f"{NAME}.{key}"].to(dtype)})
        for style in (key, key.replace("lora_", ""), key.replace("lora_", "").replace(".weight", "")):
            yield f"no partner of {style}", save({**good(), f"other.{style}": torch.zeros(4, 6)})
    yield (
        "two pairs of a name",
        save({**good(), f"{NAME}.lora_A.weight": torch.zeros(4, 6), f"{NAME}.lora_B.weight": torch.zeros(5, 4)}),
    )


def names() -> Iterator[tuple[str, bytes]]:
    for name in (
        *(
            "../../etc/passwd",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a/../b",
            "C:\\Windows",
            "..\\x",
            "a/b",
            "a..b",
            ".a",
            "a.",
        ),
        *("a\nb", "a\0b", "\x1b[2J", "__class__", "a.__init__.b", "x" * 501, "a" * 10**6, "\u202ea", "a\tb", "\x7f"),
    ):
        yield f"name {name[:20]!r}", save({**good(), **good(name)})


def methods() -> Iterator[tuple[str, bytes]]:
    """Files that are no LoRA, or whose every layer is more than a pair."""
    for more in (
        "dora_scale",
        "lora_mid.weight",
        "lora_magnitude_vector",
        "lora_up.bias",
        "lora_magnitude_vector.weight",
    ):
        yield more, save({**good(), f"{NAME}.{more}": torch.ones(5, 1)})
    for words in (
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("lokr_w1", "lokr_w2"),
        ("oft_blocks",),
        ("diff",),
    ):
        yield words[0], save({f"{NAME}.{word}": torch.ones(3, 3) for word in words})
    yield "a model", save({"model.embed.weight": torch.ones(3, 3)})
    for style in ("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.default.weight"):
        yield f"no partner of {style}", save({**good(), f"other.{style}": torch.zeros(4, 6)})
    for text in (
        *("{", "[]", "1", '"x"', "null", '{"r": 4}', '{"unet.r": 4}', '{"unet.r": "4", "unet.lora_alpha": 4}'),
        *('{"unet.r": 8, "unet.lora_alpha": 4}', '{"unet.r": 4, "unet.lora_alpha": 0}', "[" * 9000),
        *('{"unet.r": 4, "unet.lora_alpha": 8, "unet.use_dora": true}',),
        '{"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"(a*)*b": 4}}',
        '{"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": 5}',
        '{"text_encoder.r": 4, "text_encoder.lora_alpha": 8}',
    ):
        state = {"unet.a.lora_A.weight": torch.ones(4, 6), "unet.a.lora_B.weight": torch.ones(5, 4)}
        if text == '{"unet.r": 4}':
            continue
        yield f"metadata {text[:60]}", save(state, {"lora_adapter_metadata": text})


HOSTILE = [*headers(), *offsets(), *shapes(), *tensors(), *names(), *methods()]


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 200
    assert len({name for name, _ in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("data", [data for _, data in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_a_clear_error_and_nothing_written(tmp_path: Path, data: bytes) -> None:
    file, out = tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    file.write_bytes(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(MatryoshkaError) as told:
        export(file, out, rank=1)
    with pytest.raises(MatryoshkaError):
        reorder(file, out)
    with pytest.raises(MatryoshkaError):
        export(file, out, keep="50%")
    with pytest.raises(MatryoshkaError):
        describe(file)
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB
    assert 20 < len(str(told.value)) < 1500
    assert str(told.value).isprintable() or "\\" in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors"]


def test_the_good_one_is_good(tmp_path: Path) -> None:
    save_file(good(), tmp_path / "good.safetensors")
    export(tmp_path / "good.safetensors", tmp_path / "out.safetensors", rank=1)
    assert (tmp_path / "out.safetensors").is_file()


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save(good(), tmp_path / "lora.pt")
    with pytest.raises(MatryoshkaError, match="pickle"):
        describe(tmp_path / "lora.pt")
