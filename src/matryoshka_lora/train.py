"""`matryoshka train`: a YAML file, TRL's parser and trainer, and a nested adapter at the end."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_lora.errors import MatryoshkaError, explained
from matryoshka_lora.files.peft import CONFIG_NAME
from matryoshka_lora.nesting import Nesting, get_rule

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from matryoshka_lora.adapter import NestedAdapter

_OWN = ("model", "dtype", "data", "eval_data", "lora", "nesting")
_FIXED = ("resume_from_checkpoint", "push_to_hub", "peft_type", "task_type")  # no choice here
_NESTING = ("ranks", "scaling", "rule", "seed", "deploy", "reorder")
# Where TRL's defaults do not suit an adapter in float32 on a base that has its own dtype already.
_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/train",
    "learning_rate": 2e-4,  # TRL's 2e-5 is for all weights
    "bf16": False,  # autocast would round the factors and P
    "gradient_checkpointing": False,  # it takes a quarter more time to save memory
    "save_steps": 0.1,  # ten checkpoints: a killed run loses little
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # the command line's level of logging would hide the bars
    "ddp_find_unused_parameters": False,  # every rule uses every factor at every step
}
# Files of rows, and the columns that TRL takes.
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"input_ids"})
# What PEFT, transformers and TRL refuse values with.
_REFUSALS = (TypeError, ValueError, ImportError, OSError, KeyError, RuntimeError)


def read_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a training config and refuse what is no key of it, before a model is loaded.

    Args:
        path: A YAML file. ``model`` is a folder, a hub id, or absent for the embedded model;
            ``data`` and ``eval_data`` are a file of rows, a hub dataset, or keywords of
            ``datasets.load_dataset``; ``lora`` has fields of ``peft.LoraConfig``; ``nesting`` has
            ranks, scaling, rule, seed, deploy, reorder; the other keys are ``trl.SFTConfig``'s.
        overrides: ``"key=value"``; a key of a section is ``"lora.r"``.

    Raises:
        MatryoshkaError: The file cannot be read, a key is unknown, or there is no ``data``.
    """
    import yaml
    from peft import LoraConfig
    from trl import SFTConfig

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        for key, equals, value in (override.partition("=") for override in overrides):
            section, dot, name = key.rpartition(".")
            if not equals:
                raise MatryoshkaError(f"{key!r} has no value: write {key}=VALUE")
            (config.setdefault(section, {}) if dot else config)[name] = yaml.safe_load(value)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise MatryoshkaError(f"cannot read the config {path}: {error}") from error
    theirs = [[x.name for x in fields(k) if x.name not in _FIXED] for k in (SFTConfig, LoraConfig)]
    known = {"": [*_OWN, *theirs[0]], "lora": theirs[1], "nesting": list(_NESTING)}
    for section, names in known.items():
        keys = (config.get(section) or {}) if section else config
        if not isinstance(keys, dict):
            raise MatryoshkaError(
                f"{section or path} is {str(keys)!r:.40}: write keys with values, as data: my.jsonl"
            )
        for key in (key for key in keys if key not in names):
            near = [f"{home}.{key}".strip(".") for home in known if key in known[home]]
            near = near or get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `matryoshka train --help`"
            raise MatryoshkaError(f"{section or 'the config'} has no key {key!r}; {hint}")
    if not config.get("data"):
        raise MatryoshkaError(f"{path} names no data: write for example data: my.jsonl")
    if config.get("dtype") not in (None, "bf16", "fp32", "fp16"):
        raise MatryoshkaError(f"dtype is {config['dtype']!r}; write bf16, fp32 or fp16")
    nesting, lora = _checked_nesting(config.get("nesting") or {}), dict(config.get("lora") or {})
    rank = lora.setdefault("r", max(nesting.get("ranks") or [32]))
    lora.setdefault("lora_alpha", rank**0.5 if lora.get("use_rslora") else rank)  # the scale is 1
    if not lora.get("target_parameters"):
        lora.setdefault("target_modules", "all-linear")
    return {**_DEFAULTS, **config, "lora": {"task_type": "CAUSAL_LM", **lora}, "nesting": nesting}


def _checked_nesting(given: Mapping[str, Any]) -> dict[str, Any]:
    nesting = dict(given)
    if (by := nesting.setdefault("reorder", "trained")) not in ("svd", "trained"):
        raise MatryoshkaError(f"nesting.reorder is {by!r}; write svd or trained")
    get_rule(nesting.get("rule", "lora"))
    if (ranks := nesting.get("ranks")) is not None:
        if isinstance(ranks, str):  # 1,2,4 without brackets
            ranks = [int(rank) if rank.strip().isdigit() else rank for rank in ranks.split(",")]
        nesting["ranks"] = list(Nesting(tuple(ranks if isinstance(ranks, list) else [ranks])).ranks)
    return nesting


def train(config: Mapping[str, Any]) -> Path:
    """Train a nested adapter; go on from the last checkpoint in ``output_dir``, if there is one.

    The Trainer's checkpoints are in ``output_dir``, the adapter in its folder ``adapter``. Under
    ``accelerate launch`` every process calls this function and the first one writes. There, orders
    that need data are not made: reorder the saved adapter afterwards. Under FSDP and DeepSpeed
    the Trainer writes the adapter, as plain LoRA.

    Args:
        config: From `read_config`.

    Returns:
        The adapter's folder.

    Raises:
        MatryoshkaError: A value is refused.
    """
    output = Path(str(config["output_dir"]))
    target = output / "adapter"
    if target.exists():
        print(f"{target} is finished. To train with other settings, name another output_dir")
        return target
    adapter, trainer = _prepare(config)
    _run(adapter, trainer, output)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(output / "unfinished"))
        if trainer.is_world_process_zero():
            (output / "unfinished").rename(target)
    elif trainer.is_world_process_zero():
        _save(adapter, trainer, config["nesting"], target)
    trainer.accelerator.end_training()
    return target


def _prepare(config: Mapping[str, Any]) -> tuple[NestedAdapter, SFTTrainer]:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from trl import SFTTrainer

    from matryoshka_lora.models import load_model, load_tokenizer
    from matryoshka_lora.nested import nest

    with explained("the config is refused", kinds=_REFUSALS):
        arguments = _arguments({k: v for k, v in config.items() if k not in _OWN})
        options = {"dtype": config.get("dtype"), **(arguments.model_init_kwargs or {})}
        options["dtype"] = options.pop("torch_dtype", options["dtype"])  # the older name
        revision = options.pop("revision", None)
        lora = LoraConfig(**{"revision": revision, **config["lora"]})
    arguments.model_init_kwargs = None  # for the model, which is made here
    set_seed(arguments.seed)
    name, evaluated = config.get("model"), config.get("eval_data")
    text = arguments.dataset_text_field
    data, held_out = (None if x is None else _rows(x, text) for x in (config["data"], evaluated))
    nesting = {key: value for key, value in config["nesting"].items() if key != "reorder"}
    with explained("the config is refused", kinds=_REFUSALS):
        base = load_model(name, revision=revision, device=arguments.device, **options)
        adapter = nest(get_peft_model(base, lora), **{"seed": arguments.seed, **nesting})
        trainer = SFTTrainer(
            model=adapter.model,
            args=arguments,
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=load_tokenizer(name, revision),
            callbacks=[adapter.callback()],
        )
    for factor in (x for pair in adapter.parameters().values() for x in pair):
        factor.data = factor.data.float()  # SFTTrainer rounds those of a quantised base
    # TRL's card would replace the README.md of a folder that has one.
    trainer.create_model_card = lambda *args, **kwargs: None
    return adapter, trainer


def _arguments(training: Mapping[str, Any]) -> SFTConfig:
    import torch
    from trl import SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise ValueError(message)

    if not str(training.get("chat_template_path") or ".jinja").endswith((".jinja", ".j2")):
        raise MatryoshkaError("chat_template_path would add untrained tokens: name a .jinja file")
    gpu = torch.accelerator.is_available()
    # As text, so that the parser checks values as it does those of a command line.
    given = {
        key: str(value) if isinstance(value, (int, float)) else value
        for key, value in {"use_cpu": not gpu, "dataloader_pin_memory": gpu, **training}.items()
    }
    # YAML reads `no` as false.
    given |= {k: "no" for k, x in given.items() if x == "False" and k.endswith("_strategy")}
    parser = Parser([SFTConfig])
    parser.set_defaults_with_config(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that TRL sets itself
        return parser.parse_args_into_dataclasses([])[0]


def _rows(data: str | list[str] | Mapping[str, Any], text: str) -> Dataset:
    """Return rows, and refuse those that TRL would fail at; ``text`` is a column of whole texts."""
    from datasets import Dataset, load_dataset

    with explained(f"the data {data!s:.80} cannot be read", "Give rows that datasets can load"):
        first: Any = data[0] if isinstance(data, list) else data
        if isinstance(data, Mapping):
            given = dict(data)
        elif kind := _KINDS.get(Path(first).suffix):
            given = {"path": kind, "data_files": data}
        else:
            given = {"path": data}
        found = load_dataset(**{"split": "train", **given})
    names = {*(found.column_names or ())}
    columns = next((each for each in (*_COLUMNS, {text}) if each <= names), set[str]())
    for name in columns if isinstance(found, Dataset) else ():  # a stream has no first row yet
        if found.data.column(name).null_count or not isinstance(found[0][name], (str, list)):
            raise MatryoshkaError(f"a {name} of {data!s:.200} is no text: give one in each row")
    if names and not columns:
        raise MatryoshkaError(
            f"{data!s:.200} has the columns {', '.join(sorted(names))}: give prompt and "
            "completion, or messages, or text"
        )
    return found


def _run(adapter: NestedAdapter, trainer: SFTTrainer, output: Path) -> None:
    from peft import PeftConfig
    from transformers import TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(output) if output.is_dir() else None  # process 0 makes it
    if checkpoint is not None:
        print(f"Going on from {checkpoint}. Name another output_dir for another run")
        if Path(checkpoint, CONFIG_NAME).is_file():  # sharded training writes none
            old, new = PeftConfig.from_pretrained(checkpoint), adapter.model.peft_config
            for key in ("r", "lora_alpha", "use_rslora", "target_modules"):
                if getattr(old, key) != getattr(new[adapter.name], key):
                    raise MatryoshkaError(
                        f"{checkpoint} has another lora.{key}: name another output_dir"
                    )
        state, args = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json"), trainer.args
        longer = args.max_steps <= 0 and args.num_train_epochs > (state.epoch or 0)
        if state.global_step >= max(state.max_steps, args.max_steps) and not longer:
            at = (args.load_best_model_at_end and state.best_model_checkpoint) or checkpoint
            adapter.model.load_adapter(str(output / Path(at).name), adapter.name, is_trainable=True)
            trainer.state = state
            return  # a Trainer would take one step more
    with explained("cannot train", "Look at data, max_length and batch sizes", _REFUSALS):
        trainer.train(resume_from_checkpoint=checkpoint)


def _save(
    adapter: NestedAdapter, trainer: SFTTrainer, nesting: Mapping[str, Any], target: Path
) -> None:
    by: Any = "svd" if adapter.order == "paper" else nesting["reorder"]
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    if by != "svd" and trainer.args.world_size > 1:
        print(f"One process goes on: matryoshka reorder {target} -o NEW --by {by} --data FILE")
    elif by != "svd":
        print("Training the lower ranks. After a kill, the same command begins this part anew")
        try:
            adapter.reorder(by, trainer, seed=trainer.args.seed)
        except MatryoshkaError as error:
            print(f"The ranks are not {by}, and their order is svd: {error}")
    adapter.save(target)  # by its SVD, where it has no order
    trainer.processing_class.save_pretrained(target)
    print(f"{target} holds every rank, in the order {adapter.order or 'svd'}")
