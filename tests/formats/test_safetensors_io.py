"""Tensors are read bit by bit, and written as safetensors writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from matryoshka_lora import Lora, MatryoshkaError
from matryoshka_lora.formats.safetensors_io import (
    create_safetensors,
    lora_file_size,
    open_safetensors,
    read_json,
    write_lora_tensors,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor of random bits, NaN and infinity included."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return values.view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(5, 4, 3), (1,), (), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_is_bit_exact(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = random_bits(dtype, *shape)
    other = torch.arange(7, dtype=torch.uint8)  # an odd number of bytes in front
    save_file({"a": other, "x": tensor}, tmp_path / "file.safetensors", {"key": "value"})
    tensors, metadata = open_safetensors(tmp_path / "file.safetensors")
    stored = tensors["x"]
    array = stored.read()
    assert stored.shape == array.shape == shape
    assert stored.dtype == array.dtype
    assert stored.nbytes == array.nbytes == tensor.nbytes
    np.testing.assert_array_equal(
        array.reshape(-1).view(np.uint8), tensor.reshape(-1).view(torch.uint8).numpy()
    )
    with np.errstate(invalid="ignore"):  # signaling NaN
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())
    assert metadata == {"key": "value"}


def test_written_file_is_aligned_and_read_by_safetensors(tmp_path: Path) -> None:
    """Programs that map a file into memory need each tensor at a multiple of its own width."""
    expected = {str(dtype): random_bits(dtype, 3, 5) for dtype in DTYPES}
    expected["scalar"] = torch.tensor(2.5)
    expected["empty"] = torch.zeros(0, 3)
    save_file(expected, tmp_path / "source.safetensors")
    tensors, _ = open_safetensors(tmp_path / "source.safetensors")

    output = tmp_path / "output.safetensors"
    with create_safetensors(output, tensors, {"format": "pt", "key": "before"}) as writer:
        for key in reversed(tensors):
            writer.write(key, tensors[key].read())
        writer.metadata["key"] = "after!"

    loaded = load_file(output)
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert loaded[key].dtype == tensor.dtype
        assert loaded[key].shape == tensor.shape
        torch.testing.assert_close(
            loaded[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt", "key": "after!"}
    data = output.read_bytes()
    lora = Lora("", (), tensors, {"key": "before"})
    write_lora_tensors(lora, tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").stat().st_size == lora_file_size(lora)
    header_size = int.from_bytes(data[:8], "little")
    assert header_size % 8 == 0
    header = json.loads(data[8 : 8 + header_size])
    del header["__metadata__"]
    for key, entry in header.items():
        assert entry["data_offsets"][0] % expected[key].element_size() == 0


def test_arrays_are_cast_to_the_declared_dtype(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    array = generator.normal(size=(4, 6)).T  # not contiguous
    save_file({"x": torch.zeros(6, 4, dtype=torch.bfloat16)}, tmp_path / "source.safetensors")
    tensors, _ = open_safetensors(tmp_path / "source.safetensors")
    with create_safetensors(tmp_path / "output.safetensors", tensors, {}) as writer:
        writer.write("x", array)
    loaded = load_file(tmp_path / "output.safetensors")["x"]
    assert torch.equal(loaded, torch.from_numpy(array).bfloat16())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"3", b"\xff\xfe", b"[" * 200_000], ids=len
)
def test_json_without_an_object_is_rejected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(MatryoshkaError, match="damaged"):
        read_json(tmp_path / "file.json")
    with pytest.raises(MatryoshkaError, match="not found"):
        read_json(tmp_path / "missing.json")
