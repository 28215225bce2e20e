"""llama.cpp reads exported ranks: the bundled model in float32, with English text."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import LINEAR_LAYERS, randomize
from helpers.small_adapter import add_small_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from matryoshka_lora import export, nest
from matryoshka_lora.bundled_model import bundled_gguf_path, bundled_model_path
from matryoshka_lora.peft.base_model import load_model, load_tokenizer

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
gguf = pytest.importorskip("gguf")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_TOP_TOKENS = 10
"""The log-probabilities of this many of llama.cpp's most likely tokens are compared."""
TEXT = "The quick brown fox jumps over the lazy dog, and then it rests in the shade of a tree."
EXPORTS: dict[str, dict[str, Any]] = {
    # Of the small adapter, and of the main one.
    "rank-1": {"rank": 1},
    "rank-8": {"rank": 8},
    "mixed-ranks": {"keep": 0.6},
}


def save_float32_gguf(file: Path) -> None:
    """Write the bundled model in float32, with the bfloat16 values that `load_model` has."""
    reader = gguf.GGUFReader(bundled_gguf_path())
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        is_written_anyway = field.name.startswith("GGUF.") or field.name == "general.architecture"
        if not is_written_anyway and field.name != "general.file_type":
            value_type = field.types[0]
            item_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), value_type, item_type)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, torch.from_numpy(weight).bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start_server(base: Path, adapters: list[Path]) -> Any:
    """Return llama.cpp's server in this process, which computes in float32 throughout.

    It stops when the last reference to it is deleted.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0) for file in adapters]
    params.n_ctx = 1024
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def top_logprobs(address: str, token_ids: list[int], adapter: int | None) -> dict[int, float]:
    """Return the log-probabilities of llama.cpp's most likely next tokens.

    Args:
        address: The address of the server.
        token_ids: The prompt.
        adapter: The index of the adapter to apply, or None.
    """
    lora = {"id": adapter or 0, "scale": 0.0 if adapter is None else 1.0}
    body = {
        "prompt": token_ids,
        "max_tokens": 1,
        "logprobs": NUM_TOP_TOKENS,
        "temperature": 0,
        "lora": [lora],
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        positions = json.load(response)["choices"][0]["logprobs"]["content"]
    return {token["id"]: token["logprob"] for token in positions[0]["top_logprobs"]}


def peft_logprobs(token_ids: list[int], folder: Path | None) -> Tensor:
    """Return the log-probabilities of plain PEFT, shape (tokens, vocabulary)."""
    model: Any = load_model(dtype=torch.float32, device="cpu")
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        output = model.eval()(input_ids=torch.tensor([token_ids]))
    logprobs: Tensor = output.logits[0].log_softmax(-1)
    return logprobs


def test_llama_cpp_computes_what_peft_does(tmp_path: Path) -> None:
    """One server has all adapters; each request applies one of them."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR_LAYERS)
    model = get_peft_model(load_model(dtype=torch.float32, device="cpu"), config)
    randomize(model, size=0.03)
    adapter = nest(model)
    adapter.reorder()
    add_small_adapter(adapter, rank=2, size=0.03)
    adapter.save(tmp_path / "nested")
    for name, options in EXPORTS.items():
        file = tmp_path / f"{name}.gguf"
        export(tmp_path / "nested", file, base_model=str(bundled_model_path()), **options)
        export(tmp_path / "nested", tmp_path / name, **options)
    save_float32_gguf(tmp_path / "base.gguf")
    server = start_server(tmp_path / "base.gguf", [tmp_path / f"{name}.gguf" for name in EXPORTS])

    token_ids = load_tokenizer()(TEXT)["input_ids"]
    adapters: list[tuple[int | None, Path | None]] = [(None, None)]
    adapters += [(index, tmp_path / name) for index, name in enumerate(EXPORTS)]
    computed: list[Tensor] = []
    for index, folder in adapters:
        expected = peft_logprobs(token_ids, folder)
        for position in range(2, len(token_ids)):
            prompt = token_ids[: position + 1]
            logprobs = top_logprobs(server.listening_address, prompt, index)
            assert len(logprobs) == NUM_TOP_TOKENS
            for token_id, logprob in logprobs.items():
                assert abs(logprob - float(expected[position, token_id])) < 1e-3
        # The adapters differ, so the agreement is not by chance.
        assert all((expected - other).abs().max() > 0.1 for other in computed)
        computed.append(expected)
