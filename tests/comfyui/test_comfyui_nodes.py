"""The nodes in a real ComfyUI, through its HTTP interface (`make test-comfyui`).

COMFYUI_PATH is a checkout of ComfyUI, and COMFYUI_PYTHON an interpreter with its requirements.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.comfyui_server import ROOT, ComfyServer, Graph, node, to_graph
from helpers.layers import best_matrix
from PIL import Image
from safetensors.numpy import load_file, save_file

COMFYUI = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON", "")
MODELS_SCRIPT = Path(__file__).parents[1] / "helpers/comfyui_models.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (COMFYUI and PYTHON), reason="set COMFYUI_PATH and COMFYUI_PYTHON to a ComfyUI"
    ),
]

Tensors = dict[str, np.ndarray]

RANK = 6
WAN_SHAPES = {
    "blocks.0.self_attn.q": (128, 128),
    "blocks.0.ffn.0": (256, 128),
    "blocks.1.cross_attn.v": (128, 128),
    "patch_embedding": (128, 16, 1, 2, 2),  # a convolution
}
# The layers of Stable Diffusion 3 that both key formats have, by their names in kohya's format.
FUSED_LAYER = "joint_blocks.0.x_block.attn.qkv"
SPLIT_LAYERS = ["to_q", "to_k", "to_v"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    server = ComfyServer(PYTHON, Path(COMFYUI).resolve(), tmp_path_factory.mktemp("comfyui"))
    try:
        command = [PYTHON, str(MODELS_SCRIPT), str(server.models.parent)]
        subprocess.run(command, cwd=COMFYUI, check=True, capture_output=True)
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.checkpoints)  # 300 MB


def random_pair(
    generator: np.random.Generator, shape: tuple[int, ...], rank: int = RANK
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of a layer whose weight has a shape."""
    A = generator.standard_normal((rank, *shape[1:]), dtype=np.float32) / 10
    B = generator.standard_normal((shape[0], rank, *[1] * (len(shape) - 2)), dtype=np.float32)
    scales = 0.6 ** np.arange(rank, dtype=np.float32)
    return A, B * scales.reshape(1, rank, *[1] * (len(shape) - 2)) / 10


def dense(A: np.ndarray, B: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Return the update of a layer as a matrix."""
    return scale * (B.reshape(len(B), -1).astype(float) @ A.reshape(len(A), -1).astype(float))


def write_kohya(file: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    """Write a LoRA with kohya's keys and an alpha of RANK / 2, and return its dense updates."""
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    updates: Tensors = {}
    for name, shape in shapes.items():
        A, B = random_pair(generator, shape)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = A, B
        tensors[f"{key}.alpha"] = np.array(RANK / 2, dtype=np.float32)
        updates[name] = dense(A, B, 0.5)
    save_file(tensors, file)
    return updates


def load_model(name: str) -> Graph:
    return {
        "model": node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default"),
    }


def with_lora(graph: Graph, file: str, strength: float, node_id: str, after: str) -> Graph:
    loader = node(
        "LoraLoaderModelOnly",
        model=[after, 0],
        lora_name=f"{file}.safetensors",
        strength_model=strength,
    )
    return {**graph, node_id: loader}


def loaded_weights(server: ComfyServer, model: str, file: str, strength: float = 1.0) -> Tensors:
    """Return the weights of a model with a LoRA, as ComfyUI's own nodes compute them."""
    graph = with_lora(load_model(model), file, strength, "lora", "model")
    return server.weights_of(graph, ["lora", 0], f"loaded-{file}")


def base_weights(server: ComfyServer, model: str) -> Tensors:
    return load_file(server.models / f"{model}.safetensors")


def assert_changed_by(
    weights: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], updates: Mapping[str, Any]
) -> None:
    """Assert that the weights are the base weights plus updates, and the others unchanged."""
    assert weights.keys() == base.keys()
    for key, weight in weights.items():
        expected = base[key].astype(float)
        update = updates.get(key.removesuffix(".weight"))
        if update is None:
            np.testing.assert_array_equal(weight, base[key], err_msg=key)
        else:
            expected = expected + update.reshape(expected.shape)
            np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6, err_msg=key)


def shrink(file: str, by: str, filename: str, **inputs: Any) -> Graph:
    values = {"error_percent": 10.0, "rank": 3, "megabytes": 1.0, "overwrite": False, **inputs}
    return {
        "shrink": node(
            "MatryoshkaShrinkLora",
            lora_name=f"{file}.safetensors",
            by=by,
            filename=filename,
            **values,
        )
    }


def save_stack(graph: Graph, after: str, filename: str, **inputs: Any) -> Graph:
    values = {"rank": 0, "dtype": "fp32", "overwrite": False, **inputs}
    stack = node("MatryoshkaSaveLoraStack", model=[after, 0], filename=filename, **values)
    return {**graph, "stack": stack}


def combine(first: str, weight_1: float, second: str, weight_2: float, filename: str) -> Graph:
    return {
        "combine": node(
            "MatryoshkaCombineLoras",
            lora_name_1=f"{first}.safetensors",
            weight_1=weight_1,
            lora_name_2=f"{second}.safetensors",
            weight_2=weight_2,
            rank=0,
            filename=filename,
            overwrite=False,
        )
    }


def load_at_rank(file: str, rank: Any, strength: float = 1.0) -> Graph:
    loader = node(
        "MatryoshkaLoadLoraAtRank",
        model=["model", 0],
        lora_name=f"{file}.safetensors",
        rank=rank,
        strength_model=strength,
        strength_clip=1.0,
    )
    return {**load_model("wan"), "lora": loader}


# MatryoshkaShrinkLora


def test_shrink_by_rank_is_the_closest_lora(server: ComfyServer) -> None:
    updates = write_kohya(server.loras / "big.safetensors", WAN_SHAPES, seed=0)
    text = server.text_of(shrink("big", "rank", "by-rank", rank=2), "shrink")
    weights = loaded_weights(server, "wan", "by-rank", strength=0.7)
    expected = {name: 0.7 * best_matrix(update, 2) for name, update in updates.items()}
    assert_changed_by(weights, base_weights(server, "wan"), expected)
    assert "rank 2" in text


def test_shrink_by_error_reaches_the_error_that_it_shows(server: ComfyServer) -> None:
    updates = write_kohya(server.loras / "source.safetensors", WAN_SHAPES, seed=1)
    graph = shrink("source", "error", "folder/by-error.safetensors", error_percent=20.0)
    text = server.text_of(graph, "shrink")
    weights = loaded_weights(server, "wan", "folder/by-error")
    base = base_weights(server, "wan")
    missing = total = 0.0
    for name, update in updates.items():
        change = (weights[f"{name}.weight"] - base[f"{name}.weight"]).reshape(update.shape)
        missing += float(((update - change) ** 2).sum())
        total += float((update**2).sum())
    error = (missing / total) ** 0.5
    assert 0.1 < error <= 0.2
    shown_error = re.search(r"error ([\d.]+)%", text)
    assert shown_error
    assert float(shown_error[1]) == pytest.approx(100 * error, abs=0.01)


def test_shrink_by_megabytes_fits(server: ComfyServer) -> None:
    write_kohya(server.loras / "large.safetensors", WAN_SHAPES, seed=2)
    server.text_of(shrink("large", "megabytes", "by-size", megabytes=0.02), "shrink")
    sizes = [
        (server.loras / name).stat().st_size
        for name in ("large.safetensors", "by-size.safetensors")
    ]
    assert sizes[0] > 20_000 >= sizes[1]


# MatryoshkaCombineLoras


def test_combine_is_the_weighted_sum(server: ComfyServer) -> None:
    first = write_kohya(server.loras / "first.safetensors", WAN_SHAPES, seed=3)
    shapes = {name: WAN_SHAPES[name] for name in ("blocks.0.self_attn.q", "patch_embedding")}
    second = write_kohya(server.loras / "second.safetensors", shapes, seed=4)
    graph = combine("first", 0.5, "second", -2.0, "sum")
    text = server.text_of(graph, "combine")
    expected = {name: 0.5 * update - 2.0 * second.get(name, 0) for name, update in first.items()}
    assert_changed_by(loaded_weights(server, "wan", "sum"), base_weights(server, "wan"), expected)
    assert "error 0.00%" in text

    third = write_kohya(server.loras / "third.safetensors", WAN_SHAPES, seed=18)
    server.text_of(combine("sum", 1.0, "third", 0.3, "sum-of-three"), "combine")
    assert_changed_by(
        loaded_weights(server, "wan", "sum-of-three"),
        base_weights(server, "wan"),
        {name: update + 0.3 * third[name] for name, update in expected.items()},
    )

    graph["combine"]["inputs"] |= {"rank": 3, "overwrite": True}
    server.text_of(graph, "combine")
    expected = {name: best_matrix(update, 3) for name, update in expected.items()}
    assert_changed_by(loaded_weights(server, "wan", "sum"), base_weights(server, "wan"), expected)


def test_the_page_shows_that_a_sum_is_zero(server: ComfyServer) -> None:
    write_kohya(server.loras / "own-opposite.safetensors", WAN_SHAPES, seed=29)
    graph = combine("own-opposite", 1.0, "own-opposite", -1.0, "zero")
    assert "zero" in server.text_of(graph, "combine").replace("zero.safetensors", "")


def test_an_alpha_in_the_metadata_is_ignored_as_in_loaders(server: ComfyServer) -> None:
    """diffusers writes it there. The nodes save what ComfyUI's own loader does with the file."""
    generator = np.random.default_rng(8)
    tensors: Tensors = {}
    config: dict[str, Any] = {"transformer.r": RANK, "transformer.lora_alpha": 1.5}
    for name in ("blocks.0.self_attn.q", "blocks.0.ffn.0"):
        A, B = random_pair(generator, WAN_SHAPES[name])
        key = f"diffusion_model.{name}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, server.loras / "metadata.safetensors", metadata)
    expected = loaded_weights(server, "wan", "metadata")
    server.text_of(combine("metadata", 0.5, "metadata", 0.5, "whole"), "combine")
    weights = loaded_weights(server, "wan", "whole")
    for key, weight in expected.items():
        np.testing.assert_allclose(weights[key], weight, atol=2e-3)
    graph = load_at_rank("metadata", RANK)
    weights = server.weights_of(graph, ["lora", 0], "loaded-at-rank")
    for key, weight in expected.items():
        np.testing.assert_allclose(weights[key], weight, atol=2e-3)


# MatryoshkaSaveLoraStack


def write_sd3_loras(server: ComfyServer) -> tuple[Tensors, Tensors]:
    """Write a LoRA with kohya's fused names and one with diffusers' split names."""
    shapes = {FUSED_LAYER: (384, 128), "joint_blocks.1.x_block.mlp.fc1": (512, 128)}
    fused = write_kohya(server.loras / "fused.safetensors", shapes, seed=5)
    generator = np.random.default_rng(6)
    tensors: Tensors = {}
    parts: list[np.ndarray] = []
    for name in SPLIT_LAYERS:
        A, B = random_pair(generator, (128, 128), rank=4)
        key = f"transformer.transformer_blocks.0.attn.{name}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
        parts.append(dense(A, B))
    # diffusers has the scale before the shift, the authors of the model after it.
    A, B = random_pair(generator, (256, 128), rank=4)
    key = "transformer.transformer_blocks.1.norm1_context.linear"
    tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
    swapped = np.roll(dense(A, B), 128, axis=0)
    save_file(tensors, server.loras / "split.safetensors")
    split = {
        FUSED_LAYER: np.concatenate(parts),
        "joint_blocks.1.context_block.adaLN_modulation.1": swapped,
    }
    return fused, split


@pytest.mark.parametrize("rank", [0, 4])
def test_stack_of_fused_and_split_loras_is_one_file(server: ComfyServer, rank: int) -> None:
    fused, split = write_sd3_loras(server)
    graph = with_lora(load_model("sd3"), "fused", 0.8, "first", "model")
    graph = with_lora(graph, "split", -0.5, "second", "first")
    text = server.text_of(save_stack(graph, "second", f"stack-{rank}", rank=rank), "stack")
    updates = {
        name: 0.8 * fused.get(name, 0) - 0.5 * split.get(name, 0) for name in {*fused, *split}
    }
    expected = {name: best_matrix(update, rank) for name, update in updates.items()}
    base = base_weights(server, "sd3")
    weights = loaded_weights(server, "sd3", f"stack-{rank}")
    assert_changed_by(weights, base, expected if rank else updates)
    if not rank:
        # The sum of the fused layer has rank 6 + 3 x 4, and the others need less.
        assert "rank 4 to 18" in text
        stacked = server.weights_of(graph, ["second", 0], "stacked")
        for key, weight in stacked.items():
            np.testing.assert_allclose(weights[key], weight, rtol=0, atol=1e-6, err_msg=key)


def write_other_kinds(file: Path) -> None:
    """Write LoCon, LoHa, LoKr and a bias, with the keys of LyCORIS."""
    generator = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32) / 5

    alpha = np.array(2, dtype=np.float32)
    save_file(
        {
            "lora_unet_blocks_0_self_attn_q.hada_w1_a": random(128, 3),
            "lora_unet_blocks_0_self_attn_q.hada_w1_b": random(3, 128),
            "lora_unet_blocks_0_self_attn_q.hada_w2_a": random(128, 3),
            "lora_unet_blocks_0_self_attn_q.hada_w2_b": random(3, 128),
            "lora_unet_blocks_0_self_attn_q.alpha": alpha,
            "lora_unet_blocks_0_self_attn_k.lokr_w1": random(4, 8),
            "lora_unet_blocks_0_self_attn_k.lokr_w2_a": random(32, 2),
            "lora_unet_blocks_0_self_attn_k.lokr_w2_b": random(2, 16),
            "lora_unet_blocks_0_self_attn_k.alpha": alpha,
            "lora_unet_blocks_0_ffn_0.lokr_w1_a": random(16, 2),
            "lora_unet_blocks_0_ffn_0.lokr_w1_b": random(2, 8),
            "lora_unet_blocks_0_ffn_0.lokr_w2": random(16, 16),
            "lora_unet_blocks_0_ffn_0.alpha": alpha,
            "diffusion_model.blocks.0.ffn.2.diff_b": random(128),
            "diffusion_model.blocks.0.norm3.diff": random(128),
        },
        file,
    )


def test_stack_of_other_kinds_is_what_comfyui_computes(server: ComfyServer) -> None:
    write_other_kinds(server.loras / "kinds.safetensors")
    write_kohya(server.loras / "plain.safetensors", WAN_SHAPES, seed=8)
    graph = with_lora(load_model("wan"), "kinds", 0.6, "first", "model")
    graph = with_lora(graph, "plain", -1.5, "second", "first")
    graph = with_lora(graph, "kinds", 0.3, "third", "second")
    text = server.text_of(save_stack(graph, "third", "all-kinds"), "stack")
    # The file has the ranks of the sum, in which the LoRA that is applied twice counts once.
    assert "rank 6 to 38" in text
    expected = server.weights_of(graph, ["third", 0], "expected")
    base = base_weights(server, "wan")
    changed = [key for key in base if not np.array_equal(expected[key], base[key])]
    assert len(changed) == 7
    weights = loaded_weights(server, "wan", "all-kinds")
    for key, weight in expected.items():
        np.testing.assert_allclose(weights[key], weight, rtol=0, atol=2e-6, err_msg=key)


LOCON = {
    "lora_up.weight": (128, 3, 1, 1),
    "lora_mid.weight": (3, 3, 2, 2),
    "lora_down.weight": (3, 16, 1, 1),
}
LOHA = {
    "hada_w1_a": (3, 128),
    "hada_w1_b": (3, 16),
    "hada_t1": (3, 3, 2, 2),
    "hada_w2_a": (2, 128),
    "hada_w2_b": (2, 16),
    "hada_t2": (2, 2, 2, 2),
}


@pytest.mark.parametrize("kind", ["LoCon", "LoHa"])
def test_stack_of_a_convolution_with_a_core(server: ComfyServer, kind: str) -> None:
    generator = np.random.default_rng(16)
    tensors = {
        f"lora_unet_x_embedder_proj.{name}": generator.standard_normal(shape, dtype=np.float32)
        for name, shape in (LOCON if kind == "LoCon" else LOHA).items()
    }
    tensors["lora_unet_x_embedder_proj.alpha"] = np.array(-2, dtype=np.float32)
    save_file(tensors, server.loras / f"{kind}.safetensors")
    graph = with_lora(load_model("sd3"), kind, 0.1, "lora", "model")
    server.text_of(save_stack(graph, "lora", f"{kind}-stack"), "stack")
    expected = server.weights_of(graph, ["lora", 0], kind)
    weights = loaded_weights(server, "sd3", f"{kind}-stack")
    assert not np.array_equal(
        expected["x_embedder.proj.weight"], base_weights(server, "sd3")["x_embedder.proj.weight"]
    )
    for key, weight in expected.items():
        np.testing.assert_allclose(weights[key], weight, rtol=0, atol=5e-6, err_msg=key)


def test_stack_contains_the_text_encoders(server: ComfyServer) -> None:
    """The second stack shows that ComfyUI reads the keys of the first."""
    generator = np.random.default_rng(17)
    weight = generator.standard_normal((3072, 768), dtype=np.float32).astype(np.float16)
    layer = "text_model.encoder.layers.0.mlp.fc1"
    # A CLIP-L without its other weights, which are not needed here.
    save_file({f"{layer}.weight": weight}, server.text_encoders / "clip.safetensors")
    A, B = random_pair(generator, weight.shape)
    unet_A, unet_B = random_pair(generator, WAN_SHAPES["blocks.0.ffn.0"])
    tensors = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A,
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": B,
        "lora_unet_blocks_0_ffn_0.lora_down.weight": unet_A,
        "lora_unet_blocks_0_ffn_0.lora_up.weight": unet_B,
    }
    save_file(tensors, server.loras / "text.safetensors")
    updates = {
        f"text_encoders.clip_l.transformer.{layer}": 0.25 * dense(A, B),
        "diffusion_model.blocks.0.ffn.0": 0.5 * dense(unet_A, unet_B),
    }
    for file, strengths in (("text", (0.5, 0.25)), ("text-stack", (1.0, 1.0))):
        graph = {
            **load_model("wan"),
            "clip": node("CLIPLoader", clip_name="clip.safetensors", type="stable_diffusion"),
            "lora": node(
                "MatryoshkaLoadLoraAtRank",
                model=["model", 0],
                clip=["clip", 0],
                lora_name=f"{file}.safetensors",
                rank=RANK,
                strength_model=strengths[0],
                strength_clip=strengths[1],
            ),
        }
        graph = save_stack(graph, "lora", f"{file}-stack", clip=["lora", 1])
        server.text_of(graph, "stack")
        saved = load_file(server.loras / f"{file}-stack.safetensors")
        assert {key.partition(".lora_")[0] for key in saved if ".lora_" in key} == {*updates}
        for name, update in updates.items():
            factors = saved[f"{name}.lora_A.weight"], saved[f"{name}.lora_B.weight"]
            scale = float(saved[f"{name}.alpha"]) / RANK
            np.testing.assert_allclose(dense(*factors, scale), update, rtol=0, atol=1e-6)


def test_stack_has_the_dtype_of_its_loras(server: ComfyServer) -> None:
    write_kohya(server.loras / "single.safetensors", WAN_SHAPES, seed=9)
    tensors = load_file(server.loras / "single.safetensors")
    half = {key: tensor.astype(np.float16) for key, tensor in tensors.items()}
    save_file(half, server.loras / "half.safetensors")
    graph = with_lora(load_model("wan"), "half", 1.0, "lora", "model")
    server.text_of(save_stack(graph, "lora", "half-stack", dtype="auto"), "stack")
    saved = load_file(server.loras / "half-stack.safetensors")
    dtypes = {tensor.dtype for key, tensor in saved.items() if "lora_" in key}
    assert dtypes == {np.dtype(np.float16)}


# MatryoshkaLoadLoraAtRank


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_load_at_rank_is_the_closest_lora(server: ComfyServer, rank: int) -> None:
    updates = write_kohya(server.loras / "preview.safetensors", WAN_SHAPES, seed=10)
    graph = load_at_rank("preview", rank, strength=-0.4)
    weights = server.weights_of(graph, ["lora", 0], f"preview-{rank}")
    expected = {name: -0.4 * best_matrix(update, rank) for name, update in updates.items()}
    assert_changed_by(weights, base_weights(server, "wan"), expected)


def test_load_at_rank_keeps_the_decomposition_of_one_version_of_a_file(
    server: ComfyServer,
) -> None:
    path = server.loras / "version.safetensors"
    updates = write_kohya(path, WAN_SHAPES, seed=19)
    stat = path.stat()
    base = base_weights(server, "wan")

    def assert_loaded(rank: int) -> None:
        weights = server.weights_of(load_at_rank("version", rank), ["lora", 0], f"version-{rank}")
        expected = {name: best_matrix(update, rank) for name, update in updates.items()}
        assert_changed_by(weights, base, expected)

    assert_loaded(1)
    new_updates = write_kohya(path, WAN_SHAPES, seed=20)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_loaded(4)  # the file is not read again
    os.utime(path)
    updates = new_updates
    assert_loaded(2)


# MatryoshkaLoraRanks


def test_a_lora_of_another_model_is_an_error(server: ComfyServer) -> None:
    write_kohya(server.loras / "other.safetensors", {"double_blocks.0.img_mlp.0": (8, 8)}, seed=28)
    graph = load_at_rank("other", 2)
    graph["save"] = node("ModelSave", model=["lora", 0], filename_prefix="other")
    assert "fits the model" in server.error_of(graph)


def test_a_list_of_ranks_is_one_run(server: ComfyServer) -> None:
    updates = write_kohya(server.loras / "sweep.safetensors", WAN_SHAPES, seed=21)
    graph = load_at_rank("sweep", ["ranks", 0])
    ranks = node("MatryoshkaLoraRanks", lora_name="sweep.safetensors", ranks="1, 4,8,16")
    save = node("ModelSave", model=["lora", 0], filename_prefix="sweep")
    entry = server.run({**graph, "ranks": ranks, "save": save})
    assert entry["outputs"]["ranks"]["text"] == ["1, 4, 6 of 6"]
    texts = entry["outputs"]["lora"]["text"]
    assert [text.partition(":")[0] for text in texts] == ["rank 1", "rank 4", "rank 6"]
    base = base_weights(server, "wan")
    for rank, file in zip((1, 4, 6), sorted(server.output.glob("sweep_*")), strict=True):
        weights = {
            key.removeprefix("model.diffusion_model."): tensor
            for key, tensor in load_file(file).items()
        }
        expected = {name: best_matrix(update, rank) for name, update in updates.items()}
        assert_changed_by(weights, base, expected)


def test_the_example_makes_a_sheet_of_pictures(server: ComfyServer) -> None:
    shapes = {
        f"{block}.1.transformer_blocks.0.attn2.{name}": (320, inputs)
        for block in ("input_blocks.1", "middle_block")
        for name, inputs in (("to_q", 320), ("to_v", 768))
    }
    write_kohya(server.loras / "lora.safetensors", shapes, seed=26)
    file = ROOT / "comfyui/example_workflows/ranks_of_a_lora.json"
    graph = to_graph(json.loads(file.read_text()), server.get("/object_info"))
    ids = {item["class_type"]: node_id for node_id, item in graph.items()}

    def inputs_of(class_type: str) -> dict[str, Any]:
        return graph[ids[class_type]]["inputs"]

    inputs_of("CheckpointLoaderSimple")["ckpt_name"] = "sd15.safetensors"
    inputs_of("MatryoshkaLoadLoraAtRank")["strength_model"] = 9.0
    inputs_of("EmptyLatentImage").update(width=64, height=64)
    inputs_of("ImageGrid").update(columns=2, cell_width=64, cell_height=64, padding=0)
    inputs_of("KSampler")["steps"] = 2
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["outputs"][ids["MatryoshkaLoraRanks"]]["text"] == ["1, 2, 4, 6 of 6"]
    (saved,) = entry["outputs"][ids["SaveImage"]]["images"]
    sheet = np.asarray(Image.open(server.output / saved["filename"]).convert("RGB"), dtype=int)
    assert sheet.shape == (128, 128, 3)
    pictures = sheet.reshape(2, 64, 2, 64, 3).swapaxes(1, 2).reshape(4, 64, 64, 3)
    distances = [float(np.abs(picture - pictures[-1]).mean()) for picture in pictures]
    assert distances == sorted(set(distances), reverse=True)
    assert len(entry["outputs"][ids["PreviewImage"]]["images"]) == 4

    # The last picture is the one of ComfyUI's own loader.
    loader = graph[ids["MatryoshkaLoadLoraAtRank"]]
    loader["class_type"] = "LoraLoader"
    del loader["inputs"]["rank"]
    entry = server.run(graph)
    (saved,) = entry["outputs"][ids["SaveImage"]]["images"]
    sheet = np.asarray(Image.open(server.output / saved["filename"]).convert("RGB"), dtype=int)
    assert np.abs(sheet[:64, :64] - pictures[-1]).max() <= 2


@pytest.mark.parametrize("ranks", ["", "1, two", "0, 1"])
def test_ranks_that_are_none_are_errors(server: ComfyServer, ranks: str) -> None:
    write_kohya(server.loras / "no-ranks.safetensors", WAN_SHAPES, seed=22)
    graph = load_at_rank("no-ranks", ["ranks", 0])
    graph["ranks"] = node("MatryoshkaLoraRanks", lora_name="no-ranks.safetensors", ranks=ranks)
    graph["save"] = node("ModelSave", model=["lora", 0], filename_prefix="no-ranks")
    assert "rank" in server.error_of(graph)


# All nodes


@pytest.mark.parametrize("name", ["shrink", "combine"])
def test_files_have_the_requested_dtype(server: ComfyServer, name: str) -> None:
    updates = write_kohya(server.loras / "float32.safetensors", WAN_SHAPES, seed=23)
    graph = shrink("float32", "rank", f"{name}-fp16", rank=RANK)
    if name == "combine":
        graph = combine("float32", 0.5, "float32", 0.5, f"{name}-fp16")
    graph[name]["inputs"]["dtype"] = "fp16"
    server.text_of(graph, name)
    saved = load_file(server.loras / f"{name}-fp16.safetensors")
    dtypes = {tensor.dtype for key, tensor in saved.items() if not key.endswith(".alpha")}
    assert dtypes == {np.dtype(np.float16)}
    weights = loaded_weights(server, "wan", f"{name}-fp16")
    base = base_weights(server, "wan")
    for layer, update in updates.items():
        change = (weights[f"{layer}.weight"] - base[f"{layer}.weight"]).reshape(update.shape)
        np.testing.assert_allclose(change, update, rtol=0, atol=2e-3 * np.abs(update).max())


@pytest.mark.parametrize(
    ("name", "total"),
    [("rank", 4), ("error", 8), ("LoHa and LoKr", 3), ("combine", 16), ("stack", 8), ("lora", 4)],
)
def test_progress_is_shown_for_each_layer(server: ComfyServer, name: str, total: int) -> None:
    file = f"progress-{name}"
    write_kohya(server.loras / f"{file}.safetensors", WAN_SHAPES, seed=24)
    graph = shrink(file, name, f"{file}-output")
    if name == "LoHa and LoKr":
        write_other_kinds(server.loras / f"{file}.safetensors")
        graph = shrink(file, "rank", f"{file}-output")
    elif name == "combine":
        graph = combine(file, 1.0, file, 1.0, f"{file}-output")
    elif name == "stack":
        graph = with_lora(load_model("wan"), file, 1.0, "lora", "model")
        graph = save_stack(graph, "lora", f"{file}-output")
    elif name == "lora":
        graph = load_at_rank(file, 3)
        graph["save"] = node("ModelSave", model=["lora", 0], filename_prefix=file)
    progress, end = server.watch(graph)
    assert end == "execution_success"
    (node_id,) = {node_id for node_id, *_ in progress}
    # Combine reads a layer once more, to see whether the sum is zero.
    counts = [min(count, total) for count in range(1, len(progress) + 1)]
    assert progress == [(node_id, count, total) for count in counts]
    assert counts[-1] == total


@pytest.fixture(scope="module")
def slow_file(server: ComfyServer) -> str:
    """Write LoHas of rank 400, which take minutes. The rank of a LoRA of this size is smaller."""
    generator = np.random.default_rng(25)
    tensors: Tensors = {}
    for layer in range(100):
        for weight in ("w1", "w2"):
            A = generator.standard_normal((20, 1024), dtype=np.float32)
            B = generator.standard_normal((1024, 20), dtype=np.float32)
            key = f"lora_unet_blocks_{layer}_ffn_0.hada_{weight}"
            tensors[f"{key}_a"], tensors[f"{key}_b"] = B.astype("f2"), A.astype("f2")
    save_file(tensors, server.loras / "slow.safetensors")
    return "slow"


@pytest.mark.parametrize("name", ["shrink", "combine", "lora"])
def test_cancel_ends_at_the_next_layer(server: ComfyServer, slow_file: str, name: str) -> None:
    graph = shrink(slow_file, "error", "cancelled")
    if name == "combine":
        graph = combine(slow_file, 1.0, slow_file, 1.0, "cancelled")
    elif name == "lora":
        graph = load_at_rank(slow_file, 8)
        graph["save"] = node("ModelSave", model=["lora", 0], filename_prefix="cancelled")
    before = {path for path in server.loras.parents[1].rglob("*") if path.is_file()}
    progress, end = server.watch(graph, cancel_at=3)
    assert end == "execution_interrupted"
    assert 3 <= len(progress) < 10
    assert {path for path in server.loras.parents[1].rglob("*") if path.is_file()} == before


# Wrong inputs


def test_files_are_replaced_on_request_only(server: ComfyServer) -> None:
    write_kohya(server.loras / "kept.safetensors", WAN_SHAPES, seed=11)
    path = server.loras / "precious.safetensors"
    path.write_bytes(b"precious")
    for overwrite in (False, True):  # the file of another program stays
        graph = shrink("kept", "rank", "precious", overwrite=overwrite)
        assert "precious" in server.error_of(graph)
        assert path.read_bytes() == b"precious"
    server.text_of(shrink("kept", "rank", "own"), "shrink")
    assert "overwrite" in server.error_of(shrink("kept", "error", "own"))
    server.text_of(shrink("kept", "error", "own", overwrite=True), "shrink")
    assert len(load_file(server.loras / "own.safetensors")) == 3 * len(WAN_SHAPES)


@pytest.mark.parametrize("filename", ["../escaped", "a/../../escaped", "/tmp/escaped", "", ".."])
def test_files_stay_in_the_folder_of_loras(server: ComfyServer, filename: str) -> None:
    write_kohya(server.loras / "inside.safetensors", WAN_SHAPES, seed=12)
    before = set(server.loras.parent.rglob("*"))
    assert repr(filename) in server.error_of(shrink("inside", "rank", filename))
    assert set(server.loras.parent.rglob("*")) == before
    assert not Path("/tmp/escaped.safetensors").exists()


def test_a_rank_above_that_of_the_file_is_an_error(server: ComfyServer) -> None:
    write_kohya(server.loras / "narrow.safetensors", WAN_SHAPES, seed=13)
    assert f"from 1 to {RANK}" in server.error_of(shrink("narrow", "rank", "wide", rank=100))
    assert not (server.loras / "wide.safetensors").exists()


def test_errors_name_the_inputs_of_the_node(server: ComfyServer) -> None:
    write_kohya(server.loras / "inputs.safetensors", {"unknown.layer": (4096, 64)}, seed=30)
    tensors = load_file(server.loras / "inputs.safetensors")
    with_dots = {key.replace("lora_unet_unknown_", "unknown."): tensors[key] for key in tensors}
    save_file(with_dots, server.loras / "dots.safetensors")
    graphs = {
        "a larger number of megabytes": shrink("inputs", "megabytes", "none", megabytes=0.01),
        "All weights are 0": combine("inputs", 0.0, "inputs", 0.0, "none"),
        "--key-format of the command line": combine("inputs", 1.0, "dots", 1.0, "none"),
    }
    for keyword, graph in graphs.items():
        assert keyword in server.error_of(graph)


def test_what_is_no_lora_is_an_error_that_names_it(server: ComfyServer) -> None:
    write_kohya(server.loras / "dora.safetensors", WAN_SHAPES, seed=14)
    tensors = load_file(server.loras / "dora.safetensors")
    tensors["lora_unet_blocks_0_ffn_0.dora_scale"] = np.ones((256, 1), dtype=np.float32)
    save_file(tensors, server.loras / "dora.safetensors")
    graph = with_lora(load_model("wan"), "dora", 1.0, "lora", "model")
    message = server.error_of(save_stack(graph, "lora", "no-dora"))
    assert "blocks.0.ffn.0.weight is DoRA" in message
    assert not (server.loras / "no-dora.safetensors").exists()


def test_merged_models_and_models_without_loras_are_errors(server: ComfyServer) -> None:
    graph = load_model("wan")
    assert "No LoRA" in server.error_of(save_stack(graph, "model", "nothing"))
    graph["other"] = node("UNETLoader", unet_name="wan.safetensors", weight_dtype="fp8_e4m3fn")
    graph["merge"] = node("ModelMergeSimple", model1=["model", 0], model2=["other", 0], ratio=0.5)
    assert "merge of models" in server.error_of(save_stack(graph, "merge", "nothing"))
    assert not (server.loras / "nothing.safetensors").exists()


def test_the_dropdown_has_files_that_can_be_read(server: ComfyServer) -> None:
    (server.loras / "pickled.pt").write_bytes(b"")
    write_kohya(server.loras / "readable.safetensors", WAN_SHAPES, seed=15)
    inputs = server.get("/object_info/MatryoshkaShrinkLora")["MatryoshkaShrinkLora"]["input"]
    names = inputs["required"]["lora_name"][0]
    assert "readable.safetensors" in names
    assert "pickled.pt" not in names
