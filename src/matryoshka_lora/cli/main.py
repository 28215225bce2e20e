"""``matryoshka``: the verbs, and how their errors look."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import typer

from matryoshka_lora.cli.demo import demo
from matryoshka_lora.cli.measure import evaluate, select
from matryoshka_lora.cli.play import play
from matryoshka_lora.cli.serve import serve
from matryoshka_lora.cli.verbs import export, info, push, reorder, train
from matryoshka_lora.errors import MatryoshkaError

app = typer.Typer(
    name="matryoshka",
    help="Train one LoRA adapter, deploy it at any rank. Start with: matryoshka demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("select")(select)
app.command("reorder")(reorder)
app.command("info")(info)
app.command("export")(export)
app.command("serve")(serve)
app.command("play")(play)
app.command("push")(push)
app.command("demo")(demo)


def main() -> None:
    """Run the command line and exit: 0 done, 1 an error that the message explains, 2 wrong usage."""
    _quiet_libraries()
    try:
        app()
    except MatryoshkaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a name that is too long, a folder that may not be read
        named = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {named}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("matryoshka_lora"):
            raise
        print(
            f"error: this command needs the module {error.name}: install matryoshka-lora with its extras, from its "
            "repository with pip install -e '.[train,eval]'",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: stopped from the keyboard", file=sys.stderr)
        sys.exit(1)


def _quiet_libraries() -> None:
    # What they warn of is about their own next versions, and nothing that a user of this command can change.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A warning is a sentence for the user: no path of our code, no line of it.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
