"""vLLM serves a ladder: the bundled model, and a real server on localhost (`make test-vllm`)."""

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
from helpers.models import LINEAR_LAYERS
from peft import LoraConfig, PeftModel, get_peft_model

from matryoshka_lora import export, reorder
from matryoshka_lora.model.base_model import load_model, load_tokenizer

pytest.importorskip("vllm", reason="make test-vllm creates an environment for it")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MAX_RANK = 16
SERVED_RANKS = (1, 2, 4, 8)
NUM_TOKENS = 4
TEXTS = ["The sister of my mother is my", "Once upon a time there was", "Water is made of"]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Two threads that wait for each other are slow where the cores are shared.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
VLLM_OPTIONS = [
    "--dtype=float32",
    "--max-model-len=512",
    "--max-num-seqs=16",
    "--enforce-eager",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a nested adapter on the bundled model with components of one size."""
    folder = tmp_path_factory.mktemp("vllm")
    config = LoraConfig(r=MAX_RANK, lora_alpha=MAX_RANK, target_modules=LINEAR_LAYERS)
    model = get_peft_model(load_model(dtype=torch.float32), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder / "plain")
    reorder(folder / "plain", folder / "noise")
    return folder / "noise"


class Server:
    """A server on localhost that `matryoshka serve` has started."""

    def __init__(self, adapter: Path, log: Path) -> None:
        with socket.socket() as free_socket:
            free_socket.bind(("127.0.0.1", 0))
            self.port = free_socket.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", "matryoshka_lora", "serve", str(adapter)]
        command += ["--ranks", ",".join(map(str, SERVED_RANKS)), "--port", str(self.port)]
        command += ["--", *VLLM_OPTIONS]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT},
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
                status, _ = self.request("/health")
                if status == 200:
                    return
            except OSError:
                pass
            time.sleep(1)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-5000:]}")

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Return the status and the JSON of a response."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                text = response.read()
                return response.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def generate(self, model: str, prompt: Sequence[int]) -> list[int]:
        """Return the greedy tokens after a prompt."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "return_token_ids": True,
        }
        status, answer = self.request("/v1/completions", body)
        assert status == 200, answer
        token_ids: list[int] = answer["choices"][0]["token_ids"]
        return token_ids


@pytest.fixture(scope="module")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(adapter, tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait()
        yield server
        server.process.terminate()
        server.process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def test_every_rank_generates_what_peft_does(server: Server, adapter: Path, tmp_path: Path) -> None:
    """Alone, and in batches of several ranks."""
    tokenizer = load_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    pairs = [(rank, index) for index in range(len(prompts)) for rank in SERVED_RANKS]

    def generate(pair: tuple[int, int]) -> list[int]:
        rank, index = pair
        return server.generate(f"noise@{rank}", prompts[index])

    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = dict(zip(pairs, pool.map(generate, pairs), strict=True))
    for pair in pairs:
        assert generate(pair) == answers[pair]
    for rank in (1, 8):
        export(adapter, tmp_path / str(rank), rank)
        model: Any = load_model(dtype=torch.float32)
        peft_model = PeftModel.from_pretrained(model, tmp_path / str(rank)).eval()
        for index, prompt in enumerate(prompts):
            input_ids = torch.tensor([prompt])
            output = peft_model.generate(
                input_ids=input_ids, do_sample=False, max_new_tokens=NUM_TOKENS
            )
            assert output[0, len(prompt) :].tolist() == answers[rank, index]
    # The ranks differ, so the agreement is not by chance.
    assert len({tuple(answer) for answer in answers.values()}) > len(prompts)


def test_only_the_served_ranks_are_available(server: Server) -> None:
    for name in ("noise@16", "noise@3", "noise", "../noise@4"):
        status, _ = server.request("/v1/completions", {"model": name, "prompt": "Hello"})
        assert status == 404
    _, models = server.request("/v1/models")
    names = {model["id"] for model in models["data"]}
    assert names >= {f"noise@{rank}" for rank in SERVED_RANKS}
    status, _ = server.request("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/"})
    assert status == 404
