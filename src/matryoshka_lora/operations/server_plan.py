"""Plan a server of vLLM for a folder of adapters: its rank, and the memory of its slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matryoshka_lora.formats.peft_folder import base_model_of
from matryoshka_lora.formats.vllm import MAX_LORAS, round_up_to_vllm, select_for_vllm, slot_size
from matryoshka_lora.lora.convert import part_of_pipeline
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.text import format_table
from matryoshka_lora.units import format_size, pluralize

_MAX_NAMES = 5


@dataclass(frozen=True)
class ServerPlan:
    """The values of ``--max-lora-rank`` to choose from.

    Attributes:
        base_model: The base model of the server: the one that most adapters name.
        ranks: The ``--max-lora-rank`` that each adapter needs by its name, in decreasing order.
        slot_sizes: The size of a slot in bytes at each ``--max-lora-rank``, or None if it is not
            known; see `slot_size`.
        not_served: Why the server cannot serve the other adapters, by name.
    """

    base_model: str
    ranks: dict[str, int]
    slot_sizes: dict[int, int | None]
    not_served: dict[str, str]

    def larger(self, max_rank: int) -> list[str]:
        """Return the names of the adapters that need more than a ``--max-lora-rank``."""
        return [name for name, rank in self.ranks.items() if rank > max_rank]

    def to_lines(self) -> list[str]:
        """Return the lines that `matryoshka info` prints."""
        slots = min(MAX_LORAS, len(self.ranks))
        heading = ["--max-lora-rank", "a slot", pluralize(slots, "slot"), "with a larger error"]
        rows = [heading]
        for rank, size in self.slot_sizes.items():
            names = self.larger(rank)
            text = ", ".join(names[:_MAX_NAMES])
            if len(names) > _MAX_NAMES:
                text += f" and {len(names) - _MAX_NAMES} more"
            sizes = ["unknown"] * 2
            if size is not None:
                sizes = [format_size(size), format_size(slots * size)]
            rows.append([str(rank), *sizes, text])
        adapters = pluralize(len(self.ranks), "adapter")
        return [
            f"A server of vLLM for {adapters} of {self.base_model}:",
            *format_table(rows, left_aligned=1),
            "  a slot: memory for one of --max-loras adapters in bf16, as `serve` starts vLLM",
            *[f"{name} is left out: {why}" for name, why in self.not_served.items()],
        ]


def plan_server(loras: Mapping[str, Lora], ranks: Mapping[str, int]) -> ServerPlan | None:
    """Return a plan for the language models among some LoRAs, or None if vLLM can serve none."""
    adapters = {
        name: lora
        for name, lora in loras.items()
        if lora.container == "peft" and part_of_pipeline(lora) is None
    }
    is_named = any(lora.config.get("base_model_name_or_path") for lora in adapters.values())
    base_model = None if is_named else "an unnamed base model"
    served, problems = select_for_vllm(adapters, base_model)
    if not served:
        return None
    names = sorted(served, key=lambda name: -ranks[name])
    vllm_ranks = {name: round_up_to_vllm(ranks[name]) for name in names}
    slot_sizes = {rank: slot_size(served.values(), rank) for rank in vllm_ranks.values()}
    base_model, _ = base_model_of(served[names[0]], base_model)
    return ServerPlan(base_model, vllm_ranks, slot_sizes, problems)
