"""The command line: what it says, what it refuses, and how light it is."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import nested_llama
from safetensors.torch import save_file
from strangers import plain_adapter
from tiny_chat import save_tiny_chat
from typer.main import get_command
from typer.testing import CliRunner

from matryoshka_lora import Nesting, __version__
from matryoshka_lora.cli import app, main

VERBS = ["train", "info", "reorder", "combine", "extract", "export", "eval", "select", "serve"]
VERBS += ["play", "demo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a nested adapter, a plain one, a single file and rows."""
    folder = tmp_path_factory.mktemp("cli")
    nested_llama(Nesting.powers_of_two(8)).save(folder / "nested")
    plain_adapter(folder / "plain")
    save_file(
        {
            "lora_unet_a.lora_down.weight": torch.randn(8, 64),
            "lora_unet_a.lora_up.weight": torch.randn(64, 8),
            "lora_unet_a.alpha": torch.tensor(4.0),
        },
        folder / "one.safetensors",
    )
    rows = [{"prompt": f"{n} plus 1 is", "completion": f" {n + 1}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run(
    words: Sequence[object], capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of a command."""
    patch.setattr(sys, "argv", ["matryoshka", *map(str, words)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else int(code is not None)), out, err


# What it says


def test_alone_it_says_what_to_do_with_what_one_has() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    for verb in ("demo", "train", "info", "reorder", "export", "combine", "extract"):
        assert f"matryoshka {verb}" in result.output
    assert f"matryoshka-lora {__version__}" in CliRunner().invoke(app, ["--version"]).output


def test_each_verb_is_there_and_teaches_by_an_example() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert list(commands) == VERBS
    for verb, command in commands.items():
        assert f"Example: matryoshka {verb}" in command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{verb} does not explain {parameter.name}"


@pytest.mark.parametrize(
    ("line", "said", "comes_next"),
    [
        ("info nested", "in the order 'svd'", "export nested --rank 4 -o small"),
        ("info plain", "a plain LoRA", "reorder plain -o nested"),
        ("info one.safetensors", "in one file", "--keep 99% -o one-small.safetensors"),
        ("reorder plain -o new", "every rank", "info new"),
        ("reorder one.safetensors -o new.safetensors", "new.safetensors", "info new"),
        ("export nested --rank 2 -o new", "% of the update's norm", ""),
        ("export plain --keep 0.9 -o new", "ranks by layer", ""),
        ("export one.safetensors --rank 2 -o new.safetensors", "rank 2", ""),
        ("export nested --rank 1,8 --format ladder -o new", "rank 1, 8", "serve new --print"),
        ("export one.safetensors --keep 100% -o new.safetensors", "no smaller", ""),
        ("export plain --keep 99% --rank 2 -o new", "--rank 2 bounds", ""),
        ("serve nested --print --model base", "--lora-modules nested@1=", ""),
    ],
)
def test_a_verb_on_files_tells_its_result_and_what_comes_next(
    line: str,
    said: str,
    comes_next: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("nested", "plain", "one.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    words = line.split()
    code, out, err = run(words, capfd, monkeypatch)
    assert code == 0, err
    assert said in out
    _, label, after = out.splitlines()[-1].partition("Next: matryoshka ")
    assert comes_next in after
    if label:
        verb, *rest = shlex.split(after)
        known = {name for each in get_command(app).commands[verb].params for name in each.opts}  # type: ignore[attr-defined]
        assert {word for word in rest if word.startswith("-")} <= known
    if "-o" in words:
        assert (tmp_path / words[-1]).exists()


# What it refuses


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["info", "nothing"], "nothing"),
        (["info", "."], "adapter_config.json"),
        (["info", "a" * 300], "File name too long"),
        (["export", "nested", "--rank", 9, "-o", "new"], "has no rank 9"),
        (["export", "nested", "-o", "new"], "--rank 8, --keep 95% or --max-bytes"),
        (["export", "nested", "--rank", 4, "-o", "plain"], "exists already"),
        (["export", "nested", "--rank", 4, "-o", "."], "current folder"),
        (["export", "nested", "--rank", 4, "-o", "x.gguf", "--format", "peft"], "x.gguf"),
        (["export", "nested", "--rank", 4, "-o", "cat8"], None),
        (["reorder", "plain", "-o", "new", "--by", "trained"], "data"),
        (["reorder", "plain", "-o", "new", "--data", "rows.jsonl"], "data"),
        (["eval", "nested"], "arc_easy"),
        (["eval", "nested", "--data", "rows.jsonl", "--ranks", "1,9"], "rank 9"),
        (["select", "nothing", "--within", "1%"], "nothing"),
        (["serve", "nested", "--model", "base"], "vLLM is not installed"),
        (["train", "nothing.yaml"], "nothing.yaml"),
        (["demo", "-o", "nested"], "exists already"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    words: list[object],
    error: str | None,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("nested", "plain", "rows.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = run(words, capfd, monkeypatch)
    if error is None:  # a name without an ending is a folder
        assert code == 0
        return
    assert code in (1, 2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code == 1)  # typer frames the mistakes that it finds
    assert error in (lines[0] if code == 1 else err)
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("train config.yaml", "yaml"),
        ("eval nested --data rows.jsonl", "lm_eval"),
        ("play nested", "gradio"),
        ("reorder nested -o new --by trained --data rows.jsonl", "transformers"),
        ("export nested --rank 2 --format merged -o new", "peft"),
        ("export nested --rank 2 -o new.gguf", "gguf"),
    ],
)
@pytest.mark.slow
def test_a_missing_package_is_named(line: str, missing: str, folder: Path, tmp_path: Path) -> None:
    words, base = line.split(), save_tiny_chat(tmp_path / "base")
    words += ["--model", str(base)] if words[0] in ("reorder", "export", "eval") else []
    for name in ("nested", "rows.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "config.yaml").write_text(f"data: rows.jsonl\nmodel: {base}\n")
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == {missing!r} else found(name, *more)
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["matryoshka", *{words!r}]
from matryoshka_lora.cli import main
main()
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert f"this needs {missing}: in the clone, pip install '.[all]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("matryoshka_lora.info.describe", interrupted)
    code, _, err = run(["info", "."], capfd, monkeypatch)
    assert (code, err) == (130, "stopped\n")


# How light it is


def imported(verbs: list[list[str]], where: Path, names: set[str]) -> set[str]:
    """Return which modules some commands import, in a process of their own."""
    code = f"""
import sys
from matryoshka_lora.cli import main
for words in {verbs!r}:
    sys.argv = ["matryoshka", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code
print("\\n" + " ".join({names!r} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=where, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_help_imports_no_torch(tmp_path: Path) -> None:
    assert imported([["export", "--help"]], tmp_path, {"torch", "safetensors", "yaml"}) == set()


def test_work_on_files_needs_torch_and_safetensors_alone(folder: Path, tmp_path: Path) -> None:
    verbs = [
        ["info", "nested"],
        ["reorder", "plain", "-o", f"{tmp_path}/nested"],
        ["export", "plain", "--rank", "2", "-o", f"{tmp_path}/rank"],
        ["export", "one.safetensors", "--keep", "95%", "-o", f"{tmp_path}/small.safetensors"],
        ["export", "nested", "--format", "ladder", "-o", f"{tmp_path}/ladder"],
    ]
    heavy = {"peft", "transformers", "trl", "datasets", "lm_eval", "gradio", "matplotlib"}
    assert imported(verbs, folder, {*heavy, "torch"}) == {"torch"}
    assert len(list(tmp_path.iterdir())) == 4


# The long way, with real models


@pytest.mark.slow
def test_train_eval_select_export_follow_each_others_next_lines(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_tiny_chat(tmp_path / "base")
    row = (folder / "rows.jsonl").read_text().splitlines()[0]
    (tmp_path / "held-out.jsonl").write_text(f"{row}\n" * 8)
    (tmp_path / "config.yaml").write_text(
        f"data: held-out.jsonl\nmodel: {base}\nmax_steps: 60\nlora: {{r: 4}}\n"
        "learning_rate: 0.02\noutput_dir: run\nnesting: {reorder: svd}\ndisable_tqdm: true\n"
    )
    words = ["train", "config.yaml"]
    verbs = []
    while words[0] != "export":
        verbs.append(words[0])
        code, out, err = run(words, capfd, monkeypatch)
        assert code == 0, err
        last = out.splitlines()[-1]
        assert last.startswith("Next: matryoshka ")
        words = last.removeprefix("Next: matryoshka ").split()
    assert verbs == ["train", "eval", "select"]
    code, out, err = run(words, capfd, monkeypatch)
    assert code == 0, err
