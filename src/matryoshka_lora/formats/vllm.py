"""What vLLM reads of an adapter."""

from __future__ import annotations

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.card import VLLM_RANKS
from matryoshka_lora.formats.opened import OpenedAdapter


def max_lora_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` for adapters up to a rank.

    Raises:
        MatryoshkaError: It is above vLLM's largest.
    """
    if rank > VLLM_RANKS[-1]:
        raise MatryoshkaError(
            f"the largest rank is {rank}, and vLLM's is {VLLM_RANKS[-1]}: make a smaller nested adapter by `matryoshka "
            f"export --format directions --rank {VLLM_RANKS[-1]}`"
        )
    return next(value for value in VLLM_RANKS if value >= rank)


def check_for_vllm(adapter: OpenedAdapter) -> None:
    """Raises MatryoshkaError if an adapter holds more than factors, which is all that vLLM reads."""
    if adapter.others:
        raise MatryoshkaError(
            f"{adapter.name} also holds tensor {adapter.others[0]}, which is no factor, and vLLM would leave it out: "
            "use `matryoshka export --format merged`"
        )
