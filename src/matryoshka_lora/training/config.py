"""The training config: one YAML file for us, for PEFT's ``LoraConfig`` and for TRL's ``SFTConfig``."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.models import DTYPES, EMBEDDED, Quantization
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.privacy import marked, paths_in
from matryoshka_lora.rules import get_rule
from matryoshka_lora.training.checks import apply_override, check_keys, check_types, names, read_yaml, write_yaml
from matryoshka_lora.data.sources import parse_data
from matryoshka_lora.training.private import check_private

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

Reorder = Literal["svd", "learned", False]

DEFAULT_RANK = 32
EVAL_SIZE = 200
"""Questions of a built-in task to evaluate on while training, where ``eval_data`` says nothing."""

_OURS = ("model", "dtype", "quantization", "trust_remote_code", "data", "eval_data", "lora", "nesting")
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"rule": "matryoshka", "inference": "prefix", "reorder": False},
}
"""What ``recipe`` stands for in section ``nesting``: ``paper`` trains and deploys as arXiv 2605.07850 does."""

_NESTING = ("ranks", "scaling", "alpha", "rule", "inference", "seed", "reorder")

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
        nesting: Ranks and scales.
        rule: The training rule's name.
        inference: ``"prefix"`` or ``"keep"``, until it is reordered.
        rank_seed: The seed of the ranks that the rule draws.
        reorder: How the adapter is reordered after training: ``"svd"``, ``"learned"`` on a little more of the training
            data, or False, not at all.
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
    inference: Any
    rank_seed: int
    reorder: Reorder
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
            **self.nesting.to_dict(),
            "rule": self.rule,
            "inference": self.inference,
            "seed": self.rank_seed,
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
    ``recipe`` (``default`` or ``paper``, which is short for entries of ``nesting``), the sections ``lora`` (fields of
    ``peft.LoraConfig``) and ``nesting`` (``ranks``, ``scaling``, ``alpha``, ``rule``, ``inference``, ``seed``,
    ``reorder``), and any field of ``trl.SFTConfig``. Among those, ``train_sampling_strategy:
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
    sections = {"": (*_OURS, "recipe", *names(SFTConfig)), "lora": names(LoraConfig), "nesting": _NESTING}
    lora, nesting = config.get("lora") or {}, config.get("nesting") or {}
    for section, given in (("", config), ("lora", lora), ("nesting", nesting)):
        check_keys(
            given, sections[section], section, {name: keys for name, keys in sections.items() if name != section}
        )
    nesting = _with_recipe(config.get("recipe", "default"), nesting)
    if config.get("data") is None:
        raise MatryoshkaError("data is missing; write for example data: family_relationships, or data: my.jsonl")
    arguments = {key: value for key, value in config.items() if key not in (*_OURS, "recipe")}
    check_types(arguments, SFTConfig)
    check_types(lora, LoraConfig, "lora", {"r": int | None, "lora_alpha": float | None})
    dtype = _one_of("dtype", config.get("dtype", "bf16"), tuple(DTYPES))
    training = {**_TRAINING_DEFAULTS, "fp16": dtype == "fp16", **arguments}
    ranks = _nesting(nesting, lora)
    rule, reorder = get_rule(nesting.get("rule", "matryoshka")), _reorder(nesting.get("reorder", "learned"), ranks)
    inference = nesting.get("inference", rule.default_inference)
    made = TrainConfig(
        model=_text("model", config.get("model", EMBEDDED)),
        dtype=dtype,
        quantization=_quantization(config.get("quantization")),
        trust_remote_code=_flag("trust_remote_code", config.get("trust_remote_code", False)),
        data=parse_data(config["data"]),
        eval_data=_eval_data(config, training),
        lora=_lora(lora, ranks),
        nesting=ranks,
        rule=rule.name,
        inference=_one_of("nesting.inference", inference, ("prefix", "keep")),
        rank_seed=_integer("nesting.seed", nesting.get("seed", training["seed"])),
        reorder=reorder,
        training=training,
    )
    made.lora_config()
    made.sft_config()
    return made


def _with_recipe(name: Any, nesting: Mapping[str, Any]) -> dict[str, Any]:
    fixed = RECIPES[_one_of("recipe", name, tuple(RECIPES))]
    for key, value in fixed.items():
        if nesting.get(key, value) != value:
            raise MatryoshkaError(
                f"recipe {name!r} says nesting.{key}: {value}, and the config says {nesting[key]}: leave one of "
                "them out"
            )
    return {**fixed, **nesting}


def _nesting(nesting: Mapping[str, Any], lora: Mapping[str, Any]) -> Nesting:
    scaling, alpha = nesting.get("scaling", "none"), nesting.get("alpha", 1.0)
    rank = lora.get("r")
    if nesting.get("ranks") is None:
        return Nesting.powers_of_two(DEFAULT_RANK if rank is None else rank, scaling, alpha)
    made = Nesting(nesting["ranks"], scaling, alpha)
    if rank not in (None, made.max_rank):
        raise MatryoshkaError(
            f"lora.r is {rank}, but the largest of nesting.ranks is {made.max_rank}; write the same, or leave "
            "one of them out"
        )
    return made


def _lora(given: Mapping[str, Any], nesting: Nesting) -> dict[str, Any]:
    rank = nesting.max_rank
    root = rank**0.5 if given.get("use_rslora") else rank
    alpha = nesting.scale(rank) * root
    if given.get("lora_alpha") is not None and abs(given["lora_alpha"] - alpha) > 1e-9 * alpha:
        wanted = "sqrt" if given.get("use_rslora") else "rank"
        raise MatryoshkaError(
            f"lora.lora_alpha is {given['lora_alpha']}, but the nesting scales rank {rank} by {nesting.scale(rank):g}, "
            f"which is lora_alpha {alpha:g}; leave lora.lora_alpha out, or write nesting.scaling: {wanted} and "
            f"nesting.alpha: {given['lora_alpha']}"
        )
    defaults = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if given.get("target_parameters"):
        del defaults["target_modules"]
    whole = int(alpha) if alpha == int(alpha) else alpha
    return {**defaults, **given, "r": rank, "lora_alpha": whole}


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
        return parse_data(given, split="validation")
    data = parse_data(config["data"])
    if "task" not in data:
        raise MatryoshkaError("eval_strategy needs eval_data: write what to evaluate on while training")
    return {**data, "split": "validation", "size": EVAL_SIZE}


def _reorder(value: Any, nesting: Nesting) -> Reorder:
    if value is False:
        return False
    if value not in ("svd", "learned"):
        raise MatryoshkaError(f"nesting.reorder is {value!r}; write svd, learned or false")
    # One rank alone has no order to learn; its SVD is the same function.
    return "svd" if len(nesting.ranks) == 1 else typing.cast(Reorder, value)


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
