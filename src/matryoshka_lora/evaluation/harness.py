"""lm-evaluation-harness's Hugging Face backend, with all ranks computed in the same batches."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.generation import StoppingCriteria, generate
from matryoshka_lora.evaluation.kv_cache import Tokens
from matryoshka_lora.evaluation.multi_rank_model import MultiRankModel
from matryoshka_lora.evaluation.scoring import score_continuations
from matryoshka_lora.peft.adapter import NestedAdapter

_HARNESS_BATCH_SIZE = 8
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

    All ranks are computed at the first request and cached. So the harness runs once for each rank,
    but only the first run computes.

    Args:
        adapter: The nested adapter. Its model is put into eval mode.
        tokenizer: The base model's tokenizer.
        ranks: The ranks to evaluate; 0 is the base model.
        max_batch_tokens: The maximum number of tokens, over all rows, whose keys and values a batch
            holds. Defaults to 32,768.
        progress: Whether progress bars are shown on stderr.

    Attributes:
        lora_rank: The rank whose responses the harness gets. (The ``rank`` of an ``HFLM`` is the
            process index.)
        uses_multi_rank_batches: Whether rows of the same batch have different ranks. False for
            models that do not support this, such as those with routed experts. They compute one
            rank after the other.

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
        self._harness_batch_size = 1 if has_longrope else _HARNESS_BATCH_SIZE
        # HFLM would tie untied weights and modify the tokenizer, so pass a stub and a copy.
        super().__init__(
            SimpleNamespace(config=model.config, device=model.device),
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=self._harness_batch_size,
        )
        self._model = model
        self.pretrained = model
        self.progress = progress
        self.ranks = list(ranks)
        self.lora_rank = self.ranks[0]
        self.multi_rank_model = MultiRankModel(adapter, ranks, max_batch_tokens)
        self._responses: dict[tuple[str, int, int], Any] = {}
        self.uses_multi_rank_batches = (
            not has_longrope
            and self.backend == "causal"
            and self.multi_rank_model.supports_rank_per_row(self._trial_tokens())
        )

    def _trial_tokens(self) -> Tokens:
        text = "The quick brown fox jumps over the lazy dog, and sleeps under a large old tree"
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple((tokens * 13)[:13])

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
        """Return the responses at `lora_rank`; compute those that are not known yet."""
        # A task that samples several answers makes the same request several times.
        repeats: Counter[str] = Counter()
        keys: list[tuple[str, int]] = []
        # The requests of one task begin with the same few-shot examples.
        new_requests_by_task: dict[str | None, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            request_hash = hash_args(request_type, request.args)
            key = (request_hash, repeats[request_hash])
            repeats[request_hash] += 1
            keys.append(key)
            if (*key, self.lora_rank) not in self._responses:
                new_requests_by_task[request.task_name].append(index)
        for indices in new_requests_by_task.values():
            new_requests = [requests[index] for index in indices]
            for rank, responses in self._compute(request_type, new_requests).items():
                for index, response in zip(indices, responses, strict=True):
                    self._responses[*keys[index], rank] = response
        return [self._responses[*key, self.lora_rank] for key in keys]

    def _compute(self, request_type: str, requests: Sequence[Instance]) -> dict[int, list[Any]]:
        """Return the responses by rank."""
        if not self.uses_multi_rank_batches:
            return self._compute_rank_by_rank(request_type, requests)
        if request_type != "generate_until":
            return self._compute_log_likelihoods(request_type, requests)
        if all(self._is_greedy(request.args[1]) for request in requests):
            return self._generate(requests)
        return self._compute_rank_by_rank(request_type, requests)

    def _compute_rank_by_rank(
        self, request_type: str, requests: Sequence[Instance]
    ) -> dict[int, list[Any]]:
        """Let the harness compute the responses at one rank after the other."""
        self.batch_size_per_gpu = self._harness_batch_size
        compute = getattr(super(), request_type)
        responses: dict[int, list[Any]] = {}
        for rank in self.ranks:
            with self.multi_rank_model.at_rank(rank):
                responses[rank] = compute(requests, disable_tqdm=not self.progress)
        return responses

    def _compute_log_likelihoods(
        self, request_type: str, requests: Sequence[Instance]
    ) -> dict[int, list[Any]]:
        """Let the harness tokenize requests and sum up windows, with all ranks at once."""
        # `_loglikelihood_tokens` returns arrays with one entry per rank to it.
        self.batch_size_per_gpu = _ALL_AT_ONCE
        compute = getattr(super(), request_type)
        arrays = compute(requests, disable_tqdm=not self.progress)
        responses: dict[int, list[Any]] = {}
        for column, rank in enumerate(self.ranks):
            if request_type == "loglikelihood":
                responses[rank] = [
                    (float(logprobs[column]), bool(is_greedy[column]))
                    for logprobs, is_greedy in arrays
                ]
            else:
                responses[rank] = [float(logprobs[column]) for logprobs in arrays]
        return responses

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Return the log-likelihood of each request, and whether it is greedy, by rank."""
        if not self.uses_multi_rank_batches:
            return list(super()._loglikelihood_tokens(requests, *args, **kwargs))
        pairs: list[tuple[Tokens, Tokens]] = []
        for _, context, continuation in requests:
            length = len(continuation)
            if not 1 <= length <= self.max_length:
                raise MatryoshkaError(
                    f"A continuation must have 1 to {self.max_length} tokens, got {length} tokens: "
                    f"{self.tok_decode(continuation)!r:.80}. Remove its example from the task."
                )
            tokens = tuple(context + continuation)[-(self.max_length + 1) :]
            pairs.append((tokens[:-length], tokens[-length:]))
        # Batches have about as many tokens, but not as many requests: the longest come first.
        num_tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
        with self._progress_bar(num_tokens, "log-likelihoods") as bar:
            scores = score_continuations(self.multi_rank_model, pairs, bar.update)
        return list(zip(scores.logprobs, scores.is_greedy, strict=True))

    def _generate(self, requests: Sequence[Instance]) -> dict[int, list[str]]:
        """Return the answers of greedy decoding by rank."""
        answers = {rank: [""] * len(requests) for rank in self.ranks}
        indices_by_settings: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            indices_by_settings[hash_args("", [request.args[1]])].append(index)
        # A prompt that is too long is an error before the first answer.
        batches: list[tuple[list[int], StoppingCriteria, list[Tokens]]] = []
        for indices in indices_by_settings.values():
            criteria = self._stopping_criteria(requests[indices[0]].args[1])
            prompts = [
                self._encode_prompt(requests[index].args[0], criteria.max_new_tokens)
                for index in indices
            ]
            batches.append((indices, criteria, prompts))
        # Most answers of a batch end at about the same time, so a bar of answers would jump.
        num_tokens = sum(len(prompts) * criteria.max_new_tokens for _, criteria, prompts in batches)
        with self._progress_bar(num_tokens, "answers") as bar:
            for indices, criteria, prompts in batches:
                for answer in generate(self.multi_rank_model, prompts, criteria, bar.update):
                    answers[answer.rank][indices[answer.prompt]] = criteria.decode(answer)
        return answers

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

    def _stopping_criteria(self, task_settings: dict[str, Any]) -> StoppingCriteria:
        settings = normalize_gen_kwargs(task_settings, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop_strings = handle_stop_sequences(settings["until"], eos=eos)
        stop_tokens = self.model.generation_config.eos_token_id
        if not isinstance(stop_tokens, list):
            stop_tokens = [stop_tokens]
        return StoppingCriteria(settings["max_gen_toks"], stop_strings, stop_tokens, self.tokenizer)

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

    def _progress_bar(self, num_tokens: int, description: str) -> Any:
        return tqdm(
            total=num_tokens * len(self.ranks),
            desc=f"{description} at {len(self.ranks)} ranks",
            disable=not self.progress,
            leave=False,
            unit=" tokens",
            unit_scale=True,
        )
