"""LoHa and LoKr in single files: every rank is the closest LoRA to LyCORIS's dense update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.plain_peft import best
from helpers.single_files import read_ranks, read_updates
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka_lora import combine, export, info, reorder
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.formats.single_file import read

NAME = "lora_unet_mid_block_attn"
OTHER_PAIR = {
    "lora_unet_other.lora_down.weight": torch.ones(2, 3),
    "lora_unet_other.lora_up.weight": torch.ones(4, 2),
}


class Case(NamedTuple):
    """A layer: the shapes of its matrices, its alpha, the rank that divides it, its exact rank."""

    shapes: dict[str, tuple[int, ...]]
    alpha: float | None
    alpha_rank: float
    rank: int
    kernel: tuple[int, ...] = ()


def loha(a: tuple[int, ...], b: tuple[int, ...], **cores: tuple[int, ...]) -> dict[str, Any]:
    pairs = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    return pairs | {f"hada_{name}": shape for name, shape in cores.items()}


CASES = {
    "LoHa": Case(loha((20, 3), (3, 16)), 2.0, 3, 9),
    "LoHa, wide rank": Case(loha((12, 5), (5, 30)), 5.0, 5, 12),
    "LoHa, wide rank, tall": Case(loha((30, 5), (5, 12)), 5.0, 5, 12),
    "LoHa, negative alpha": Case(loha((20, 2), (2, 16)), -1.0, 2, 4),
    "LoHa, no alpha": Case(loha((20, 2), (2, 16)), None, 1, 4),
    "LoHa, convolution": Case(loha((20, 2), (2, 5 * 9)), 1.0, 2, 4),
    "LoHa, Tucker": Case(
        loha((3, 20), (3, 6), t1=(3, 3, 3, 3), t2=(3, 3, 3, 3)), 2.0, 3, 9, kernel=(3, 3)
    ),
    "LoKr": Case({"lokr_w1": (4, 4), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 6)}, 1.0, 2, 8),
    "LoKr, factors": Case(
        {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (5, 3), "lokr_w2_b": (3, 6)},
        2.0,
        3,
        6,
    ),
    "LoKr, factors of the first": Case(
        {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 4), "lokr_w2": (3, 2)}, 1.0, 2, 4
    ),
    "LoKr, full": Case({"lokr_w1": (4, 3), "lokr_w2": (5, 6)}, 7.0, 7, 15),
    "LoKr, negative alpha": Case(
        {"lokr_w1": (4, 4), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 6)}, -3.0, 2, 8
    ),
    "LoKr, convolution": Case(
        {"lokr_w1": (4, 3), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 2 * 9)}, 1.0, 2, 6
    ),
    "LoKr, full convolution": Case(
        {"lokr_w1": (4, 2), "lokr_w2": (5, 3, 3, 3)}, None, 1, 10, kernel=(3, 3)
    ),
    "LoKr, Tucker": Case(
        {"lokr_w1": (4, 2), "lokr_w2_a": (2, 5), "lokr_w2_b": (2, 3), "lokr_t2": (2, 2, 3, 3)},
        1.0,
        2,
        4,
        kernel=(3, 3),
    ),
}


def save_case(case: Case, file: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write a file of one layer, and return its matrices."""
    generator = torch.Generator().manual_seed(0)
    matrices = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in case.shapes.items()
    }
    tensors = {f"{NAME}.{name}": matrix for name, matrix in matrices.items()}
    if case.alpha is not None:
        tensors[f"{NAME}.alpha"] = torch.tensor(case.alpha)
    save_file(tensors, file)
    return matrices


def dense_update(case: Case, matrices: dict[str, Tensor]) -> np.ndarray:
    """Return the dense update, (out, in); kernels are flattened."""
    scale = 1.0 if case.alpha is None else case.alpha / case.alpha_rank
    arrays = {name: matrix.double().numpy() for name, matrix in matrices.items()}
    kind = "hada" if "hada_w1_a" in arrays else "lokr"
    products: list[np.ndarray] = []
    for number in (1, 2):
        if f"{kind}_w{number}" in arrays:
            products.append(arrays[f"{kind}_w{number}"])
            continue
        a, b = arrays[f"{kind}_w{number}_a"], arrays[f"{kind}_w{number}_b"]
        core = arrays.get(f"{kind}_t{number}")
        products.append(a @ b if core is None else np.einsum("ijkl,jr,ip->prkl", core, b, a))
    first, second = products
    if kind == "hada":
        update = first * second
    else:
        update = np.kron(first.reshape(first.shape + (1,) * (second.ndim - 2)), second)
    return scale * update.reshape(len(update), -1)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_is_the_closest_lora(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    source = tmp_path / "lycoris.safetensors"
    update = dense_update(case, save_case(case, source))
    assert np.linalg.matrix_rank(update) == case.rank
    norm = np.linalg.norm(update)
    for rank in range(1, case.rank + 1):
        output = tmp_path / f"{rank}.safetensors"
        result = export(source, output, rank)
        assert read_ranks(output) == {NAME: rank}
        written = read_updates(output)[NAME]
        optimal_error = np.linalg.norm(best(update, rank) - update) / norm
        error = np.linalg.norm(written - update) / norm
        assert error == pytest.approx(optimal_error, abs=1e-6)
        assert result.errors[rank] == pytest.approx(optimal_error, abs=1e-6)
        assert load_file(output)[f"{NAME}.lora_down.weight"].shape[2:] == case.kernel
    result = export(source, tmp_path / "half.safetensors", error=0.5)
    assert result.errors[max(result.errors)] <= 0.5
    errors = info(source).errors
    assert errors[1] == pytest.approx(np.linalg.norm(best(update, 1) - update) / norm, abs=1e-6)
    reorder(source, tmp_path / "exact.safetensors")
    exact = read_updates(tmp_path / "exact.safetensors")[NAME]
    assert np.linalg.norm(exact - update) < 1e-6 * norm


@pytest.mark.parametrize("name", ["LoHa", "LoKr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_dtype_is_kept(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    source, output = tmp_path / "lycoris.safetensors", tmp_path / "lora.safetensors"
    update = dense_update(case, save_case(case, source, dtype))
    export(source, output, case.rank)
    expected_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    assert load_file(output)[f"{NAME}.lora_up.weight"].dtype == expected_dtype
    error = np.linalg.norm(read_updates(output)[NAME] - update)
    assert error < 1e-2 * np.linalg.norm(update)


LYCORIS_MODULES: dict[str, Callable[[Any], Any]] = {
    "LoHa": lambda lycoris: lycoris.LohaModule(NAME, nn.Linear(24, 40), lora_dim=3, alpha=2),
    "LoHa, convolution": lambda lycoris: lycoris.LohaModule(
        NAME, nn.Conv2d(6, 20, 3), lora_dim=3, alpha=2
    ),
    "LoHa, Tucker": lambda lycoris: lycoris.LohaModule(
        NAME, nn.Conv2d(6, 20, 3), lora_dim=3, alpha=2, use_tucker=True
    ),
    "LoKr": lambda lycoris: lycoris.LokrModule(
        NAME, nn.Linear(24, 40), lora_dim=2, alpha=1, factor=4
    ),
    "LoKr, factors": lambda lycoris: lycoris.LokrModule(
        NAME, nn.Linear(144, 96), lora_dim=2, alpha=1, decompose_both=True
    ),
    "LoKr, full": lambda lycoris: lycoris.LokrModule(
        NAME, nn.Linear(24, 40), lora_dim=2, alpha=1, factor=4, full_matrix=True
    ),
    "LoKr, convolution": lambda lycoris: lycoris.LokrModule(
        NAME, nn.Conv2d(24, 40, 3), lora_dim=2, alpha=1, factor=4
    ),
    "LoKr, Tucker": lambda lycoris: lycoris.LokrModule(
        NAME, nn.Conv2d(24, 40, 3), lora_dim=2, alpha=1, factor=4, use_tucker=True
    ),
}


@pytest.mark.parametrize("name", LYCORIS_MODULES)
def test_the_update_is_that_of_lycoris(tmp_path: Path, name: str) -> None:
    lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    torch.manual_seed(0)
    module = LYCORIS_MODULES[name](lycoris)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    tensors = {
        f"{NAME}.{key}": tensor.detach().clone().contiguous()
        for key, tensor in module.state_dict().items()
        if key in module.weight_list
    }
    source = tmp_path / "lycoris.safetensors"
    save_file(tensors, source)
    update = module.get_weight(module.shape).detach().double().flatten(1).numpy()
    for rank in (1, 3, read(source).max_rank):
        export(source, tmp_path / f"{rank}.safetensors", rank)
        written = read_updates(tmp_path / f"{rank}.safetensors")[NAME]
        norm = np.linalg.norm(update)
        optimal_error = np.linalg.norm(best(update, rank) - update) / norm
        assert np.linalg.norm(written - update) / norm == pytest.approx(optimal_error, abs=1e-6)


def test_layers_of_lora_and_lokr_in_one_file_get_one_rank(tmp_path: Path) -> None:
    source, output = tmp_path / "mixed.safetensors", tmp_path / "small.safetensors"
    save_case(CASES["LoKr"], source)
    save_file({**load_file(source), **OTHER_PAIR}, source, {"ss_network_module": "lycoris.kohya"})
    result = export(source, output, 2)
    assert read_ranks(output) == {NAME: 2, "lora_unet_other": 2}
    assert any("LoKr" in note for note in result.notes)
    assert read(output).metadata["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("extra", ["dora_scale", "alpha"])
def test_layers_that_cannot_be_converted_are_copied(tmp_path: Path, extra: str) -> None:
    """DoRA, and an alpha of 0, which LyCORIS and ComfyUI read in two ways."""
    source, output = tmp_path / "mixed.safetensors", tmp_path / "small.safetensors"
    save_case(CASES["LoKr"], source)
    others = {**load_file(source), f"{NAME}.{extra}": torch.zeros(())}
    save_file({**others, **OTHER_PAIR}, source)
    export(source, output, 1)
    written = load_file(output)
    for key, tensor in others.items():
        assert torch.equal(written[key], tensor)


@pytest.mark.parametrize(
    "changes",
    [
        {"hada_w2_b": torch.ones(3, 17)},
        {"hada_w2_b": torch.ones(2, 16)},
        {"hada_w2_b": None},
        {"hada_t1": torch.ones(3, 2, 3, 3)},
        {"hada_w1_a": torch.ones(20, 3, dtype=torch.int32)},
    ],
    ids=["inputs", "rank", "missing", "core", "dtype"],
)
def test_matrices_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Tensor | None]
) -> None:
    source = tmp_path / "lycoris.safetensors"
    save_case(CASES["LoHa"], source)
    tensors = load_file(source)
    for name, tensor in changes.items():
        tensors.pop(f"{NAME}.{name}", None)
        if tensor is not None:
            tensors[f"{NAME}.{name}"] = tensor
    save_file(tensors, source)
    with pytest.raises(MatryoshkaError, match="fit"):
        read(source)


def test_a_product_of_any_size_is_refused(tmp_path: Path) -> None:
    """A file of a few kilobytes would become one of gigabytes."""
    column = torch.ones(2**11, 1)
    save_file({"a.lokr_w1": column, "a.lokr_w2": column.clone()}, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match="fit"):
        read(tmp_path / "lora.safetensors")


def test_full_matrices_of_peft_are_refused(tmp_path: Path) -> None:
    """PEFT multiplies them by alpha / r, and the file contains neither."""
    matrices = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}
    tensors = {f"base_model.model.a.{name}": matrix for name, matrix in matrices.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    for alpha in (None, 2):
        with pytest.raises(MatryoshkaError, match="lokr"):
            read(tmp_path / "lora.safetensors", alpha)


@pytest.mark.parametrize("name", ["LoHa", "LoKr"])
def test_a_layer_before_training_is_zero(tmp_path: Path, name: str) -> None:
    source, output = tmp_path / "lycoris.safetensors", tmp_path / "lora.safetensors"
    matrices = save_case(CASES[name], source)
    tensors = load_file(source)
    tensors[f"{NAME}.{max(matrices)}"].zero_()
    save_file(tensors, source)
    assert set(export(source, output, 2).errors.values()) == {0.0}
    assert not read_updates(output)[NAME].any()


@pytest.mark.parametrize("name", ["LoHa", "LoKr"])
def test_matrices_that_are_not_finite_are_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / "lycoris.safetensors"
    matrices = save_case(CASES[name], source)
    tensors = load_file(source)
    tensors[f"{NAME}.{max(matrices)}"][0, 0] = float("nan")
    save_file(tensors, source)
    with pytest.raises(NotFiniteError):
        export(source, tmp_path / "small.safetensors", 1)


def test_two_kinds_of_one_module_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "lycoris.safetensors"
    save_case(CASES["LoKr"], source)
    pair = {
        f"{NAME}.lora_down.weight": torch.ones(2, 3),
        f"{NAME}.lora_up.weight": torch.ones(4, 2),
    }
    save_file({**load_file(source), **pair}, source)
    with pytest.raises(MatryoshkaError, match="LoKr"):
        read(source)


def test_keys_alone_cannot_be_converted(tmp_path: Path) -> None:
    """That would write LoRA of the full rank, which is a large file."""
    source = tmp_path / "lycoris.safetensors"
    save_case(CASES["LoKr"], source)
    tensors = {key.replace(NAME, "unet.mid.attn"): t for key, t in load_file(source).items()}
    save_file(tensors, source)
    with pytest.raises(MatryoshkaError, match="rank"):
        export(source, tmp_path / "kohya.safetensors", key_format="kohya")


def save_with_matrices(file: Path, kind: str, name: str) -> np.ndarray:
    """Write a layer of 24 x 12 of LoHa or LoKr, and return its dense update."""
    torch.manual_seed(0)
    if kind == "LoKr":
        w1, w2 = torch.randn(4, 3), torch.randn(6, 4)
        save_file({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, file)
        return np.kron(w1.double().numpy(), w2.double().numpy())
    matrices = {"w1_a": (24, 2), "w1_b": (2, 12), "w2_a": (24, 2), "w2_b": (2, 12)}
    tensors = {f"{name}.hada_{key}": torch.randn(shape) for key, shape in matrices.items()}
    save_file(tensors, file)
    B1, A1, B2, A2 = (tensor.double().numpy() for tensor in tensors.values())
    return np.asarray((B1 @ A1) * (B2 @ A2))


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
@pytest.mark.parametrize(
    ("options", "factor", "rank"),
    [
        ({"scale": {"*": 0.5}, "rank": 4}, 0.5, 4),
        ({"scale": {"*": -2.0}, "rank": 3}, -2.0, 3),
        ({"dtype": "fp16", "rank": 3}, 1.0, 3),
    ],
    ids=str,
)
def test_all_options_of_export_see_the_update(
    tmp_path: Path, kind: str, options: dict[str, Any], factor: float, rank: int
) -> None:
    file, output = tmp_path / "lycoris.safetensors", tmp_path / "lora.safetensors"
    dense = factor * save_with_matrices(file, kind, NAME)
    expected = best(dense, rank)
    result = export(file, output, **options)
    (update,) = read_updates(output).values()
    tolerance = 1e-2 if "dtype" in options else 1e-5
    assert np.linalg.norm(update - expected) < tolerance * np.linalg.norm(expected)
    (error,) = result.errors.values()
    relative_error = np.linalg.norm(expected - dense) / np.linalg.norm(dense)
    assert error == pytest.approx(relative_error, abs=1e-5)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_another_key_format_and_a_sum_see_the_update(tmp_path: Path, kind: str) -> None:
    """The halves of this layer are swapped in the other format."""
    file, output = tmp_path / "lycoris.safetensors", tmp_path / "lora.safetensors"
    name = "joint_blocks_23_context_block_adaLN_modulation_1"
    dense = save_with_matrices(file, kind, f"lora_unet_{name}")
    swapped = np.roll(dense, 12, axis=0)
    export(file, output, 4 if kind == "LoHa" else 12, key_format="diffusers")
    ((new_name, update),) = read_updates(output).items()
    assert new_name == "transformer.transformer_blocks.23.norm1_context.linear"
    np.testing.assert_allclose(update, swapped, atol=1e-4)
    combine([output, file], tmp_path / "sum.safetensors", [1.0, -3.0], rank="sum")
    (update,) = read_updates(tmp_path / "sum.safetensors").values()
    np.testing.assert_allclose(update, -2 * swapped, atol=1e-4)
