"""A page to upload a LoRA to: see the error and size of each rank, choose one, and download it.

    python examples/space/app.py

It also runs as a Space on the Hugging Face hub, see README.md. A file is read in a separate
process, which is stopped after a minute. Nothing in it is executed, and uploads are deleted within
half an hour.
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

from matryoshka_lora import ExportResult, MatryoshkaError, export

MAX_FILE_SIZE = "1gb"
TIME_LIMIT = 60
SHARES = (0.9, 0.95, 0.99)
BY_RANK = "one rank for all layers"
BY_ERROR = "an error of the whole file"
BY_SIZE = "a file size"
DEFAULTS = {BY_RANK: "8", BY_ERROR: "10%", BY_SIZE: "50MB"}

INTRODUCTION = """# Shrink a LoRA

Drop the `.safetensors` file of an image or video LoRA, or the two files that PEFT saves:
`adapter_config.json` and `adapter_model.safetensors`. No base model is needed.
"""
EXPLANATION = """The **error** is the norm of what truncation to a rank drops, divided by the norm
of the whole update. No other LoRA of that rank has a smaller error. How much is acceptable depends
on the model: compare images of the same seed. Begin with 10%."""

Row = dict[str, Any]


def measure(path: str) -> tuple[list[Row], list[Row]]:
    """Return the error and size of each rank, and the ranks that each layer needs."""
    from matryoshka_lora.lora_file.open import open_lora

    lora = open_lora(path)
    squared_errors = {layer.name: lora.squared_errors(layer) for layer in lora.layers}
    total = sum(float(errors[0]) for errors in squared_errors.values()) or 1.0
    curve: list[Row] = []
    for rank in lora.available_ranks:
        dropped = sum(
            float(errors[min(rank, len(errors) - 1)]) for errors in squared_errors.values()
        )
        error = 100 * math.sqrt(dropped / total)
        size = lora.plan(rank).file_size / 1e6
        curve.append({"rank": rank, "error in %": round(error, 2), "MB": round(size, 3)})
    layers: list[Row] = []
    for layer in lora.layers:
        errors = squared_errors[layer.name]
        row: Row = {"layer": layer.name, "rank": layer.rank}
        for share in SHARES:
            row[f"for {100 * share:.0f}%"] = int((errors > (1 - share) * errors[0]).sum())
        layers.append(row)
    return curve, layers


def describe(result: ExportResult) -> str:
    """Return what was written, in one line."""
    ranks = result.ranks.values() if isinstance(result.ranks, dict) else result.ranks
    lowest, highest = min(ranks), max(ranks)
    rank = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}, by layer"
    error = max(result.errors.values())
    sizes = f"{result.size_before / 1e6:.1f} MB -> {result.size_after / 1e6:.1f} MB"
    return f"{result.path.name}: {rank}, {sizes}, error {error:.1%}"


def run_bounded(function: Callable[..., Any], folder: str, *args: Any, **options: Any) -> Any:
    """Call a function in a separate process, for at most a minute.

    Args:
        function: A function of a module.
        folder: A folder whose name must not appear in an error message.
        args: The function's positional arguments.
        options: The function's keyword arguments.

    Raises:
        gradio.Error: The function failed or took too long.
    """
    with get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(function, args, options).get(TIME_LIMIT)
        except TimeoutError:
            message = (
                f"This takes more than {TIME_LIMIT} seconds. Run `matryoshka export` on your "
                "own machine."
            )
        except MatryoshkaError as error:
            message = str(error).replace(f"{folder}/", "")
        except Exception:
            message = "This file cannot be read."
    raise gr.Error(message, print_exception=False)


def copy_uploads(files: list[str], folder: str) -> Path:
    """Copy the uploads into a folder, and return the path of the LoRA."""
    files_by_name = {Path(file).name: file for file in files}
    if "adapter_config.json" in files_by_name:
        lora_folder = Path(folder) / "adapter"
        lora_folder.mkdir()
        for name, file in files_by_name.items():
            shutil.copy(file, lora_folder / name)
        return lora_folder
    if len(files) > 1:
        raise gr.Error("Drop one file, or PEFT's two files.", print_exception=False)
    return Path(shutil.copy(files[0], folder))


def show(files: list[str] | None) -> Iterator[Any]:
    """Show the errors and sizes of an uploaded LoRA."""
    if not files:
        yield gr.Column(visible=False), None, None, None, None
        return
    with TemporaryDirectory() as folder:
        path = copy_uploads(files, folder)
        curve, layers = run_bounded(measure, folder, str(path))
        curve_table = pd.DataFrame(curve)
        yield gr.Column(visible=True), curve_table, curve_table, pd.DataFrame(layers), None


def shrink(files: list[str], criterion: str, value: str) -> Iterator[Any]:
    """Write the smaller LoRA: a file, or a ZIP archive of PEFT's folder."""
    options: dict[str, Any]
    if criterion == BY_RANK:
        if not value.strip().isdecimal():
            raise gr.Error("A rank is a number such as 8.", print_exception=False)
        options = {"rank": int(value)}
    elif criterion == BY_ERROR:
        options = {"error": value}
    else:
        options = {"max_bytes": value}
    with TemporaryDirectory() as folder:
        path = copy_uploads(files, folder)
        output = Path(folder) / f"{path.stem}-small{path.suffix}"
        result = run_bounded(export, folder, str(path), str(output), **options)
        if output.is_dir():
            output = Path(shutil.make_archive(str(output), "zip", output))
        # Gradio copies the file when it is yielded; the folder is deleted after that.
        yield describe(result), str(output)


def build_page() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(
        title="Shrink a LoRA", analytics_enabled=False, delete_cache=(300, 1500)
    ) as page:
        gr.Markdown(INTRODUCTION)
        files = gr.File(label="LoRA", file_count="multiple", file_types=[".safetensors", ".json"])
        with gr.Column(visible=False) as results:
            with gr.Row():
                error_plot = gr.LinePlot(x="rank", y="error in %", title="Error of each rank")
                size_plot = gr.LinePlot(x="rank", y="MB", title="File size of each rank")
            gr.Markdown(EXPLANATION)
            with gr.Row():
                criterion = gr.Radio([*DEFAULTS], value=BY_ERROR, label="Choose the ranks by")
                value = gr.Textbox(DEFAULTS[BY_ERROR], label="How much", max_lines=1)
            button = gr.Button("Shrink", variant="primary")
            summary = gr.Markdown()
            output_file = gr.File(label="The smaller LoRA", interactive=False)
            with gr.Accordion("The rank that each layer needs", open=False):
                layer_table = gr.Dataframe(
                    interactive=False, label="To keep a share of its squared norm"
                )
        gr.on(
            [files.change],
            show,
            files,
            [results, error_plot, size_plot, layer_table, output_file],
        )
        criterion.change(DEFAULTS.__getitem__, criterion, value)
        gr.on(
            [button.click, value.submit], shrink, [files, criterion, value], [summary, output_file]
        )
    return page


if __name__ == "__main__":
    build_page().queue(default_concurrency_limit=1, max_size=20, api_open=False).launch(
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
