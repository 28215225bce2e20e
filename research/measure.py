"""What an adapter is worth at each rank, on questions with one right answer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.data.questions import Question, tokenize
from research.records import Curve


def measure(
    adapter: NestedAdapter, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], ranks: Sequence[int]
) -> Curve:
    """Loss and accuracy at each rank from one pass: an answer counts if greedy decoding would write all of it."""
    questions = [tokenize(tokenizer, row) for row in rows]
    requests = [(question.context, question.completion) for question in questions]
    of = [rank for rank in ranks for _ in questions]
    found = Engine(adapter, tokenizer).loglikelihood(requests * len(ranks), of)
    tokens = sum(len(question.completion) for question in questions)
    by_rank = [found[n * len(rows) : (n + 1) * len(rows)] for n in range(len(ranks))]
    return Curve(
        tuple(round(-sum(one.logprob for one in some) / tokens, 6) for some in by_rank),
        tuple(round(sum(one.greedy for one in some) / len(some), 6) for some in by_rank),
    )
