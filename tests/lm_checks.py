"""What is checked of a causal language model beside `adapter_checks`: its greedy answers, and the engine."""

from __future__ import annotations

import contextlib
import copy
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapter_checks import LENGTH, NESTING, RANKS, Case, NothingToCheckError, Report, WrongError, check
from peft import LoraConfig, get_peft_model
from tiny_chat import tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from matryoshka_lora import MatryoshkaError, nest
from matryoshka_lora.engine.engine import Engine

NEW = 8
"""Tokens of an answer."""
TOKENIZER = tiny_tokenizer()
END = 2

# PEFT takes linear layers of these names for routed experts, where transformers 5 has stacked what were such layers.
_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def check_language_model(model: PreTrainedModel) -> dict[str, Report]:
    """Check an adapter on all linear layers, or on some where PEFT cannot have all, and one on stacked experts."""
    double = _in_double(model)

    def found(base: PreTrainedModel, targets: dict[str, Any], *more: str) -> Report:
        with tempfile.TemporaryDirectory() as folder:
            case = CausalCase(base, targets, Path(folder))
            return check(case, ("ranks", "rows", "generate", *more, "merge", "reorder", "save"))

    reports = {"all-linear": found(double, {"target_modules": "all-linear"}, "engine")}
    if reports["all-linear"].parts["nest"].state != "right":
        reports["named"] = found(double, {"target_modules": named_layers(model)}, "engine")
    experts = stacked_experts(model)
    if experts:  # as they are computed by default
        reports["experts"] = found(model, {"target_modules": [], "target_parameters": experts})
    return reports


def named_layers(model: PreTrainedModel) -> list[str]:
    """The names of linear layers, each without its path, that are left when the ways out of all refusals are taken."""
    output = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }
    while names:
        config = LoraConfig(r=NESTING.max_rank, lora_alpha=NESTING.max_rank, target_modules=sorted(names))
        try:
            nest(get_peft_model(copy.deepcopy(model), config), RANKS)
        except (MatryoshkaError, ValueError) as refusal:
            left_out = re.search(
                r"layer (\S+) .*eave .* out of target_modules|Module '(\w+)' is incompatible", str(refusal)
            )
            out = {(left_out[1] or left_out[2]).rpartition(".")[2]} if left_out else _EXPERTS
            if not names & out:
                break
            names -= out
        else:
            break
    return sorted(names)


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
    double.set_experts_implementation("eager")  # the others know no float64
    tried = copy.deepcopy(double).train()  # some models keep what they have computed
    try:
        logits = tried(**inputs(2, LENGTH)).logits
        logits.square().mean().backward()
        with contextlib.suppress(AttributeError, IndexError, TypeError, ValueError):  # no `generate`, in no precision
            tried.eval().generate(input_ids=tokens(1, 4), max_new_tokens=2, pad_token_id=0)
    except RuntimeError:
        return model
    return double if bool(logits.isfinite().all()) else model
