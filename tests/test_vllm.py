"""vLLM itself serves every rank: the real model, a real server on the loopback (``make test-vllm``)."""

from __future__ import annotations

import json
import os
import random
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
import yaml
from conftest import LINEAR_LAYERS
from peft import LoraConfig, PeftModel, get_peft_model

from matryoshka_lora import MatryoshkaError, evaluate, export, reorder
from matryoshka_lora.data.questions import tokenize
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.models import embedded_folder, load_model, load_tokenizer

pytest.importorskip("vllm", reason="make test-vllm sets up its own environment")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

R = 32
RANKS = (1, 2, 4, 8, 16, 32)
TOKENS = 4

# One thread, as two that wait for each other are slow where the cores are shared.
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = {"max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True}


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two nested adapters: ``family`` was trained for a few steps, ``noise`` has random numbers."""
    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    model = get_peft_model(load_model(), LoraConfig(r=R, lora_alpha=R, target_modules=LINEAR_LAYERS)).train()
    tokenizer = load_tokenizer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    for question in get_task("family_relationships").examples("train", 16):
        tokens = tokenize(tokenizer, question)
        ids = torch.tensor([tokens.context + tokens.completion])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "plain")
    reorder(folder / "plain", folder / "adapters/family")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.12)  # all directions weigh the same, so that ranks differ
    model.save_pretrained(folder / "random")
    reorder(folder / "random", folder / "adapters/noise")
    return folder / "adapters"


def questions(count: int) -> list[list[int]]:
    """Held-out questions in tokens, after which an answer begins."""
    tokenizer = load_tokenizer()
    return [tokenize(tokenizer, each).prompt for each in get_task("family_relationships").examples("test", count)]


def beginnings() -> list[list[int]]:
    """Of texts, in tokens."""
    tokenizer = load_tokenizer()
    texts = ["The sister of my mother is my", "Once upon a time there was", "In the year 1900, the", "Water is made of"]
    texts += ["The capital of France is", "def add(a, b):", "Two plus two is", "She opened the door and"]
    return [tokenizer(text)["input_ids"] for text in texts]


def by_peft(folder: Path) -> Any:
    return PeftModel.from_pretrained(load_model(dtype=torch.float32), str(folder)).eval()


# vLLM reads what is exported


def test_a_ladder_and_a_budget_in_one_batch_have_the_log_probabilities_of_peft(adapters: Path, tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    export(adapters / "family", tmp_path / "ladder", format="ladder", verify=False)
    export(adapters / "family", tmp_path / "ladder/budget", budget=0.25, verify=False)
    folders = [tmp_path / "ladder" / name for name in ("rank-1", "rank-4", "rank-32", "budget")]
    texts = questions(2)
    model = LLM(str(embedded_folder()), dtype="float32", enable_lora=True, max_lora_rank=R, max_loras=4, **OPTIONS)
    try:
        requests = [LoRARequest(folder.name, 1 + place, str(folder)) for place, folder in enumerate(folders)]
        asked = [(text, request) for text in texts for request in requests]
        answers = model.generate(
            [TokensPrompt(prompt_token_ids=text) for text, _ in asked],
            SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=4),
            lora_request=[request for _, request in asked],
            use_tqdm=False,
        )
    finally:
        model.llm_engine.engine_core.shutdown()
    found = [answer.outputs[0] for answer in answers]
    worst = 0.0
    for place, folder in enumerate(folders):
        peft = by_peft(folder)
        for number, text in enumerate(texts):
            answer = found[number * len(folders) + place]
            with torch.no_grad():
                logs = peft(input_ids=torch.tensor([[*text, *answer.token_ids]])).logits[0].log_softmax(-1)
            for position, likely in enumerate(answer.logprobs, start=len(text) - 1):
                assert logs[position].argmax() == answer.token_ids[position - len(text) + 1]
                for token, value in likely.items():
                    worst = max(worst, abs(value.logprob - float(logs[position, token])))
    print(f"the largest difference of a log-probability from PEFT: {worst:.2g}")
    assert worst < 1e-4
    # The adapters differ, so agreement is no accident.
    first, *others = (next(iter(answer.logprobs[0].values())).logprob for answer in found[: len(folders)])
    assert all(abs(first - other) > 1e-2 for other in others)


# One server, every rank by its name


class Server:
    """A server on the loopback that was started by `matryoshka serve`."""

    def __init__(self, adapters: Path, cache: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "matryoshka_lora",
                    "serve",
                    str(adapters),
                    "--port",
                    str(self.port),
                    "--",
                    *options,
                ],
                env={**os.environ, **CPU, "MATRYOSHKA_VLLM_CACHE": str(cache)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
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
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def ask(self, model: str, prompt: Sequence[int]) -> list[int]:
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": TOKENS,
            "temperature": 0,
            "return_token_ids": True,
        }
        status, answer = self.get("/v1/completions", body)
        assert status == 200, answer
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    def refused(self, model: str) -> tuple[int, str]:
        status, answer = self.get("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1})
        return status, answer["error"]["message"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """With all of its processes, as a machine that runs out of memory or power does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    started = Server(adapters, folder / "cache", folder / "log")
    yield started
    started.stop()
    # Nothing is left of a server that was ended.
    assert [path.name for path in (folder / "cache").iterdir()] == ["cleaning.lock"]


def test_every_rank_by_its_name_alone_and_in_mixed_batches(server: Server, adapters: Path, tmp_path: Path) -> None:
    prompts = beginnings()
    pairs = [(rank, number) for number in range(len(prompts)) for rank in RANKS] + [(4, 0), (32, 0)]
    assert len(pairs) == 50
    alone = {pair: server.ask(f"noise@{pair[0]}", prompts[pair[1]]) for pair in dict.fromkeys(pairs)}
    random.Random(0).shuffle(pairs)
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda pair: server.ask(f"noise@{pair[0]}", prompts[pair[1]]), pairs))
    assert together == [alone[pair] for pair in pairs]
    assert len({tuple(answer) for answer in alone.values()}) > 2 * len(prompts)  # ranks say different things
    for rank in (1, 4, 32):
        export(adapters / "noise", tmp_path / str(rank), rank, verify=False)
        peft = by_peft(tmp_path / str(rank))
        for number in range(2):
            ids = torch.tensor([prompts[number]])
            with torch.no_grad():
                answer = peft.generate(input_ids=ids, do_sample=False, max_new_tokens=TOKENS)[0, ids.shape[1] :]
            assert answer.tolist() == alone[rank, number]


def test_a_rank_that_two_requests_ask_for_at_once(server: Server) -> None:
    prompt = questions(1)[0]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.ask("family@3", prompt), range(8)))
    assert all(answer == answers[0] for answer in answers)


def test_errors_reach_the_client(server: Server, adapters: Path) -> None:
    for name, why in {
        "family@33": "rank 33 is above the largest rank 32",
        "family@x": "is no rank: write family@4",
        "family": "family has many ranks",
        "family@auto": "no rank was chosen for family",
    }.items():
        status, message = server.refused(name)
        assert (status, why in message, str(adapters) in message) == (400, True, False), message
    for name in ("nobody@4", "../adapters/family@4", f"{adapters}/family@4", "family/../family@4", ".@4"):
        assert server.refused(name)[0] == 404
    base = server.get("/v1/models")[1]["data"][0]["id"]
    assert server.refused(base)[0] == 400  # of a CPU: vLLM would answer by an adapter
    assert "start another server for the base model" in server.refused(base)[1]
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
        assert server.get(path, {"lora_name": "x", "lora_path": str(adapters.parent / "plain")})[0] == 403


def test_names_and_ranks_are_listed(server: Server) -> None:
    ranks = list(range(1, R + 1))
    assert server.get("/v1/ranks") == (
        200,
        {"object": "list", "data": [{"id": name, "ranks": ranks, "auto": None} for name in ("family", "noise")]},
    )


def test_a_killed_server_starts_again(adapters: Path, tmp_path: Path) -> None:
    prompt, cache = questions(1)[0], tmp_path / "cache"
    server = Server(adapters, cache, tmp_path / "first")
    try:
        before = server.ask("family@4", prompt)
    finally:
        server.kill()
    (left,) = (path for path in cache.iterdir() if path.is_dir())
    again = Server(adapters, cache, tmp_path / "second")
    try:
        assert again.ask("family@4", prompt) == before
        assert not left.exists()
    finally:
        again.stop()


# lm-evaluation-harness


def test_eval_by_vllm_has_the_numbers_of_our_engine(adapters: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"The opposite of {word} is", "choices": [right, wrong, "none of them"], "answer": 0}
        for word, right, wrong in [("hot", "cold", "red"), ("big", "small", "wet"), ("up", "down", "green")]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "opposites",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metadata": {"version": 1},
    }
    (tmp_path / "opposites.yaml").write_text(yaml.safe_dump(task))
    asked: dict[str, Any] = {
        "tasks": [str(tmp_path / "opposites.yaml"), "family_relationships"],
        "ranks": [1, 4, 32],
        "dtype": "fp32",
        "limit": 2,
        "latency": False,
    }
    own = evaluate(adapters / "family", out=tmp_path / "own", **asked).to_dict()
    found = evaluate(adapters / "family", out=tmp_path / "vllm", engine="vllm", vllm_options=OPTIONS, **asked).to_dict()
    assert found["settings"]["engine"] == "vllm"
    assert own.keys() == found.keys()
    for name, entry in own["tasks"].items():
        other = found["tasks"][name]
        assert {**entry, "metrics": 0, "aurac": 0} == {**other, "metrics": 0, "aurac": 0}  # the prompts' hash included
        for metric, values in entry["metrics"].items():
            close = {"rel": 1e-4, "abs": 1e-4} if metric.startswith("loss") else {"rel": 0, "abs": 0}
            assert other["metrics"][metric]["value"] == pytest.approx(values["value"], **close), metric
            assert other["metrics"][metric]["base"]["value"] == pytest.approx(values["base"]["value"], **close)
    answers = [
        [json.loads(line)["answers"] for line in (tmp_path / name / "examples.jsonl").read_text().splitlines()]
        for name in ("own", "vllm")
    ]
    assert answers[0] == answers[1]


def test_what_vllm_is_not_asked_to_do(adapters: Path, tmp_path: Path) -> None:
    for options, why in (
        ({"trust_remote_code": True}, "would run code"),
        ({"dtype": "float16"}, "dtype is no option of vLLM here"),
        ({"no_such_option": 1}, "vLLM cannot load smollm2-135m"),
    ):
        with pytest.raises(MatryoshkaError, match=why):
            evaluate(
                adapters / "family",
                "family_relationships",
                ranks=[4],
                out=tmp_path / "out",
                engine="vllm",
                vllm_options=options,
            )
