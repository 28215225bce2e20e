"""The command line: its output, its refusals, and what it imports."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.evaluations import new_evaluation
from helpers.loras import random_lora
from helpers.models import nested_llama
from helpers.outputs import names_in
from helpers.plain_peft import plain_adapter
from helpers.tiny_chat import save_tiny_chat
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import matryoshka_lora
from matryoshka_lora import Nesting, __version__, select
from matryoshka_lora.cli import app
from matryoshka_lora.training.train_ranks import Hyperparameters

Run = Callable[[str | Sequence[str]], tuple[int, str, str]]

VERBS = [
    "demo",
    "train",
    "info",
    "reorder",
    "train-ranks",
    "combine",
    "extract",
    "export",
    "preview",
    "eval",
    "select",
    "serve",
]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
INPUTS = ("nested", "plain", "one.safetensors", "examples.jsonl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a nested adapter, a plain one, a single file and examples."""
    folder = tmp_path_factory.mktemp("inputs")
    adapter = nested_llama(Nesting.powers_of_two(8))
    adapter.reorder()
    adapter.save(folder / "nested")
    plain_adapter(folder / "plain")
    save_file(
        {
            "lora_unet_a.lora_down.weight": torch.randn(8, 64),
            "lora_unet_a.lora_up.weight": torch.randn(64, 8),
            "lora_unet_a.alpha": torch.tensor(4.0),
        },
        folder / "one.safetensors",
    )
    examples = [{"prompt": f"{n} plus 1 is", "completion": f" {n + 1}"} for n in range(40)]
    lines = [json.dumps(example) + "\n" for example in examples]
    (folder / "examples.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def workspace(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which has links to the inputs."""
    for name in INPUTS:
        (tmp_path / name).symlink_to(inputs / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_options(verb: str) -> set[str]:
    return {option for parameter in COMMANDS[verb].params for option in parameter.opts}


# Help


def test_without_a_verb_it_suggests_where_to_start() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    for verb in ("demo", "train", "info", "reorder", "export", "combine", "extract"):
        assert f"matryoshka {verb}" in result.output


def test_version() -> None:
    assert __version__ in CliRunner().invoke(app, ["--version"]).output


def test_every_verb_has_an_example_and_explains_its_options() -> None:
    assert list(COMMANDS) == VERBS
    for verb, command in COMMANDS.items():
        assert f"Example: matryoshka {verb}" in command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{verb}: {parameter.name} has no help"


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_the_help_use_existing_options(verb: str) -> None:
    examples = [line for line in COMMANDS[verb].help.splitlines() if "Example:" in line]
    for example in examples:
        words, _, _ = example.partition(" -- ")
        options = {word for word in shlex.split(words) if word.startswith("-")}
        assert options <= command_options(verb)


# Output


def test_warnings_the_log_and_the_next_command_escape_control_characters(
    workspace: Path, run: Run
) -> None:
    shutil.copytree("nested", "a\nNext: curl")
    code, stdout, stderr = run(["info", "a\nNext: curl"])
    assert code == 0
    shutil.copytree("nested", "--a")
    assert "Next: matryoshka export ./--a" in run("info ./--a")[1]
    warning = warnings.formatwarning("a\nNext: curl", UserWarning, "file", 1)
    assert "\nNext: curl" not in stdout + stderr + warning


@pytest.mark.parametrize(
    ("line", "expected", "next_command"),
    [
        ("info nested", "reordered by SVD", "export nested --rank 4 -o rank-4"),
        ("info nested --layers", "stable rank", "export nested --rank 4 -o rank-4"),
        ("info . --error 30%", "one.safetensors", "export . --error 30%"),
        ("info plain", "without an order", "reorder plain -o nested"),
        ("info one.safetensors", "single file", "--error 10% -o one-small.safetensors"),
        ("reorder plain -o new", "every rank", "info new"),
        ("reorder one.safetensors --output new.safetensors", "new", "info new.safetensors"),
        ("combine plain plain --weights 1,-0.5 -o new", "layers", "info new"),
        ("combine plain nested --weights mean -o new", "Cosines", "info new"),
        ("export nested --rank 2 -o new", "Relative error", ""),
        ("export plain --keep 0.9 -o new", "by layer", ""),
        ("export one.safetensors --rank 2 -o new.safetensors", "rank 2", ""),
        (
            "export plain/adapter_model.safetensors --rank 2 --alpha 8 -o new.safetensors",
            "rank 2",
            "",
        ),
        ("export nested --rank 1,8 --format ladder -o new", "ranks 1, 8", "serve new --dry-run"),
        ("export one.safetensors --rank 8 -o new.safetensors", "not smaller", ""),
        ("export plain --error 10% --rank 2 -o new", "rank limits", ""),
        ("serve nested --dry-run --base-model base", "nested@1", ""),
    ],
)
def test_file_verbs_print_the_result_and_the_next_command(
    line: str, expected: str, next_command: str, workspace: Path, run: Run
) -> None:
    code, stdout, stderr = run(line)
    assert code == 0, stderr
    assert expected in stdout
    _, separator, words = stdout.splitlines()[-1].partition("Next: matryoshka ")
    assert next_command in words
    if separator:
        verb, *arguments = shlex.split(words)
        options = {argument for argument in arguments if argument.startswith("-")}
        assert options <= command_options(verb)


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("info nested --layers --json", {"errors_by_rank", "layers", "trigger_words"}),
        ("info . --json", {"loras", "failed"}),
    ],
)
def test_json_is_all_that_is_printed(line: str, keys: set[str], workspace: Path, run: Run) -> None:
    code, stdout, _ = run(line)
    assert code == 0
    assert keys <= json.loads(stdout).keys()


@pytest.mark.parametrize("source", ["nested", "."])
def test_json_has_the_rank_of_an_error(source: str, workspace: Path, run: Run) -> None:
    text = run(f"info {source} --error 40%")[1]
    values = json.loads(run(f"info {source} --error 40% --json")[1])
    assert values["max_error"] == 0.4
    assert f"rank {values['rank_for_error']}" in text.lower()
    if source == ".":
        ranks = [lora["rank_for_error"] for lora in values["loras"].values()]
        assert values["rank_for_error"] == max(ranks)
    assert "rank_for_error" not in json.loads(run("info nested --json")[1])


@pytest.mark.parametrize(
    ("error", "next_command"),
    [
        ("60%", "export folder --error 60% --for-vllm -o folder-small"),
        ("1%", "serve folder --dry-run"),
    ],
)
def test_a_folder_for_a_server_gets_a_rank_of_vllm(
    error: str, next_command: str, workspace: Path, run: Run
) -> None:
    """A server reserves the rank of the largest layer, so a rank for each layer saves nothing."""
    for rank in (9, 12):
        plain_adapter(workspace / "folder" / f"rank-{rank}", r=rank)
    code, stdout, _ = run(f"info folder --error {error}")
    assert code == 0
    assert stdout.splitlines()[-1] == f"Next: matryoshka {next_command}"


def test_an_export_of_an_image_model_says_which_programs_load_it(workspace: Path, run: Run) -> None:
    """No program has loaded the folder, and `eval` does not take it."""
    lora = random_lora({"unet.down_blocks.0.attentions.0.to_q": (8, 8)})
    lora.convert("peft").save("unet")
    assert "ComfyUI" in run("export unet --rank 1 -o new.safetensors")[1].splitlines()[-1]
    assert "preview" in run("export unet --rank 1 -o new")[1]


def test_export_changes_layers_by_patterns(workspace: Path, run: Run) -> None:
    words = ["export", "plain", "--dtype", "bf16", "--drop", "*.0.*", "--drop", "*k_proj"]
    words += ["--scale", "*=0.5", "--scale", "*q_proj=-1", "-o", "changed"]
    code, stdout, stderr = run(words)
    assert code == 0, stderr
    assert "Left out 8 layers of 14." in stdout
    source = load_file(workspace / "plain" / "adapter_model.safetensors")
    for key, tensor in load_file(workspace / "changed" / "adapter_model.safetensors").items():
        factor = 1.0 if "lora_A" in key else -1.0 if "q_proj" in key else 0.5
        assert torch.equal(tensor, (factor * source[key]).bfloat16())
    code, _, stderr = run("export plain --scale 0.5 -o x")
    assert (code, "PATTERN" in stderr) == (2, True)


def test_a_rank_above_the_loras_names_the_option(workspace: Path, run: Run) -> None:
    words = ["export", "one.safetensors", "--rank", "16", "-o", "padded.safetensors"]
    code, _, stderr = run(words)
    assert (code, "--pad" in stderr) == (1, True)
    code, stdout, stderr = run([*words, "--pad"])
    assert code == 0, stderr
    assert "rank 16" in stdout


@pytest.mark.parametrize("line", ["info plain --revision v1", "select evaluation --within 1%"])
def test_the_next_command_has_the_revision(line: str, workspace: Path, run: Run) -> None:
    (workspace / "evaluation").mkdir()
    new_evaluation(revision="v1").write(workspace / "evaluation")
    code, stdout, stderr = run(line)
    assert code == 0, stderr
    assert "--revision v1" in stdout.splitlines()[-1]


def test_select_prints_json(workspace: Path, run: Run) -> None:
    (workspace / "evaluation").mkdir()
    new_evaluation().write(workspace / "evaluation")
    code, stdout, stderr = run("select evaluation --within 2% --json")
    assert code == 0, stderr
    assert json.loads(stdout) == json.loads(
        json.dumps(select(workspace / "evaluation", within="2%").to_dict())
    )


def test_a_folder_of_loras_prints_a_line_per_lora(workspace: Path, run: Run) -> None:
    code, stdout, stderr = run("export . --rank 4 -o small")
    assert code == 0, stderr
    # A heading, the total, and what the error does not mean.
    assert len(stdout.splitlines()) == 6
    assert set(names_in(workspace / "small")) == {
        "nested",
        "plain",
        "one.safetensors",
    }


def test_a_lora_of_a_folder_that_fails_is_an_error(workspace: Path, run: Run) -> None:
    (workspace / "broken").mkdir()
    (workspace / "broken" / "adapter_config.json").write_text("{}")
    code, stdout, stderr = run("export . --rank 4 -o small")
    assert code == 1
    assert "nested" in stdout
    assert "error: Not exported: broken" in stderr
    assert run("info .")[0] == 1
    assert run("export . --rank 4 -o again --skip-bad")[0] == 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_the_terminal_cannot_show_are_escaped(
    workspace: Path, encoding: str
) -> None:
    shutil.copytree("nested", "日本")
    result = subprocess.run(
        [sys.executable, "-m", "matryoshka_lora", "info", "日本"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=True,
    )
    assert result.stderr == b""
    assert result.stdout


# Refusals


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("info nothing", "nothing"),
        (f"info {'a' * 300}", "File name too long"),
        ("export nested --rank 9 -o new", "8"),
        ("export nested -o new", "--max-bytes"),
        ("export nested --rank 4 -o plain", "Pass another path"),
        ("export nested --rank 4 -o .", "current"),
        ("export plain/adapter_model.safetensors --rank 2 -o new.safetensors", "--alpha"),
        ("export plain --rank 2 --alpha 8 -o new", "--alpha"),
        ("export nested --rank 4 -o x.gguf --format peft", "x.gguf"),
        ("combine nested plain --weights one,two -o new", "one,two"),
        ("combine nested plain --weights 1 -o new", "weight"),
        ("train-ranks plain -o new", "--data"),
        ("train-ranks one.safetensors --data examples.jsonl -o new", "single file"),
        ("eval nested", "--tasks"),
        ("eval nested --data examples.jsonl --ranks 1,9", "9"),
        ("eval nested --data examples.jsonl --base-model base --backend vllm", "pip install vllm"),
        ("eval . --data examples.jsonl --backend vllm", "folder"),
        ("export nested -o new --rank 1.5", "'1.5'"),
        ("export nested -o new --rank 0", "rank"),
        (f"export nested -o new --rank {'9' * 4000}", "rank"),
        ("select nothing --within 1%", "nothing"),
        ("serve nested --base-model base", "vLLM"),
        ("train nothing.yaml", "nothing.yaml"),
        ("demo -o nested", "--output"),
    ],
)
def test_a_mistake_gets_one_message_and_nothing_is_written(
    line: str, expected: str, workspace: Path, run: Run
) -> None:
    names_before = sorted(path.name for path in workspace.iterdir())
    code, _, stderr = run(line)
    messages = [text for text in stderr.splitlines() if text.startswith("error: ")]
    assert code in (1, 2)
    assert len(messages) == (1 if code == 1 else 0)  # typer frames those that it finds itself
    assert expected in stderr
    assert "Traceback" not in stderr
    assert sorted(path.name for path in workspace.iterdir()) == names_before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "module", "extra"),
    [
        ("train config.yaml", "trl", "train"),
        ("eval nested --data examples.jsonl --base-model base", "lm_eval", "eval"),
        ("train-ranks nested -o new --data examples.jsonl --base-model base", "torch", "peft"),
        ("extract base base -o new", "torch", "peft"),
        ("export nested --rank 2 --format merged -o new --base-model base", "torch", "peft"),
        ("export nested --rank 2 -o new.gguf --base-model base", "gguf", "gguf"),
        ("export nested --rank 2 -o new.gguf --base-model smollm2-135m", "torch", "peft,gguf"),
        ("demo -o new", "iso3166", "demo"),
    ],
)
def test_a_missing_dependency_names_the_extra(
    line: str, module: str, extra: str, workspace: Path
) -> None:
    save_tiny_chat(workspace / "base")
    (workspace / "config.yaml").write_text("data: examples.jsonl\nbase_model: base\n")
    code = f"""
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *_: None if name == {module!r} else find_spec(name, *_)
sys.meta_path.insert(0, Missing())
sys.argv = ["matryoshka", *{line.split()!r}]
from matryoshka_lora.cli import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=workspace,
        env={**os.environ, "MATRYOSHKA_CACHE": "cache"},  # the bundled model is not unpacked yet
    )
    assert result.returncode == 1
    assert f"matryoshka-lora[{extra}]" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_with_one_line(
    workspace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(matryoshka_lora, "info", interrupt)
    code, _, stderr = run("info plain")
    assert code == 130
    assert stderr == "Stopped.\n"


def test_a_finished_run_with_other_settings_fails(workspace: Path, run: Run) -> None:
    save_tiny_chat(workspace / "base")
    (workspace / "config.yaml").write_text(
        "data: examples.jsonl\nbase_model: base\nmax_steps: 1\nlora: {r: 1}\noutput_dir: run\n"
        "save_strategy: no\ndisable_tqdm: true\n"
    )
    assert run("train config.yaml")[0] == 0
    code, stdout, stderr = run("train config.yaml learning_rate=1e-3")
    assert code == 1
    assert "learning_rate" in stderr
    assert "Next" not in stdout


def test_the_help_and_the_output_of_train_ranks_name_its_default(workspace: Path, run: Run) -> None:
    default = str(Hyperparameters().max_examples)
    (option,) = [o for o in COMMANDS["train-ranks"].params if o.name == "max_examples"]
    assert str(option.default) == default
    _, _, stderr = run("train-ranks plain --data examples.jsonl --base-model none -o new")
    assert f"{default} examples" in stderr


# Imports


def imported_modules(lines: Sequence[str], folder: Path, modules: set[str]) -> set[str]:
    """Return which of some modules commands import, in a process of their own."""
    code = f"""
import sys
from matryoshka_lora.cli import main
for line in {list(lines)!r}:
    sys.argv = ["matryoshka", *line.split()]
    try:
        main()
    except SystemExit as exit_request:
        assert not exit_request.code
print("\\n" + " ".join({modules!r} & sys.modules.keys()))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_help_imports_neither_numpy_nor_torch(tmp_path: Path) -> None:
    modules = {"torch", "numpy", "safetensors", "huggingface_hub", "yaml"}
    assert imported_modules(["--help", "export --help"], tmp_path, modules) == set()


def test_file_verbs_do_not_import_torch(workspace: Path) -> None:
    lines = [
        "info nested",
        "reorder plain -o reordered",
        "combine plain plain -o combined",
        "export plain --rank 2 -o rank-2",
        "export one.safetensors --keep 95% -o small.safetensors",
        "export nested --format ladder -o ladder",
        "serve ladder --dry-run --base-model base",
    ]
    modules = {"torch", "peft", "transformers", "trl", "datasets", "lm_eval", "matplotlib"}
    assert imported_modules(lines, workspace, modules) == set()


# Real models


@pytest.mark.slow
def test_each_verb_prints_a_next_command_that_works(workspace: Path, run: Run) -> None:
    save_tiny_chat(workspace / "base")
    first_line = (workspace / "examples.jsonl").read_text().splitlines()[0]
    (workspace / "held-out.jsonl").write_text(f"{first_line}\n" * 8)
    (workspace / "config.yaml").write_text(
        "data: held-out.jsonl\nbase_model: base\nmax_steps: 60\nlora: {r: 4}\n"
        "learning_rate: 0.02\noutput_dir: run\nnesting: {train_ranks: false}\ndisable_tqdm: true\n"
    )
    words = ["train", "config.yaml"]
    verbs = []
    while words[0] != "export":
        verbs.append(words[0])
        code, stdout, stderr = run(words)
        assert code == 0, stderr
        last_line = stdout.splitlines()[-1]
        assert last_line.startswith("Next: matryoshka ")
        words = shlex.split(last_line.removeprefix("Next: matryoshka "))
    assert verbs == ["train", "eval", "select"]
    code, _, stderr = run(words)
    assert code == 0, stderr

    for name in ("a", "b"):
        shutil.copytree("run/adapter", Path("loras", name))
    code, stdout, stderr = run("eval loras --data held-out.jsonl")
    assert code == 0, stderr
    assert "Evaluating b, 2 of 2" in stderr
    words = shlex.split(stdout.splitlines()[-1].removeprefix("Next: matryoshka "))
    assert words[:2] == ["export", "loras"]
    code, stdout, stderr = run(words)
    assert code == 0, stderr
    assert "not a LoRA" not in stdout  # of the folders of the evaluations
    code, _, stderr = run("eval loras --data held-out.jsonl")
    assert code == 1
    assert "loras/b-evaluation already exists. Pass another path, or --force" in stderr  # the log


def test_train_ranks_and_extract(workspace: Path, run: Run) -> None:
    save_tiny_chat(workspace / "base")
    plain_adapter(workspace / "lora", AutoModelForCausalLM.from_pretrained("base"))
    for line in (
        "train-ranks lora --data examples.jsonl --base-model base --dtype fp32 -o trained",
        "reorder lora --data examples.jsonl --base-model base -o weighted "
        "--model-args dtype=float32,attn_implementation=eager",
        "info weighted --error 20%",
        "export weighted --error 20% -o small",
        "export lora --rank 4 --format merged --base-model base -o tuned",
        "extract base tuned --rank 4 -o extracted",
        "info extracted",
    ):
        code, _, stderr = run(line)
        assert code == 0, stderr
