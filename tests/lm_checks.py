"""What is checked of a causal language model beside `adapter_checks`: its greedy answers, and the engine."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapter_checks import LENGTH, RANKS, Case, NothingToCheckError, Report, WrongError, check
from tiny_chat import tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from matryoshka_lora.evaluate.engine import Engine

NEW = 8
"""Tokens of an answer."""
TOKENIZER = tiny_tokenizer()
END = 2

# PEFT takes layers of these names for routed experts, where transformers 5 has stacked what were layers in version 4,
# and refuses the last one in a model of Mamba's kind.
_OTHER_MEANING = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "out_proj"}


def check_language_model(model: PreTrainedModel) -> dict[str, Report]:
    """Check an adapter on all linear layers, or on some where PEFT cannot have all, and one on stacked experts."""
    base = _in_double(model)

    def found(targets: dict[str, Any], *more: str) -> Report:
        with tempfile.TemporaryDirectory() as folder:
            case = CausalCase(base, targets, Path(folder))
            return check(case, ("ranks", "rows", "generate", *more, "merge", "reorder", "save"))

    reports = {"all-linear": found({"target_modules": "all-linear"}, "engine")}
    some, experts = named_layers(base), stacked_experts(base)
    if reports["all-linear"].parts["nest"].state != "right" and some:
        reports["named"] = found({"target_modules": some}, "engine")
    if experts:
        reports["experts"] = found({"target_modules": [], "target_parameters": experts})
    return reports


def named_layers(model: PreTrainedModel) -> list[str]:
    """The names of a model's linear layers, each without its path, but for those that PEFT takes for something else."""
    output = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: module is output
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
    }
    return sorted(name for name, is_output in linear.items() if not is_output and name not in _OTHER_MEANING)


def stacked_experts(model: PreTrainedModel) -> list[str]:
    """The parameters that are a matrix for each expert, each by the last two parts of its name."""
    return sorted(
        {
            f"{name.rpartition('.')[2]}.{leaf}"
            for name, module in model.named_modules()
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3 and "expert" in f"{name} {type(module).__name__}".lower()
        }
    )


class CausalCase(Case):
    """A causal language model."""

    def __init__(self, base: PreTrainedModel, targets: dict[str, Any], folder: Path) -> None:
        super().__init__(base, targets, folder, inputs)

    def generate(self) -> None:
        """transformers' ``generate`` writes at every rank what it writes with plain PEFT."""
        ids = tokens(2, LENGTH // 2)
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": END}
        try:
            expected = {rank: self.plain(rank).generate(input_ids=ids, **settings).tolist() for rank in RANKS}
        except Exception as error:
            raise NothingToCheckError(f"transformers' generate: {type(error).__name__}: {error}") from error
        for rank in RANKS:
            self.adapter.set_rank(rank)
            found = self.adapter.model.generate(input_ids=ids, **settings).tolist()
            if found != expected[rank]:
                raise WrongError(f"rank {rank} writes {found}, plain PEFT {expected[rank]}")

    def engine(self) -> None:
        """The engine scores and writes what each request alone gets of plain PEFT, without padding and cache."""
        engine = Engine(self.adapter, TOKENIZER)
        draw = random.Random(5)
        shared = [draw.randrange(4, 95) for _ in range(20)]
        contexts = [[*(shared if n % 2 else ()), *(draw.randrange(4, 95) for _ in range(3 + 4 * n))] for n in range(6)]
        requests = [
            (context, [draw.randrange(4, 95) for _ in range(1 + n % 3)], rank)
            for context in contexts
            for n, rank in enumerate((0, 2, 4, 4, 2))
        ]
        scored = engine.loglikelihood([(a, b) for a, b, _ in requests], [rank for _, _, rank in requests])
        for found, (context, ending, rank) in zip(scored, requests, strict=True):
            expected = self._likelihood(context, ending, rank)
            if not abs(found.logprob - expected) <= self.close * max(10.0, abs(expected)):
                raise WrongError(
                    f"the log-likelihood of {len(ending)} tokens after {len(context)} at rank {rank} is "
                    f"{found.logprob:.6f}, alone with plain PEFT {expected:.6f}"
                )
        prompts = [(context, rank) for context in contexts for rank in (0, 2, 4)]
        texts = engine.generate([context for context, _ in prompts], [rank for _, rank in prompts], NEW)
        for text, (context, rank) in zip(texts, prompts, strict=True):
            whole, certain = self._answer(context, rank)
            if text != whole and not (certain != whole and text.startswith(certain)):
                raise WrongError(
                    f"the answer to {len(context)} tokens at rank {rank} is {text!r}, alone with plain PEFT {whole!r}"
                )

    def _logits(self, ids: Sequence[int], rank: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.plain(rank)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return found.double()

    def _likelihood(self, context: Sequence[int], ending: Sequence[int], rank: int) -> float:
        logprobs = self._logits([*context, *ending], rank).log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(ending) - 1)
        return sum(logprobs[place, token].item() for place, token in zip(places, ending, strict=True))

    def _answer(self, context: Sequence[int], rank: int) -> tuple[str, str]:
        """The greedy answer, and as much of it as no rounding can change."""
        made: list[int] = []
        certain: int | None = None
        while len(made) < NEW and made[-1:] != [END]:
            best = self._logits([*context, *made], rank)[-1].topk(2)
            if certain is None and best.values[0] - best.values[1] < self.close * best.values[0].abs():
                certain = len(made)
            made.append(int(best.indices[0]))
        whole, part = (TOKENIZER.decode(made[:end], skip_special_tokens=True) for end in (None, certain))
        return whole, part


def inputs(rows: int, length: int) -> dict[str, Any]:
    """Rows without padding."""
    return {"input_ids": tokens(rows, length), "use_cache": False}


def tokens(rows: int, length: int) -> Tensor:
    """Tokens that are neither special nor the vocabulary's last."""
    return torch.randint(4, 95, (rows, length), generator=torch.Generator().manual_seed(100 * rows + length))


def _in_double(model: PreTrainedModel) -> PreTrainedModel:
    """In float64, unless the model computes in other precisions only."""
    double = copy.deepcopy(model).double()
    tried = copy.deepcopy(double).train()  # some models keep what they have computed
    try:
        logits = tried(**inputs(2, LENGTH)).logits
        logits.square().mean().backward()
    except RuntimeError:
        return model
    return double if bool(logits.isfinite().all()) else model
