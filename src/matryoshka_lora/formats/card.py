"""README.md beside an adapter: the model card, made of what is in its folder, and the page of a ladder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from matryoshka_lora.files import (
    EVALUATION_FOLDER,
    EVALUATION_NAME,
    PICTURE_NAME,
    WRITTEN_BY_US,
    is_ours,
    read_text,
    write_text,
)
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.privacy import shown
from matryoshka_lora.state import State

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for ``--max-lora-rank``."""

CARD_NAME = "README.md"

_MARK = f"{WRITTEN_BY_US}, and again whenever the adapter is saved: delete this line to keep your own. -->"
_MAX_BYTES = 1 << 24
HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What others call a base model whose name is known here only; the embedded one is 4 bits of these weights."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""How the id of a model on the hub looks; a relative path may look so too."""

_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")

# What a card shows of a training config. All else may be a secret, or nobody's business.
_RECIPE = {
    "": (
        *("model", "dtype", "quantization"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_steps", "num_train_epochs"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "max_grad_norm"),
        *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"),
        *("label_smoothing_factor", "loss_type", "max_length", "packing", "padding_free", "truncation_mode"),
        *("completion_only_loss", "assistant_only_loss", "bf16", "fp16", "gradient_checkpointing"),
        *("load_best_model_at_end", "metric_for_best_model", "seed", "data_seed"),
    ),
    "data": ("task", "path", "dataset", "config", "revision", "split", "size", "seed", "template"),
    "lora": (
        *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out", "init_lora_weights"),
        *("modules_to_save", "trainable_token_indices", "target_parameters", "task_type", "revision"),
    ),
    "model_init_kwargs": ("revision", "attn_implementation"),
    "nesting": ("ranks", "scaling", "rule", "seed", "deploy", "reorder"),
}
_VERSIONS = re.compile(r"# Written by (?:[\w.+-]+ [\w.+-]+(?:, )?)+")
_MAX_RECIPE_BYTES = 1 << 16


def write_card(
    folder: Path, config: AdapterConfig, state: State | None, home: Path | None = None, measured: bool = False
) -> None:
    """Write the model card of an adapter, unless there is one that somebody has written.

    Args:
        folder: Where to write it.
        config: The adapter's.
        state: Its nesting; None for one rank that was cut out.
        home: Where the card will be, with the recipe (``train.yaml``) and the evaluation; None means ``folder``.
        measured: Whether the evaluation is of this very adapter; else the card leaves it out.
    """
    place = folder if home is None else home
    if has_own_card(place):
        return
    write_text(folder / CARD_NAME, make_card(config, state, place, measured))


def has_own_card(folder: Path) -> bool:
    """Whether a folder has a card that somebody has written, which stays whatever is written beside it."""
    card = folder / CARD_NAME
    return card.is_file() and not is_ours(card)


def make_card(config: AdapterConfig, state: State | None, home: Path, measured: bool = False) -> str:
    """The text of the card, in Markdown with the Hugging Face hub's header."""
    named = hub_name(config.base_model)
    title = "A LoRA adapter for every rank" if state else f"A LoRA adapter of rank {config.r}"
    parts = [_header(named), _MARK, f"# {title}", _what(config, state, named)]
    parts += [_curve(home) if measured else "", _recipe(home), _use(config, state, named or "BASE_MODEL")]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_name(base: str | None) -> str:
    """What others call a base model, or "" if it has no name on the hub.

    A folder's name on the machine that trained is of no use to others, and none of their business.
    """
    name = HUB_IDS.get(base or "", base or "")
    return name if HUB_ID.fullmatch(name) and not os.path.exists(name) else ""


def _hub_revision(config: AdapterConfig) -> str:
    """The revision of the base model, or "" if the config names none that could be one."""
    revision = str(config.revision or "")
    return revision if _REVISION.fullmatch(revision) else ""


def _header(base: str) -> str:
    lines = ["---", "library_name: peft", "tags:", "- lora", "- matryoshka-lora"]
    return "\n".join([*lines, *([f"base_model: {base}"] if base else []), "---"])


def _what(config: AdapterConfig, state: State | None, base: str) -> str:
    of = f" for `{base}`" if base else ""
    if state is None:
        return (
            f"An ordinary LoRA adapter{of}, as PEFT, vLLM and others read it: r={config.r}, "
            f"lora_alpha={config['lora_alpha']:g}. It was cut out of a nested adapter by "
            "[matryoshka-lora](https://arxiv.org/abs/2605.07850)."
        )
    ranks = state.ranks
    named = f"any rank from 1 to {ranks[-1]}" if state.reordered else f"rank {', '.join(map(str, ranks))}"
    how = "Rank r is the first r columns, as it was trained."
    if state.reordered:
        how = f"Its factors were reordered (`{state.reordered}`), so each prefix is a good adapter of its rank."
    elif state.rule.fixed:
        how = (
            "Its deployment is the paper's: P is dropped, and rank r is the first r columns as they were trained. Low "
            "ranks are much worse than those of a reordered adapter."
        )
    return (
        f"One adapter{of} that may be used at {named} ([MatryoshkaLoRA](https://arxiv.org/abs/2605.07850), rule "
        f"`{state.rule.name}`). {how} PEFT reads this folder as the adapter of rank {config.r}."
    )


def _curve(home: Path) -> str:
    """Table and picture of its evaluation, if `matryoshka eval` has written one."""
    try:
        table = "\n".join(_rows(json.loads(read_text(home / EVALUATION_FOLDER / EVALUATION_NAME, _MAX_BYTES))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ""
    picture = f"{EVALUATION_FOLDER}/{PICTURE_NAME}"
    image = f"\n\n![Every task at every rank]({picture})" if (home / picture).is_file() else ""
    return f"## How good each rank is\n\nBy rank, ± one standard error over the questions:\n\n{table}{image}"


def _rows(data: dict[str, Any]) -> Iterator[str]:
    ranks = data["ranks"]
    yield f"| | {' | '.join(str(int(rank)) for rank in ranks)} |"
    yield f"|---|{'---|' * len(ranks)}"
    for name, task in data["tasks"].items():
        first = task["metrics"][task["metric"]]
        cells = [with_error(*pair) for pair in zip(first["value"], first["stderr"], strict=True)]
        yield f"| {shown(name)}: {metric_name(task['metric'])}, {int(task['items'])} questions | {' | '.join(cells)} |"


def training_config(home: Path) -> tuple[Mapping[str, Any], str]:
    """What ``train.yaml`` in an adapter's folder says, and its text; nothing where there is none that can be read."""
    try:
        text = read_text(home / "train.yaml", _MAX_RECIPE_BYTES)
        config = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}, ""
    return (config, text) if isinstance(config, Mapping) else ({}, "")


def template_of(home: Path) -> str | None:
    """The ``data.template`` that an adapter was trained with, as ``train.yaml`` in its folder says it."""
    data = training_config(home)[0].get("data")
    template = data.get("template") if isinstance(data, Mapping) else None
    return template if isinstance(template, str) and template.count("{prompt}") == 1 else None


def changed_tokenizer(home: Path, chat: bool = True) -> str:
    """By what options training took another tokenizer than the base model's, as ``train.yaml`` says; empty if none.

    The adapter's folder does not hold that tokenizer. A template matters for chat alone.
    """
    config = training_config(home)[0]
    return " and ".join(key for key in (*["chat_template_path"] * chat, "eos_token") if config.get(key))


def _recipe(home: Path) -> str:
    """Of the training config what `_RECIPE` names."""
    config, text = training_config(home)
    if not config:
        return ""
    found = _allowed(config, _RECIPE[""])
    for section in ("data", "eval_data", "lora", "model_init_kwargs", "nesting"):
        given = config.get(section)
        if isinstance(given, Mapping):
            # A built-in task has settings of its own, which are numbers.
            numbers = [key for key, value in given.items() if isinstance(value, (int, float))]
            more = numbers if section in ("data", "eval_data") else []
            found[section] = _allowed(given, (*_RECIPE[section.removeprefix("eval_")], *more))
    ordered = {key: found[key] for key in config if found.get(key) not in (None, {})}
    first = text.partition("\n")[0]
    versions = f"{first}\n" if _VERSIONS.fullmatch(first) else ""
    written = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True).rstrip().replace("```", "")
    return f"## How it was trained\n\n```yaml\n{versions}{written}\n```"


def _allowed(given: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Those keys of a mapping whose values are plain, or lists and mappings of plain values."""
    return {key: shown(value) for key, value in given.items() if key in keys and _is_shallow(value)}


def _is_shallow(value: Any) -> bool:
    below = [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return all(isinstance(each, (str, int, float, type(None))) for each in below)


def _use(config: AdapterConfig, state: State | None, base: str) -> str:
    revision = _hub_revision(config)
    given = f', revision="{revision}"' if revision else ""
    loaded = f'AutoModelForCausalLM.from_pretrained("{base}"{given})'
    peft = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained({loaded}, "THIS_FOLDER")
```"""
    if state is None:
        return f"## How to use it\n\n{peft}"
    some = state.ranks[len(state.ranks) // 4]
    return f"""## How to use each rank

```python
from matryoshka_lora import load  # pip install matryoshka-lora
from transformers import AutoModelForCausalLM

adapter = load({loaded}, "THIS_FOLDER", rank={some})
adapter.set_rank({config.r})  # costs nothing, between any two calls
```

PEFT, full rank only:

{peft}

One rank as an ordinary adapter for PEFT, all of them for vLLM, one for llama.cpp:

```sh
matryoshka export THIS_FOLDER --rank {some} -o rank-{some}
matryoshka export THIS_FOLDER --format ladder -o ladder  # its README has the vllm serve command
matryoshka export THIS_FOLDER --rank {some} --format gguf -o rank-{some}.gguf
llama-cli -m BASE.gguf --lora rank-{some}.gguf
```"""


def metric_name(key: str) -> str:
    """A metric of the harness as people read it: ``accuracy,none`` is the accuracy, without a filter."""
    return key.removesuffix(",none")


def with_error(value: float | None, error: float | None) -> str:
    """A metric as people read it, with its standard error where there is one; ``"?"`` where there is no value."""
    if value is None:
        return "?"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _serve_command(config: AdapterConfig, ranks: Sequence[int]) -> str:
    """The ``vllm serve`` command for all ranks of a ladder; each is a model of its own name in the API.

    It is for the ladder's own folder: no path of the machine that made it is in it.
    """
    base = hub_name(config.base_model) or "BASE_MODEL"
    revision = f" --revision {_hub_revision(config)}" if _hub_revision(config) else ""
    largest = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), VLLM_RANKS[-1])
    modules = " ".join(f"rank-{rank}=rank-{rank}" for rank in ranks)
    return (
        f"vllm serve {base}{revision} --enable-lora --max-lora-rank {largest} "
        f"--max-loras {len(ranks)} --lora-modules {modules}"
    )


def ladder_readme(config: AdapterConfig, ranks: Sequence[int]) -> str:
    """The README of a ladder, in Markdown: its adapters, and how vLLM and PEFT serve them."""
    missing = "" if hub_name(config.base_model) else " (BASE_MODEL is the base model's folder, or its id)"
    folders = "\n".join(f"* `rank-{rank}`" for rank in ranks)
    return f"""{WRITTEN_BY_US}: delete this line to keep your own. -->

# One adapter at {len(ranks)} ranks

Each folder is an ordinary LoRA adapter, cut out of the same nested one by matryoshka-lora:

{folders}

vLLM serves them all on one base model, and each request names its rank. In this folder{missing}:

```sh
{_serve_command(config, ranks)}
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "rank-{ranks[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
```

PEFT:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "rank-{ranks[0]}")
model.load_adapter("rank-{ranks[-1]}", adapter_name="rank-{ranks[-1]}")
model.set_adapter("rank-{ranks[-1]}")
```
"""


def gguf_ladder_readme(ranks: Sequence[int]) -> str:
    """The README of a ladder of GGUF files, in Markdown: its adapters, and how llama.cpp's server serves them."""
    files = "\n".join(f"* `rank-{rank}/adapter.gguf`, adapter {number}" for number, rank in enumerate(ranks))
    loras = " ".join(f"--lora rank-{rank}/adapter.gguf" for rank in ranks)
    return f"""{WRITTEN_BY_US}: delete this line to keep your own. -->

# One adapter at {len(ranks)} ranks, for llama.cpp

Each file is a LoRA adapter, cut out of the same nested one by matryoshka-lora. llama.cpp's server numbers them in the
order of its command:

{files}

The server loads them all beside one base model. In this folder (BASE.gguf is the base model's file):

```sh
llama-server -m BASE.gguf {loras}
```

Each request turns one of them on:

```sh
curl http://localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"lora": [{{"id": {len(ranks) - 1}, "scale": 1.0}}], "messages": [{{"role": "user", "content": "Hello"}}]}}'
```

Name one in every request. Two at once add up, and a request that names none gets all of them, which is none of the
ranks (`--lora-init-without-apply` does not change that: llama.cpp's issue 28674). The base model alone is
`"lora": [{{"id": 0, "scale": 0.0}}]`.
"""
