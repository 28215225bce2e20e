"""The entry point of the command line."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from matryoshka_lora.cli import file_commands, model_commands
from matryoshka_lora.cli.terminal import is_main_process, with_flags
from matryoshka_lora.errors import MatryoshkaError, optional_imports, printable

START = """Train one LoRA adapter, deploy it at any rank. What do you have?

  nothing yet     matryoshka demo                         train a small adapter, query every rank
  data            matryoshka train CONFIG.yaml            train an adapter for every rank
  a LoRA file     matryoshka export LORA.safetensors --error 10% -o small.safetensors
  a LoRA folder   matryoshka info FOLDER                  see the size and error of each rank
                  matryoshka reorder FOLDER -o nested     make every rank usable
  several LoRAs   matryoshka combine A B -o sum           add them, usable at every rank
  a tuned model   matryoshka extract BASE TUNED --rank 64 -o lora

matryoshka --help lists the other commands, matryoshka COMMAND --help explains one."""

app = typer.Typer(
    name="matryoshka",
    help="Train one LoRA adapter, deploy it at any rank.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
app.command("demo")(model_commands.demo)
app.command("train")(model_commands.train)
app.command("info")(file_commands.info)
app.command("reorder")(file_commands.reorder)
app.command("train-ranks")(model_commands.train_ranks)
app.command("combine")(file_commands.combine)
app.command("extract")(file_commands.extract)
app.command("export")(file_commands.export)
app.command("preview")(model_commands.preview)
app.command("eval")(model_commands.evaluate)
app.command("select")(model_commands.select)
app.command("serve")(model_commands.serve)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train one LoRA adapter, deploy it at any rank."""
    if version:
        from matryoshka_lora import __version__

        typer.echo(f"matryoshka-lora {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(START)


def main() -> None:
    """Run the command line.

    Exit status: 0 success, 1 an error with a message, 2 wrong usage, 130 Ctrl-C.
    """
    _configure_libraries()
    try:
        with optional_imports():
            app()
    except (MatryoshkaError, OSError, MemoryError) as error:
        print(f"error: {_with_options(str(error))}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as exit_request:
        if exit_request.code == 130:  # Ctrl-C
            print("Stopped.", file=sys.stderr)
        raise


class _LineFormatter(logging.Formatter):
    """Escapes control characters: a message may hold a name from a file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(_with_options(super().format(record)))


def _configure_libraries() -> None:
    """Show the log and all characters, and hide warnings that no user can act on."""
    logger = logging.getLogger("matryoshka_lora")
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may not have all characters
        sys.stdout.reconfigure(errors="backslashreplace")
    # The warnings of transformers and TRL are about their own next versions. diffusers warns of
    # each part of a pipeline without a layer of a LoRA.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # bitsandbytes warns of a missing kernel for 4 bits when PEFT imports it, for any model.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Otherwise torch's threads spin while they wait, which is five times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = lambda message, *_args, **_kwargs: (
        f"warning: {printable(str(message))}\n"
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT looks for the bundled model on the Hub.
    warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config")


def _with_options(message: str) -> str:
    """Return a message with its parameters written as the options of the commands."""
    if sys.argv[1:2] == ["train"]:
        return message  # they are keys of its YAML file
    commands = typer.main.get_group(app).commands.values()
    options = {
        str(parameter.name)
        for command in commands
        for parameter in command.params
        if parameter.param_type_name == "option"
    }
    return with_flags(message, options)
