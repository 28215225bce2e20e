"""`matryoshka train`: supervised fine-tuning of a nested adapter with TRL, from a YAML file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer, TrlParser

from matryoshka_lora.atomic import replace_file
from matryoshka_lora.errors import (
    MatryoshkaError,
    check_choice,
    check_integer,
    printable,
    short,
    wrap_errors,
)
from matryoshka_lora.formats import peft_folder
from matryoshka_lora.formats.hub import SMALL_FOLDER
from matryoshka_lora.lora.results import TrainRanksResult
from matryoshka_lora.nesting import Deploy, Order, Scaling, check_ranks
from matryoshka_lora.peft.adapter import NestedAdapter
from matryoshka_lora.peft.base_model import DTYPES, load_model, load_tokenizer
from matryoshka_lora.peft.nest import check_deploy, nest
from matryoshka_lora.rules import get_rule

# The keys that are not fields of SFTConfig.
_MODEL_KEYS = ("base_model", "base_revision", "dtype")
_DATA_KEYS = ("data", "eval_data")
_SECTIONS = ("lora", "nesting")
_NESTING_KEYS = ("ranks", "scaling", "rule", "seed", "deploy", "train_ranks")
# Fields that have no effect here, or only one possible value.
_UNUSED_FIELDS = ("resume_from_checkpoint", "push_to_hub", "peft_type", "task_type")
# Overrides of TRL defaults that do not suit a float32 adapter on a base model of its own dtype.
_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/train",
    "learning_rate": 2e-4,  # TRL's 2e-5 is for full fine-tuning
    "bf16": False,  # autocast would round the factors and P
    "gradient_checkpointing": False,  # it saves memory, but takes a quarter more time
    "save_steps": 0.1,  # ten checkpoints, so that a killed run loses little
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # transformers disables it at the command line's log level
    "ddp_find_unused_parameters": False,  # every rule uses every factor at every step
}
_DEFAULT_RANK = 32
_SETTINGS_NAME = "train-settings.json"
_AFTER_RUN = ("nesting.train_ranks",)  # settings without an effect on the training itself
# The builders of datasets by the extension of a file, and the columns that TRL takes.
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"input_ids"})
# The errors that PEFT, transformers and TRL raise for values that they reject.
_LIBRARY_ERRORS = (TypeError, ValueError, ImportError, OSError, KeyError, RuntimeError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        path: The adapter's folder.
        order: The order of its factors. None in the paper's deployment, and in all processes but
            the first.
        deploy: ``"paper"`` in the paper's deployment.
        train_ranks: The result of training the ranks, if that took place.
    """

    path: Path
    order: Order | None = None
    deploy: Deploy = "reordered"
    train_ranks: TrainRanksResult | None = None

    def __repr__(self) -> str:
        """Return which ranks the adapter has, and the result of training them."""
        ranks = f"every rank (order: {self.order})"
        if self.deploy == "paper":
            ranks = "its nested ranks (deploy: paper)"
        text = f"The adapter {printable(str(self.path))} has {ranks}."
        return text if self.train_ranks is None else f"{text}\n{self.train_ranks}"


# The config


def read_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a training config, check its keys, and fill in defaults. No model is loaded.

    Args:
        path: A YAML file. ``base_model`` is a folder, a Hub id, or absent for the bundled model;
            ``base_revision`` and ``dtype`` are the base model's. ``data`` and ``eval_data`` are a
            file or a list of files, a Hub dataset, or keyword arguments of
            ``datasets.load_dataset``. ``lora`` has fields of ``peft.LoraConfig``. ``nesting`` has
            ranks, scaling, rule, seed, deploy and train_ranks: true, false, or the number of
            examples relative to the run, such as 0.5. All other keys are fields of
            ``trl.SFTConfig``.
        overrides: ``"key=value"``; a key of a section is ``"lora.r"``. The value is YAML.

    Returns:
        The config as `train` takes it.

    Raises:
        MatryoshkaError: The file cannot be read, a key is unknown, ``data`` is missing, or a value
            of ``lora`` or ``nesting`` is not valid.
    """
    config = _load_yaml(path, overrides)
    _check_keys(config, path)
    if not config.get("data"):
        raise MatryoshkaError(f"{path} has no data. Add, for example, 'data: my.jsonl'.")
    if config.get("dtype") is not None:
        check_choice("dtype", config["dtype"], list(DTYPES))
    nesting = _check_nesting(config.get("nesting") or {})
    # Defaults make the scale of rank R 1.
    lora = {"task_type": "CAUSAL_LM", **(config.get("lora") or {})}
    lora.setdefault("r", nesting["ranks"][-1] if "ranks" in nesting else _DEFAULT_RANK)
    rank = check_integer("lora.r", lora["r"])
    lora.setdefault("lora_alpha", rank**0.5 if lora.get("use_rslora") else rank)
    for key in ("lora_alpha", "lora_dropout"):
        if isinstance(lora.get(key), str):  # YAML 1.1 reads 1e1 as a string
            with wrap_errors(f"Cannot use lora.{key}", exceptions=ValueError):
                lora[key] = float(lora[key])
    if not lora.get("target_parameters"):
        lora.setdefault("target_modules", "all-linear")
    if "ranks" in nesting and nesting["ranks"][-1] != rank:
        raise MatryoshkaError(
            f"The largest of nesting.ranks must be lora.r, {lora['r']}, got {nesting['ranks'][-1]}."
        )
    output_dir = config.get("output_dir") or _DEFAULTS["output_dir"]  # without a value it is None
    return {**_DEFAULTS, **config, "output_dir": output_dir, "lora": lora, "nesting": nesting}


def _load_yaml(path: str | os.PathLike[str], overrides: Iterable[str]) -> dict[str, Any]:
    with wrap_errors(f"Cannot read {path}"):  # PyYAML raises errors of many types
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(config, dict):
        raise MatryoshkaError(f"{path} must be a YAML mapping, got {short(config)}.")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise MatryoshkaError(f"{short(key)} has no value. Write {key}=VALUE.")
        with wrap_errors(f"Cannot read the value of {key}"):
            value = yaml.safe_load(text)
        section, _, name = key.rpartition(".")
        values = config.setdefault(section, {}) if section else config
        if not isinstance(values, dict):
            raise MatryoshkaError(f"Cannot set {key}, because {section} is {short(values)}.")
        values[name] = value
    return config


def _check_keys(config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise MatryoshkaError for an unknown key."""
    sft_fields = [field.name for field in fields(SFTConfig) if field.name not in _UNUSED_FIELDS]
    lora_fields = [field.name for field in fields(LoraConfig) if field.name not in _UNUSED_FIELDS]
    known_keys = {
        "": [*_MODEL_KEYS, *_DATA_KEYS, *_SECTIONS, *sft_fields],
        "lora": lora_fields,
        "nesting": list(_NESTING_KEYS),
    }
    for section, known in known_keys.items():
        values = (config.get(section) or {}) if section else config
        if not isinstance(values, Mapping):
            raise MatryoshkaError(f"{section} must be a YAML mapping, got {short(values)}.")
        for key in values:
            if key not in known:
                raise MatryoshkaError(
                    f"{section or path} has no key {short(key)}. The key of a section has a dot, "
                    "such as lora.r; other keys are fields of TRL's SFTConfig."
                )


def _check_nesting(section: Mapping[str, Any]) -> dict[str, Any]:
    """Check the section ``nesting``; return it with a list of ranks and with ``train_ranks``."""
    nesting = {key: value for key, value in section.items() if value is not None}
    train_ranks = nesting.setdefault("train_ranks", True)
    is_share = isinstance(train_ranks, float) and 0 < train_ranks < math.inf
    if not (is_share or isinstance(train_ranks, bool)):
        raise MatryoshkaError(
            "nesting.train_ranks must be true, false, or a number of examples relative to the run "
            f"such as 0.5, got {short(train_ranks)}."
        )
    rule = get_rule(nesting.get("rule", "lora"))
    check_choice("scaling", nesting.get("scaling", "none"), get_args(Scaling))
    check_deploy(nesting.get("deploy", "reordered"), rule)
    if "ranks" in nesting:
        ranks = nesting["ranks"]
        if isinstance(ranks, str):  # 1,2,4 without brackets
            ranks = [int(rank) if rank.strip().isdigit() else rank for rank in ranks.split(",")]
        elif not isinstance(ranks, list):
            ranks = [ranks]
        nesting["ranks"] = list(check_ranks(ranks))
    return nesting


# Training


def train(config: Mapping[str, Any]) -> TrainResult:
    """Train a nested adapter, or resume from the last checkpoint in ``output_dir``.

    The Trainer's checkpoints are in ``output_dir``, and the adapter in its folder ``adapter``.
    Under ``accelerate launch`` every process calls this function, and the first one writes the
    adapter.

    Args:
        config: From `read_config`.

    Raises:
        MatryoshkaError: A value is rejected, or an earlier run has other settings.
    """
    output_dir = Path(str(config["output_dir"]))
    path = output_dir / "adapter"
    _check_same_settings(config, output_dir, is_finished=path.exists())
    if path.exists():
        logger.info("%s is finished. To train with other settings, set another output_dir.", path)
        lora = peft_folder.read(path)
        return TrainResult(path, lora.order, lora.deploy)
    adapter, trainer = build_trainer(config)
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        with replace_file(output_dir / _SETTINGS_NAME) as file:
            file.write_text(json.dumps(_digests(config), indent=2))
    _train_or_resume(adapter, trainer, output_dir)
    result = _train_ranks_and_save(adapter, trainer, path, config["nesting"]["train_ranks"])
    trainer.accelerator.end_training()
    return result


def _digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each setting except the folder: values may hold tokens and paths."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if key in _SECTIONS:
            settings.update({f"{key}.{name}": field for name, field in value.items()})
        elif key != "output_dir":
            settings[key] = value
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        for key, value in settings.items()
    }


def _check_same_settings(config: Mapping[str, Any], output_dir: Path, is_finished: bool) -> None:
    """Raise MatryoshkaError if an earlier run was of another adapter, or is finished otherwise."""
    file = output_dir / _SETTINGS_NAME
    if not file.exists() or not (is_finished or last_checkpoint(output_dir)):
        return
    old, new = json.loads(file.read_text()), _digests(config)
    changed = sorted(key for key in old | new if old.get(key) != new.get(key))
    if not is_finished:  # it may go on with more steps, for example
        prefixes = ("base_", "lora.", "nesting.")
        changed = [key for key in changed if key.startswith(prefixes) and key not in _AFTER_RUN]
    if changed:
        raise MatryoshkaError(
            f"The run in {output_dir} has other settings: {', '.join(changed)}. Set another "
            "output_dir, or the settings of this run."
        )


def build_trainer(config: Mapping[str, Any]) -> tuple[NestedAdapter, SFTTrainer]:
    """Load the base model and the data of a config, and return the adapter and its Trainer.

    Args:
        config: From `read_config`.

    Raises:
        MatryoshkaError: A value is rejected.
    """
    not_of_trl = (*_MODEL_KEYS, *_DATA_KEYS, *_SECTIONS)
    with wrap_errors("Cannot use the config", exceptions=_LIBRARY_ERRORS):
        arguments = _sft_config({k: v for k, v in config.items() if k not in not_of_trl})
        model_options = {"dtype": config.get("dtype"), **(arguments.model_init_kwargs or {})}
        if "torch_dtype" in model_options:  # the old name of dtype
            model_options["dtype"] = model_options.pop("torch_dtype")
        revision = model_options.pop("revision", config.get("base_revision"))
        lora = LoraConfig(**{"revision": revision, **config["lora"]})
    arguments.model_init_kwargs = None  # they are for a model that SFTTrainer would load
    set_seed(arguments.seed)
    train_dataset = _load_dataset(config["data"], arguments.dataset_text_field)
    eval_dataset = None
    if config.get("eval_data") is not None:
        eval_dataset = _load_dataset(config["eval_data"], arguments.dataset_text_field)
    nesting = {"seed": arguments.seed, **config["nesting"]}
    del nesting["train_ranks"]
    base_model = config.get("base_model")
    with wrap_errors("Cannot use the config", exceptions=_LIBRARY_ERRORS):
        base = load_model(base_model, revision=revision, device=arguments.device, **model_options)
        adapter = nest(get_peft_model(base, lora), **nesting)
        trainer = SFTTrainer(
            model=adapter.model,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_tokenizer(base_model, revision),
            callbacks=[adapter.callback()],
        )
    for A, B in adapter.layer_factors().values():
        A.data = A.data.float()  # SFTTrainer casts them to bfloat16 on a quantized base
        B.data = B.data.float()
    # TRL's card would overwrite a README.md in output_dir.
    trainer.create_model_card = lambda *args, **kwargs: None
    return adapter, trainer


def _sft_config(values: Mapping[str, Any]) -> SFTConfig:
    """Parse the fields of SFTConfig, as TRL's own commands do."""

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise ValueError(message)  # instead of leaving the program

    template_path = str(values.get("chat_template_path") or "")
    if template_path and not template_path.endswith((".jinja", ".j2")):
        raise MatryoshkaError(
            f"chat_template_path is {short(template_path)}, but only .jinja files are supported: "
            "loading a model's template may add untrained tokens."
        )
    has_accelerator = torch.accelerator.is_available()
    defaults: dict[str, Any] = {
        "use_cpu": not has_accelerator,
        "dataloader_pin_memory": has_accelerator,
    }
    arguments = {**defaults, **values}
    for key, value in arguments.items():
        if isinstance(value, (int, float)):  # as a string, so that the parser checks the type
            arguments[key] = str(value)
        if value is False and key.endswith("_strategy"):
            arguments[key] = "no"  # YAML 1.1 parses `no` as False
    parser = Parser([SFTConfig])
    parser.set_defaults_with_config(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of fields that TRL sets itself
        return parser.parse_args_into_dataclasses([])[0]


def _load_dataset(
    data: str | list[str] | Mapping[str, Any], text_field: str
) -> Dataset | IterableDataset:
    """Load a dataset, and fail early on columns that TRL cannot use.

    Args:
        data: A file or a list of files, a Hub dataset, or keyword arguments of
            ``datasets.load_dataset``.
        text_field: The name of a column of strings to train on as a whole.
    """
    hint = "Pass a file or a dataset that datasets.load_dataset() can load."
    with wrap_errors(f"Cannot read the data {short(data)}", hint):
        if isinstance(data, Mapping):
            arguments = dict(data)
        else:
            first_file = data[0] if isinstance(data, list) else data
            builder = _BUILDERS.get(Path(first_file).suffix)
            arguments = {"path": builder, "data_files": data} if builder else {"path": data}
        dataset = load_dataset(**{"split": "train", **arguments})
    columns = set(dataset.column_names or ())
    if not columns:  # a stream may not know its columns
        return dataset
    used_columns = [required for required in (*_COLUMNS, {text_field}) if required <= columns]
    if not used_columns:
        raise MatryoshkaError(
            f"{short(data)} has the columns {', '.join(sorted(columns))}. Pass examples with a "
            "prompt and a completion, with messages, or with text."
        )
    if isinstance(dataset, Dataset):
        for column in used_columns[0]:
            has_nulls = dataset.data.column(column).null_count > 0
            if has_nulls or not isinstance(dataset[0][column], (str, list)):
                raise MatryoshkaError(
                    f"The column {column} of {short(data)} must have a string or a list in each "
                    "row."
                )
    return dataset


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the path of the checkpoint that a run resumes from, if there is one."""
    # Only the first process creates the folder, so it may not exist yet in another one.
    checkpoint: str | None = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    return checkpoint


def _train_or_resume(adapter: NestedAdapter, trainer: SFTTrainer, output_dir: Path) -> None:
    """Train, from the last checkpoint if there is one."""
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is not None:
        logger.info("Resuming from %s. To start a new run, set another output_dir.", checkpoint)
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        has_steps = state.global_step < max(state.max_steps, trainer.args.max_steps)
        has_epochs = trainer.args.num_train_epochs > (state.epoch or 0)
        if not has_steps and not (has_epochs and trainer.args.max_steps <= 0):
            # The run is finished, and Trainer.train() would take another step.
            final = Path(checkpoint)
            if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
                # Its folder may have been moved.
                final = final.with_name(Path(state.best_model_checkpoint).name)
            adapter.model.load_adapter(str(final), adapter.name, is_trainable=True)
            trainer.state = state
            return
    hint = "Check data, max_length and the batch sizes."
    with wrap_errors("Cannot train", hint, _LIBRARY_ERRORS):
        trainer.train(resume_from_checkpoint=checkpoint)


def _train_ranks_and_save(
    adapter: NestedAdapter, trainer: SFTTrainer, path: Path, share: bool | float
) -> TrainResult:
    """Train the ranks, if asked for, and let the first process save the adapter and tokenizer."""
    # Restore the forward that accelerate has replaced, and leave train mode: the run is over.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    ranks_result = None
    if share and adapter.deploy != "paper":
        logger.info(
            "Training the low ranks. If the process is killed, the same command repeats this part."
        )
        max_examples = None if share is True else share
        try:
            ranks_result = adapter.train_ranks(
                trainer, max_examples=max_examples, seed=trainer.args.seed
            )
        except MatryoshkaError as error:
            logger.warning("The ranks were not trained: %s", error)
    adapter.save(path)  # reordered by SVD, if it has no order
    if not trainer.is_world_process_zero():
        return TrainResult(path, train_ranks=ranks_result)
    trainer.processing_class.save_pretrained(path)
    lora = peft_folder.read(path)
    small = f" The low ranks are in {path / SMALL_FOLDER}." if lora.small else ""
    logger.info("Saved %s (order: %s, deploy: %s).%s", path, lora.order, lora.deploy, small)
    return TrainResult(path, lora.order, lora.deploy, ranks_result)
