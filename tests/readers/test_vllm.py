"""vLLM serves a ladder: the real model and a real server on the loopback (``make test-vllm``)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEAR_LAYERS
from peft import LoraConfig, PeftModel, get_peft_model

from matryoshka_lora import export, reorder
from matryoshka_lora.models import load_model, load_tokenizer

pytest.importorskip("vllm", reason="make test-vllm sets up its own environment")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

R, TOKENS = 16, 4
# One thread, as two that wait for each other are slow where the cores are shared.
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
TEXTS = ["The sister of my mother is my", "Once upon a time there was", "Water is made of"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a nested adapter on the embedded model with directions of one size."""
    folder = tmp_path_factory.mktemp("vllm")
    config = LoraConfig(r=R, lora_alpha=R, target_modules=LINEAR_LAYERS)
    model = get_peft_model(load_model(dtype=torch.float32), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder / "plain")
    reorder(folder / "plain", folder / "noise")
    return folder / "noise"


class Server:
    """A server on the loopback that `matryoshka serve` has started."""

    def __init__(self, adapter: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", "matryoshka_lora", "serve", str(adapter)]
        command += ["--ranks", "1,2,4,8", "--port", str(self.port)]
        options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--", *options, "--enforce-eager"],
                env={**os.environ, **CPU},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when the server answers."""
        for _ in range(900):
            if self.process.poll() is not None:
                break
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(1)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-5000:]}")

    def get(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Return status and answer of a request."""
        data = None if body is None else json.dumps(body).encode()
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def ask(self, model: str, prompt: Sequence[int]) -> list[int]:
        """Return the greedy tokens after a prompt."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0}
        status, answer = self.get("/v1/completions", {**body, "return_token_ids": True})
        assert status == 200, answer
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens


@pytest.fixture(scope="module")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(adapter, tmp_path_factory.mktemp("server") / "log")
    try:
        started.wait()
        yield started
        started.process.terminate()
        started.process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait()


def test_every_rank_answers_as_peft_does_alone_and_in_mixed_batches(
    server: Server, adapter: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    pairs = [(rank, number) for number in range(len(prompts)) for rank in (1, 2, 4, 8)]
    with ThreadPoolExecutor(len(pairs)) as pool:
        asked = pool.map(lambda pair: server.ask(f"noise@{pair[0]}", prompts[pair[1]]), pairs)
        together = dict(zip(pairs, asked, strict=True))
    for rank, number in pairs:
        assert server.ask(f"noise@{rank}", prompts[number]) == together[rank, number]
    for rank in (1, 8):
        export(adapter, tmp_path / str(rank), rank)
        model = load_model(dtype=torch.float32)
        peft = PeftModel.from_pretrained(model, tmp_path / str(rank)).eval()
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            answer = peft.generate(input_ids=ids, do_sample=False, max_new_tokens=TOKENS)
            assert answer[0, ids.shape[1] :].tolist() == together[rank, number]
    assert len({tuple(answer) for answer in together.values()}) > len(prompts)


def test_a_rank_that_is_not_served_and_folders_of_the_server_are_refused(server: Server) -> None:
    for name in ("noise@16", "noise@3", "noise", "../noise@4"):
        assert server.get("/v1/completions", {"model": name, "prompt": "Hello"})[0] == 404
    listed = {model["id"] for model in server.get("/v1/models")[1]["data"]}
    assert {"noise@1", "noise@2", "noise@4", "noise@8"} <= listed
    body = {"lora_name": "x", "lora_path": "/"}
    assert server.get("/v1/load_lora_adapter", body)[0] == 404
