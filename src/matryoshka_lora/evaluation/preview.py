"""Draw the same pictures at several ranks of a LoRA, and measure how they differ."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import avg_pool2d

from matryoshka_lora.atomic import CREATED_WITH, PathLike, check_output, create_file
from matryoshka_lora.errors import MatryoshkaError, check_list
from matryoshka_lora.formats.open import open_lora
from matryoshka_lora.lora.convert import pipeline_key_format
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.peft.pipeline import draw, open_pipeline, with_lora
from matryoshka_lora.progress import training_bar
from matryoshka_lora.registry import DtypeName
from matryoshka_lora.text import format_percent, format_range, format_table, join_lines
from matryoshka_lora.units import format_size, parse_share, pluralize

_NO_LORA = "no LoRA"
_WHOLE_LORA = "whole LoRA"
_SSIM_WINDOW = 7


@dataclass(frozen=True)
class PreviewPicture:
    """A picture, compared with the one of the whole LoRA.

    Attributes:
        image: The picture; of a video, the frame in the middle.
        distance: The distance of its final latents to those of the whole LoRA, relative to the
            distance without a LoRA: 1 without a LoRA, and 0 for the whole one.
        squared_error: The mean squared difference of the pixels, whose values are from 0 to 1.
        ssim: See `structural_similarity`.
    """

    image: Image.Image
    distance: float
    squared_error: float
    ssim: float


@dataclass(frozen=True)
class PreviewColumn:
    """The pictures of one setting.

    Attributes:
        name: ``"no LoRA"``, ``"whole LoRA"``, or the setting, such as ``"rank 8"``.
        options: The arguments of `export` that write its file, such as ``{"rank": 8}``; empty for
            no LoRA and for the whole one.
        ranks: The rank of each layer by its name; empty for no LoRA.
        size: The size of its file in bytes.
        pictures: The pictures of all seeds of the first prompt, then of the second, and so on.
    """

    name: str
    options: dict[str, Any]
    ranks: dict[str, int]
    size: int
    pictures: tuple[PreviewPicture, ...]

    @property
    def distance(self) -> float:
        """The mean distance of the pictures."""
        return fmean(picture.distance for picture in self.pictures)

    @property
    def psnr(self) -> float | None:
        """The peak signal-to-noise ratio in dB of all pictures; None if they are equal."""
        return _psnr(fmean(picture.squared_error for picture in self.pictures))

    @property
    def ssim(self) -> float:
        """The mean structural similarity of the pictures."""
        return fmean(picture.ssim for picture in self.pictures)

    def cells(self) -> list[str]:
        """Return name, ranks, size and distance for people."""
        ranks = size = ""
        if self.ranks:
            ranks, size = format_range(self.ranks.values()), format_size(self.size)
        return [self.name, ranks, size, format_percent(self.distance)]


@dataclass(frozen=True, repr=False)
class Preview:
    """The pictures of a LoRA at several ranks. A notebook shows the sheet.

    Attributes:
        lora: The path of the LoRA.
        model: The path or Hub id of the pipeline; the name of its class if it was in memory.
        prompts: The prompts.
        seeds: The seeds of each prompt.
        pipeline_args: The arguments of the pipeline.
        within: The largest distance of a suggested setting.
        small_rank: The ranks up to this one are trained, and not suggested: they were not trained
            to draw the pictures of the whole LoRA.
        columns: No LoRA, the settings from the smallest file to the largest, and the whole LoRA.
        notes: Remarks for the user, one sentence each.
    """

    lora: str
    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pipeline_args: dict[str, Any]
    within: float
    small_rank: int
    columns: tuple[PreviewColumn, ...]
    notes: tuple[str, ...] = ()

    @property
    def suggestion(self) -> PreviewColumn | None:
        """The setting of the smallest file whose mean distance is at most `within`, or None."""
        for column in self.columns[1:-1]:
            is_trained = column.options.get("rank", math.inf) <= self.small_rank
            if column.distance <= self.within and not is_trained:
                return column
        return None

    def __repr__(self) -> str:
        """Return a table of the settings, and a suggestion, as `matryoshka preview` prints them."""
        rows = [["setting", "rank", "size", "distance", "PSNR", "SSIM"]]
        for column in self.columns[:-1]:
            psnr = "equal" if column.psnr is None else f"{column.psnr:.1f}"
            rows.append([*column.cells(), psnr, f"{column.ssim:.3f}"])
        rows.append([*self.columns[-1].cells(), "", ""])
        lines = [
            *format_table(rows),
            "  distance: of the final latents from those of the whole LoRA; no LoRA has 100%",
            "  PSNR, SSIM: the pictures compared with those of the whole LoRA; PSNR in dB",
            *self.notes,
        ]
        limit = f"{100 * self.within:.4g}%"
        number = (
            f"{pluralize(len(self.prompts), 'prompt')} and {pluralize(len(self.seeds), 'seed')}"
        )
        if self.suggestion is None:
            lines.append(f"No setting has a distance of at most {limit}, on {number}.")
        else:
            lines.append(
                f"{self.suggestion.name} ({format_size(self.suggestion.size)}) is the smallest "
                f"file with a distance of at most {limit}. This is based on {number}: look at the "
                "pictures."
            )
        return join_lines(lines)

    def sheet(self) -> Image.Image:
        """Return a contact sheet: a row for each prompt and seed, a column for each setting."""
        captions: list[list[str]] = []
        for column in self.columns:
            name, ranks, size, distance = column.cells()
            has_ranks = ranks and name.removesuffix(", trained") != f"rank {ranks}"
            captions.append(
                [name, f"distance {distance}", f"rank {ranks}, {size}" if has_ranks else size]
            )
        titles = [f"seed {seed}: {prompt}" for prompt, seed in self._rows()]
        pictures = [[picture.image for picture in column.pictures] for column in self.columns]
        return _contact_sheet(pictures, titles, captions)

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        comment = PngInfo()
        comment.add_text("Comment", CREATED_WITH)
        self.sheet().save(stream, "PNG", pnginfo=comment)
        return stream.getvalue()

    def _rows(self) -> list[tuple[str, int]]:
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as values that JSON can represent."""
        columns: list[dict[str, Any]] = []
        for column in self.columns:
            pictures: list[dict[str, Any]] = []
            for (prompt, seed), picture in zip(self._rows(), column.pictures, strict=True):
                numbers = {"distance": picture.distance, "psnr": _psnr(picture.squared_error)}
                pictures.append({"prompt": prompt, "seed": seed, **numbers, "ssim": picture.ssim})
            columns.append(
                {
                    "name": column.name,
                    "options": column.options,
                    "layers_by_rank": dict(sorted(Counter(column.ranks.values()).items())),
                    "bytes": column.size,
                    "distance": column.distance,
                    "psnr": column.psnr,
                    "ssim": column.ssim,
                    "pictures": pictures,
                }
            )
        return {
            "lora": self.lora,
            "model": self.model,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "pipeline_args": {name: str(value) for name, value in self.pipeline_args.items()},
            "within": self.within,
            "suggestion": self.suggestion and self.suggestion.name,
            "columns": columns,
            "notes": list(self.notes),
        }

    def save(self, path: PathLike, *, force: bool = False) -> None:
        """Write the sheet as a PNG file, and the numbers as a JSON file of the same name.

        Args:
            path: The file to write, such as ``sheet.png``.
            force: Whether to replace earlier outputs of this package. Nothing else is replaced.

        Raises:
            MatryoshkaError: One of the files already exists or cannot be written.
        """
        sheet, numbers = _check_outputs(path, force)
        text = json.dumps({"created_with": CREATED_WITH, **self.to_dict()}, indent=1)
        with create_file(sheet, force) as file:
            file.write_bytes(self._repr_png_())
        with create_file(numbers, force) as file:
            file.write_text(f"{text}\n", encoding="utf-8")


def preview(
    lora: Lora | PathLike,
    model: Any,
    prompts: Iterable[str],
    ranks: Iterable[int] | None = None,
    *,
    errors: Iterable[float | str] = (),
    seeds: Iterable[int] = (0,),
    within: float | str = "20%",
    pipeline_args: Mapping[str, Any] | None = None,
    dtype: DtypeName | None = None,
    offload: bool = False,
    revision: str | None = None,
    output: PathLike | None = None,
    force: bool = False,
    progress: bool = True,
) -> Preview:
    """Draw the same pictures without a LoRA, at several ranks of it, and with the whole LoRA.

    The pipeline is loaded once. A picture is the one that diffusers draws with the file that
    `export` writes. One of these LoRAs is in memory at a time.

    Args:
        lora: A PEFT folder, a single ``.safetensors`` file, the Hub id of either, or an opened
            LoRA.
        model: A pipeline of diffusers: a folder, a Hub id, or one in memory that has no LoRA.
        prompts: The prompts.
        ranks: Strictly increasing. Defaults to the nested ranks, or to none if there are
            ``errors``.
        errors: Relative errors such as ``"10%"``, for which `export` chooses the ranks of layers.
        seeds: The seeds of each prompt. The noise is made on the CPU, so it is the same on every
            device.
        within: The largest distance of a setting that is suggested.
        pipeline_args: Arguments of the pipeline, such as ``{"num_inference_steps": 20}``.
        dtype: The dtype of a pipeline on disk: ``"bf16"``, ``"fp32"`` or ``"fp16"``. Defaults to
            float32 on a CPU and otherwise to bfloat16, if the hardware supports it.
        offload: Whether the parts of a pipeline on disk are on the accelerator only while they
            compute.
        revision: Branch, tag or commit of the LoRA on the Hub.
        output: The PNG file to write the sheet to; see `Preview.save`.
        force: Whether to replace earlier outputs of this package. Nothing else is replaced.
        progress: Whether a progress bar is shown on stderr.

    Raises:
        MatryoshkaError: An argument is not valid, the LoRA or the pipeline cannot be loaded, they
            do not fit each other, or the output already exists.
        MissingDependencyError: diffusers or PEFT is not installed.
    """
    prompts, seeds = check_list("prompts", prompts), check_list("seeds", seeds)
    if not (prompts and seeds):
        raise MatryoshkaError("Pass at least one of `prompts` and one of `seeds`.")
    shares = [f"{100 * parse_share(error):.4g}%" for error in check_list("errors", errors)]
    max_distance = parse_share(within)
    pipeline_args = dict(pipeline_args or {})
    if output is not None:
        _check_outputs(output, force)
    lora = lora if isinstance(lora, Lora) else open_lora(lora, revision=revision)
    if lora.container == "peft":  # `export` writes a file, too
        lora = lora.convert(pipeline_key_format(lora) or "diffusers")
    options: dict[str, dict[str, Any]] = {f"error {share}": {"error": share} for share in shares}
    if ranks is not None or not shares:
        for rank in lora.check_ranks(ranks):
            if rank < lora.max_rank:
                name = f"rank {rank}, trained" if rank <= lora.small_rank else f"rank {rank}"
                options[name] = {"rank": rank}
    if not options:
        raise MatryoshkaError(f"Rank {lora.max_rank} is the whole LoRA. Pass smaller `ranks`.")
    settings = {name: lora.truncate(**arguments) for name, arguments in options.items()}
    sizes = {name: setting.file_size for name, setting in settings.items()}
    is_plain = lora.nesting is None and all(layer.kind == "LoRA" for layer in lora.layers)
    whole = lora if is_plain else lora.truncate(lora.max_rank)  # LoKr becomes LoRA, for example
    has_one_file = lora.files and lora.small is None
    sizes |= {_NO_LORA: 0, _WHOLE_LORA: lora.size if has_one_file else whole.file_size}

    pipeline, model_name = open_pipeline(model, dtype, offload)
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    # The whole LoRA is the first one: if it does not fit the pipeline, that is seen at once.
    loras: dict[str, Lora | None] = {_WHOLE_LORA: whole, _NO_LORA: None, **settings}
    drawings: dict[str, list[tuple[Image.Image, Tensor]]] = {}
    notes = lora.notes
    if any(setting.get("rank", math.inf) <= lora.small_rank for setting in options.values()):
        notes += (
            "Trained ranks have pictures of their own, so the distance does not rate them. "
            "Look at the pictures.",
        )
    with training_bar(range(len(loras) * len(rows)), "pictures", is_shown=progress) as bar:
        for name, setting in loras.items():
            with with_lora(pipeline, setting) as note:
                if name == _WHOLE_LORA and note:
                    notes += (note,)
                drawings[name] = []
                for prompt, seed in rows:
                    drawings[name].append(_draw(pipeline, prompt, seed, pipeline_args))
                    bar.update()

    columns: list[PreviewColumn] = []
    for name in [_NO_LORA, *sorted(settings, key=lambda name: sizes[name]), _WHOLE_LORA]:
        setting = loras[name]
        drawn = zip(drawings[name], drawings[_WHOLE_LORA], drawings[_NO_LORA], strict=True)
        columns.append(
            PreviewColumn(
                name,
                options.get(name, {}),
                ranks={} if setting is None else setting.ranks,
                size=sizes[name],
                pictures=tuple(
                    _compare(*drawing, *target, base) for drawing, target, (_, base) in drawn
                ),
            )
        )
    result = Preview(
        lora.name,
        model_name,
        prompts,
        seeds,
        pipeline_args,
        max_distance,
        lora.small_rank,
        tuple(columns),
        notes,
    )
    if output is not None:
        try:
            result.save(output, force=force)
        except MatryoshkaError as error:  # the pictures may have taken hours
            sheet = Path(tempfile.mkdtemp(prefix="matryoshka-"), "sheet.png")
            result.save(sheet)
            raise MatryoshkaError(f"{error} The sheet was written to {sheet} instead.") from error
    return result


def structural_similarity(picture: Tensor, other: Tensor) -> float:
    """Return the mean structural similarity (SSIM, Wang et al. 2004) over windows of 7 x 7 pixels.

    Args:
        picture: Shape (channels, height, width), values from 0 to 1.
        other: A picture of the same shape.
    """
    pool = partial(avg_pool2d, kernel_size=_SSIM_WINDOW, stride=1)
    mean, other_mean = pool(picture), pool(other)
    unbiased = _SSIM_WINDOW**2 / (_SSIM_WINDOW**2 - 1)
    squares = pool(picture**2 + other**2)
    variances = unbiased * (squares - mean**2 - other_mean**2)
    covariance = unbiased * (pool(picture * other) - mean * other_mean)
    luminance = (2 * mean * other_mean + 0.01**2) / (mean**2 + other_mean**2 + 0.01**2)
    return float((luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean())


def _check_outputs(path: PathLike, force: bool) -> tuple[Path, Path]:
    """Return the PNG file and the JSON file of an output, after checking both."""
    if Path(path).suffix.lower() != ".png":
        raise MatryoshkaError(f"The output must be a PNG file such as sheet.png, got {path}.")
    sheet = check_output(path, force, is_file=True)
    return sheet, check_output(sheet.with_suffix(".json"), force, is_file=True)


def _draw(
    pipeline: Any, prompt: str, seed: int, options: Mapping[str, Any]
) -> tuple[Image.Image, Tensor]:
    """Return a picture, and its final latents in float32 on the CPU."""
    last: dict[str, Tensor] = {}

    def keep(
        _pipeline: Any, _step: int, _time: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        last.update(tensors)
        return {}

    output = draw(pipeline, prompt, seed, keep, options)
    if hasattr(output, "images"):
        image = output.images[0]
    elif hasattr(output, "frames"):
        image = output.frames[0][len(output.frames[0]) // 2]
    else:
        name = type(pipeline).__name__
        raise MatryoshkaError(f"{name} returns neither images nor frames. Pass another pipeline.")
    if len(getattr(output, "images", ())) > 1:
        raise MatryoshkaError("The pipeline draws several pictures. Pass several `seeds` instead.")
    return image.convert("RGB"), last["latents"].float().cpu()


def _compare(
    image: Image.Image,
    latents: Tensor,
    whole_image: Image.Image,
    whole_latents: Tensor,
    base_latents: Tensor,
) -> PreviewPicture:
    """Compare a picture with that of the whole LoRA, and with the one without a LoRA."""
    change = (base_latents - whole_latents).norm()
    distance = float((latents - whole_latents).norm() / change)
    if not math.isfinite(distance):
        raise MatryoshkaError(
            "The latents with and without the LoRA are equal, or not finite. Pass the model that "
            "the LoRA is for, or another `dtype`."
        )
    picture, whole = (
        torch.from_numpy(np.array(value, dtype=np.float64)).permute(2, 0, 1) / 255
        for value in (image, whole_image)
    )
    return PreviewPicture(
        image,
        distance=distance,
        squared_error=float(((picture - whole) ** 2).mean()),
        ssim=structural_similarity(picture, whole),
    )


def _psnr(squared_error: float) -> float | None:
    """Return the peak signal-to-noise ratio in dB; None for equal pictures."""
    return -10 * math.log10(squared_error) if squared_error else None


def _contact_sheet(
    columns: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    captions: Sequence[Sequence[str]],
) -> Image.Image:
    """Return a grid of pictures, with a title above each row and a caption below each column."""
    width = max(image.width for column in columns for image in column)
    height = max(image.height for column in columns for image in column)
    font_size = max(14, width // 20)
    font = ImageFont.load_default(font_size)
    gap, line = font_size // 2, font_size * 3 // 2
    text_width = max(font.getlength(text) for caption in captions for text in caption)
    step = max(width, math.ceil(text_width)) + gap
    row_height = line + height + gap
    sheet_width = gap + step * len(columns)
    caption_height = line * max(map(len, captions))
    sheet = Image.new("RGB", (sheet_width, row_height * len(titles) + caption_height), "white")
    draw = ImageDraw.Draw(sheet)
    max_characters = int((sheet_width - 2 * gap) / font.getlength("n"))
    for row, title in enumerate(titles):
        top = row * row_height
        text = " ".join(title.split())[:max_characters]  # a line break would need another row
        draw.text((gap, top + gap // 2), text, "black", font)
        for index, column in enumerate(columns):
            sheet.paste(column[row], (gap + index * step, top + line))
    for index, caption in enumerate(captions):
        for number, text in enumerate(caption):
            top = row_height * len(titles) + number * line
            draw.text((gap + index * step, top), text, "black", font)
    return sheet
