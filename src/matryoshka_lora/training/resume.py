"""What a run finds in its folder: nothing, checkpoints to go on from, a finished adapter, or another run.

And what it leaves in a checkpoint: how many processes trained it, and no path of this machine.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import write_text
from matryoshka_lora.formats.card import CARD_NAME
from matryoshka_lora.privacy import marked
from matryoshka_lora.training.checks import in_new_words, read_yaml
from matryoshka_lora.training.config import TrainConfig

CONFIG_NAME = "train.yaml"
"""The config with everything filled in, written before the first step."""

FINISHED_NAME = "trainer_state.json"
"""The Trainer's last state, written after the adapter: it says that the run is finished."""

_LENGTH = ("max_steps", "num_train_epochs")
_AFTERWARDS = ("nesting.reorder", "nesting.deploy")
"""What changes nothing before the last step: a finished run is finished anew from its last checkpoint."""

# What may differ between a run and its continuation, since it changes no weight.
_HARMLESS = (
    *("logging_", "log_", "report_to", "run_name", "project", "trackio_", "disable_tqdm"),
    *("ddp_", "save_", "push_to_hub", "hub_", "output_dir", "resume_from_checkpoint"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
)


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        finished: Nothing: the adapter is there.
        checkpoint: Where to go on from; None starts anew.
    """

    finished: bool = False
    checkpoint: Path | None = None

    @property
    def step(self) -> int:
        """The optimizer steps that are done."""
        return 0 if self.checkpoint is None else int(_read_state(self.checkpoint)["global_step"])


class ProcessCount(TrainerCallback, ExportableState):
    """Lets the Trainer write into each checkpoint how many processes trained it."""

    def __init__(self, num_processes: int = 1) -> None:
        self.num_processes = num_processes

    def state(self) -> dict[str, Any]:
        """What the Trainer writes."""
        return {"args": {"num_processes": self.num_processes}, "attributes": {}}


def plan(config: TrainConfig, num_processes: int = 1) -> Plan:
    """What there is to do in a config's folder, which is only looked at.

    Args:
        config: Of this run.
        num_processes: That train together now.

    Raises:
        MatryoshkaError: It holds another run, or something that this run would overwrite.
    """
    output = config.output_dir
    written = config.training.get("resume_from_checkpoint")
    named = None if written in (None, "auto") else Path(written)
    if named is not None and not _is_complete(named):
        raise MatryoshkaError(
            f"resume_from_checkpoint {named} is no complete checkpoint; leave it out to go on from the newest one"
        )
    has_ended = (output / FINISHED_NAME).is_file()
    own = None if config.training.get("save_only_model") else _last_checkpoint(output)
    if not has_ended and own is None:
        if (output / "adapter_config.json").exists():
            raise MatryoshkaError(
                f"{output} holds an adapter that this run did not make, or did not finish: choose another output_dir, "
                "or move it away"
            )
        return Plan() if named is None else _going_on(named, num_processes)
    different = _differences(config)
    # The best checkpoint was chosen by the losses of what is deployed.
    chosen = ("nesting.deploy",) if config.training.get("load_best_model_at_end") else ()
    allowed = {*_LENGTH, *_AFTERWARDS}.difference(chosen)
    harmful = [line for key, line in different.items() if key not in allowed]
    if harmful:
        raise MatryoshkaError(
            f"{output} holds a run with another config: {'; '.join(harmful)}. Choose another output_dir for this one, "
            "or write the old values to go on"
        )
    if has_ended and not different and named is None:
        return Plan(finished=True)
    checkpoint = own if named is None else named
    if checkpoint is None:
        raise MatryoshkaError(
            f"{output} holds a finished run without checkpoints to go on from: choose another output_dir"
        )
    return _going_on(checkpoint, num_processes)


def _going_on(checkpoint: Path, num_processes: int) -> Plan:
    before = _process_count(_read_state(checkpoint))
    if before != num_processes:
        raise MatryoshkaError(
            f"{before} process(es) trained {checkpoint}, and now there are {num_processes}: each step would see "
            "another batch. Start as many as before, or choose another output_dir"
        )
    return Plan(checkpoint=checkpoint)


def _last_checkpoint(output: Path) -> Path | None:
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if _is_complete(path):
            return path
        print(f"{path} was not written to its end and is left out")
    return None


def _is_complete(checkpoint: Path) -> bool:
    # The Trainer writes trainer_state.json last, in place: if it can be read, the main process wrote all other files.
    # Every process writes its random numbers by itself. What a power cut leaves of them shows in their own formats.
    try:
        state = _read_state(checkpoint)
        count = _process_count(state)
        names = ["rng_state.pth"] if count == 1 else [f"rng_state_{index}.pth" for index in range(count)]
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, "pt"):
                pass
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    files = [file for file in checkpoint.rglob("*") if file.suffix in (".pt", ".pth", ".bin")]
    return all((checkpoint / name).is_file() for name in names) and all(map(zipfile.is_zipfile, files))


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    int(state["global_step"])
    return state


def _process_count(state: Mapping[str, Any]) -> int:
    saved = state.get("stateful_callbacks", {}).get(ProcessCount.__name__)
    return 1 if saved is None else int(saved["args"]["num_processes"])


def _differences(config: TrainConfig) -> dict[str, str]:
    file = config.output_dir / CONFIG_NAME
    if not file.is_file():
        raise MatryoshkaError(f"{config.output_dir} holds checkpoints of another program: choose another output_dir")
    before, now = _flat(marked(in_new_words(read_yaml(file)))), _flat(marked(config.to_dict()))
    different = {
        key: f"{key} was {before.get(key, 'not set')} and is now {now.get(key, 'not set')}"
        for key in [*before, *(key for key in now if key not in before)]
        if before.get(key) != now.get(key) and not key.startswith(_HARMLESS)
    }
    for key in {"data.sha256", "eval_data.sha256"} & different.keys():
        if key not in before or key not in now:  # a run of before version 0.2, or no file any more
            del different[key]
        else:
            different[key] = f"the file of {key.removesuffix('.sha256')} has changed"
    return different


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


class PrivateCheckpoints(TrainerCallback):
    """Takes out of each checkpoint the paths of this machine, and what nobody needs to go on.

    That is the pickle of the training arguments, PEFT's card and the path of the best checkpoint, which the Trainer
    also knows by its step.

    Args:
        home: The folder of the checkpoints that were there before.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = self.home / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from transformers.trainer import TRAINING_ARGS_NAME  # slow to import, and here already

        if args.should_save:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            for name in (TRAINING_ARGS_NAME, CARD_NAME):
                (folder / name).unlink(missing_ok=True)
            write_state(state, folder)


def write_state(state: TrainerState, folder: Path) -> None:
    """Write the Trainer's state as the Trainer does, but without the path of its best checkpoint."""
    from transformers.trainer import TRAINER_STATE_NAME

    text = json.dumps({**asdict(state), "best_model_checkpoint": None}, indent=2, sort_keys=True)
    write_text(folder / TRAINER_STATE_NAME, text + "\n")
