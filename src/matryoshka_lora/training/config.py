"""The training config: one YAML file for us, for PEFT's ``LoraConfig`` and for TRL's ``SFTConfig``."""

from __future__ import annotations

import math
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from matryoshka_lora.data.sources import parse_data, with_hash
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.models import DTYPES, EMBEDDED, Quantization
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.privacy import marked, paths_in
from matryoshka_lora.rules import get_rule
from matryoshka_lora.state import By, Deploy
from matryoshka_lora.training.checks import (
    apply_override,
    check_keys,
    check_private,
    check_trainable,
    check_types,
    names,
    read_yaml,
    refuse_old_words,
    write_yaml,
)

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

DEFAULT_RANK = 32
EVAL_SIZE = 200
"""Questions of a built-in task to evaluate on while training, where ``eval_data`` says nothing."""

_OURS = ("model", "dtype", "quantization", "trust_remote_code", "data", "eval_data", "lora", "nesting")
_NESTING = ("ranks", "scaling", "rule", "seed", "deploy", "reorder")

# Where TRL's own defaults do not suit an adapter in float32 on a base that is already in the dtype to compute with.
_TRAINING_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/train",
    "learning_rate": 2e-4,  # TRL's 2e-5 is for all weights
    "bf16": False,  # autocast would round the adapters and p to bfloat16 too, and needs a GPU or use_cpu
    "gradient_checkpointing": False,  # as in transformers; TRL's True takes a quarter more time to save memory
    "save_steps": 0.1,  # a fraction: ten checkpoints, so that a killed run loses little
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # else whoever quiets transformers' log loses the progress bar
    "seed": 42,
}


@dataclass(frozen=True)
class TrainConfig:
    """A checked config with everything filled in. Made by `load_config` or `make_config`.

    Attributes:
        model: `matryoshka_lora.models.load_model`'s name.
        dtype: Of the base: ``"bf16"``, ``"fp32"`` or ``"fp16"``. Adapters are float32.
        quantization: ``"nf4"``, ``"int8"`` or None.
        trust_remote_code: Whether code that comes with the model may run.
        data: What `matryoshka_lora.data.sources.parse_data` returns.
        eval_data: The same for evaluation while training, or None.
        lora: Fields of ``peft.LoraConfig``.
        nesting: Ranks and scales; the scale of the largest rank is that of ``lora``.
        rule: The training rule's name.
        rank_seed: The seed of the ranks that the rule draws.
        deploy: ``"reordered"``, or ``"paper"``, which drops P; see `matryoshka_lora.nest`.
        reorder: What the adapter is reordered by after training, see `matryoshka_lora.NestedAdapter.reorder`; None
            where the paper's deployment is asked for.
        training: Fields of ``trl.SFTConfig``.
    """

    model: str
    dtype: str
    quantization: Quantization | None
    trust_remote_code: bool
    data: dict[str, Any]
    eval_data: dict[str, Any] | None
    lora: dict[str, Any]
    nesting: Nesting
    rule: str
    rank_seed: int
    deploy: Deploy
    reorder: By | None
    training: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and the adapter are written."""
        return Path(self.training["output_dir"]).expanduser()

    @property
    def seed(self) -> int:
        """Of everything random but the ranks and a task's questions."""
        seed: int = self.training["seed"]
        return seed

    @property
    def model_options(self) -> dict[str, Any]:
        """What else transformers is told when it loads the base model."""
        options = self.training.get("model_init_kwargs") or {}
        if not isinstance(options, dict):
            raise MatryoshkaError("model_init_kwargs is text; write a mapping, for example {revision: main}")
        return options

    @property
    def revision(self) -> str | None:
        """Of the base model; the adapter's config keeps it."""
        ours, theirs = (options.get("revision") for options in (self.model_options, self.lora))
        if theirs not in (None, ours) and ours is not None:
            raise MatryoshkaError(f"model_init_kwargs.revision is {ours!r} and lora.revision {theirs!r}: write one")
        revision = theirs if ours is None else ours
        return None if revision is None else str(revision)

    def lora_config(self) -> LoraConfig:
        """PEFT's config.

        Raises:
            MatryoshkaError: PEFT refuses a value.
        """
        from peft import LoraConfig

        try:
            return LoraConfig(**{**self.lora, "revision": self.revision})
        except (TypeError, ValueError, ImportError) as error:
            raise MatryoshkaError(f"lora: {error}") from error

    def sft_config(self) -> SFTConfig:
        """TRL's config, without any token.

        Raises:
            MatryoshkaError: TRL or transformers refuses a value.
        """
        import torch

        from matryoshka_lora.training.trainer import Arguments

        options = {key: value for key, value in self.model_options.items() if key != "token"}
        given = {**self.training, "model_init_kwargs": options or None}
        for key in ("resume_from_checkpoint", "hub_token"):
            given.pop(key, None)
        given.setdefault("dataloader_pin_memory", torch.cuda.is_available())
        given.setdefault("ddp_find_unused_parameters", False)  # every rule uses every factor at every step
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of names that we set, or TRL does
                return Arguments(**given)
        except (TypeError, ValueError, ImportError, OSError) as error:
            raise MatryoshkaError(f"transformers refuses a training argument: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of the YAML file; `make_config` gives an equal config back."""
        nesting = {
            "ranks": list(self.nesting.ranks),
            "scaling": self.nesting.scaling,
            "rule": self.rule,
            "seed": self.rank_seed,
            "deploy": self.deploy,
            "reorder": self.reorder,
        }
        ours = {key: getattr(self, key) for key in _OURS if key not in ("nesting", "eval_data")}
        evaluation = {} if self.eval_data is None else {"eval_data": self.eval_data}
        return {**ours, **evaluation, "nesting": nesting, **self.training}

    def to_yaml(self) -> str:
        """The YAML text for a run's folder, which `load_config` reads as this config but for what others may not see.

        Tokens are left out, and so is an ``output_dir`` that is an absolute path. Of other absolute paths it has the
        last part and a hash, which `load_config` refuses: whoever repeats the run writes these again.
        """
        hidden = ("output_dir",) if paths_in(self.training["output_dir"]) else ()
        return write_yaml(marked({key: value for key, value in self.to_dict().items() if key not in hidden}))


def load_config(path: str | PathLike[str], overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a training config.

    The top level has ``model``, ``dtype``, ``quantization``, ``trust_remote_code``, ``data``, ``eval_data``,
    the sections ``lora`` (fields of ``peft.LoraConfig``) and ``nesting`` (``ranks``, ``scaling``, ``rule``, ``seed``,
    ``deploy``, ``reorder``), and any field of ``trl.SFTConfig``. Among those, ``train_sampling_strategy:
    group_by_length`` puts rows of a like length into a batch, which saves padding.

    Args:
        path: A YAML file.
        overrides: ``"key=value"``, where key may have dots (``"lora.r=8"``) and value is YAML.

    Raises:
        MatryoshkaError: The file cannot be read, or something in it is wrong; the message names the key and the
            nearest right one.
    """
    config = read_yaml(path)
    for override in overrides:
        apply_override(config, override)
    try:
        return make_config(config)
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{path}: {error}") from error


def make_config(config: Mapping[str, Any]) -> TrainConfig:
    """Check a config given as a mapping of the YAML file's form, and fill in what it leaves out.

    Raises:
        MatryoshkaError: As `load_config`.
    """
    from peft import LoraConfig
    from trl import SFTConfig

    check_private(config)
    refuse_old_words(config)
    sections = {"": (*_OURS, *names(SFTConfig)), "lora": names(LoraConfig), "nesting": _NESTING}
    lora, nesting = config.get("lora") or {}, config.get("nesting") or {}
    for section, given in (("", config), ("lora", lora), ("nesting", nesting)):
        check_keys(
            given, sections[section], section, {name: keys for name, keys in sections.items() if name != section}
        )
    if config.get("data") is None:
        raise MatryoshkaError("data is missing; write for example data: family_relationships, or data: my.jsonl")
    arguments = {key: value for key, value in config.items() if key not in _OURS}
    check_types(arguments, SFTConfig)
    check_types(lora, LoraConfig, "lora", {"r": int | None, "lora_alpha": float | None})
    dtype = _one_of("dtype", config.get("dtype", "bf16"), tuple(DTYPES))
    training = {**_TRAINING_DEFAULTS, "fp16": dtype == "fp16", **arguments}
    check_trainable(training, lora)
    lora = _lora(lora, nesting)
    ranks, rule = _nesting(nesting, lora), get_rule(nesting.get("rule", "matryoshka"))
    deploy = typing.cast(Deploy, _one_of("nesting.deploy", nesting.get("deploy", "reordered"), get_args(Deploy)))
    made = TrainConfig(
        model=_text("model", config.get("model", EMBEDDED)),
        dtype=dtype,
        quantization=_quantization(config.get("quantization")),
        trust_remote_code=_flag("trust_remote_code", config.get("trust_remote_code", False)),
        data=with_hash(parse_data(config["data"])),
        eval_data=_eval_data(config, training),
        lora=lora,
        nesting=ranks,
        rule=rule.name,
        rank_seed=_integer("nesting.seed", nesting.get("seed", training["seed"])),
        deploy=deploy,
        reorder=_reorder(nesting.get("reorder"), deploy, ranks),
        training=training,
    )
    made.lora_config()
    made.sft_config()
    return made


def _nesting(nesting: Mapping[str, Any], lora: Mapping[str, Any]) -> Nesting:
    scaling, scale = nesting.get("scaling", "none"), AdapterConfig(lora).scale
    if nesting.get("ranks") is None:
        return Nesting.powers_of_two(lora["r"], scaling, scale)
    made = Nesting(nesting["ranks"], scaling, scale)
    if lora["r"] != made.max_rank:
        raise MatryoshkaError(
            f"lora.r is {lora['r']}, but the largest of nesting.ranks is {made.max_rank}; write the same, or leave "
            "one of them out"
        )
    return made


def _lora(given: Mapping[str, Any], nesting: Mapping[str, Any]) -> dict[str, Any]:
    """With what it leaves out: all linear layers, and the alpha that makes the scale 1."""
    rank, alpha, ranks = given.get("r"), given.get("lora_alpha"), nesting.get("ranks")
    if rank is None:
        rank = DEFAULT_RANK if ranks is None else Nesting(ranks).max_rank
    elif rank < 1:
        raise MatryoshkaError(f"lora.r is {rank}; write a positive integer")
    if alpha is None:
        alpha = rank**0.5 if given.get("use_rslora") else rank
    elif not 0 < alpha < math.inf:
        raise MatryoshkaError(f"lora.lora_alpha is {alpha}; write a positive number")
    defaults = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if given.get("target_parameters"):
        del defaults["target_modules"]
    return {**defaults, **given, "r": rank, "lora_alpha": alpha}


def _quantization(value: Any) -> Quantization | None:
    if value in (None, False, "none"):
        return None
    return typing.cast(Quantization, _one_of("quantization", value, (*get_args(Quantization), "none")))


def _eval_data(config: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any] | None:
    given, off = config.get("eval_data"), training.get("eval_strategy", "no") == "no"
    if off and given is not None:
        raise MatryoshkaError("eval_data is used by eval_strategy only; write eval_strategy: steps, or leave it out")
    if off:
        return None
    if given is not None:
        return with_hash(parse_data(given, split="validation"))
    data = parse_data(config["data"])
    if "task" not in data:
        raise MatryoshkaError("eval_strategy needs eval_data: write what to evaluate on while training")
    return {**data, "split": "validation", "size": EVAL_SIZE}


def _reorder(value: Any, deploy: Deploy, nesting: Nesting) -> By | None:
    if deploy == "paper":
        if value is not None:
            raise MatryoshkaError("nesting.deploy: paper deploys the factors as they were trained: leave reorder out")
        return None
    by: By = "trained" if value is None else value
    if by not in get_args(By):
        raise MatryoshkaError(
            f"nesting.reorder is {value!r}; write one of {', '.join(get_args(By))}. nesting.deploy: paper leaves the "
            "factors as they were trained"
        )
    # One rank alone has no order to learn; its SVD is the same function.
    return "svd" if len(nesting.ranks) == 1 else by


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise MatryoshkaError(f"{name} is {value!r}; write one of {', '.join(allowed)}")
    return str(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MatryoshkaError(f"{name} is {value!r}; write true or false")
    return value


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MatryoshkaError(f"{name} is {value!r}; write an integer")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise MatryoshkaError(f"{name} is {value!r}; write a name")
    return value
