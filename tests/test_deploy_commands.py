"""reorder, info and export on the command line, the card beside an adapter, and the calibration behind them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import an_evaluation
import pytest
import torch
import typer
from conftest import LINEAR_LAYERS, nested_llama, randomize, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from strangers import IDS, output
from tiny_chat import save_tiny_chat, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, load, nest, reorder
from matryoshka_lora.adapter.in_model import InModel
from matryoshka_lora.cli.main import app
from matryoshka_lora.data.questions import Row
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.formats.beside import read_spectra
from matryoshka_lora.formats.card import make_card
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.models import EMBEDDED
from matryoshka_lora.reordering.moments import Moments, measure_moments
from matryoshka_lora.reordering.sources import QuestionRows
from matryoshka_lora.serving.info import describe

Run = Callable[..., str]


@pytest.fixture
def run(capsys: Any) -> Run:
    def command(*arguments: object) -> str:
        app([str(argument) for argument in arguments], standalone_mode=False)
        written: str = capsys.readouterr().out
        return written

    return command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR_LAYERS)
    )
    randomize(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def nested(plain: Path) -> Path:
    reorder(plain, plain.parent / "nested")
    return plain.parent / "nested"


# What a small device needs not have


COMMANDS = {
    "info": ["info", "{adapter}"],
    "reorder": ["reorder", "{adapter}", "-o", "{out}"],
    "peft": ["export", "{adapter}", "--rank", "4", "--no-verify", "-o", "{out}"],
    "budget": ["export", "{adapter}", "--budget", "0.3", "--no-verify", "-o", "{out}"],
    "ladder": ["export", "{adapter}", "--format", "ladder", "--no-verify", "-o", "{out}"],
    "directions": ["export", "{adapter}", "--format", "directions", "-o", "{out}"],
}


@pytest.mark.parametrize("kind", ["plain", "nested"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_needs_no_model_imports_neither_peft_nor_transformers(
    plain: Path, nested: Path, tmp_path: Path, command: str, kind: str
) -> None:
    adapter = plain if kind == "plain" else nested
    code = (
        "import sys; from matryoshka_lora.cli.main import app; app(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'peft', 'transformers'}))"
    )
    arguments = [part.format(adapter=adapter, out=tmp_path / "out") for part in COMMANDS[command]]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    assert command == "info" or (tmp_path / "out").is_dir()


# reorder


@pytest.mark.parametrize("by", ["svd", "loss", "learned"])
def test_reorder_does_not_write_over_what_it_reads(
    run: Run, base: Path, plain: Path, data: Path, tmp_path: Path, by: str
) -> None:
    own = Path(shutil.copytree(plain, tmp_path / "own"))
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    options = [] if by == "svd" else ["--by", by, "--data", data, "--rows", 2, "--model", base]
    for force in ([], ["--force"]):
        with pytest.raises(MatryoshkaError, match="is the adapter itself"):
            run("reorder", own, "-o", own, *options, *force)
    assert {file.name: file.read_bytes() for file in own.iterdir()} == before


@pytest.mark.parametrize("by", ["svd", "activations", "loss", "learned"])
def test_reorder(run: Run, base: Path, plain: Path, data: Path, tmp_path: Path, by: str) -> None:
    more = [] if by == "svd" else ["--by", by, "--data", data, "--rows", 20, "--dtype", "fp32"]
    out = run("reorder", plain, "-o", tmp_path / "out", *more)
    assert "Next: matryoshka info" in out
    made = open_adapter(tmp_path / "out")
    assert made.nested.reordered == by
    spectra = read_spectra(made)
    assert spectra is not None
    assert spectra.keys() == {layer.name for layer in made.layers}
    before, after = (
        output(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path))
        for path in (plain, tmp_path / "out")
    )
    assert (after - before).norm() < 1e-5 * before.norm()


def test_reorder_says_which_option_is_missing(run: Run, plain: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="by='loss' needs data"):
        run("reorder", plain, "-o", tmp_path / "x", "--by", "loss")
    with pytest.raises(MatryoshkaError, match="data are for by='activations', 'loss', 'learned' and 'trained'"):
        run("reorder", plain, "-o", tmp_path / "x", "--data", data)
    with pytest.raises(MatryoshkaError, match="rows is 0"):
        reorder(plain, tmp_path / "x", "loss", str(data), rows=0)
    assert not (tmp_path / "x").exists()


def moments(adapter: NestedAdapter, tokenizer: Any, rows: list[Row], gradients: bool) -> dict[str, Moments]:
    """Over each row once."""
    data = QuestionRows(adapter.model, rows, tokenizer)
    return measure_moments(InModel(adapter.model, adapter.name), data, gradients, len(rows))


def test_moments_are_those_of_the_hidden_activations_and_their_gradients(base: Path, nested: Path) -> None:
    """Against one row at a time, without padding, with autograd's own gradients of a factor's output."""
    adapter = load(AutoModelForCausalLM.from_pretrained(base), nested, trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # One more than a batch has.
    rows = [Row("a" * n, "bc" * n) for n in (1, 3, 8, 2, 4, 5, 6, 7, 9)]
    activations = moments(adapter, tokenizer, rows, gradients=False)
    weighted = moments(adapter, tokenizer, rows, gradients=True)

    layer = "model.layers.1.self_attn.v_proj"
    factor = adapter.model.base_model.model.get_submodule(layer).lora_A["default"]
    kept: list[Any] = []
    handle = factor.register_forward_hook(lambda module, inputs, hidden: kept.append(hidden) or hidden.retain_grad())
    inner, left, right = (torch.zeros(8, 8, dtype=torch.float64) for _ in range(3))
    for row in rows:
        ids = tokenizer(row.prompt + row.completion + tokenizer.eos_token)["input_ids"]
        logits = adapter.model.eval()(input_ids=torch.tensor([ids])).logits[0]
        start = len(tokenizer(row.prompt)["input_ids"])
        torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum").backward()
        hidden, gradient = kept[-1][0].detach().double(), kept[-1].grad[0].double()
        for h, g in zip(hidden, gradient, strict=True):
            inner += torch.outer(h, h)
            left += torch.outer(h, h) * g.dot(g)
            right += torch.outer(g, g) * h.dot(h)
    handle.remove()
    torch.testing.assert_close(activations[layer].inner, inner, rtol=1e-4, atol=1e-6 * float(inner.max()))
    assert activations[layer].outer is None
    torch.testing.assert_close(weighted[layer].inner, left, rtol=1e-3, atol=1e-5 * float(left.abs().max()))
    assert weighted[layer].outer is not None
    torch.testing.assert_close(weighted[layer].outer, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))
    assert len(weighted) == len(open_adapter(nested).layers)


class WithoutDoubles(torch.Tensor):
    """On a device that has no float64, as Apple's, which no test here can run on."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, WithoutDoubles) and found.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return found


@pytest.mark.parametrize("gradients", [False, True])
def test_moments_on_a_device_without_float64(base: Path, nested: Path, gradients: bool) -> None:
    adapter = load(AutoModelForCausalLM.from_pretrained(base), nested, trainable=True)
    tokenizer, rows = AutoTokenizer.from_pretrained(base), [Row("abc", "de")]
    wanted = moments(adapter, tokenizer, rows, gradients)
    for name, module in adapter.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda module, inputs, hidden: hidden.as_subclass(WithoutDoubles))
        if name.endswith("lora_B.default"):
            module.register_forward_pre_hook(lambda module, inputs: inputs[0].as_subclass(torch.Tensor))
    found = moments(adapter, tokenizer, rows, gradients)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert one.inner.dtype == torch.float64
        torch.testing.assert_close(one.inner, wanted[name].inner)
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2).as_subclass(WithoutDoubles).double()


@pytest.mark.parametrize("pad", [None, "<pad>"], ids=["none", "unknown-to-the-model"])
@pytest.mark.parametrize("eos", ["</s>", None])
def test_a_tokenizer_without_a_pad_token_that_the_model_knows(base: Path, nested: Path, pad: Any, eos: Any) -> None:
    adapter = load(AutoModelForCausalLM.from_pretrained(base), nested, trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    requests = [([5, 6, 7], [8]), ([9], [10, 11])]
    wanted = Engine(adapter, tokenizer).loglikelihood(requests, 4)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [Row([{"role": "user", "content": "a" * n}], [{"role": "assistant", "content": "b"}]) for n in (1, 5)]
    before = moments(adapter, tokenizer, rows, gradients=False)
    tokenizer.add_special_tokens({"pad_token": pad} if pad else {})
    tokenizer.pad_token, tokenizer.eos_token = pad, eos
    assert tokenizer.pad_token_id == (adapter.model.config.vocab_size if pad else None)
    engine = Engine(adapter, tokenizer)
    assert engine.loglikelihood(requests, 4) == wanted
    assert len(engine.generate([[5, 6, 7], [9]], 4, 3)) == 2
    again = moments(adapter, tokenizer, rows, gradients=False)
    for name, found in again.items():
        torch.testing.assert_close(found.inner, before[name].inner)
    adapter.reorder("learned", rows, tokenizer, rows=2)


@pytest.mark.parametrize("by", ["activations", "loss", "learned"])
def test_rows_are_cut_to_the_context(by: Any) -> None:
    """At their end, as training does. A prompt that leaves nothing of its answer is named."""
    tokenizer = tiny_tokenizer()
    model = get_peft_model(
        tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=16),
        LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]),
    )
    adapter = nest(model, [1, 4])
    seen: list[list[int]] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    adapter.reorder(by, [Row("abc", "d" * 40)], tokenizer, rows=1)
    assert seen
    assert all(row == tokenizer("abc" + "d" * 13)["input_ids"] for row in seen)
    seen.clear()
    with pytest.raises(MatryoshkaError, match=r"row 2 .* prompt has 16 tokens.* context has 16"):
        adapter.reorder(by, [Row("abc", "d"), Row("a" * 16, "d")], tokenizer)
    assert not seen


# info


def test_info_needs_no_base_model(run: Run, plain: Path, nested: Path, tmp_path: Path) -> None:
    out = run("info", plain)
    assert "a plain LoRA adapter" in out
    assert f"Next: matryoshka reorder {plain}" in out
    out = run("info", nested, "--plot", tmp_path / "decay.png")
    assert "reordered by svd: any rank may be used" in out
    assert (tmp_path / "decay.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(typer.BadParameter, match="ends in"):
        run("info", nested, "--plot", tmp_path / "decay")


def test_info_counts_what_an_export_has(plain: Path, nested: Path) -> None:
    described, before = describe(nested), describe(plain)
    tensors = sum(p.numel() for x in described.adapter.layers for p in described.adapter.factors(x))
    assert described.parameters(8) == tensors
    assert described.parameters(2) * 4 == tensors
    assert described.size(8) == 4 * tensors
    assert described.kept(8) == pytest.approx(1)
    assert 0 < described.kept(1) < described.kept(2) < 1
    # A plain adapter's own singular values are those that reordering finds.
    for name, values in before.spectra.items():
        torch.testing.assert_close(values, described.spectra[name], rtol=1e-4, atol=1e-6)


def test_info_tells_the_deployments_apart(tmp_path: Path) -> None:
    nested_llama(Nesting([1, 4])).save(tmp_path / "paper")
    paper = describe(tmp_path / "paper")
    assert "with the paper's deployment, which drops P: low ranks are poor" in paper.kind
    nested_llama(Nesting([1, 4]), deploy="reordered").save(tmp_path / "reordered")
    assert "reordered by svd: any rank may be used" in describe(tmp_path / "reordered").kind
    # Of factors between which P stood, the values are those of the function that was trained.
    for name, values in describe(tmp_path / "reordered").spectra.items():
        torch.testing.assert_close(values, paper.spectra[name], rtol=1e-4, atol=1e-6)


# export


FORMATS = {
    "peft": (["--rank", 2], "two"),
    "budget": (["--budget", 0.3], "two"),
    "padded": (["--budget", 0.3, "--pad"], "two"),
    "merged": (["--rank", 2, "--format", "merged"], "two"),
    "gguf": (["--rank", 2, "--format", "gguf"], "two.gguf"),
    "mlx": (["--rank", 2, "--format", "mlx"], "two"),
    "ladder": (["--format", "ladder"], "two"),
    "gguf-ladder": (["--format", "gguf-ladder"], "two"),
    "directions": (["--format", "directions"], "two"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_export_verifies_before_it_announces(run: Run, nested: Path, tmp_path: Path, case: str) -> None:
    options, name = FORMATS[case]
    out = run("export", nested, *options, "-o", tmp_path / name)
    *_, verified, announced, following = out.splitlines()
    assert verified.startswith("Verified: ")
    assert announced.startswith(f"{tmp_path / name} is ")
    assert following.startswith("Next: ")
    assert (tmp_path / name).exists()


def test_export_says_when_it_cannot_verify(run: Run, nested: Path, tmp_path: Path) -> None:
    out = run("export", nested, "--rank", 2, "-o", tmp_path / "a", "--model", tmp_path / "absent")
    assert "No logits were compared: the base model" in out
    assert "Logits were not compared, as you asked." in run(
        "export", nested, "--rank", 2, "-o", tmp_path / "b", "--no-verify"
    )
    merged = ("--format", "merged", "--no-verify")
    assert "Logits were not compared, as you asked." in run(
        "export", nested, "--rank", 2, *merged, "-o", tmp_path / "d"
    )
    assert (tmp_path / "d" / "model.safetensors").exists()
    with pytest.raises(MatryoshkaError, match="needs the base model"):
        run("export", nested, "--rank", 2, "--format", "merged", "-o", tmp_path / "c", "--model", tmp_path / "absent")
    assert not (tmp_path / "c").exists()


def test_a_ladder_ends_at_the_rank_that_was_asked_for(run: Run, nested: Path, tmp_path: Path) -> None:
    run("export", nested, "--format", "ladder", "--rank", 3, "-o", tmp_path / "ladder")
    assert sorted(path.name for path in (tmp_path / "ladder").glob("rank-*")) == ["rank-1", "rank-2", "rank-3"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rank", 2, "--budget", 0.5],
        ["--rank", 2, "--pad"],
        ["--budget", 0.5, "--format", "ladder"],
    ],
    ids=str,
)
def test_export_refuses_what_contradicts_itself(run: Run, nested: Path, tmp_path: Path, options: list[Any]) -> None:
    with pytest.raises(MatryoshkaError, match=r"give |padding belongs to a budget"):
        run("export", nested, *options, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# The card


def test_the_card_has_the_header_the_curve_the_recipe_and_how_to_load(nested: Path, tmp_path: Path) -> None:
    adapter = nested_llama(Nesting([1, 2, 8]))
    adapter.reorder()
    home = tmp_path / "run"
    an_evaluation.write(home / "evaluation", None)
    (home / "evaluation" / "curve.png").write_bytes(b"x")
    (home / "train.yaml").write_text("learning_rate: 0.002\noutput_dir: /home/somebody/secret\n")
    adapter.save(home)
    card = (home / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    # Of 60 questions, rank 1 answers every third and rank 8 all but three.
    assert "| | 1 | 2 | 4 | 8 |" in card
    assert "| family: acc, 60 questions | 0.333 ± 0.061 | 0.667 ± 0.061 | 0.933 ± 0.032 | 0.950 ± 0.028 |" in card
    assert "![Every task at every rank](evaluation/curve.png)" in card
    assert "learning_rate: 0.002" in card
    assert "somebody" not in card
    for way in ("from matryoshka_lora import load", "PeftModel.from_pretrained", "vllm serve", "llama-cli"):
        assert way in card


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"ranks": [1], "tasks": {"a": 5}}',
        '{"ranks": [1], "tasks": {"a": {"metrics": {}}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_evaluation_leaves_a_card_without_curve(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(content)
    nested_llama(Nesting([1, 8])).save(tmp_path)
    assert "How good each rank is" not in (tmp_path / "README.md").read_text()


def test_an_evaluation_of_other_weights_is_not_in_the_card(tmp_path: Path) -> None:
    an_evaluation.write(tmp_path / "evaluation", None, adapter={"sha256": "0" * 64})
    nested_llama(Nesting([1, 8])).save(tmp_path)
    assert "How good each rank is" not in (tmp_path / "README.md").read_text()


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting([1, 8]))
    adapter.save(tmp_path)
    ours = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    adapter.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").write_text(ours + "old")
    adapter.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == ours


def test_a_folder_of_this_machine_is_named_in_no_card(nested: Path, base: Path) -> None:
    assert str(base) not in (nested / "README.md").read_text()
    opened = open_adapter(nested)
    config = opened.config.changed(base_model_name_or_path="owner/model")
    assert "base_model: owner/model\n" in make_card(config, opened.state, nested)


def test_a_card_names_the_embedded_model_as_others_know_it(nested: Path) -> None:
    opened = open_adapter(nested)
    config = opened.config.changed(base_model_name_or_path=EMBEDDED)
    card = make_card(config, opened.state, nested)
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert EMBEDDED not in card.partition("## How it was trained")[0]
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in card


def test_the_tokens_of_the_test_are_the_model_s(base: Path) -> None:
    assert int(IDS.max()) < AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().num_embeddings
