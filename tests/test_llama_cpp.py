"""llama.cpp itself, which ``make test-deploy`` installs, serves the ranks: the real model, real words."""

from __future__ import annotations

import json
import re
import shlex
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import LINEAR_LAYERS
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from matryoshka_lora import export
from matryoshka_lora.data.questions import tokenize
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.models import embedded_gguf, load_model, load_tokenizer

xllamacpp = pytest.importorskip("xllamacpp", reason="make test-deploy installs llama.cpp")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

POSITIONS = 500
RANK = 8
RANKS = (1, 2, 4, 8, 16, 32)
TOKENS = 8
TOP = 10
"""Of how many of llama.cpp's most likely tokens the log-probabilities are compared."""
CHAT = {"max_tokens": TOKENS, "logprobs": True, "top_logprobs": TOP, "temperature": 0}

Texts = list[list[int]]
Answer = tuple[list[int], list[dict[int, float]]]
"""The tokens that llama.cpp wrote, and at the place of each its most likely ones with their log-probabilities."""


@pytest.fixture(scope="module")
def texts() -> Texts:
    """Held-out questions with their answers, in tokens."""
    tokenizer, task = load_tokenizer(), get_task("family_relationships")
    # A question has some 80 tokens of its own after the system prompt.
    tokens = [tokenize(tokenizer, question) for question in task.examples("test", 9)]
    return [question.context + question.completion for question in tokens]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained for a few steps, its ranks as PEFT's files and as GGUF, the base model in float32."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = get_peft_model(load_model(), LoraConfig(r=32, lora_alpha=32, target_modules=LINEAR_LAYERS)).train()
    tokenizer = load_tokenizer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    for question in get_task("family_relationships").examples("train", 16):
        tokens = tokenize(tokenizer, question)
        ids = torch.tensor([tokens.context + tokens.completion])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "plain")
    for rank in RANKS:
        export(folder / "plain", folder / f"peft-{rank}", rank, verify=False)
    export(folder / "plain", folder / "rank.gguf", RANK, "gguf", verify=False)
    export(folder / "plain", folder / "ladder", format="gguf-ladder", verify=False)
    in_float32(embedded_gguf(), folder / "model.gguf")
    return folder


def in_float32(gguf_file: Path, target: Path) -> None:
    """The model that `load_model` gives, whose weights are rounded to bfloat16; in float32, as PEFT computes."""
    reader = gguf.GGUFReader(gguf_file)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        writer.add_tensor(tensor.name, weight.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# llama.cpp


def started(base: Path, adapters: Sequence[Path] = (), at_once: int = 1) -> Any:
    """llama.cpp's server in this process, listening on a port of its own. It rounds nothing that PEFT does not."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0) for adapter in adapters]
    params.n_ctx, params.n_parallel = 1024 * at_once, at_once
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def asked(address: str, route: str, request: Any) -> Any:
    body = json.dumps(request).encode()
    asking = urllib.request.Request(f"{address}{route}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asking, timeout=600) as answer:
        return json.load(answer)


def written(response: Any) -> Answer:
    places = response["choices"][0]["logprobs"]["content"]
    return [place["id"] for place in places], [
        {token["id"]: token["logprob"] for token in place["top_logprobs"]} for place in places
    ]


def complete(address: str, ids: list[int], tokens: int = 1, **request: Any) -> Answer:
    wish = {"prompt": ids, "max_tokens": tokens, "logprobs": TOP, "temperature": 0, **request}
    return written(asked(address, "/v1/completions", wish))


# Agreement


def by_peft(folder: Path | None, texts: Texts) -> list[torch.Tensor]:
    """The log-probabilities after each token."""
    model: Any = load_model(dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    return log_probabilities(model, texts)


def log_probabilities(model: Any, texts: Texts) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids in texts]


def places(texts: Texts) -> list[tuple[int, int]]:
    """Text and position. The system prompt is the same in every text, and is left out."""
    shared = next(i for i, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)
    found = [(text, position) for text, ids in enumerate(texts) for position in range(shared, len(ids))]
    assert len(found) >= POSITIONS
    return found[:POSITIONS]


def same_best(peft: list[torch.Tensor], base: Path, adapter: Path | None, texts: Texts) -> tuple[int, float]:
    """At how many places both have the same most likely token, and how far the log-probabilities of llama.cpp's
    most likely ones are from PEFT's, at most."""
    server = started(base, [] if adapter is None else [adapter])
    same, difference = 0, 0.0
    for text, position in places(texts):
        (token,), (best,) = complete(server.listening_address, texts[text][: position + 1])
        wanted = peft[text][position]
        same += int(wanted.argmax()) == token
        difference = max(difference, largest_difference(best, wanted))
    return same, difference


def largest_difference(best: dict[int, float], wanted: torch.Tensor) -> float:
    assert len(best) == TOP
    return max(abs(found - float(wanted[token])) for token, found in best.items())


def test_the_slice_agrees_with_peft(folder: Path, texts: Texts, capsys: Any) -> None:
    """On float32 weights everywhere. On the 4-bit file as it comes, llama.cpp also rounds what it multiplies them with
    to 8 bits, so even the base model alone disagrees with itself in transformers: that is printed."""
    adapter, exact, four_bit = folder / "rank.gguf", folder / "model.gguf", embedded_gguf()
    peft, base = by_peft(folder / f"peft-{RANK}", texts), by_peft(None, texts)
    same, differences = {}, {}
    for name, wanted, model, lora in (
        ("float32", peft, exact, adapter),
        ("4-bit", peft, four_bit, adapter),
        ("4-bit, no adapter in either", base, four_bit, None),
    ):
        same[name], differences[name] = same_best(wanted, model, lora, texts)
    alike = sum(int(peft[text][at].argmax() == base[text][at].argmax()) for text, at in places(texts))
    same["PEFT with against without"] = alike
    with capsys.disabled():
        print(json.dumps({"positions": POSITIONS, "same top-1": same, "largest difference of top 10": differences}))
    assert same["float32"] >= 0.99 * POSITIONS
    assert differences["float32"] < 1e-3
    assert same["4-bit"] >= 0.95 * POSITIONS
    # The adapter matters at these positions, so agreement is no accident.
    assert alike < 0.8 * POSITIONS


# The ladder


def command_of(ladder: Path, base: Path) -> list[str]:
    """The server's command in the README of a ladder."""
    found = re.search(r"^llama-server .*$", (ladder / "README.md").read_text(), re.MULTILINE)
    assert found is not None
    return shlex.split(found[0].replace("BASE.gguf", shlex.quote(str(base))))


def serve(ladder: Path, base: Path) -> Any:
    """A server as the README's command says; xllamacpp has no reader of llama.cpp's command line."""
    found = re.search(r"^llama-server (.*)$", (ladder / "README.md").read_text(), re.MULTILINE)
    assert found is not None
    words = shlex.split(found[1])
    assert words[:2] == ["-m", "BASE.gguf"]
    assert set(words[2::2]) == {"--lora"}
    return started(base, [ladder / word for word in words[3::2]], at_once=3)


def scaled(folder: Path, weights: dict[int, float]) -> Any:
    """PEFT's model with ranks at scales, which add up."""
    model: Any = load_model(dtype=torch.float32)
    for rank, weight in weights.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder / f"peft-{rank}", str(rank))
        else:
            model = PeftModel.from_pretrained(model, folder / f"peft-{rank}", str(rank))
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(str(rank), weight)
    if weights:
        model.base_model.set_adapter([str(rank) for rank in weights])
    return model.eval()


def lora(wish: dict[int, float]) -> list[dict[str, float]]:
    named = [{"id": RANKS.index(rank), "scale": scale} for rank, scale in wish.items()]
    return named or [{"id": 0, "scale": 0.0}]


def test_each_request_of_a_ladder_has_its_rank(folder: Path, texts: Texts, capsys: Any) -> None:
    """What the README of a ladder says: its command; a request that names no rank; and, three at a time, requests for a
    rank, a scale, two ranks and the base model. Every token is PEFT's most likely one."""
    everything = dict.fromkeys(RANKS, 1.0)
    wishes: list[dict[int, float]] = [{}, *({rank: 1.0} for rank in RANKS), {32: 0.5}, {1: 1.0, 32: 0.5}]
    prompts = [ids[: places(texts)[0][1] + 40] for ids in texts[:3]]
    jobs = [(wish, prompt) for prompt in prompts for wish in wishes]
    question = {"role": "user", "content": "Mary is married to John. Their child is Anne. What is Anne to Mary?"}
    chat = load_tokenizer().apply_chat_template([question], add_generation_prompt=True, return_dict=False)

    server = serve(folder / "ladder", folder / "model.gguf")
    address = server.listening_address
    answers = [complete(address, prompts[0], TOKENS)]
    with ThreadPoolExecutor(3) as pool:
        answers += pool.map(lambda job: complete(address, job[1], TOKENS, lora=lora(job[0])), jobs)
    answers.append(
        written(asked(address, "/v1/chat/completions", {**CHAT, "messages": [question], "lora": lora({4: 1.0})}))
    )
    jobs = [(everything, prompts[0]), *jobs, ({4: 1.0}, chat)]

    differences: dict[str, float] = {}
    for wish in [everything, *wishes]:
        model = scaled(folder, wish)
        name = " + ".join(f"{scale} x rank {rank}" for rank, scale in wish.items()) or "none"
        for (asked_for, prompt), (tokens, best) in zip(jobs, answers, strict=True):
            if asked_for == wish:
                (wanted,) = log_probabilities(model, [prompt + tokens[:-1]])
                wanted = wanted[len(prompt) - 1 :]
                assert tokens == wanted.argmax(-1).tolist(), name
                found = max(largest_difference(each, row) for each, row in zip(best, wanted, strict=True))
                differences[name] = max(differences.get(name, 0.0), found)
    with capsys.disabled():
        print(json.dumps({"largest difference of log-probabilities": differences}))
    assert max(differences.values()) < 1e-3
    # The rank matters, so agreement is no accident.
    assert len({tuple(tokens) for tokens, _ in answers[1 : len(wishes) + 1]}) > 2
