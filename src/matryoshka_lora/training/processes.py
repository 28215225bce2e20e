"""A run of several processes, as `accelerate launch` starts them: what one of them does for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import datasets
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import ParallelMode
from transformers.utils import logging as transformers_logging

from matryoshka_lora.errors import MatryoshkaError

Result = TypeVar("Result")


def check_joined(arguments: TrainingArguments) -> None:
    """Make sure that the processes of one launch train together, and in a way that is known to work.

    Without a GPU, and unless told to use CPUs, accelerate takes each of them for a run of its own.

    Raises:
        MatryoshkaError: They do not; the message says what to write instead.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise MatryoshkaError(
            f"{launched} processes were launched, and accelerate finds no accelerator to join them on: write "
            "use_cpu: true to train on CPUs, or launch one process"
        )
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise MatryoshkaError(
            "DeepSpeed ZeRO-3 takes the weights apart before the adapter is attached: write zero_stage: 2, or launch "
            "with FSDP2, which shares out the base model too"
        )


def on_main(work: Callable[[], Result]) -> Result:
    """Do something in the main process only, while the others wait.

    Args:
        work: What it returns is sent to the others by pickle.

    Returns:
        In every process, what ``work`` returned in the main one.

    Raises:
        MatryoshkaError: In every process, if ``work`` raised one.
    """
    state = PartialState()
    outcome: list[Result | Exception | None] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except MatryoshkaError as error:
            outcome = [error]
    # Any other exception ends the main process, and the launcher then ends those that wait here.
    (result,) = broadcast_object_list(outcome)
    if isinstance(result, MatryoshkaError):
        raise result
    return result  # type: ignore[no-any-return]


def leave() -> None:
    """End the group of processes when nothing is left to do, as torch asks of those that exit."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


@contextmanager
def one_voice(arguments: TrainingArguments) -> Iterator[None]:
    """Progress bars in the main process only."""
    silent = arguments.process_index > 0 and transformers_logging.is_progress_bar_enabled()
    if silent:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silent:
            transformers_logging.enable_progress_bar()
            datasets.enable_progress_bars()
