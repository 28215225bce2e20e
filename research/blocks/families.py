"""The block of docs/shrink.md: what can be done with the LoRAs of each family of models."""

from __future__ import annotations

from research.blocks.shared import block, read, table


@block
def families() -> str:
    """Each family of image and video models: conversions, and what reads the files."""
    models = {m["name"]: m for m in read("src/matryoshka_lora/lora/models.json")["models"]}
    rows: list[list[str]] = []
    for entry in read("research/families.json"):
        model = models.get(entry["model"])
        kohya = "yes" if model and model["kohya_names"] else ""
        diffusers = "yes" if model else ""
        comfyui = ""
        if entry["run"]:
            formats = ["kohya"] + ["diffusers"] * entry.get("comfyui_reads_diffusers", False)
            comfyui = ", ".join(f"`{name}`" for name in formats)
        elif entry["comfyui"]:
            comfyui = "its own names"
        loader = "`diffusers`" if entry["diffusers"] and model else ""
        if entry["diffusers"] and not model:
            loader = "its own names"
        rows.append([entry["family"], kohya, diffusers, comfyui, loader])
    heading = ["LoRAs of", "to `kohya`", "to `diffusers`, `peft`"]
    return table([*heading, "ComfyUI reads", "diffusers reads"], rows)
