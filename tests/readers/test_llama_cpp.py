"""llama.cpp itself reads the exported ranks: the embedded model in float32, real words."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LINEAR_LAYERS, randomize
from peft import LoraConfig, PeftModel, get_peft_model

from matryoshka_lora import export
from matryoshka_lora.models import embedded_folder, embedded_gguf, load_model, load_tokenizer

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
gguf = pytest.importorskip("gguf")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TOP = 10
"""Of so many of llama.cpp's most likely tokens the log-probabilities are compared."""
TEXT = "The quick brown fox jumps over the lazy dog, and then it rests in the shade of a tree."
WISHES: dict[str, dict[str, Any]] = {"1": {"rank": 1}, "8": {"rank": 8}, "layers": {"keep": 0.6}}


def in_float32(target: Path) -> None:
    """Write the weights that `load_model` gives, which are rounded to bfloat16, as float32."""
    reader = gguf.GGUFReader(embedded_gguf())
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    left_out = ("general.architecture", "general.file_type")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in left_out:
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, torch.from_numpy(weight).bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def started(base: Path, adapters: list[Path]) -> Any:
    """Return llama.cpp's server in this process. It rounds nothing that PEFT does not."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(each), 1.0) for each in adapters]
    params.n_ctx, params.n_parallel = 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def best_tokens(address: str, ids: list[int], lora: int) -> dict[int, float]:
    """Return llama.cpp's most likely next tokens with one adapter on, or none for -1."""
    wish: dict[str, Any] = {"prompt": ids, "max_tokens": 1, "logprobs": TOP, "temperature": 0}
    wish["lora"] = [{"id": max(lora, 0), "scale": float(lora >= 0)}]
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(wish).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        places = json.load(answer)["choices"][0]["logprobs"]["content"]
    return {token["id"]: token["logprob"] for token in places[0]["top_logprobs"]}


def test_llama_cpp_computes_what_peft_does(tmp_path: Path) -> None:
    """One server with all adapters; each request turns one of them on."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR_LAYERS)
    model = get_peft_model(load_model(dtype=torch.float32, device="cpu"), config)
    randomize(model, size=0.03)
    model.save_pretrained(tmp_path / "plain")
    files, base = list[Path](), str(embedded_folder())
    for name, wish in WISHES.items():
        files.append(tmp_path / f"{name}.gguf")
        export(tmp_path / "plain", files[-1], model=base, **wish)
        export(tmp_path / "plain", tmp_path / f"peft-{name}", **wish)
    in_float32(tmp_path / "base.gguf")
    server = started(tmp_path / "base.gguf", files)  # it ends with the last reference to it
    ids = load_tokenizer()(TEXT)["input_ids"]
    computed = list[torch.Tensor]()
    for number, name in enumerate(("base", *WISHES), -1):
        plain: Any = load_model(dtype=torch.float32, device="cpu")
        if number >= 0:
            plain = PeftModel.from_pretrained(plain, tmp_path / f"peft-{name}")
        with torch.no_grad():
            wanted = plain.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(2, len(ids)):
            found = best_tokens(server.listening_address, ids[: place + 1], number)
            assert len(found) == TOP
            for token, log in found.items():
                assert abs(log - float(wanted[place, token])) < 1e-3
        # The rank matters, so agreement is no accident.
        assert all((wanted - other).abs().max() > 0.1 for other in computed)
        computed.append(wanted)
