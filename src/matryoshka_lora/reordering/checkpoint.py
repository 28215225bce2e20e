"""What the training of ranks has done so far, in a file from which a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

from matryoshka_lora.errors import MatryoshkaError, one_line
from matryoshka_lora.files import replace_file
from matryoshka_lora.reordering.model import Factors

SECONDS = 30.0
"""Between two writings."""


class Checkpoint:
    """A file of tensors that belongs to one run.

    Under torch.distributed every process reads it, and the first one writes it.

    Args:
        path: The file, in safetensors. It need not exist.
        run: What the run depends on, as JSON has it. A file of another run counts as none, and is written over.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.path, self.run = Path(path), json.dumps(run, sort_keys=True)
        self._written, self._fails = time.monotonic(), False

    def read(self) -> dict[str, Tensor]:
        """The tensors that were written last; none where there is no file of this run, or not for every process.

        Raises:
            MatryoshkaError: As `check_checkpoint`.
        """
        found: dict[str, Tensor] = {}
        if check_checkpoint(self.path) == self.run:
            with safe_open(self.path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in list(file.keys())}
        if distributed.is_available() and distributed.is_initialized():
            # All have read before the first may write. They may share their steps, so they begin at the same one.
            mark = {key: int(tensor) if key == "step" else tensor.shape for key, tensor in found.items()}
            marks: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(marks, mark)
            if any(other != mark for other in marks):
                return {}
        return found

    @property
    def is_due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return time.monotonic() - self._written >= SECONDS

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of those that were written before.

        Where that fails, as on a full disk, a warning says so once, and nothing is written any more.
        """
        if is_first_process() and not self._fails:
            kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            try:
                with replace_file(self.path) as new:
                    save_file(kept, new, {"format": "pt", "run": self.run})
            except (SafetensorError, MatryoshkaError) as error:
                self._fails = True
                warnings.warn(
                    f"no checkpoint: {one_line(error)}. The ranks are trained all the same; if that is stopped, it "
                    "begins anew",
                    stacklevel=2,
                )
        self._written = time.monotonic()


def check_checkpoint(path: Path) -> str | None:
    """Of which run a file is a checkpoint; None where there is no file.

    Raises:
        MatryoshkaError: It is damaged, or no checkpoint.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            run: str | None = (file.metadata() or {}).get("run")
    except (OSError, SafetensorError) as error:
        raise MatryoshkaError(
            f"{path} cannot be read: {error}. Delete it, and training the ranks begins anew"
        ) from error
    if run is None:
        raise MatryoshkaError(f"{path} is no checkpoint, and would be written over: move it away")
    return run


def is_first_process() -> bool:
    """Whether this is the first process of torch.distributed, or the only one."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def digest(factors: Factors) -> str:
    """SHA-256 of factors, to the last bit."""
    found = hashlib.sha256()
    for name, pair in sorted(factors.items()):
        for factor in pair:
            found.update(f"{name} {factor.dtype} {tuple(factor.shape)}\n".encode())
            found.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def flat(name: str, factors: Factors) -> dict[str, Tensor]:
    """Factors as tensors of a file."""
    return {
        f"{name}.{kind}.{layer}": one for layer, pair in factors.items() for kind, one in zip("AB", pair, strict=True)
    }


def unflat(name: str, tensors: Mapping[str, Tensor], like: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """What `flat` has made of factors of these layers, on their devices."""
    return {
        layer: (tensors[f"{name}.A.{layer}"].to(A.device), tensors[f"{name}.B.{layer}"].to(B.device))
        for layer, (A, B) in like.items()
    }
