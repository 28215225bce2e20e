"""The command line: each command calls one public function, prints its result and the next step."""

from matryoshka_lora.cli.entry_point import app, main

__all__ = ["app", "main"]
