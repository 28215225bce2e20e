"""Ranks by their names, without vLLM: which names there are, what is cut, how often, and what is left of it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import an_evaluation
import pytest
import torch
from conftest import nested_llama, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file
from strangers import forget_weights

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, select
from matryoshka_lora.cli.main import app
from matryoshka_lora.evaluation.select import save_choice
from matryoshka_lora.formats.beside import fingerprint
from matryoshka_lora.formats.config import CONFIG_NAME
from matryoshka_lora.formats.opened import WEIGHTS_NAME, open_adapter
from matryoshka_lora.serving.cuts import Cuts, Settings
from matryoshka_lora.serving.serve import serve

RANKS = (1, 2, 4, 8)
BASE = "someone/some-model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[NestedAdapter, Path]:
    adapter = nested_llama(Nesting(RANKS), deploy="reordered")
    adapter.reorder()
    folder = tmp_path_factory.mktemp("saved") / "family"
    adapter.save(folder)
    named(folder, BASE)
    return adapter, folder


@pytest.fixture
def family(saved: tuple[NestedAdapter, Path], tmp_path: Path) -> Path:
    """An adapter of the folder ``adapters``."""
    shutil.copytree(saved[1], tmp_path / "adapters/family")
    return tmp_path / "adapters/family"


@pytest.fixture
def cuts(family: Path, tmp_path: Path) -> Cuts:
    return Cuts(Settings(family.parent, tmp_path / "cache", 10**9))


def named(folder: Path, base: str) -> None:
    """Let an adapter name another base model."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "base_model_name_or_path": base}))


def found(cuts: Cuts, name: str, base: str | None = BASE) -> Path:
    folder = cuts.find(name, base)
    assert folder is not None
    return folder


def evaluated(family: Path) -> None:
    about = {"adapter": {"sha256": fingerprint(open_adapter(family))}}
    an_evaluation.write(family / "evaluation", an_evaluation.some_examples(), **about)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_name_is_that_rank_to_plain_peft(saved: tuple[NestedAdapter, Path], cuts: Cuts, rank: int) -> None:
    ids = torch.arange(2, 26)[None]
    plain = PeftModel.from_pretrained(tiny_llama(), str(found(cuts, f"family@{rank}"))).eval()
    saved[0].set_rank(rank)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, saved[0].model(input_ids=ids).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("other@4", "other", "", "@4", "family ", "Family@4", "family/@4", "./family@4", "family@4@4"),
        *("../adapters/family@4", "..@4", ".@4", "/etc/passwd@4", "family\0@4", "a/../family@4", "%2e%2e@4"),
        *("plain@4", "text.txt@4", f"{'x' * 100_000}@4"),
    ],
)
def test_other_names_lead_nowhere(family: Path, cuts: Cuts, tmp_path: Path, name: str) -> None:
    shutil.copytree(family, family.parent / "plain")
    (family.parent / "plain/nesting.json").unlink()
    (family.parent / "text.txt").touch()
    shutil.copytree(family, tmp_path / "etc")
    assert cuts.find(name, BASE) is None
    assert cuts.find(f"{tmp_path}/etc@4", BASE) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("family", "family has many ranks: write family@4"),
        ("family@9", "rank 9 is above the largest rank 8"),
        *(
            (f"family@{rank}", "is no rank: write family@4")
            for rank in ("0", "-1", "04", "4.0", "٤", "x", "", " 4", "4/..")
        ),
        (f"family@{'9' * 5000}", "is no rank"),
        ("family@auto", "no rank was chosen for family: run `matryoshka select family"),
    ],
)
def test_a_rank_that_cannot_be_had(cuts: Cuts, tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(MatryoshkaError, match=why) as error:
        cuts.find(name, BASE)
    assert str(tmp_path) not in str(error.value)
    assert len(str(error.value)) < 500
    assert not (tmp_path / "cache").exists()


def test_a_served_folder_is_the_only_name(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family, family.parent / "secret")
    cuts = Cuts(Settings(family, tmp_path / "cache", 10**9))
    assert open_adapter(found(cuts, "family@2")).rank == 2
    assert cuts.find("secret@2", BASE) is None
    assert [entry["id"] for entry in cuts.listing()] == ["family"]


def test_an_adapter_as_it_was_trained_is_reordered_on_the_way(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting([2, 4]), deploy="paper")
    adapter.save(tmp_path / "adapters/paper")
    cuts = Cuts(Settings(tmp_path / "adapters", tmp_path / "cache", 10**9))
    assert cuts.listing()[0]["ranks"] == [2, 4]
    with pytest.raises(MatryoshkaError, match="rank 3 was not trained"):
        cuts.find("paper@3")
    assert open_adapter(found(cuts, "paper@2", None)).rank == 2


def test_two_that_race_for_a_rank_cut_it_once(family: Path, cuts: Cuts, tmp_path: Path) -> None:
    evaluated(family)
    save_choice(family, select(family, within="5%"), "family")
    names = ["family@4", "family@auto"] * 8
    with ThreadPoolExecutor(16) as pool:
        folders = set(pool.map(lambda name: cuts.find(name, BASE), names))
    assert len(folders) == 1
    (server,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert set(server.iterdir()) == folders


def test_auto_is_the_rank_that_was_chosen_for_these_weights(family: Path, cuts: Cuts, tmp_path: Path) -> None:
    evaluated(family)
    with pytest.raises(MatryoshkaError, match="no rank was chosen"):
        cuts.find("family@auto", BASE)
    app(["select", str(family), "--within", "5%", "--save"], standalone_mode=False)
    assert open_adapter(found(cuts, "family@auto")).rank == 4
    assert cuts.listing() == [{"id": "family", "ranks": list(range(1, 9)), "auto": 4}]
    forget_weights(family)
    weights = load_file(family / WEIGHTS_NAME)
    save_file({key: tensor * 2 for key, tensor in weights.items()}, family / WEIGHTS_NAME)
    with pytest.raises(MatryoshkaError, match="measured on other weights"):
        Cuts(cuts.settings).find("family@auto", BASE)


def test_an_evaluation_that_is_made_again_drops_the_choice(family: Path) -> None:
    from matryoshka_lora.evaluation.select import read_evaluation

    evaluated(family)
    before = read_evaluation(family).to_dict()
    save_choice(family, select(family, within="5%"), "family")
    after = read_evaluation(family).to_dict()
    limits = {"within": 0.05, "max_bytes": None, "max_latency": None}
    assert after.pop("selected") == {"rank": 4, "task": "family", **limits}
    assert after == before
    evaluated(family)
    assert "selected" not in read_evaluation(family).to_dict()


def test_ranks_are_of_one_adapter(family: Path, cuts: Cuts, tmp_path: Path) -> None:
    forget_weights(family)
    first = found(cuts, "family@2")
    weights = load_file(family / WEIGHTS_NAME)
    save_file({key: tensor * 2 for key, tensor in weights.items()}, family / WEIGHTS_NAME)
    with pytest.raises(MatryoshkaError, match="family has changed since this server began"):
        cuts.find("family@4", BASE)
    assert list(first.parent.iterdir()) == [first]
    assert open_adapter(found(Cuts(cuts.settings), "family@4")).rank == 4


def test_the_base_model_must_be_the_adapter_s(family: Path, tmp_path: Path) -> None:
    settings = Settings(family.parent, tmp_path / "cache", 10**9)
    with pytest.raises(MatryoshkaError, match=f"belongs to the base model {BASE}, and this server has another"):
        Cuts(settings).find("family@4", "someone/another")
    told = Settings(family.parent, tmp_path / "cache", 10**9, BASE)
    assert Cuts(told).find("family@4", str(tmp_path / "a-copy")) is not None
    named(family, str(tmp_path / "model"))
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert Cuts(settings).find("family@4", str(tmp_path / "link")) is not None


def test_what_vllm_would_leave_out_is_refused(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting([1, 2]), deploy="reordered", modules_to_save=["norm"])
    adapter.reorder()
    adapter.save(tmp_path / "adapters/whole")
    with pytest.raises(MatryoshkaError, match=r"norm\.weight, which is no factor, and vLLM would leave it out"):
        Cuts(Settings(tmp_path / "adapters", tmp_path / "cache", 10**9)).find("whole@2")
    with pytest.raises(MatryoshkaError, match="which is no factor, and vLLM would leave it out"):
        serve(tmp_path / "adapters", model=BASE)


def test_a_damaged_adapter_is_listed_with_the_reason(family: Path, cuts: Cuts, tmp_path: Path) -> None:
    shutil.copytree(family, family.parent / "broken")
    (family.parent / "broken" / WEIGHTS_NAME).write_bytes(b"no weights")
    broken, good = cuts.listing()
    assert good["ranks"] == list(range(1, 9))
    assert "damaged" in broken["error"]
    assert str(tmp_path) not in broken["error"]


def test_a_full_cache_refuses_and_keeps_what_it_has(family: Path, tmp_path: Path) -> None:
    whole = open_adapter(family).size
    cuts = Cuts(Settings(family.parent, tmp_path / "cache", whole // 2))
    four = found(cuts, "family@4")
    with pytest.raises(MatryoshkaError, match="this server's cache is full"):
        cuts.find("family@1", BASE)
    assert found(cuts, "family@4") == four
    written = sum(tensor.nbytes for tensor in load_file(four / WEIGHTS_NAME).values())
    assert written <= whole // 2


def test_nothing_is_left_of_a_server_that_ends_or_is_killed(family: Path, cuts: Cuts, tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from matryoshka_lora.serving.cuts import Cuts, Settings\n"
        "cuts = Cuts(Settings.read(os.environ))\n"
        "print(cuts.find('family@4'), flush=True)\n"
        "if sys.argv[1] == 'wait': time.sleep(600)\n"
    )
    environment = {**os.environ, **cuts.settings.variables()}

    def started(how: str) -> tuple[Any, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, how], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    ended, gone = started("end")
    assert ended.wait() == 0
    assert not gone.parent.exists()
    killed, left = started("wait")
    other, kept = started("wait")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / WEIGHTS_NAME).is_file()
        mine = found(cuts, "family@4")
        assert not left.parent.exists()
        assert (kept / WEIGHTS_NAME).is_file()
        cuts.close()
        assert not mine.parent.exists()
    finally:
        other.kill()
        other.wait()


def test_the_settings_survive_the_environment(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path / "cache", 25 * 10**8, BASE)
    assert Settings.read(settings.variables()) == settings
    assert Settings.read({}) is None
    for wrong in ("0", "-1", "many", "nan", "inf"):
        with pytest.raises(MatryoshkaError, match="MATRYOSHKA_VLLM_CACHE_GB"):
            Settings.read({**settings.variables(), "MATRYOSHKA_VLLM_CACHE_GB": wrong})
    with pytest.raises(MatryoshkaError, match="which is no folder"):
        Settings.read({"MATRYOSHKA_VLLM_ADAPTERS": str(tmp_path / "nowhere")})


# The command


def option(arguments: Any, name: str) -> str:
    words = list(arguments)
    return str(words[words.index(name) + 1])


def test_the_command_has_what_vllm_needs(family: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    served = serve(family, more=["--max-model-len", "512"])
    assert option(served.arguments, "--model") == BASE
    assert option(served.arguments, "--max-lora-rank") == "8"
    assert option(served.arguments, "--max-loras") == "4"
    assert option(served.arguments, "--host") == "127.0.0.1"
    assert option(served.arguments, "--max-model-len") == "512"
    assert served.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert served.environment["VLLM_PLUGINS"] == "lora_filesystem_resolver,matryoshka_lora"
    assert Settings.read(served.environment) == Settings(family, Settings.read(served.environment).cache, 10**10, BASE)  # type: ignore[union-attr]
    app(["serve", str(family), "--print", "--", "--max-model-len", "512"], standalone_mode=False)
    assert capsys.readouterr().out.strip() == served.command()


@pytest.mark.parametrize("rank", [1, 6, 40])
def test_the_largest_rank_is_one_that_vllm_takes(tmp_path: Path, rank: int) -> None:
    adapter = nested_llama(Nesting([rank]), deploy="reordered")
    adapter.reorder()
    adapter.save(tmp_path / "adapter")
    named(tmp_path / "adapter", BASE)
    assert option(serve(tmp_path / "adapter").arguments, "--max-lora-rank") == {1: "1", 6: "8", 40: "64"}[rank]


def test_a_base_model_by_another_name(family: Path, tmp_path: Path) -> None:
    served = serve(family.parent, model=str(tmp_path))
    assert option(served.arguments, "--model") == str(tmp_path)
    settings = Settings.read(served.environment)
    assert settings is not None
    assert Cuts(settings).find("family@4", str(tmp_path)) is not None


def test_what_cannot_be_served(family: Path, tmp_path: Path) -> None:
    def no_base() -> None:
        named(family, "")
        serve(family)

    def two_bases() -> None:
        shutil.copytree(family, family.parent / "other")
        named(family.parent / "other", "someone/another")
        serve(family.parent, model=BASE)

    cases: dict[str, Callable[[], object]] = {
        "which is no folder": lambda: serve(tmp_path / "nowhere"),
        "is no nested adapter and holds none": lambda: serve(tmp_path),
        "--trust-remote-code would run code": lambda: serve(family, more=["--trust-remote-code"]),
        "--trust_remote would run code": lambda: serve(family, more=["--trust_remote"]),
        "do not have one base model": two_bases,
        "do not say which base model": no_base,
    }
    for why, call in cases.items():
        with pytest.raises(MatryoshkaError, match=why):
            call()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_command_says_so(family: Path) -> None:
    with pytest.raises(MatryoshkaError, match="vLLM is not installed beside this package"):
        app(["serve", str(family)], standalone_mode=False)


def test_the_package_does_not_import_vllm() -> None:
    """Only vLLM itself calls the parts that do."""
    program = (
        "import sys, pkgutil, importlib\n"
        "from contextlib import suppress\n"
        "import matryoshka_lora\n"
        "for module in pkgutil.walk_packages(matryoshka_lora.__path__, 'matryoshka_lora.'):\n"
        "    with suppress(ModuleNotFoundError):  # of a package that an extra brings\n"
        "        importlib.import_module(module.name) if not module.name.endswith('__main__') else None\n"
        "print('vllm' in sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip().endswith("False")
