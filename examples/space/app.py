"""A page to upload LoRAs to: see the error and size of each rank, choose one, and download it.

    python examples/space/app.py

It also runs as a Space on the Hugging Face hub, see README.md. The files are read in a separate
process, which is stopped after a minute per file. Nothing in them is executed, and uploads are
deleted within half an hour.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import pandas as pd

import matryoshka_lora as ml
from matryoshka_lora.units import format_size

MAX_SIZE = 10**9
MAX_FILES = 20
TIME_LIMIT = 60
MAX_ERROR = 0.1
COMPARED_RANK = 8
BY_RANK = "one rank for all layers"
BY_ERROR = "an error of the whole file"
BY_SIZE = "a file size"
DEFAULTS = {BY_RANK: "8", BY_ERROR: f"{MAX_ERROR:.0%}", BY_SIZE: "50MB"}
CONFIG_NAME = "adapter_config.json"

INTRODUCTION = f"""# Shrink a LoRA

Drop `.safetensors` files of image or video LoRAs, at most {MAX_FILES}, or the two files that PEFT
saves: `adapter_config.json` and `adapter_model.safetensors`. No base model is needed.
"""
EXPLANATION = """The **error** is the norm of what truncation to a rank drops, divided by the norm
of the whole update. No other LoRA of that rank has a smaller error. How much is acceptable depends
on the model: compare images of the same seed. Begin with 10%. For an error or a file size, each
layer gets its own rank, so the file is usually smaller than at one rank for all layers."""

# White text on the default orange is hard to read.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
)

Row = dict[str, Any]


def measure(path: str, layers: bool) -> Row:
    """Return `LoraInfo.to_dict`, and the smallest rank of a small error with its size."""
    lora_info = ml.info(path, layers=layers)
    rank = lora_info.rank_for_error(MAX_ERROR)
    size = lora_info.lora.at_rank(rank).file_size
    return {**lora_info.to_dict(), "rank_for_error": rank, "bytes_for_error": size}


def shrink_file(
    path: str, output: str, limit_rank: bool, rank: int | None = None, **options: Any
) -> ml.ExportResult:
    """Export a LoRA. If ``limit_rank``, one of a smaller rank keeps its own."""
    lora = ml.open(path)
    if rank is not None and limit_rank:
        rank = min(rank, lora.max_rank)
    return ml.export(lora, output, rank, **options)


def start_process() -> Any:
    """Return a pool of one process that has imported this module, which takes seconds."""
    pool = get_context("spawn").Pool(1)
    pool.apply(int)
    return pool


def run_bounded(
    function: Callable[..., Any], folder: str, calls: dict[str, tuple[Any, ...]], **options: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Call a function for each of several files in a separate process, for at most a minute each.

    Args:
        function: A function of a module.
        folder: A folder whose name must not appear in an error message.
        calls: The positional arguments by the name of the file.
        options: The keyword arguments of each call.

    Returns:
        The results by the name of the file, and why the other files failed.

    Raises:
        gradio.Error: All files failed.
    """
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    pool = start_process()
    try:
        for name, args in calls.items():
            try:
                results[name] = pool.apply_async(function, args, options).get(TIME_LIMIT)
            except TimeoutError:
                pool.terminate()
                pool = start_process()
                failed[name] = (
                    f"This takes more than {TIME_LIMIT} seconds. Run `matryoshka export` on your "
                    "own machine."
                )
            except ml.MatryoshkaError as error:
                failed[name] = str(error).replace(f"{folder}/", "")
            except Exception:
                failed[name] = "This file cannot be read."
    finally:
        pool.terminate()
    if not results:
        raise gr.Error(next(iter(failed.values())), print_exception=False)
    return results, failed


def copy_uploads(files: Sequence[str], folder: str) -> dict[str, Path]:
    """Copy the uploads into a folder, and return the path of each LoRA by its name."""
    if len(files) > MAX_FILES or sum(Path(file).stat().st_size for file in files) > MAX_SIZE:
        message = f"Drop at most {MAX_FILES} files of {format_size(MAX_SIZE)} altogether."
        raise gr.Error(message, print_exception=False)
    if any(Path(file).name == CONFIG_NAME for file in files):
        if len(files) > 2:
            raise gr.Error("Drop PEFT's two files without others.", print_exception=False)
        lora_folder = Path(folder) / "adapter"
        lora_folder.mkdir()
        for file in files:
            shutil.copy(file, lora_folder)
        return {"adapter": lora_folder}
    paths: dict[str, Path] = {}
    for file in map(Path, files):
        path = Path(folder) / file.name
        number = 2
        while path.name in paths:  # several tools name every file pytorch_lora_weights
            path = Path(folder) / f"{file.stem}-{number}{file.suffix}"
            number += 1
        paths[path.name] = Path(shutil.copy(file, path))
    return paths


def show(files: Sequence[str] | None) -> tuple[Any, ...]:
    """Return the values of the page's parts that show the uploaded LoRAs; see `build_page`."""
    if not files:
        return update_parts()
    with TemporaryDirectory() as folder:
        paths = copy_uploads(files, folder)
        is_single = len(paths) == 1
        calls = {name: (str(path), is_single) for name, path in paths.items()}
        loras, failed = run_bounded(measure, folder, calls)
    text = "\n\n".join([summarize(loras), *format_failures(failed)])
    if is_single:
        (lora,) = loras.values()
        return update_parts(text, single=[error_rows(lora), rank_rows(lora), layer_rows(lora)])
    return update_parts(text, several=[file_row(name, lora) for name, lora in loras.items()])


def update_parts(
    text: str = "", single: Sequence[list[Row]] = (), several: Sequence[Row] = ()
) -> tuple[Any, ...]:
    """Return the values of the page's parts: the tables of a single LoRA or of several."""
    tables = [pd.DataFrame(rows) for rows in single] or [None, None, None]
    return (
        gr.Column(visible=bool(single or several)),
        text,
        gr.Row(visible=bool(single)),
        gr.Accordion(visible=bool(single)),
        *tables,
        gr.Dataframe(pd.DataFrame(several), visible=bool(several)),
        "",  # the summary of the previous files
        None,
    )


def summarize(loras: dict[str, Row]) -> str:
    """Return the size at a small error, in one sentence."""
    size = format_size(sum(lora["bytes"] for lora in loras.values()))
    small_size = format_size(sum(lora["bytes_for_error"] for lora in loras.values()))
    if len(loras) > 1:
        return (
            f"**{len(loras)} LoRAs: {small_size} instead of {size}**, if each has the smallest "
            f"rank whose error is at most {MAX_ERROR:.0%}."
        )
    (lora,) = loras.values()
    rank = lora["rank_for_error"]
    return (
        f"**Rank {rank} of {lora['rank']}: {small_size} instead of {size}, error "
        f"{lora['errors_by_rank'][rank]:.1%}.** It is the smallest rank whose error is at most "
        f"{MAX_ERROR:.0%}."
    )


def format_failures(failed: dict[str, str]) -> list[str]:
    """Return a line for each file that failed. Most reasons begin with its name."""
    return [
        reason if reason.startswith(name) else f"{name}: {reason}"
        for name, reason in failed.items()
    ]


def error_rows(lora: Row) -> list[Row]:
    """Return the error of each rank."""
    errors = lora["errors_by_rank"]
    return [{"rank": rank, "error in %": percent(error)} for rank, error in errors.items()]


def rank_rows(lora: Row) -> list[Row]:
    """Return the size and the error of each nested rank."""
    return [
        {
            "rank": rank,
            "MB": round(size / 1e6, 3),
            "size %": percent(size / lora["bytes"]),
            "error %": percent(lora["errors_by_rank"][rank]),
        }
        for rank, size in lora["bytes_by_rank"].items()
    ]


def layer_rows(lora: Row) -> list[Row]:
    """Return the ranks that each layer needs."""
    return [
        {
            "rank": layer["rank"],
            "for 95%": layer["rank_95"],
            "for 99%": layer["rank_99"],
            "layer": name,
        }
        for name, layer in lora["layers"].items()
    ]


def file_row(name: str, lora: Row) -> Row:
    """Return the table row of one of several files."""
    compared_rank = min(COMPARED_RANK, lora["rank"])
    error = lora["errors_by_rank"].get(compared_rank)  # the paper's deployment has few ranks
    return {
        "file": name,
        "rank": lora["rank"],
        "MB": round(lora["bytes"] / 1e6, 2),
        f"rank for {MAX_ERROR:.0%}": lora["rank_for_error"],
        f"MB for {MAX_ERROR:.0%}": round(lora["bytes_for_error"] / 1e6, 2),
        f"error % at rank {COMPARED_RANK}": None if error is None else percent(error),
    }


def percent(share: float) -> float:
    """Return a share in percent, as the tables show it."""
    return round(100 * share, 2)


def describe(name: str, result: ml.ExportResult) -> str:
    """Return what was written, in one line."""
    lowest = min(result.ranks.values())
    highest = max(result.ranks.values())
    rank = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}, by layer"
    error = max(result.errors.values())
    sizes = f"{format_size(result.size_before)} → {format_size(result.size_after)}"
    return f"`{name}`: {rank}, {sizes}, error {error:.1%}"


def shrink(files: Sequence[str], criterion: str, value: str) -> Iterator[Any]:
    """Write the smaller LoRA: a file, or a ZIP archive of PEFT's folder or of several files."""
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
        paths = copy_uploads(files, folder)
        is_several = len(paths) > 1
        output_folder = Path(folder) / "small"
        output_folder.mkdir()
        calls = {
            name: (str(path), str(output_folder / f"{path.stem}-small{path.suffix}"), is_several)
            for name, path in paths.items()
        }
        results, failed = run_bounded(shrink_file, folder, calls, **options)
        failures = format_failures(failed)
        lines = [describe(result.path.name, result) for result in results.values()]
        download = next(iter(results.values())).path
        if is_several:
            download = make_archive(output_folder, Path(folder) / "small-loras.zip", failures)
        elif download.is_dir():
            download = make_archive(download, download.with_suffix(".zip"))
        # Gradio copies the file when it is yielded; the folder is deleted after that.
        yield "\n\n".join(lines + failures), str(download)


def make_archive(folder: Path, archive: Path, failures: Sequence[str] = ()) -> Path:
    """Write the files of a folder into a ZIP archive; weights are hardly compressible."""
    with zipfile.ZipFile(archive, "w") as output:
        for file in sorted(folder.iterdir()):
            output.write(file, file.name)
        if failures:
            output.writestr("failed.txt", "\n".join(failures) + "\n")
    return archive


def build_page() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(
        title="Shrink a LoRA", analytics_enabled=False, delete_cache=(300, 1500)
    ) as page:
        gr.Markdown(INTRODUCTION)
        files = gr.File(label="LoRAs", file_count="multiple", file_types=[".safetensors", ".json"])
        with gr.Column(visible=False) as results:
            sentence = gr.Markdown()
            with gr.Row() as single_lora:
                plot = gr.LinePlot(x="rank", y="error in %", title="Error of each rank")
                ranks = gr.Dataframe(interactive=False, label="Size and error of each rank")
            file_table = gr.Dataframe(interactive=False, label="The LoRAs")
            gr.Markdown(EXPLANATION)
            with gr.Row():
                criterion = gr.Radio(
                    [*DEFAULTS], value=BY_ERROR, label="Choose the ranks by", min_width=320
                )
                value = gr.Textbox(DEFAULTS[BY_ERROR], label="How much", max_lines=1)
            button = gr.Button("Shrink", variant="primary")
            summary = gr.Markdown()
            output_file = gr.File(label="Download", interactive=False)
            with gr.Accordion("The rank that each layer needs", open=False) as layer_ranks:
                layers = gr.Dataframe(
                    interactive=False, label="To keep a share of its squared norm"
                )
        parts = [results, sentence, single_lora, layer_ranks, plot, ranks, layers, file_table]
        files.change(show, files, [*parts, summary, output_file])
        criterion.change(DEFAULTS.__getitem__, criterion, value)
        gr.on(
            [button.click, value.submit], shrink, [files, criterion, value], [summary, output_file]
        )
    return page


if __name__ == "__main__":
    build_page().queue(default_concurrency_limit=1, max_size=20, api_open=False).launch(
        max_file_size=MAX_SIZE,
        footer_links=[],
        ssr_mode=False,
        theme=THEME,
    )
