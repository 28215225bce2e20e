"""A page to upload a LoRA to: see what each rank keeps and weighs, choose one, download it.

    python examples/space/app.py

It runs as a Space of the hub too, see README.md. A file is read in a process of its own, which is
stopped after a minute. Nothing of it is executed, and uploads are deleted within half an hour.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import pandas as pd

from matryoshka_lora import MatryoshkaError, export

MOST, SECONDS = "1gb", 60
SHARES = (0.9, 0.95, 0.99)
ONE, SHARE, SIZE = "one rank for all layers", "a share for each layer", "a file size"
START = {ONE: "8", SHARE: "99%", SIZE: "50MB"}
TEXT = """# Shrink a LoRA

Drop the `.safetensors` file of an image or video LoRA, or the two files that PEFT saves:
`adapter_config.json` and `adapter_model.safetensors`. No base model is needed.
"""
MEANING = """The **error** is the norm of what a rank leaves out, divided by the norm of the whole
update. A LoRA is cut so that no other file of that rank has a smaller error. How much is too much
depends on the model: compare pictures of the same seed. Begin with 10 %, which keeps 99 % of the
square."""


def measure(path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the error and size of each rank, and the ranks that each layer needs."""
    from matryoshka_lora.files.peft import open_adapter, plan_rank

    adapter = open_adapter(path)
    lost = {layer.name: adapter.lost(layer) for layer in adapter.layers}
    whole = sum(float(own[0]) for own in lost.values()) or 1.0
    curve, layers = list[dict[str, Any]](), list[dict[str, Any]]()
    for rank in adapter.available:
        left = sum(float(own[min(rank, len(own) - 1)]) for own in lost.values())
        size = plan_rank(adapter, rank).size / 1e6
        error = 100 * math.sqrt(left / whole)
        curve.append({"rank": rank, "error in %": round(error, 2), "MB": round(size, 3)})
    for layer in adapter.layers:
        own = lost[layer.name]
        needed = {
            f"for {100 * share:.0f} %": int((own > (1 - share) * own[0]).sum()) for share in SHARES
        }
        layers.append({"layer": layer.name, "rank": layer.rank, **needed})
    return curve, layers


def cut(path: str, target: str, wish: dict[str, Any]) -> list[str]:
    """Write a smaller adapter, and return what there is to tell."""
    return export(path, target, **wish).lines()


def bounded(function: Callable[..., Any], folder: str, *arguments: Any) -> Any:
    """Call a function in a process of its own, for a minute at most; errors name no folder."""
    with get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(function, arguments).get(SECONDS)
        except TimeoutError:
            said = f"This takes more than {SECONDS} seconds: run `matryoshka export` at home."
        except MatryoshkaError as error:
            said = str(error).replace(f"{folder}/", "")
        except Exception:
            said = "This file cannot be read."
    raise gr.Error(said, print_exception=False)


def put_together(files: list[str], folder: str) -> Path:
    """Copy the uploads into a folder, and return the path of the adapter."""
    names = {Path(file).name: file for file in files}
    if "adapter_config.json" in names:
        place = Path(folder) / "adapter"
        place.mkdir()
        for name, file in names.items():
            shutil.copy(file, place / name)
        return place
    if len(files) > 1:
        raise gr.Error("Drop one file, or PEFT's two files.", print_exception=False)
    return Path(shutil.copy(files[0], folder))


def look(files: list[str] | None) -> Iterator[Any]:
    """Show what was uploaded."""
    if not files:
        yield gr.Column(visible=False), None, None, None, None
        return
    with TemporaryDirectory() as folder:
        path = put_together(files, folder)
        curve, layers = (pd.DataFrame(x) for x in bounded(measure, folder, str(path)))
        yield gr.Column(visible=True), curve, curve, layers, None


def shrink(files: list[str], how: str, wish: str) -> Iterator[Any]:
    """Make the smaller adapter: a file, or a ZIP archive of PEFT's folder."""
    options: dict[str, Any] = {SHARE: {"keep": wish}, SIZE: {"max_bytes": wish}}.get(how, {})
    if how == ONE:
        if not wish.strip().isdecimal():
            raise gr.Error("A rank is a number such as 8.", print_exception=False)
        options = {"rank": int(wish)}
    with TemporaryDirectory() as folder:
        path = put_together(files, folder)
        # Gradio copies the file when it is yielded, and the folder ends after that.
        target = Path(folder) / f"{path.stem}-small{path.suffix}"
        lines = bounded(cut, folder, str(path), str(target), options)
        if target.is_dir():
            target = Path(shutil.make_archive(str(target), "zip", target))
        yield "\n\n".join(lines).replace(f"{folder}/", ""), str(target)


def page() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(
        title="Shrink a LoRA", analytics_enabled=False, delete_cache=(300, 1500)
    ) as blocks:
        gr.Markdown(TEXT)
        files = gr.File(label="LoRA", file_count="multiple", file_types=[".safetensors", ".json"])
        with gr.Column(visible=False) as found:
            with gr.Row():
                error = gr.LinePlot(x="rank", y="error in %", title="What a rank leaves out")
                size = gr.LinePlot(x="rank", y="MB", title="What its file weighs")
            gr.Markdown(MEANING)
            with gr.Row():
                how = gr.Radio([*START], value=SHARE, label="Keep")
                wish = gr.Textbox(START[SHARE], label="How much", max_lines=1)
            button = gr.Button("Shrink", variant="primary")
            said, made = gr.Markdown(), gr.File(label="The smaller LoRA", interactive=False)
            with gr.Accordion("The rank that each layer needs", open=False):
                layers = gr.Dataframe(interactive=False, label="To keep a share of its square")
        gr.on([files.change], look, files, [found, error, size, layers, made])
        how.change(START.__getitem__, how, wish)
        gr.on([button.click, wish.submit], shrink, [files, how, wish], [said, made])
    return blocks


if __name__ == "__main__":
    page().queue(default_concurrency_limit=1, max_size=20, api_open=False).launch(
        max_file_size=MOST,
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
