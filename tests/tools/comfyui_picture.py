"""Draw docs/figures/comfyui.png: the five nodes in ComfyUI's page, after they have run.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python tests/tools/comfyui_picture.py OUTPUT.png

It needs Playwright and Chromium; CHROMIUM is the path of the browser.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.comfyui_server import ComfyServer, node

MODELS_SCRIPT = Path(__file__).parents[1] / "helpers/comfyui_models.py"
WAN_LAYERS = [f"blocks.{block}.{name}" for block in range(2) for name in ("self_attn.q", "ffn.0")]
# Position and size of each node.
LAYOUT = {
    "model": [(0, 0), (270, 80)],
    "first": [(0, 125), (270, 80)],
    "second": [(0, 250), (270, 80)],
    "stack": [(320, 0), (270, 265)],
    "ranks": [(0, 375), (270, 150)],
    "preview": [(320, 310), (270, 270)],
    "save": [(320, 625), (270, 60)],
    "shrink": [(640, 0), (270, 315)],
    "combine": [(640, 360), (270, 325)],
}
# Hints and panels that would cover the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
TAB_BAR_HEIGHT = 38
SIZE = {"width": 960, "height": 790}


def write_lora(file: Path, seed: int) -> None:
    """Write a LoRA of rank 16 for the tiny Wan model."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for layer in WAN_LAYERS:
        rows = 256 if "ffn" in layer else 128
        A = generator.standard_normal((16, 128), dtype=np.float32)
        B = generator.standard_normal((rows, 16), dtype=np.float32) * 0.7 ** np.arange(16)
        key = f"diffusion_model.{layer}"
        tensors[f"{key}.lora_A.weight"] = A.astype(np.float16)
        tensors[f"{key}.lora_B.weight"] = (B * generator.lognormal()).astype(np.float16)
    save_file(tensors, file)


def graph() -> dict[str, dict[str, Any]]:
    """Return the nodes and their links."""
    save = {"overwrite": False}
    return {
        "model": node("UNETLoader", unet_name="wan.safetensors", weight_dtype="default"),
        "first": node(
            "LoraLoaderModelOnly",
            model=["model", 0],
            lora_name="style.safetensors",
            strength_model=0.8,
        ),
        "second": node(
            "LoraLoaderModelOnly",
            model=["first", 0],
            lora_name="character.safetensors",
            strength_model=-0.5,
        ),
        "stack": node(
            "MatryoshkaSaveLoraStack",
            model=["second", 0],
            rank=0,
            dtype="auto",
            filename="style-and-character",
            **save,
        ),
        "preview": node(
            "MatryoshkaLoadLoraAtRank",
            model=["model", 0],
            lora_name="style.safetensors",
            rank=["ranks", 0],
            strength_model=1.0,
            strength_clip=1.0,
        ),
        "ranks": node("MatryoshkaLoraRanks", lora_name="style.safetensors", ranks="1, 2, 4, 8, 16"),
        # Something has to use the model.
        "save": node("ModelSave", model=["preview", 0], filename_prefix="preview"),
        "combine": node(
            "MatryoshkaCombineLoras",
            lora_name_1="style.safetensors",
            weight_1=1.0,
            lora_name_2="character.safetensors",
            weight_2=0.5,
            rank=16,
            filename="combined",
            **save,
        ),
        "shrink": node(
            "MatryoshkaShrinkLora",
            lora_name="style.safetensors",
            by="error",
            error_percent=10.0,
            rank=16,
            megabytes=50.0,
            filename="style-small",
            **save,
        ),
    }


HIDE_PANELS_SCRIPT = """
() => window.comfyAPI.app.app.extensionManager.command.execute("Workspace.ToggleFocusMode")
"""
LOAD_SCRIPT = """
async ([nodes, layout]) => {
    const { app } = window.comfyAPI.app;
    await app.loadApiJson(nodes, "nodes");
    const names = Object.keys(nodes);
    app.graph._nodes.forEach((node, index) => {
        const name = names.find((name) => String(node.id) === name) ?? names[index];
        node.pos = layout[name][0];
        node.setSize(layout[name][1]);
    });
    app.graph.setDirtyCanvas(true, true);
    await app.queuePrompt(0);
}
"""
FIT_SCRIPT = """
([scale]) => {
    const { app } = window.comfyAPI.app;
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [20, 80];
    app.graph.setDirtyCanvas(true, true);
}
"""


def take_picture(url: str, output: str) -> None:
    """Load the graph in a browser, run it, and save a picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=SIZE)
        page.goto(url)
        page.wait_for_function("window.comfyAPI?.app?.app?.graph", timeout=240_000)
        page.wait_for_timeout(10_000)
        page.evaluate(HIDE_PANELS_SCRIPT)
        page.evaluate(LOAD_SCRIPT, [graph(), LAYOUT])
        page.wait_for_function(
            "window.comfyAPI.app.app.graph._nodes.filter((node) => node.widgets?.some("
            "(widget) => widget.name === 'result' && widget.value)).length === 5",
            timeout=240_000,
        )
        page.wait_for_timeout(3_000)
        page.evaluate(FIT_SCRIPT, [1.0])
        page.wait_for_timeout(3_000)
        height = SIZE["height"] - TAB_BAR_HEIGHT
        clip = {"x": 0, "y": TAB_BAR_HEIGHT, "width": SIZE["width"], "height": height}
        page.screenshot(path=output, clip=clip)
        browser.close()


def main() -> None:
    """Start ComfyUI, and save the picture."""
    python, source = os.environ["COMFYUI_PYTHON"], os.environ["COMFYUI_PATH"]
    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(python, Path(source).resolve(), Path(folder))
        try:
            command = [python, str(MODELS_SCRIPT), str(server.models.parent)]
            subprocess.run(command, cwd=source, check=True)
            for seed, name in enumerate(("style", "character")):
                write_lora(server.loras / f"{name}.safetensors", seed)
            server.wait_until_ready()
            server.post("/settings", SETTINGS)
            take_picture(server.url, sys.argv[1])
        finally:
            server.stop()


if __name__ == "__main__":
    main()
