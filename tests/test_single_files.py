"""Single LoRA files: what is kept as it is, how much memory is used, and the commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import Run, assert_explained, run  # noqa: F401 - a fixture
from torch import Tensor

from matryoshka_lora import MatryoshkaError, export, reorder
from matryoshka_lora.formats.single import open_file
from matryoshka_lora.formats.styles import PIPELINE_PARTS
from matryoshka_lora.serving.single import in_order


def pair(name: str, rank: int = 6, wide: int = 10, tall: int = 8, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_down.weight": torch.randn(rank, wide, generator=generator),
        f"{name}.lora_up.weight": torch.randn(tall, rank, generator=generator),
        f"{name}.alpha": torch.tensor(3.0),
    }


BESIDE = {
    "DoRA": {**pair("lora_unet_b", seed=1), "lora_unet_b.dora_scale": torch.ones(8, 1)},
    "a matrix between": {**pair("lora_unet_b", seed=1), "lora_unet_b.lora_mid.weight": torch.ones(6, 6, 3, 3)},
    "a bias": {**pair("lora_unet_b", seed=1), "lora_unet_b.lora_up.bias": torch.ones(8)},
    "LoHa": {f"lora_unet_b.hada_w{i}_{x}": torch.ones(3, 3) for i in (1, 2) for x in "ab"},
    "LoKr": {"lora_unet_b.lokr_w1": torch.ones(2, 2), "lora_unet_b.lokr_w2": torch.ones(4, 4)},
    "an embedding": {"emb_params": torch.randn(2, 12), "bundle_emb.x.string_to_param.*": torch.randn(2, 12)},
    "odd dtypes": {
        "a": torch.arange(3, dtype=torch.int32),
        "b": torch.ones(5).to(torch.float8_e4m3fn),
        "c": torch.tensor([True]),
        "d": torch.zeros(0),
    },
    "NaN where nobody computes": {"lora_unet_b.diff": torch.full((3,), float("nan"))},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_no_pair_is_kept_with_a_warning(tmp_path: Path, kind: str) -> None:
    file, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_file({**pair("lora_unet_a"), **BESIDE[kind]}, file)
    with pytest.warns(UserWarning, match=r"(is|are) kept as (it is|they are)"):
        export(file, out, rank=2)
    found = load_file(out)
    assert found["lora_unet_a.lora_down.weight"].shape == (2, 10)
    for key, tensor in BESIDE[kind].items():
        assert found[key].dtype == tensor.dtype
        assert found[key].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    with pytest.raises(MatryoshkaError, match="leave the style as it is"):
        export(file, tmp_path / "other.safetensors", rank=2, style="diffusers")
    assert not (tmp_path / "other.safetensors").exists()


def test_each_tensor_is_aligned(tmp_path: Path) -> None:
    """Readers that map a file into memory need it: a tensor of 4 bytes after an odd number of 2 bytes would not be."""
    state = {k: t.bfloat16() for k, t in {**pair("lora_unet_a", 3, 5, 7), **pair("lora_unet_b", 1, 3, 3)}.items()}
    save_file(state, tmp_path / "lora.safetensors")
    reorder(tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    data = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    sizes = {"F32": 4, "BF16": 2}
    for key, entry in json.loads(data[8 : 8 + length]).items():
        assert key == "__metadata__" or entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_dtypes_may_differ_by_layer(tmp_path: Path) -> None:
    half = {k: t.half() for k, t in pair("lora_unet_a").items()}
    save_file({**half, **pair("lora_unet_b", seed=1)}, tmp_path / "lora.safetensors")
    export(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", rank=2)
    found = load_file(tmp_path / "out.safetensors")
    assert found["lora_unet_a.lora_up.weight"].dtype == torch.float16
    assert found["lora_unet_b.lora_up.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "ending", "message"),
    [
        ("transformer_blocks.0.attn.to_q", ".lora_down.weight", "which part of a pipeline"),
        ("blocks.0.to_q_lora", ".down.weight", "which part of a pipeline"),
        ("double_blocks.0.processor.qkv_lora1", ".down.weight", "XLabs'"),
        ("diffusion_model.double_blocks.0.processor.qkv_lora1", ".down.weight", "XLabs'"),
    ],
)
def test_diffusers_would_not_find_it(tmp_path: Path, name: str, ending: str, message: str) -> None:
    state = {f"{name}{ending}": torch.randn(2, 6), f"{name}{ending.replace('down', 'up')}": torch.randn(6, 2)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match=f"{message}.*leave the style as it is"):
        export(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", style="diffusers")
    assert not (tmp_path / "out.safetensors").exists()


PARTS = ("transformer", "transformer_2", "transformer_ref", "connectors", "text_conditioner", "prior")


def of_parts(file: Path, parts: tuple[str, ...]) -> Path:
    state, metadata = {}, {}
    for alpha, part in enumerate(parts, 1):
        state |= {key.replace("down", "A").replace("up", "B"): t for key, t in pair(f"{part}.to_q").items()}
        del state[f"{part}.to_q.alpha"]
        metadata |= {f"{part}.{key}": value for key, value in {"r": 6, "lora_alpha": 6 * alpha}.items()}
    save_file(state, file, {"lora_adapter_metadata": json.dumps(metadata)})
    return file


def test_every_part_of_diffusers_has_its_own_scale(tmp_path: Path) -> None:
    file = of_parts(tmp_path / "lora.safetensors", PARTS)
    assert {layer.name: layer.scale for layer in open_file(file).layers} == {
        f"{part}.to_q": scale for scale, part in enumerate(PARTS, 1)
    }
    export(file, tmp_path / "cut.safetensors", rank=2)
    assert {layer.scale for layer in open_file(tmp_path / "cut.safetensors").layers} == {1.0}
    with pytest.raises(MatryoshkaError, match="kohya's style has no name for the connectors"):
        export(of_parts(file, ("connectors",)), tmp_path / "kohya.safetensors", style="kohya")


def test_every_part_of_diffusers_is_known() -> None:
    pipelines = pytest.importorskip("diffusers.loaders.lora_pipeline")
    mixins = [kind for kind in vars(pipelines).values() if hasattr(kind, "_lora_loadable_modules")]
    assert {part for kind in mixins for part in kind._lora_loadable_modules} <= set(PIPELINE_PARTS)


def test_a_scale_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match=r"no r and lora_alpha for 'later\.r', which names no part"):
        open_file(of_parts(tmp_path / "lora.safetensors", ("later",)))
    file = of_parts(tmp_path / "lora.safetensors", ("unet", "prior"))
    state = load_file(file)
    save_file(state, file, {"lora_adapter_metadata": json.dumps({"unet.r": 6, "unet.lora_alpha": 6, "prior.r": 6})})
    with pytest.raises(MatryoshkaError, match="no r and lora_alpha for prior"):
        open_file(file)


def test_an_update_too_small_for_its_dtype_is_refused(tmp_path: Path) -> None:
    """Its alpha of 1e-9 is no part of the factors, and goes into them: in halves they would be zeros."""
    state = pair("lora_unet_a")
    state["lora_unet_a.lora_down.weight"] = (state["lora_unet_a.lora_down.weight"] * 1e-3).half()
    state["lora_unet_a.lora_up.weight"] = (state["lora_unet_a.lora_up.weight"] * 1e-3).half()
    state["lora_unet_a.alpha"] = torch.tensor(1e-9)
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match="save the file in fp32"):
        export(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors"]


def test_a_file_that_is_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(pair("lora_unet_a"), file)
    opened = open_file(file)
    save_file(pair("lora_unet_a", seed=1), tmp_path / "new.safetensors")
    os.utime(tmp_path / "new.safetensors", ns=(1, 1))  # clocks of file systems have coarse steps
    (tmp_path / "new.safetensors").replace(file)
    with pytest.raises(MatryoshkaError, match="replaced while it was read"):
        opened.factors(opened.layers[0])


def test_jobs_come_in_order_and_few_are_ahead() -> None:
    begun, most, lock = [0], [0], threading.Lock()

    def job(number: int) -> Callable[[], int]:
        def run_it() -> int:
            with lock:
                begun[0] += 1
            return number

        return run_it

    before = torch.get_num_threads()
    with in_order([job(n) for n in range(50)]) as take:
        for number in range(50):
            assert take() == number
            most[0] = max(most[0], begun[0] - number)
    assert most[0] <= 6
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), in_order([lambda: 1 // 0]) as failing:
        failing()
    assert torch.get_num_threads() == before


MEMORY = """
import resource, sys
import torch
from matryoshka_lora import export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(sys.argv[1], sys.argv[2], rank=1)
export(sys.argv[1], sys.argv[2], keep="50%", overwrite=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_few_layers_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """A file of 120 layers of 0.5 MB: less than half of it is needed, work space included, for all that is done."""
    state = {}
    for number in range(120):
        state |= pair(f"lora_unet_{number}_a", 16, 4096, 4096, number)
    save_file(state, tmp_path / "lora.safetensors")
    size = (tmp_path / "lora.safetensors").stat().st_size
    assert size > 60e6
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "lora.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) * 1024 < size / 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({**pair("lora_unet_a"), **pair("lora_unet_b", 4, 9, 7, 1)}, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_the_commands(run: Run, file: Path, tmp_path: Path) -> None:  # noqa: F811
    code, told, _ = run("info", file)
    assert code == 0
    assert "a LoRA in one file" in told
    assert re.search(r"--keep 95%\s+\d to \d", told)
    small = tmp_path / "small.safetensors"
    code, told, _ = run("export", file, "--rank", 2, "-o", small)
    assert code == 0
    assert "66 of 172 parameters" not in told
    assert f"{2 * (10 + 8) + 2 * (9 + 7)} of {6 * 18 + 4 * 16} parameters (ranks from 2 to 2" in told
    with safe_open(small, framework="pt") as opened:
        assert '"did": "rank 2"' in opened.metadata()["matryoshka_lora"]
    assert_explained(run("export", file, "--rank", 2, "-o", small), "--force")
    assert run("export", file, "--keep", "sv_ratio=3", "-o", small, "--force")[0] == 0
    assert run("export", file, "--max-bytes", "1.5kB", "-o", small, "--force")[0] == 0
    assert small.stat().st_size <= 1500
    assert_explained(run("export", file, "--keep", "most", "-o", small, "--force"), "write a share such as 95%")
    assert_explained(run("export", file, "-o", tmp_path / "x.safetensors"), "give a rank")
    assert_explained(run("info", tmp_path / "none.safetensors"), "no such file")
    code, told, _ = run("reorder", file, "-o", tmp_path / "ordered.safetensors")
    assert code == 0
    assert "its directions are in order" in told
    assert run("info", small)[1].startswith(f"{small} is a LoRA in one file, made by this package: max_bytes 1500")


def test_the_picture(run: Run, file: Path, tmp_path: Path) -> None:  # noqa: F811
    assert run("info", file, "--plot", tmp_path / "decay.png")[0] == 0
    assert (tmp_path / "decay.png").read_bytes().startswith(b"\x89PNG")
