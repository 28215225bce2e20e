"""PEFT alone, in a process that cannot import this package, reads what is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import nested_llama, tiny_llama
from strangers import IDS, distance, logits

from matryoshka_lora import Nesting, export

pytestmark = pytest.mark.slow

READER = """
import sys
sys.modules["matryoshka_lora"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, ids, *folders = sys.argv[1:]
for folder in folders:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(ids)).logits, folder + "/logits")
"""


def test_peft_alone_computes_what_the_adapter_does(tmp_path: Path) -> None:
    """The nested folder is rank R; each export is its rank."""
    adapter = nested_llama(Nesting((1, 2, 4, 8), "sqrt", 0.7))
    adapter.reorder()
    adapter.save(tmp_path / "rank-8")
    for rank in (1, 3):
        export(tmp_path / "rank-8", tmp_path / f"rank-{rank}", rank)
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.save(IDS, tmp_path / "ids")
    folders = {rank: tmp_path / f"rank-{rank}" for rank in (1, 3, 8)}
    arguments = [tmp_path / "base", tmp_path / "ids", *folders.values()]
    subprocess.run([sys.executable, "-c", READER, *map(str, arguments)], check=True)
    for rank, folder in folders.items():
        adapter.set_rank(rank)
        assert distance(torch.load(folder / "logits"), logits(adapter.model)) < 1e-5
