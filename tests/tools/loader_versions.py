"""Compare what versions of diffusers and ComfyUI make of LoRA files with the files' updates.

By hand, for the table in docs/formats.md::

    python tests/tools/loader_versions.py write FILES            # with this package
    OTHER_PYTHON tests/tools/loader_versions.py diffusers FILES  # any environment with diffusers
    OTHER_PYTHON tests/tools/loader_versions.py comfyui FILES --source FOLDER_OF_COMFYUI

A command prints a row: for each file whether all updates are right, and otherwise how many are not
and how strong they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODULES = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 8
FILES = {
    "kohya": "kohya, one rank",
    "kohya-mixed": "kohya, ranks by layer, one alpha",
    "kohya-alphas": "kohya, ranks by layer, alphas by layer (not ours)",
    "unet": "diffusers, U-Net, one rank",
    "unet-mixed": "diffusers, U-Net, ranks by layer",
    "unet-plain": "diffusers, U-Net, ranks by layer, no metadata (not ours)",
    "flux": "diffusers, Flux, one rank",
    "flux-mixed": "diffusers, Flux, ranks by layer",
    "flux-plain": "diffusers, Flux, ranks by layer, no metadata (not ours)",
}


def create_model(part: str) -> Any:
    """Return a small U-Net of Stable Diffusion, or a small transformer of Flux."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers.diffusers_models import small_flux, small_unet

    return small_unet() if part == "unet" else small_flux()


def part_of(name: str) -> str:
    return "transformer" if name.startswith("flux") else "unet"


def write(folder: Path) -> None:
    """Write the files with this package, and the updates that they stand for."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    import matryoshka_lora as ml
    from matryoshka_lora.lora.truncate import with_ranks

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for name in FILES:
        part = part_of(name)
        tensors: dict[str, Tensor] = {}
        for module, layer in create_model(part).named_modules():
            if module.endswith(MODULES) and isinstance(layer, torch.nn.Linear):
                A, B = torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)
                key = f"{part}.{module}"
                if name.startswith("kohya"):
                    key = f"lora_unet_{module.replace('.', '_')}"
                    tensors[f"{key}.alpha"] = torch.tensor(3.0)
                suffixes = ("down", "up") if name.startswith("kohya") else ("A", "B")
                tensors[f"{key}.lora_{suffixes[0]}.weight"] = A
                tensors[f"{key}.lora_{suffixes[1]}.weight"] = B
        file = folder / f"{name}.safetensors"
        source = folder / "source"
        save_file(tensors, source.with_suffix(".safetensors"))
        lora = ml.open(source.with_suffix(".safetensors"))
        ranks = {layer.name: 2 + index % 4 for index, layer in enumerate(lora.layers)}
        if "-" in name:
            with_ranks(lora, ranks).save(file)
        else:
            ml.export(source.with_suffix(".safetensors"), file, 4)
            ranks = dict.fromkeys(ranks, 4)
        if name in ("kohya-alphas", "unet-plain", "flux-plain"):
            rewrite_as_others_do(file)
        updates: dict[str, np.ndarray] = {}
        for layer in lora.layers:
            A, B = (factor.astype(float) for factor in layer.read()[:2])
            scale = 3 / RANK if name.startswith("kohya") else 1.0
            u, s, vh = np.linalg.svd(scale * B @ A)
            rank = ranks[layer.name]
            updates[layer.name] = (u[:, :rank] * s[:rank]) @ vh[:rank]
        np.savez(folder / f"{name}.npz", **updates)
    source.with_suffix(".safetensors").unlink()


def rewrite_as_others_do(file: Path) -> None:
    """Drop the metadata, and make the alpha of each layer its rank: scale 1."""
    tensors = load_file(file)
    for key in list(tensors):
        if key.endswith(".alpha"):
            key_A, key_B = (key.replace("alpha", f"lora_{x}.weight") for x in ("down", "up"))
            rank = len(tensors[key_A])
            tensors[key_B] = tensors[key_B] * tensors[key] / rank
            tensors[key] = torch.tensor(float(rank))
    save_file(tensors, file)


def read_with_diffusers(file: Path) -> dict[str, np.ndarray]:
    """Return the update of each layer that diffusers has loaded."""
    from diffusers import loaders

    part = part_of(file.stem)
    mixin = loaders.FluxLoraLoaderMixin
    if part == "unet":
        mixin = loaders.StableDiffusionLoraLoaderMixin

    class Pipeline(mixin):  # type: ignore[misc, valid-type]
        components: dict[str, Any] = {}
        hf_device_map = None
        text_encoder = None

    pipeline = Pipeline()
    setattr(pipeline, part, create_model(part))
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    updates: dict[str, np.ndarray] = {}
    for module, layer in getattr(pipeline, part).named_modules():
        for adapter in getattr(layer, "lora_A", ()):
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            name = f"{part}.{module}"
            if file.stem.startswith("kohya"):
                name = f"lora_unet_{module.replace('.', '_')}"
            updates[name] = (layer.scaling[adapter] * B.double() @ A.double()).detach().numpy()
    return updates


def read_with_comfyui(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Return the update of each layer that ComfyUI has loaded."""
    from comfy.cli_args import args

    args.cpu = True  # before torch's devices are listed
    from comfy import lora

    tensors = load_file(file)
    patches = lora.load_lora(tensors, {name: name for name in names})
    updates: dict[str, np.ndarray] = {}
    for name, patch in patches.items():
        shapes = [tensors[key].shape for key in sorted(tensors) if key.startswith(f"{name}.lora_")]
        size_in, size_out = shapes[0][1], shapes[1][0]
        weight = torch.zeros(size_out, size_in, dtype=torch.float32)
        patched = lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, name)
        updates[name] = patched.double().numpy()
    return updates


def compare(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> str:
    """Return a cell of the table."""
    strengths: list[float] = []
    num_other = 0
    for name, update in expected.items():
        strength = np.sum(actual.get(name, 0 * update) * update) / np.sum(update**2)
        error = np.linalg.norm(actual.get(name, 0 * update) - strength * update)
        if error > 1e-4 * np.linalg.norm(update):
            num_other += 1
        elif abs(strength - 1) > 1e-4:
            strengths.append(float(strength))
    if num_other:
        return f"{num_other} of {len(expected)} layers wrong"
    if strengths:
        low, high = min(strengths), max(strengths)
        return f"{len(strengths)} of {len(expected)} layers at {low:.2f} to {high:.2f}"
    return "right"


def check(folder: Path, program: str) -> None:
    """Print a row of the table."""
    if program == "comfyui":
        from comfyui_version import __version__ as version
    else:
        from diffusers import __version__ as version
    cells = [f"{program} {version}"]
    for name in FILES:
        file = folder / f"{name}.safetensors"
        with np.load(folder / f"{name}.npz") as stored:
            expected = dict(stored)
        try:
            if program == "comfyui":
                actual = read_with_comfyui(file, list(expected))
            else:
                actual = read_with_diffusers(file)
            cells.append(compare(actual, expected))
        except Exception as error:  # whatever a version raises is its answer
            cells.append(f"{type(error).__name__}: {error!s:.60}")
    print("| " + " | ".join(["loader", *FILES.values()]) + " |")
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["write", "diffusers", "comfyui"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", help="ComfyUI's repository")
    arguments = parser.parse_args()
    if arguments.source:
        sys.path.insert(0, arguments.source)
        sys.argv = sys.argv[:1]  # ComfyUI parses it
    if arguments.command == "write":
        write(arguments.folder)
    else:
        check(arguments.folder, arguments.command)
