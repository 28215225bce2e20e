"""Our own questions, a built-in task's or a file's, as a task of the harness: asked for an answer and for its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.data.questions import Judge, Question, end_texts, tokenize

EXTRA_TOKENS = 8
"""How many tokens more than the longest reference answer a model may write."""


class QuestionsTask(ConfigurableTask):  # type: ignore[misc, unused-ignore]
    """A task of the harness without shots, with the metrics ``accuracy`` and ``loss`` (nats per token).

    Its requests are the tokens of training. The harness's are text, which would be cut into others where a prompt and
    its answer share one; and its ``loglikelihood`` moves white space from the end of a context to the continuation.

    Args:
        judge: Tells right answers from wrong ones.
        questions: At least one.
        tokenizer: Its chat template writes chat questions; text is asked as it is.

    Raises:
        MatryoshkaError: The questions are chat and the tokenizer has no template, or a question has no answer.
    """

    VERSION = 1

    def __init__(self, judge: Judge, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> None:
        self._judge, self._questions = judge, questions
        self._tokens = [tokenize(tokenizer, question) for question in questions]
        longest = max(len(tokens.completion) for tokens in self._tokens)
        data = {
            "prompt": [tokenizer.decode(tokens.prompt) for tokens in self._tokens],
            "completion": [tokenizer.decode(tokens.completion) for tokens in self._tokens],
            "index": list(range(len(questions))),
        }
        means = [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}]
        super().__init__(
            config={
                "task": judge.name,
                "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_dict(data)),
                "test_split": "test",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{completion}}",
                "output_type": "generate_until",
                "generation_kwargs": {
                    "until": end_texts(tokenizer, self._tokens),
                    "max_gen_toks": longest + EXTRA_TOKENS,
                    "do_sample": False,
                },
                "process_results": self._judged,
                "metric_list": [*means, {"metric": "loss", "aggregation": _per_token, "higher_is_better": False}],
                "num_fewshot": 0,
                "metadata": {"version": self.VERSION},
            }
        )

    def download(self, *args: Any, **kwargs: Any) -> None:
        self.dataset = self.config.custom_dataset()

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The answer, and its likelihood: `matryoshka_lora.evaluation.harness.RanksLM` knows both kinds."""
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        tokens, text = self._tokens[doc["index"]], doc["prompt"]
        settings = dict(self.config.generation_kwargs)
        return [
            Instance("answer", doc, (text, tokens.prompt, settings), 0, **kwargs),
            Instance("answer_likelihood", doc, (text, tokens.context, tokens.completion), 1, **kwargs),
        ]

    def _judged(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        answer, (logprob, _) = results
        right = self._judge.is_correct(answer, self._questions[doc["index"]])
        return {"accuracy": float(right), "loss": (-logprob, len(self._tokens[doc["index"]].completion))}


def _per_token(items: Sequence[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in items) / sum(tokens for _, tokens in items)
