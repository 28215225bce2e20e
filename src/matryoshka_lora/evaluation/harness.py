"""lm-evaluation-harness's Hugging Face backend, with all ranks computed in the same batches."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.evaluation.engine import Engine, Tokens
from matryoshka_lora.peft.adapter import NestedAdapter

_ALL_AT_ONCE = 2**30
# The settings that do not change which token greedy decoding takes.
_GREEDY_SETTINGS = {
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "eos_token_id",
    "max_gen_toks",
    "max_length",
    "max_new_tokens",
    "min_p",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "until",
    "use_cache",
}


class ManyRanksLM(HFLM):  # type: ignore[misc, unused-ignore]
    """The harness's ``HFLM`` for an adapter at several ranks.

    The harness runs once for each rank. At the first run, the engine computes the responses of all
    ranks, and they are cached. If the engine does not support the model, or if a task does not ask
    for greedy decoding, ``HFLM`` computes the responses of one rank in each run. Of several
    processes, each computes a share of the responses.

    Args:
        adapter: The nested adapter. Its model is put into eval mode.
        ranks: The ranks to evaluate; 0 is the base model.
        max_batch_tokens: See `Engine`.

    Attributes:
        lora_rank: The rank whose responses the harness gets. (The ``rank`` of an ``HFLM`` is the
            process index.)
        engine: The engine; it may be replaced.
        is_supported: Whether the engine supports the model. It does not support recurrent states,
            for example.

    Raises:
        MatryoshkaError: The adapter is merged or not active, or a rank is not available.
    """

    def __init__(
        self,
        adapter: NestedAdapter,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Sequence[int],
        max_batch_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        model = adapter.model.eval()
        # longrope's frequencies depend on the longest row of a batch.
        has_longrope = "longrope" in str(model.config)
        self._harness_batch_size = 1 if has_longrope else 8
        # HFLM would tie untied weights and modify the tokenizer, so pass a stub and a copy.
        super().__init__(
            SimpleNamespace(config=model.config, device=model.device),
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=self._harness_batch_size,
        )
        self._model = model
        self.pretrained = model
        self.adapter = adapter
        self.progress = progress
        self.ranks = list(ranks)
        self.lora_rank = self.ranks[0]
        self.engine = Engine(adapter, ranks, max_batch_tokens)
        text = "The quick brown fox jumps over the lazy dog, and sleeps under a large old tree"
        tokens = tuple(self.tokenizer.encode(text, add_special_tokens=False) * 13)
        self.is_supported = (
            not has_longrope and self.backend == "causal" and self.engine.is_supported(tokens[:13])
        )
        self._responses: dict[str, list[Any]] = {}  # by request, one for each rank

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods, and whether they are greedy, at `lora_rank`."""
        return self._respond("loglikelihood", requests)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log-likelihoods of whole strings at `lora_rank`."""
        return self._respond("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return answers at `lora_rank`."""
        return self._respond("generate_until", requests)

    def _respond(self, request_type: str, requests: Sequence[Instance]) -> list[Any]:
        compute = getattr(super(), request_type)
        is_generation = request_type == "generate_until"
        if not self.is_supported or (
            is_generation and not all(self._is_greedy(request.args[1]) for request in requests)
        ):
            self.adapter.set_rank(self.lora_rank)
            self.batch_size_per_gpu = self._harness_batch_size
            return _divide_over_processes(
                requests, lambda share: list(compute(share, disable_tqdm=not self.progress))
            )

        keys = [hash_args(request_type, request.args) for request in requests]
        # The requests of one task begin with the same few-shot examples.
        new_requests_by_task: dict[str | None, dict[str, Instance]] = defaultdict(dict)
        for key, request in zip(keys, requests, strict=True):
            if key not in self._responses:
                new_requests_by_task[request.task_name][key] = request

        def log_likelihoods(share: Sequence[Instance]) -> list[list[Any]]:
            # The harness tokenizes requests, and adds up the windows of long strings. Here it adds
            # up arrays over the ranks, from `_loglikelihood_tokens`.
            self.batch_size_per_gpu = _ALL_AT_ONCE
            arrays = compute(share, disable_tqdm=True)
            if request_type == "loglikelihood_rolling":
                return [array.tolist() for array in arrays]
            return [
                list(zip(logprobs.tolist(), is_greedy.tolist(), strict=True))
                for logprobs, is_greedy in arrays
            ]

        for new_requests in new_requests_by_task.values():
            responses = _divide_over_processes(
                list(new_requests.values()), self._generate if is_generation else log_likelihoods
            )
            self._responses.update(zip(new_requests, responses, strict=True))
        column = self.ranks.index(self.lora_rank)
        return [self._responses[key][column] for key in keys]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Return the log-likelihood of each request, and whether it is greedy, for all ranks."""
        if not self.is_supported:
            return list(super()._loglikelihood_tokens(requests, *args, **kwargs))
        pairs: list[tuple[Tokens, Tokens]] = []
        for _, context, continuation in requests:
            length = len(continuation)
            if not 1 <= length <= self.max_length:
                raise MatryoshkaError(
                    f"A continuation must have 1 to {self.max_length} tokens, got {length} tokens: "
                    f"{short(self.tok_decode(continuation))}. Remove its example from the task."
                )
            tokens = tuple(context + continuation)[-(self.max_length + 1) :]
            pairs.append((tokens[:-length], tokens[-length:]))
        # Batches have about the same number of tokens, but not of requests: the longest come first.
        num_tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
        with self._progress_bar(num_tokens, "log-likelihoods") as bar:
            scores = self.engine.score(pairs, bar.update)
        return list(zip(scores.logprobs, scores.is_greedy, strict=True))

    def _generate(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Return the answers of greedy decoding for each request, one for each rank."""
        prompts: list[Tokens] = []
        indices_by_settings: dict[str, list[int]] = defaultdict(list)
        num_tokens = 0
        for index, request in enumerate(requests):
            prompt, task_settings = request.args
            max_new_tokens = normalize_gen_kwargs(task_settings, self.max_gen_toks)["max_gen_toks"]
            # A prompt that is too long is an error before the first answer.
            prompts.append(self._encode_prompt(prompt, max_new_tokens))
            indices_by_settings[hash_args("", [task_settings])].append(index)
            num_tokens += max_new_tokens
        texts = [[""] * len(self.ranks) for _ in requests]
        # Most answers of a batch end at about the same time, so a bar of answers would jump. The
        # remaining time is unknown: an answer may end before its maximum.
        with self._progress_bar(num_tokens, "answers", "{l_bar}{bar}| {elapsed}") as bar:
            for indices in indices_by_settings.values():
                settings = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)
                eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
                stop_strings = handle_stop_sequences(settings["until"], eos=eos)
                answers = self.engine.generate(
                    [prompts[index] for index in indices],
                    settings["max_gen_toks"],
                    self._stopping_criterion(stop_strings),
                    bar.update,
                )
                for answer in answers:
                    text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
                    text = postprocess_generated_text(text, stop_strings, think_end_token=None)
                    texts[indices[answer.prompt]][self.ranks.index(answer.rank)] = str(text)
        return texts

    def _stopping_criterion(self, stop_strings: list[str]) -> Callable[[list[int]], bool]:
        """Return the criterion of the harness with one prompt per batch."""
        stop_tokens = self.model.generation_config.eos_token_id
        if not isinstance(stop_tokens, list):
            stop_tokens = [stop_tokens]
        # The number of last tokens in which the harness searches for each stop string.
        num_recent_tokens = {
            string: len(self.tokenizer.encode(string, add_special_tokens=False)) + 2
            for string in stop_strings
        }

        def is_finished(tokens: list[int]) -> bool:
            return tokens[-1] in stop_tokens or any(
                string in self.tokenizer.decode(tokens[-count:])
                for string, count in num_recent_tokens.items()
            )

        return is_finished

    def _is_greedy(self, task_settings: dict[str, Any]) -> bool:
        """Return whether the task and the model ask for greedy decoding and nothing else."""
        if "max_length" in task_settings:
            return False
        settings = normalize_gen_kwargs(task_settings)
        if settings["do_sample"]:
            return False
        names = set(settings)
        for name, value in self.model.generation_config.to_diff_dict().items():
            if value and not name.startswith("_"):
                names.add(name)
        return names <= _GREEDY_SETTINGS

    def _encode_prompt(self, prompt: str, max_new_tokens: int) -> Tokens:
        max_prompt_length = self.max_length - max_new_tokens
        if max_prompt_length <= 0:
            raise MatryoshkaError(
                f"An answer may have up to {max_new_tokens} tokens, but the model's context window "
                f"has {self.max_length}. Remove the long example, or set a smaller max_gen_toks in "
                "the task's YAML file."
            )
        input_ids, _ = self.tok_batch_encode([prompt], truncation=self.truncation)
        tokens: list[int] = input_ids[0].tolist()
        if len(tokens) > max_prompt_length:
            warnings.warn(
                "Prompts longer than the context window are truncated from the left.",
                stacklevel=2,
            )
        return tuple(tokens[-max_prompt_length:])

    def _progress_bar(
        self, num_tokens: int, description: str, bar_format: str | None = None
    ) -> Any:
        return tqdm(
            total=num_tokens * len(self.ranks),
            desc=f"{description} at {len(self.ranks)} ranks",
            disable=not self.progress,
            leave=False,
            unit=" tokens",
            unit_scale=True,
            bar_format=bar_format,
        )


def _divide_over_processes(
    requests: Sequence[Instance], compute: Callable[[Sequence[Instance]], list[Any]]
) -> list[Any]:
    """Return the response to each request, of which each process computes a share."""
    state = PartialState()
    if state.num_processes == 1:
        return compute(requests)
    # In blocks, because the choices of a question follow each other and share their context.
    start, end = [
        len(requests) * (state.process_index + offset) // state.num_processes for offset in (0, 1)
    ]
    responses: list[Any] = gather_object(compute(requests[start:end]) if start < end else [])
    return responses
