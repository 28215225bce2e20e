"""Scoring and generating for many ranks at once.

All ranks of an adapter share the base weights, so rows of one batch may have different ranks and the base weights are
read once for all of them. What requests share is computed once for each rank: a prefix (few-shot examples), and the
context of several continuations. Logits are made where they are needed, and rows that are done leave the batch.

None of this changes an answer beyond the rounding of its dtype: a request's result does not depend on its neighbours.
Models of which that is not true are refused: see `matryoshka_lora.engine.agreement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.engine.agreement import check_agreement
from matryoshka_lora.engine.generation import Answer, Limits, Prompt, generate_rows
from matryoshka_lora.engine.generation import repetition_penalty as penalty_of
from matryoshka_lora.engine.likelihood import Likelihood, Tree, branched, score_trees
from matryoshka_lora.engine.packing import Tokens, batches, encoded, families
from matryoshka_lora.engine.runner import WAY_OUT, Prefix, Runner, row_attention, running
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.loaded import context_length, rotation_limit

Text = str | Sequence[int]
"""What a request is made of: text, or tokens."""


class Engine:
    """Scores and generates with one adapter, each request at a rank of its own.

    Args:
        adapter: Its ranks and mode are the same after every call.
        tokenizer: The base model's.
        batch_size: The most rows that generate together; None measures how many fit.

    Attributes:
        model: The adapter's base model, with the adapter in it.

    Raises:
        MatryoshkaError: The batch size is not positive, the adapter is not active, or the model is of a kind whose rows
            cannot have ranks of their own.
    """

    def __init__(
        self, adapter: NestedAdapter, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise MatryoshkaError(f"batch_size is {batch_size}; write 1 or more")
        self.adapter, self.tokenizer, self.batch_size = adapter, tokenizer, batch_size
        self.model: Any = adapter.model.get_base_model()
        _check_writes_text(self.model)
        with row_attention(self.model):
            pass  # raises where it cannot be
        self._token_bytes = check_agreement(adapter, tokenizer, self.max_length)

    @property
    def max_length(self) -> int | None:
        """The most tokens of a row, where the model's config says it."""
        limits = (context_length(self.model), rotation_limit(self.model))
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def window(self) -> int | None:
        """The most tokens that the model was made to read, by which the harness cuts longer texts."""
        return context_length(self.model)

    def encode(self, text: str) -> Tokens:
        """Tokens of a text, with the special tokens that the tokenizer adds unless the text begins with one."""
        return encoded(self.tokenizer, text)

    def loglikelihood(
        self,
        requests: Sequence[tuple[Text, Text]],
        ranks: int | Sequence[int],
        on_result: Callable[[int, Likelihood], object] | None = None,
    ) -> list[Likelihood]:
        """How likely each continuation is after its context.

        Requests with the same context and rank share its computation.

        Args:
            requests: Context and continuation, each as text or as tokens, neither of them empty.
            ranks: One for all requests, or one for each. 0 is the base model.
            on_result: Called with a request's place and result as soon as it is known, in any order.

        Returns:
            One result for each request, in their order.

        Raises:
            MatryoshkaError: A rank was not trained, or a request is empty or longer than the model's context.
        """
        of = self._ranks(ranks, len(requests))
        pairs = [self.encode_pair(context, continuation) for context, continuation in requests]
        for number, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise MatryoshkaError(
                    f"request {number} has an empty {'continuation' if context else 'context'}: give at least a token"
                )
            self._check_length(number, len(context) + len(continuation) - 1, "context and continuation have")
        trees: dict[tuple[Tokens, int], Tree] = {}
        for number, ((context, continuation), rank) in enumerate(zip(pairs, of, strict=True)):
            trees.setdefault((context, rank), Tree(context, rank, [])).branches.append((number, continuation))
        found: list[Likelihood | None] = [None] * len(requests)

        def put(number: int, result: Likelihood) -> None:
            found[number] = result
            if on_result is not None:
                on_result(number, result)

        contexts = sorted({context for context, _ in trees})
        by_context: dict[Tokens, list[Tree]] = {}
        for tree in trees.values():
            by_context.setdefault(tree.context, []).append(tree)
        with self._running() as runner:
            for family in families(contexts):
                members = [tree for place in family.members for tree in by_context[contexts[place]]]
                for prefix, rows in _by_rank(runner, family.prefix, members):
                    cut = [part for tree in rows for part in branched(tree, prefix.length)]
                    lengths = [part.length for part in cut]
                    most = runner.room.prefill_tokens
                    for batch in batches(lengths, most, most):
                        score_trees(runner, prefix, [cut[i] for i in batch], put)
        return [result for result in found if result is not None]

    def generate(
        self,
        prompts: Sequence[Text],
        ranks: int | Sequence[int],
        max_new_tokens: int = 256,
        until: Sequence[str] = (),
        repetition_penalty: float | None = None,
        on_result: Callable[[int, str], object] | None = None,
        on_text: Callable[[int, str], object] | None = None,
    ) -> list[str]:
        """The greedy answer to each prompt, as transformers gives it by the model's own generation config.

        An answer ends before the first text of ``until``, at a token that ends a turn, or after ``max_new_tokens``. A
        text of ``until`` may be a special token.

        Args:
            prompts: Text or tokens, not empty.
            ranks: One for all prompts, or one for each. 0 is the base model.
            max_new_tokens: The most tokens of an answer.
            until: Texts that end an answer; they do not belong to it.
            repetition_penalty: As in transformers; 1 is none, None is the model's own.
            on_result: Called with a prompt's place and answer as soon as it is known, in any order.
            on_text: Called with a prompt's place and what there is of its answer, after each token. What it raises ends
                the work.

        Returns:
            The answers without special tokens, in the order of the prompts.

        Raises:
            MatryoshkaError: A rank was not trained, a prompt is empty, or does not fit the model's context with
                ``max_new_tokens`` more, or the model's generation config has settings that the engine does not know.
        """
        of = self._ranks(ranks, len(prompts))
        penalty = penalty_of(self.model) if repetition_penalty is None else repetition_penalty
        if max_new_tokens < 1:
            raise MatryoshkaError(f"max_new_tokens is {max_new_tokens}; write 1 or more")
        encoded = [self._tokens(prompt) for prompt in prompts]
        for number, tokens in enumerate(encoded):
            if not tokens:
                raise MatryoshkaError(f"prompt {number} is empty: give at least one token")
            self._check_length(number, len(tokens) + max_new_tokens, f"prompt and {max_new_tokens} new tokens need")
        limits = Limits.of(self.model, self.tokenizer, max_new_tokens, until, penalty)
        found: list[str | None] = [None] * len(prompts)

        def put(answer: Answer) -> None:
            if on_text is None and not answer.over:
                return
            number, text = answer.prompt.number, limits.text(answer.made)
            if on_text is not None:
                on_text(number, text)
            if answer.over:
                found[number] = text
                if on_result is not None:
                    on_result(number, text)

        unique = sorted(set(encoded))
        at: dict[Tokens, list[int]] = {}
        for number, tokens in enumerate(encoded):
            at.setdefault(tokens, []).append(number)
        with self._running() as runner:
            for family in families(unique):
                members = [
                    Prompt(number, of[number], tokens)
                    for tokens in (unique[place] for place in family.members)
                    for number in at[tokens]
                ]
                for prefix, rows in _by_rank(runner, family.prefix, members):
                    generate_rows(runner, prefix, rows, limits, put)
        return [answer for answer in found if answer is not None]

    def _running(self) -> AbstractContextManager[Runner]:
        return running(self.adapter, self.tokenizer, self._token_bytes, self.batch_size)

    def _ranks(self, ranks: int | Sequence[int], count: int) -> list[int]:
        listed = [ranks] * count if isinstance(ranks, int) else list(ranks)
        if len(listed) != count:
            raise MatryoshkaError(f"{len(listed)} ranks for {count} requests: give one for each, or one for all")
        for rank in sorted(set(listed) - {0}):
            self.adapter.state.check_rank(rank)
        return listed

    def _tokens(self, text: Text) -> Tokens:
        return self.encode(text) if isinstance(text, str) else tuple(text)

    def encode_pair(self, context: Text, continuation: Text) -> tuple[Tokens, Tokens]:
        """Tokens of a context and of what follows it; two texts are tokenized as one and cut."""
        if isinstance(context, str) and isinstance(continuation, str):
            before = self.encode(context)
            return before, self.encode(context + continuation)[len(before) :]
        return self._tokens(context), self._tokens(continuation)

    def _check_length(self, number: int, length: int, what: str) -> None:
        if self.max_length is None or length <= self.max_length:
            return
        if self.max_length == rotation_limit(self.model):
            tuned = getattr(self.model.config.get_text_config(), "attn_temperature_tuning", False)
            change = "tunes its attention" if tuned else "turns all positions of a row otherwise (longrope)"
            raise MatryoshkaError(
                f"request {number} is too long: {what} {length} tokens, and from {self.max_length} on this model "
                f"{change}, so that rows cannot share a batch. Way out: {WAY_OUT}"
            )
        raise MatryoshkaError(
            f"request {number} is too long: {what} {length} tokens, and the model's context has "
            f"{self.max_length}. Use fewer or shorter few-shot examples, or a model with a longer context"
        )


def _check_writes_text(model: Any) -> None:
    """Raises MatryoshkaError for what is no causal language model of transformers."""
    is_model = isinstance(model, PreTrainedModel)
    if not is_model or model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise MatryoshkaError(
            f"{type(model).__name__} is no causal language model of transformers, and the engine evaluates no other: "
            "choose a rank by set_rank, and evaluate the model as you would without an adapter"
        )


def _by_rank(runner: Runner, prefix: Tokens, members: Sequence[Any]) -> Iterator[tuple[Prefix, list[Any]]]:
    """The members of a family with their computed prefix, for as many ranks at a time as have room for it."""
    ranks = sorted({member.rank for member in members})
    at_once = max(1, runner.room.cache_tokens // 2 // len(prefix)) if prefix else len(ranks)
    for start in range(0, len(ranks), at_once):
        some = ranks[start : start + at_once]
        yield runner.prefix(prefix, some), [member for member in members if member.rank in some]
