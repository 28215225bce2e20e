"""A file of which a device reads only the ranks it needs: what is read is counted, by the operating system."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from pathlib import Path

import pytest
import torch
from conftest import LINEAR_LAYERS, nested_llama, randomize, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from strangers import IDS, output, plain_adapter
from transformers import MixtralConfig, MixtralForCausalLM

from matryoshka_lora import MatryoshkaError, Nesting, export, load, reorder
from matryoshka_lora.formats.directions import DIRECTIONS_NAME
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.formats.write import write_adapter


def pages_in_memory(path: Path) -> int:
    """How many bytes of a file the kernel holds in its page cache: what was read from the disk, and read ahead."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
        pages = -(-size // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        # The mapping is read-only, so ctypes cannot take its address: map it once more.
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_long] * 5]
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident)
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
        del view
    assert not failed
    return sum(page & 1 for page in resident) * mmap.PAGESIZE


def forget(path: Path) -> None:
    """Let the kernel drop a file from its page cache."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(path):
        pytest.skip("this file system keeps its files in memory")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="counts pages as Linux does")
def test_rank_4_of_256_touches_under_3_percent_of_the_file(tmp_path: Path) -> None:
    """24 layers of 1536 x 576, as SmolLM2 has them, in float32: 52 MB."""
    names = [f"layers.{i}.up_proj" for i in range(24)]
    config = LoraConfig(r=256, lora_alpha=256, target_modules=["up_proj"])
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(256, 576)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(1536, 256)
    (tmp_path / "plain").mkdir()
    config.save_pretrained(tmp_path / "plain")
    save_file(tensors, tmp_path / "plain" / "adapter_model.safetensors", {"format": "pt"})
    reorder(tmp_path / "plain", tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "device", 256, "directions")

    file = tmp_path / "device" / DIRECTIONS_NAME
    forget(file)
    part = open_adapter(tmp_path / "device", max_rank=4)
    read = part.tensors()
    touched = pages_in_memory(file)
    assert part.nested.nesting == Nesting([1, 2, 4])
    assert (part.config.r, part.config.scale) == (4, 1.0)
    share = touched / file.stat().st_size
    print(f"rank 4 of 256: {touched:,} of {file.stat().st_size:,} bytes, {100 * share:.2f} %")
    assert 4 / 256 <= share <= 0.03

    # And the count can fail: PEFT's layout is touched all over.
    whole = tmp_path / "nested" / "adapter_model.safetensors"
    forget(whole)
    expected = open_adapter(tmp_path / "nested", max_rank=4).tensors()
    assert pages_in_memory(whole) > 0.5 * whole.stat().st_size
    assert read.keys() == expected.keys()
    for key, tensor in read.items():
        assert torch.equal(tensor, expected[key])


@pytest.mark.parametrize("kind", ["linear", "embedding", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_it_is_the_adapter(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = MixtralConfig(vocab_size=96, num_hidden_layers=1, num_local_experts=3, **small)
    base = MixtralForCausalLM(mixtral) if kind == "experts" else tiny_llama()
    options = {
        "linear": {"target_modules": LINEAR_LAYERS, "modules_to_save": ["norm"]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    }[kind]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, **options))
    randomize(model)
    model.save_pretrained(tmp_path / "plain")
    reorder(tmp_path / "plain", tmp_path / "float32")
    (tmp_path / "nested").mkdir()
    write_adapter(tmp_path / "nested", open_adapter(tmp_path / "float32").cast(dtype))
    export(tmp_path / "nested", tmp_path / "device", 8, "directions")
    wanted, found = (open_adapter(tmp_path / name).tensors() for name in ("nested", "device"))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].dtype == tensor.dtype
    for rank in (1, 3, 8):
        some, same = (open_adapter(tmp_path / name, max_rank=rank).tensors() for name in ("device", "nested"))
        assert all(torch.equal(some[key], same[key]) for key in same)


@pytest.mark.parametrize("layout", ["nested", "device"])
def test_a_device_computes_what_the_whole_adapter_does(tmp_path: Path, layout: str) -> None:
    plain_adapter(tmp_path / "plain", lora_alpha=3)
    reorder(tmp_path / "plain", tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "device", 8, "directions")
    whole = load(tiny_llama(), tmp_path / "nested")
    part = load(tiny_llama(), tmp_path / layout, max_rank=4)
    assert part.ranks == (1, 2, 3, 4)
    assert part.model.num_parameters() < whole.model.num_parameters()
    for rank in (1, 3, 4):
        whole.set_rank(rank)
        part.set_rank(rank)
        torch.testing.assert_close(output(part.model), output(whole.model), rtol=0, atol=1e-4)
    with pytest.raises(MatryoshkaError, match="above the largest rank 4"):
        part.set_rank(5)


def test_scales_survive(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting([2, 8], "sqrt", 0.7))
    adapter.reorder()
    adapter.save(tmp_path / "nested")
    part = load(tiny_llama(), tmp_path / "nested", max_rank=3)
    adapter.set_rank(3)
    torch.testing.assert_close(output(part.model), output(adapter.model), rtol=0, atol=1e-4)


def test_peft_s_format_comes_out_again(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain")
    reorder(tmp_path / "plain", tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "device", 6, "directions")
    tiny_llama().save_pretrained(tmp_path / "base")
    one = export(tmp_path / "device", tmp_path / "one", 3, model=str(tmp_path / "base"))
    assert one.verified is not None
    assert one.verified.share < 1e-4
    export(tmp_path / "nested", tmp_path / "other", 3, verify=False)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]


def test_an_adapter_as_it_was_trained_is_not_read_in_part(tmp_path: Path) -> None:
    nested_llama(Nesting([2, 8])).save(tmp_path / "raw")
    with pytest.raises(MatryoshkaError, match="matryoshka reorder"):
        load(tiny_llama(), tmp_path / "raw", max_rank=2)


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "{}",
        "[]",
        "[[1, 2, 3, 4]]",
        '[["a.lora_A.weight", [8, 4]]]',
        '[["a.lora_A.weight", [8, 1], "a.lora_B.weight", [1, 8]]]',
        '[["a.lora_A.weight", [8, -4], "a.lora_B.weight", [4, 8]]]',
        '[["a.lora_A.weight", [8, 4611686018427387904], "a.lora_B.weight", [4, 8]]]',
        "[" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, layout: str) -> None:
    plain_adapter(tmp_path / "plain")
    reorder(tmp_path / "plain", tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "device", 8, "directions")
    file = tmp_path / "device" / DIRECTIONS_NAME
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["__metadata__"]["layers"] = layout
    data = content[8 + int.from_bytes(content[:8], "little") :]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    model = tiny_llama()
    wanted = model(input_ids=IDS).logits
    with pytest.raises(MatryoshkaError, match="damaged"):
        load(model, tmp_path / "device")
    assert torch.equal(model(input_ids=IDS).logits, wanted)
