"""The names of formats and dtypes, and what the command line and model cards say of errors."""

from __future__ import annotations

from typing import Literal

Format = Literal["peft", "merged", "ladder", "gguf", "mlx"]
"""The formats of PEFT folders that `export` can write."""

OutputFormat = Literal["peft", "merged", "ladder", "gguf", "mlx", "single"]
"""The formats of all outputs; a single file always stays in its format."""

# A new key format needs: its name here and in ImageKeyFormat, the names of its modules in
# lora_file/keys/naming.py, its keys in keys/formats.py and keys/names.py, and the help of the
# options in cli/arguments.py and cli/file_commands.py. A new model needs its names in
# lora_file/keys/models.py.
KeyFormat = Literal["kohya", "diffusers", "peft"]
"""The formats of a single file's keys; ``"peft"`` makes a PEFT folder of it."""

ImageKeyFormat = Literal["kohya", "diffusers"]
"""The formats of the keys of a file for image models."""

DtypeName = Literal["bf16", "fp32", "fp16"]
"""The dtypes of base models."""

ANSWERS_CAVEAT = "The error does not predict the quality of answers. Run `matryoshka eval`."
"""Shown next to the errors of a PEFT folder."""

PICTURES_CAVEAT = (
    "The error does not predict what pictures look like. Compare pictures of the same seed."
)
"""Shown next to the errors of a single file."""
