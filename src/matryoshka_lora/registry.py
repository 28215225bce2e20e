"""The formats that a LoRA can be written in, the formats of keys, and the dtypes of factors.

Nothing is imported here until it is used, so that the command line can list the formats quickly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from matryoshka_lora.errors import optional_imports

if TYPE_CHECKING:
    from pathlib import Path

    from matryoshka_lora.lora.lora import Lora
    from matryoshka_lora.lora.save import Written

FormatName = Literal["peft", "single", "merged", "ladder", "gguf", "mlx"]
"""The names of the formats."""

KeyFormat = Literal["kohya", "diffusers", "peft"]
"""The formats of the keys of a LoRA; ``"peft"`` is the format of a PEFT folder."""

ImageKeyFormat = Literal["kohya", "diffusers"]
"""The formats of the keys of a file for image models."""

DtypeName = Literal["bf16", "fp32", "fp16"]
"""The dtypes of factors and of base models."""

ANSWERS_CAVEAT = "The error does not predict the quality of answers. Run `matryoshka eval`."
"""The caveat of language models, and the default."""

PICTURES_CAVEAT = "The error does not predict what pictures look like. Run `matryoshka preview`."
"""The caveat of image models."""

DORA_HINT = "With its base model, `matryoshka extract BASE DORA` writes the closest LoRA."
"""What users of a DoRA adapter can do."""


@dataclass(frozen=True)
class Target:
    """The options of the formats that need more than the LoRA.

    Attributes:
        base_model: The base model, a folder or Hub id. None stands for the one in the config.
        base_revision: Its revision on the Hub.
        ranks: The ranks of a ladder. None stands for the nested ones.
    """

    base_model: str | None = None
    base_revision: str | None = None
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Format:
    """A format of outputs.

    A new format is a module with a function ``write(lora, path, target) -> Written``, and an entry
    in `FORMATS`. ``write`` raises MatryoshkaError if the format cannot represent a LoRA, before it
    computes anything.

    Attributes:
        name: Its name.
        module: The module that writes it.
        description: A phrase for ``--help``.
        load: How another program loads the output, with ``{path}`` for its path.
        caveat: The sentence next to the errors of the output.
        suffix: The suffix of a format that is a file; empty for a folder.
        containers: The containers of the LoRAs that it accepts.
        is_lora: Whether `matryoshka_lora.open` reads the output. The dtype of its factors may be
            chosen, and its module has a function ``file_size(lora) -> int``.
    """

    name: FormatName
    module: str
    description: str
    load: str
    caveat: str = ANSWERS_CAVEAT
    suffix: str = ""
    containers: tuple[Literal["peft", "single"], ...] = ("peft",)
    is_lora: bool = False

    def write(self, lora: Lora, path: Path, target: Target) -> Written:
        """Write a LoRA to a path that does not exist, or into an empty folder.

        The path is temporary, and has another suffix than the output.
        """
        written: Written = self._module().write(lora, path, target)
        return written

    def file_size(self, lora: Lora) -> int:
        """Return the size in bytes of the weights that `write` will write."""
        size: int = self._module().file_size(lora)
        return size

    def _module(self) -> Any:
        with optional_imports():
            return import_module(self.module)


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "peft",
            "matryoshka_lora.formats.peft_folder",
            "a PEFT folder, an ordinary LoRA adapter",
            load="PeftModel.from_pretrained(base_model, {path})",
            is_lora=True,
        ),
        Format(
            "single",
            "matryoshka_lora.formats.single_file",
            "a single file, the usual format for image models",
            load="load {path} with the program that loaded the original",
            caveat=PICTURES_CAVEAT,
            suffix=".safetensors",
            containers=("single",),
            is_lora=True,
        ),
        Format(
            "merged",
            "matryoshka_lora.peft.merged",
            "the base model with the adapter merged into its weights",
            load="vllm serve {path}",
        ),
        Format(
            "ladder",
            "matryoshka_lora.formats.ladder",
            "one PEFT folder for each rank, to serve them all",
            load="matryoshka serve {path} --dry-run",
        ),
        Format(
            "gguf",
            "matryoshka_lora.formats.gguf",
            "a file for llama.cpp",
            load="llama-server -m BASE.gguf --lora {path}, where llama.cpp's convert_hf_to_gguf.py "
            "writes BASE.gguf from the base model",
            suffix=".gguf",
        ),
        Format(
            "mlx",
            "matryoshka_lora.formats.mlx",
            "a folder for mlx-lm",
            load="mlx_lm.generate --model BASE --adapter-path {path} --prompt Hello",
        ),
    )
}
"""The formats by name."""


def caveat_of(formats: Iterable[str]) -> str:
    """Return the caveat of the formats of several LoRAs; the default if they differ."""
    caveats = {FORMATS[name].caveat for name in formats}
    return caveats.pop() if len(caveats) == 1 else ANSWERS_CAVEAT
