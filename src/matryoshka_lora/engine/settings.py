"""Which of transformers' generation settings greedy decoding heeds: none is left out without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from matryoshka_lora.engine.exchange import WAY_OUT
from matryoshka_lora.errors import MatryoshkaError

_CHANGES: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "diversity_penalty": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "force_words_ids": [],
    "constraints": [],
    "sequence_bias": [],
    "stop_strings": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "max_time": None,
    "token_healing": None,
}
"""Settings that change a greedy answer, with the value that changes nothing; None and False change nothing either. The
others are heeded, or are about sampling, beams or the way of computing."""

_KNOWN = {*GenerationConfig().to_dict()} - {"eos_token_id", "max_length", "max_new_tokens"}
"""What a task may set: its end texts and its length have other names."""


def repetition_penalty(model: Any, given: Mapping[str, Any] | None = None, giver: str = "") -> float:
    """The repetition penalty of greedy answers: 1 is none.

    Args:
        model: Its own generation config counts, but for how long an answer may be: who asks for it says that.
        given: What stands in its place, as transformers' ``generate`` takes it.
        giver: Whose that is, for messages.

    Raises:
        MatryoshkaError: Another setting would change the answers.
    """
    config, given = getattr(model, "generation_config", None), given or {}
    own = {} if config is None else {name: value for name, value in config.to_dict().items() if name not in given}
    _check(own, "the model's generation config", "its generation_config.json")
    _check(given, giver, "its generation_kwargs")
    for name in given:
        if name not in _KNOWN:
            raise MatryoshkaError(f"{giver} sets {name}, which is no setting of greedy decoding: take it out")
    return float({**own, **given}.get("repetition_penalty") or 1.0)


def _check(settings: Mapping[str, Any], giver: str, place: str) -> None:
    for name, value in settings.items():
        if name in _CHANGES and value is not None and value is not False and value != _CHANGES[name]:
            raise MatryoshkaError(
                f"{giver} sets {name} to {value}, which the engine does not know: take it out of {place}, or {WAY_OUT}"
            )
