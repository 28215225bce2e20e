"""`serve`: the commands for vLLM. vLLM itself is started in tests/runtimes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.many_adapters import save_adapter
from helpers.plain_peft import plain_adapter
from helpers.single_files import save_pairs

from matryoshka_lora import (
    MatryoshkaError,
    MissingDependencyError,
    export,
    export_folder,
    reorder,
)
from matryoshka_lora.serve import serve


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A nested adapter with the ranks 1, 2, 4, 8, 12."""
    plain_adapter(tmp_path / "plain", r=12, target_modules=["q_proj"])
    reorder(tmp_path / "plain", tmp_path / "adapter")
    return tmp_path / "adapter"


def dry_run(path: Path, **options: Any) -> list[list[str]]:
    """Return the words of the commands."""
    result = serve(path, dry_run=True, **options)
    assert result.exit_status is None
    return [shlex.split(command) for command in result.commands]


def values_of(words: list[str], option: str) -> list[str]:
    """Return the words between an option and the next one, or the one after its "="."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    if values:
        return values
    for word in words[words.index(option) + 1 :]:
        if word.startswith("-"):
            break
        values.append(word)
    return values


def modules_of(words: list[str]) -> dict[str, str]:
    """Return the folder of each adapter by its name, as vLLM parses them."""
    modules: dict[str, str] = {}
    for word in values_of(words, "--lora-modules"):
        if "=" in word and "," not in word:
            name, path = word.split("=", 1)
            modules[name] = path
        else:
            module = json.loads(word)
            modules[module["name"]] = module["path"]
    return modules


def set_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", ["a=b", "a,b", "--trust-remote-code", "a b"])
def test_a_name_is_not_an_option_or_a_separator(
    name: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter.rename(name)
    export_command, server = dry_run(Path(name), ranks=[4], base_model=name)
    assert not export_command[2].startswith("-")
    assert modules_of(server) == {f"{name}@4": f"{name}-ladder/{name}@4"}
    assert values_of(server, "--model") == [name]
    assert name not in server


@pytest.mark.parametrize(
    ("ranks", "served_ranks", "max_lora_rank"),
    [
        (None, [1, 2, 4, 8, 12], "16"),
        ([1, 2], [1, 2], "8"),
        ([2, 8], [2, 8], "8"),
        ([1], [1], "1"),
    ],
)
def test_the_commands_serve_the_ladder_that_they_write(
    ranks: list[int] | None,
    served_ranks: list[int],
    max_lora_rank: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    export_command, server = dry_run(adapter, ranks=ranks, base_model="some/base", port=8123)
    assert export_command[:3] == ["matryoshka", "export", str(adapter)]
    assert values_of(export_command, "--format") == ["ladder"]
    (rank_list,) = values_of(export_command, "--rank")
    (ladder,) = values_of(export_command, "--output")
    assert not Path(ladder).exists()
    export(adapter, ladder, [int(rank) for rank in rank_list.split(",")], format="ladder")

    modules = modules_of(server)
    assert list(modules) == [f"adapter@{rank}" for rank in served_ranks]
    assert sorted(map(Path, modules.values())) == sorted(Path(ladder).glob("*@*"))
    assert values_of(server, "--max-lora-rank") == [max_lora_rank]
    assert values_of(server, "--max-loras") == [str(len(served_ranks))]
    assert values_of(server, "--model") == ["some/base"]
    assert values_of(server, "--host") == ["127.0.0.1"]
    assert values_of(server, "--port") == ["8123"]
    # A ladder that exists is served as it is.
    (again,) = dry_run(Path(ladder), base_model="some/base", port=8123)
    assert modules_of(again) == modules
    assert values_of(again, "--max-lora-rank") == [max_lora_rank]
    (smaller,) = dry_run(Path(ladder), ranks=served_ranks[:1], base_model="some/base")
    name = f"adapter@{served_ranks[0]}"
    assert modules_of(smaller) == {name: modules[name]}


def test_a_folder_of_adapters_is_served_under_their_names(tmp_path: Path) -> None:
    ranks = {f"style-{index}": 2 + index for index in range(10)}
    for name, rank in ranks.items():
        plain_adapter(tmp_path / "loras" / name, r=rank, target_modules=["q_proj"])
    (tmp_path / "loras" / "notes.txt").write_text("not an adapter")
    (server,) = dry_run(tmp_path / "loras", base_model="some/base")
    assert modules_of(server) == {name: str(tmp_path / "loras" / name) for name in ranks}
    assert values_of(server, "--max-lora-rank") == ["16"]
    assert values_of(server, "--max-loras") == ["8"]
    assert values_of(server, "--max-cpu-loras") == ["10"]
    with pytest.raises(MatryoshkaError, match="ranks"):
        serve(tmp_path / "loras", base_model="some/base", ranks=[2], dry_run=True)


def test_each_bad_adapter_of_a_folder_is_named_and_may_be_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "loras"
    for name in ("good", "better", "other-base", "experts"):
        plain_adapter(folder / name, target_modules=["q_proj"])
        set_config(folder / name, base_model_name_or_path="a/b")
    set_config(folder / "other-base", base_model_name_or_path="c/d")
    set_config(folder / "experts", target_parameters=["experts.down_proj"])
    plain_adapter(folder / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_pairs(folder / "file.safetensors", "a")
    keywords = {
        "other-base": "c/d",
        "experts": "target_parameters",
        "head": "lm_head",
        "file.safetensors": "single file",
    }
    with pytest.raises(MatryoshkaError, match=r"4 of 6.*skip_bad"):
        serve(folder, dry_run=True)
    lines = {
        name: line for line in caplog.messages for name in keywords if str(folder / name) in line
    }
    assert all(keyword in lines[name] for name, keyword in keywords.items())

    (server,) = dry_run(folder, skip_bad=True)
    assert modules_of(server).keys() == {"good", "better"}
    assert values_of(server, "--model") == ["a/b"]
    (server,) = dry_run(folder, skip_bad=True, base_model="e/f")
    assert modules_of(server).keys() == {"good", "better", "other-base"}
    for name in ("good", "better", "other-base"):
        shutil.rmtree(folder / name)
    with pytest.raises(MatryoshkaError, match="3 of 3"):
        serve(folder, skip_bad=True, dry_run=True)


def test_a_tie_of_base_models_is_decided_by_the_first_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = {"model.layers.0.self_attn.q_proj": (8, 8)}
    save_adapter(tmp_path / "loras" / "a", layers, 4, "some/base")
    save_adapter(tmp_path / "loras" / "b", layers, 4, "other/base")
    (server,) = dry_run(tmp_path / "loras", skip_bad=True)
    assert values_of(server, "--model") == ["some/base"]
    assert "a decides" in caplog.text
    caplog.clear()
    # The revision main is the default, so this is a majority.
    save_adapter(tmp_path / "loras" / "c", layers, 4, "other/base", revision="main")
    (server,) = dry_run(tmp_path / "loras", skip_bad=True)
    assert values_of(server, "--model") == ["other/base"]
    assert modules_of(server).keys() == {"b", "c"}
    assert not any(word.startswith("--revision") for word in server)
    assert "decides" not in caplog.text


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"], "down_proj q_proj v_proj"),
        # vLLM has other names for some modules, and ignores an adapter's without an error.
        (["self_attn.q_proj", "mlp.experts.0.gate_proj"], None),
        (["self_attn.q_proj", "self_attn.dense"], None),
    ],
)
def test_memory_is_reserved_for_the_modules_of_all_adapters(
    modules: list[str], expected: str | None, tmp_path: Path
) -> None:
    for module in modules:
        layers = {f"model.layers.0.{module}": (8, 8)}
        save_adapter(tmp_path / "loras" / module, layers, 4, "some/base")
    (server,) = dry_run(tmp_path / "loras")
    if expected is None:
        assert "--lora-target-modules" not in server
    else:
        assert values_of(server, "--lora-target-modules") == expected.split()


def test_a_folder_of_ladders_is_served(tmp_path: Path) -> None:
    for name in ("style-a", "style-b"):
        plain_adapter(tmp_path / "loras" / name, r=4, target_modules=["q_proj"])
    export_folder(tmp_path / "loras", tmp_path / "ladders", [1, 4], format="ladder")
    (server,) = dry_run(tmp_path / "ladders", base_model="some/base", ranks=[4])
    shutil.rmtree(tmp_path / "ladders" / "style-b" / "style-b@1")
    with pytest.raises(MatryoshkaError, match="style-b@1"):
        dry_run(tmp_path / "ladders", base_model="some/base", ranks=[1])
    assert modules_of(server) == {
        f"{name}@4": str(tmp_path / "ladders" / name / f"{name}@4")
        for name in ("style-a", "style-b")
    }
    shutil.copytree(tmp_path / "ladders" / "style-a", tmp_path / "ladders" / "style-c")
    with pytest.raises(MatryoshkaError, match="same name"):
        dry_run(tmp_path / "ladders", base_model="some/base", ranks=[4])


FAKE_VLLM = """
import json
import sys
from pathlib import Path

start = sys.argv.index("--lora-modules") + 1
modules = sys.argv[start : sys.argv.index("--model=some/base")]
folders = [Path(json.loads(module)["path"]) for module in modules]
is_ready = all((folder / "adapter_config.json").is_file() for folder in folders)
sys.exit(10 + len(folders) if is_ready else 1)
"""


def test_the_server_runs_on_a_temporary_ladder(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = serve(adapter, ranks=[1, 8], base_model="some/base")
    assert result.exit_status == 12
    ladder = values_of(shlex.split(result.commands[0]), "--output")[0]
    assert not Path(ladder).exists()


def test_the_adapter_names_base_model_and_revision(adapter: Path) -> None:
    set_config(adapter, base_model_name_or_path="a/b", revision="v1")
    _, server = dry_run(adapter, vllm_options=["--max-model-len", "64"])
    assert values_of(server, "--model") == ["a/b"]
    assert values_of(server, "--revision") == ["v1"]
    assert server[-2:] == ["--max-model-len", "64"]
    _, server = dry_run(adapter, base_model="other/base")
    assert not any(word.startswith("--revision") for word in server)  # v1 is a revision of a/b


def test_what_vllm_cannot_read_is_rejected(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_pairs(tmp_path / "lora.safetensors", "a")
    for name, keyword in (("lora", "lm_head"), ("lora.safetensors", "single file")):
        with pytest.raises(MatryoshkaError, match=keyword):
            serve(tmp_path / name, base_model="some/base", dry_run=True)


def test_what_cannot_be_served_is_rejected(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="vLLM"):
        serve(adapter, base_model="some/base")
    with pytest.raises(MatryoshkaError, match="rank"):
        serve(adapter, base_model="some/base", ranks=[13])
    with pytest.raises(MatryoshkaError, match="ranks"):
        serve(adapter, base_model="some/base", ranks=[])
    with pytest.raises(MatryoshkaError, match="base_model"):
        serve(adapter)
    ladder = tmp_path / "ladder"
    export(adapter, ladder, [1, 2, 12], format="ladder")
    with pytest.raises(MatryoshkaError, match="@4"):
        serve(ladder, base_model="some/base", ranks=[4])
    with pytest.raises(MatryoshkaError, match="ranks"):
        serve(ladder, base_model="some/base", ranks=[])


def test_the_memory_in_the_docs_is_that_of_the_formula() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    hidden, key_value, intermediate, vocabulary = 4096, 1024, 14336, 128256  # Llama 3 8B
    attention = [(hidden, hidden), (hidden, key_value), (hidden, key_value)]
    others = [(hidden, hidden), *[(hidden, intermediate)] * 3]
    fused = 32 * sum(map(sum, attention))
    linear = fused + 32 * sum(map(sum, others))
    for numbers in (fused, linear, linear + 2 * (vocabulary + hidden)):
        assert f"{numbers:,}" in page
    assert f"{100 * fused / linear:.1f} %" in page
    for modules, numbers in (("all linear layers", linear), ("`q_proj`, `v_proj`", fused)):
        for rank in (64, 8):
            slot = 2 * rank * numbers / 1e9
            sizes = f"{slot:.3f} GB | {8 * slot:.2f} GB | {50 * slot:.1f} GB"
            assert f"| {modules} | {rank} | {sizes} |" in page


def test_a_rank_that_vllm_does_not_have_is_rejected(tmp_path: Path) -> None:
    for name, rank in (("large", 600), ("small", 8)):
        save_adapter(
            tmp_path / "loras" / name, {"model.layers.0.mlp.up_proj": (8, 8)}, rank, "base"
        )
    with pytest.raises(MatryoshkaError, match="600"):
        dry_run(tmp_path / "loras")
