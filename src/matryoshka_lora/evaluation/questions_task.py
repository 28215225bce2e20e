"""Our own questions, a built-in task's or a file's, as a task of the harness: asked for an answer and for its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.data.questions import Judge, Question, as_trained, end_texts, tokenize

EXTRA_TOKENS = 8
"""How many tokens more than the longest reference answer a model may write."""


class QuestionsTask(ConfigurableTask):  # type: ignore[misc, unused-ignore]
    """A task of the harness without shots, with the metrics ``accuracy`` and ``loss`` (nats per token).

    The loss is over the tokens that training sees. Its requests are not the harness's ``loglikelihood``, which moves
    white space from the end of a context to the continuation.

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
        rows = [_texts(tokenizer, question) for question in questions]
        lengths = [len(tokenizer(completion, add_special_tokens=False)["input_ids"]) for _, _, completion in rows]
        for number, length in enumerate(lengths):
            if not rows[number][0] or not length:
                raise MatryoshkaError(f"{judge.name}: question {number} has an empty prompt or answer")
        data = {
            "prompt": [prompt for prompt, _, _ in rows],
            "context": [context for _, context, _ in rows],
            "completion": [completion for _, _, completion in rows],
            "tokens": lengths,
            "index": list(range(len(rows))),
        }
        ends = end_texts(tokenizer, [tokenize(tokenizer, question) for question in questions])
        means = [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}]
        super().__init__(
            config={
                "task": judge.name,
                "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_dict(data)),
                "test_split": "test",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{completion}}",
                "output_type": "generate_until",
                "generation_kwargs": {"until": ends, "max_gen_toks": max(lengths) + EXTRA_TOKENS, "do_sample": False},
                "process_results": self._judged,
                "metric_list": [*means, {"metric": "loss", "aggregation": _per_token, "higher_is_better": False}],
                "num_fewshot": 0,
                "metadata": {"version": self.VERSION},
            }
        )

    def download(self, *args: Any, **kwargs: Any) -> None:
        self.dataset = self.config.custom_dataset()

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        settings = dict(self.config.generation_kwargs)
        return [
            Instance("generate_until", doc, (doc["prompt"], settings), 0, **kwargs),
            Instance("answer_loglikelihood", doc, (doc["context"], doc["completion"]), 1, **kwargs),
        ]

    def _judged(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        answer, (logprob, _) = results
        right = self._judge.is_correct(answer, self._questions[doc["index"]])
        return {"accuracy": float(right), "loss": (-logprob, doc["tokens"])}


def _per_token(items: Sequence[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in items) / sum(tokens for _, tokens in items)


def _texts(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[str, str, str]:
    """What generation starts from, and the same text as training sees it, cut in context and completion."""
    prompt, completion = as_trained(tokenizer, question)
    if isinstance(prompt, str):
        return prompt, prompt, completion
    asked: str = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    shorter = min(len(asked), len(whole))
    shared = next((i for i in range(shorter) if asked[i] != whole[i]), shorter)
    return asked, whole[:shared], whole[shared:]
