"""Exports that PEFT does not read: they are written, read back in PEFT's layout, and that is compared."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_lora.files import replace_file, write_text
from matryoshka_lora.formats.card import CARD_NAME, gguf_ladder_readme
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.formats.write import Ranks, check_layers, cut, write_adapter

if TYPE_CHECKING:
    from matryoshka_lora.serving.on_base import Base, Verified


def export_gguf(
    opened: OpenedAdapter, ranks: Ranks, pad: bool, out: Path, config: Any, base: Base | None, overwrite: bool
) -> Verified | None:
    """Write one GGUF file.

    Args:
        opened: The nested adapter.
        ranks: See `matryoshka_lora.formats.write.cut`.
        pad: As there.
        out: The file.
        config: The transformers config of the base model.
        base: Loads the base model to compare logits on; None compares the layers alone.
        overwrite: Whether the file may be there.

    Raises:
        MatryoshkaError: It cannot be had in this format, or computes something else.
    """
    from matryoshka_lora.formats.gguf import check_extension, read_gguf, write_gguf

    check_extension(out)
    plain = cut(opened, ranks, pad)
    with replace_file(out, overwrite) as file:
        write_gguf(plain, file, config)
        return _check_again(opened, [ranks], [read_gguf(file, plain, config)], base, pad)


def export_gguf_ladder(
    opened: OpenedAdapter, ranks: Sequence[int], folder: Path, config: Any, base: Base | None
) -> Verified | None:
    """Write one GGUF file for each rank, and a README with the server's command; see `export_gguf`."""
    from matryoshka_lora.formats.gguf import GGUF_NAME, read_gguf, write_gguf

    again = []
    for rank in ranks:
        file, plain = folder / f"rank-{rank}" / GGUF_NAME, cut(opened, rank)
        file.parent.mkdir()
        write_gguf(plain, file, config)
        again.append(read_gguf(file, plain, config))
    write_text(folder / CARD_NAME, gguf_ladder_readme(ranks))
    return _check_again(opened, ranks, again, base)


def export_mlx(
    opened: OpenedAdapter, ranks: Ranks, folder: Path, config: Any, stored: Mapping[str, Any], base: Base | None
) -> Verified | None:
    """Write mlx-lm's files; see `export_gguf`. mlx-lm knows one rank, so ranks by layer are always padded.

    Args:
        opened: The nested adapter.
        ranks: See `matryoshka_lora.formats.write.cut`.
        folder: Where to write.
        config: The transformers config of the base model.
        stored: Its ``config.json``. What mlx-lm would misread there is a warning.
        base: Loads the base model to compare logits on; None compares the layers alone.
    """
    from matryoshka_lora.formats.mlx import read_mlx, unread, write_mlx

    if fields := unread(stored):
        warnings.warn(
            "mlx-lm computes something else with this base model: it does not read rope_parameters. Add to the "
            f"base model's config.json: {json.dumps(fields)[1:-1]}",
            stacklevel=3,
        )
    pad = not isinstance(ranks, int)
    plain = cut(opened, ranks, pad)
    write_mlx(plain, folder, config)
    return _check_again(opened, [ranks], [read_mlx(folder, plain)], base, pad)


def _check_again(
    opened: OpenedAdapter, ranks: Sequence[Ranks], again: Sequence[OpenedAdapter], base: Base | None, pad: bool = False
) -> Verified | None:
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(number) for number in range(len(again))]
        for folder, adapter in zip(folders, again, strict=True):
            folder.mkdir()
            write_adapter(folder, adapter)
        return check_folders(opened, ranks, folders, base, pad)


def check_folders(
    opened: OpenedAdapter, ranks: Sequence[Ranks], folders: Sequence[Path], base: Base | None, pad: bool = False
) -> Verified | None:
    """Compare each of PEFT's folders with the nested adapter: its layers, and on a base model the logits.

    Returns:
        The worst difference of logits.

    Raises:
        MatryoshkaError: One computes something else.
    """
    for each, folder in zip(ranks, folders, strict=True):
        check_layers(open_adapter(folder), opened, each, pad)
    if base is None:
        return None
    from matryoshka_lora.serving.on_base import compare_all

    return max(compare_all(opened, ranks, folders, base), key=lambda verified: verified.difference)
