"""No file of an adapter's life holds a token or an absolute path of the machine, whatever its config has.

But ``base_model_name_or_path`` in ``adapter_config.json``: PEFT loads the base model from there, and `matryoshka push`
does not send a folder's (tests/test_push.py).
"""

from __future__ import annotations

import base64
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from strangers import lora_file
from test_privacy import FIELDS, OTHER, PLACE, TOKEN, config_with, filled
from tiny_chat import save_tiny_chat
from tiny_hub import tiny_hub

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.adapter.callback import NestingCallback
from matryoshka_lora.cli.main import app
from matryoshka_lora.training import make_config, train
from matryoshka_lora.training.resume import plan

# These values stop a training, or are the name of something that has to be there.
STOPS = {
    *("lr_scheduler_kwargs", "optim_args", "torch_compile_backend", "torch_compile_mode", "log_level"),
    *("log_level_replica", "report_to", "dataloader_multiprocessing_context", "resume_from_checkpoint", "loss_type"),
    *("model_init_kwargs", "chat_template_path", "dataset_kwargs", "eos_token", "pad_token", "truncation_mode"),
    *(
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs",
        "train_sampling_strategy",
        "data",
        "eval_data",
    ),
    *("model", "output_dir", "hub_token"),
}


class Life:
    """An adapter from its training to its exports, with absolute paths in every command and tokens in its config."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / PLACE
        self.base = save_tiny_chat(self.home / "models" / "tiny")
        self.run, self.out = self.home / "runs" / "mine", self.home / "out"
        self.rows = self.home / "rows.jsonl"
        rows = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(12)]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.text = self.home / "text.jsonl"  # which needs no chat template: training had one of its own
        self.text.write_text(
            "".join(json.dumps({"prompt": "1 + 1 =", "completion": f" {i}"}) + "\n" for i in range(12))
        )
        self.task = self.home / "mine.yaml"
        self.task.write_text(
            "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {self.rows}}}}}\n"
            'doc_to_text: "{{question}}"\ndoc_to_choice: ["1", "2"]\ndoc_to_target: 0\n'
        )
        (self.home / "template.jinja").write_text((self.base / "chat_template.jinja").read_text())
        self.given = self._config()

    def _config(self) -> dict[str, Any]:
        """A path in every field that may have one, and tokens where they may be."""
        given: dict[str, Any] = {}
        for section, name, value in FIELDS:
            if section or name in STOPS:
                continue
            try:
                make_config(config_with("", name, filled(value, f"/srv/{PLACE}/{name}")))
            except MatryoshkaError:
                continue
            given[name] = filled(value, f"/srv/{PLACE}/{name}")
        return {
            **given,
            "model": str(self.base),
            "dtype": "fp32",
            "data": {"path": str(self.rows)},
            "eval_data": {"path": str(self.rows), "size": 4},
            "output_dir": str(self.run),
            "chat_template_path": str(self.home / "template.jinja"),
            "hub_token": TOKEN,
            "model_init_kwargs": {"token": OTHER, "cache_dir": str(self.home / "cache")},
            "metric_for_best_model": "loss",
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "report_to": ["tensorboard"],
            "max_steps": 4,
            "save_steps": 2,
            "eval_steps": 2,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
            "lora": {"r": 4},
        }


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    lived = Life(tmp_path_factory.mktemp("life"))
    config = lived.home / "config.yaml"
    config.write_text(json.dumps(lived.given))  # JSON is YAML
    assert len(lived.given) > 30
    out, run = lived.out, str(lived.run)

    def command(*arguments: object) -> None:
        app([str(argument) for argument in arguments], standalone_mode=False)

    command("train", config)
    small = ("--ranks", "1,4", "--limit", "4", "--dtype", "fp32")
    command("eval", run, "--data", lived.text, *small)
    command("eval", run, "--tasks", lived.task, *small, "-o", out / "evaluation")
    for kind in ("peft", "merged", "directions", "ladder", "mlx", "gguf", "gguf-ladder"):
        if not kind.startswith("gguf") or pytest.importorskip("gguf"):
            where = out / (f"{kind}.gguf" if kind == "gguf" else kind)
            command("export", run, "--rank", "4", "--format", kind, "-o", where)
    single = lora_file(lived.home / "single.safetensors")
    command("export", single, "--rank", "2", "-o", out / "small.safetensors")
    command("export", single, "--style", "kohya", "-o", out / "kohya.safetensors")
    command("export", single, "--style", "peft", "-o", out / "from-file")
    command("export", out / "from-file", "--rank", "2", "--style", "diffusers", "-o", out / "diffusers.safetensors")
    command("reorder", single, "-o", out / "ordered.safetensors")
    command("export", run, "--budget", "0.5", "-o", out / "budget")
    for by in ("svd", "loss", "learned"):
        data = () if by == "svd" else ("--data", lived.text, "--rows", "4")
        command("reorder", run, "-o", out / by, "--by", by, *data, "--dtype", "fp32")
    for kind in ("png", "svg", "pdf"):
        command("info", run, "--plot", out / f"info.{kind}")
    return lived


def contents(file: Path) -> Iterator[tuple[str, bytes]]:
    """A file's bytes; of an archive, such as PyTorch's, those of each member too; of an adapter's config, all else."""
    content = file.read_bytes()
    if file.name == "adapter_config.json":
        found = json.loads(content)
        base = found.pop("base_model_name_or_path", None)
        assert base is None or Path(base).name == "tiny"
        content = json.dumps(found).encode()
    yield str(file), content
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            yield from ((f"{file}: {name}", archive.read(name)) for name in archive.namelist())


def test_no_file_holds_a_token_or_a_path(life: Life) -> None:
    files = [file for folder in (life.run, life.out) for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"train.yaml", "README.md", "optimizer.pt", "trainer_state.json", "answers.jsonl", "report.html"} <= names
    assert {"curve.png", "spectra.safetensors", "directions.safetensors", "tokenizer_config.json", "info.pdf"} <= names
    assert {"adapters.safetensors", "kohya.safetensors", "ordered.safetensors", "adapter.gguf"} <= names
    assert any("tfevents" in name for name in names)
    for file in files:
        assert PLACE not in str(file.relative_to(life.home))
        for name, content in contents(file):
            for marker in (TOKEN, OTHER, PLACE):
                assert marker.encode() not in content, (name, marker)
                assert marker.encode("utf-16-le") not in content, (name, marker)


def test_what_is_pushed_holds_none_either(life: Life) -> None:
    with tiny_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        app(["push", str(life.run), "me/mine", "--base-model", "someone/tiny"], standalone_mode=False)
        app(["push", str(life.out / "loss"), "me/mine", "--base-model", "someone/tiny"], standalone_mode=False)
        bodies = [path.encode() + body for path, body in hub.requests]
    assert len(bodies) > 4
    for body in bodies:
        assert not any(marker.encode() in body for marker in (TOKEN, OTHER, PLACE))
        for line in body.splitlines():
            value = json.loads(line[line.index(b"{") :]).get("value", {})
            for marker in (TOKEN, OTHER, PLACE):
                assert marker.encode() not in base64.b64decode(value.get("content") or "")


def test_the_card_names_what_it_may(life: Life) -> None:
    card = (life.run / "README.md").read_text()
    for line in ("model: tiny", "  path: rows.jsonl", "max_steps: 4", "  r: 4", "  rule: matryoshka"):
        assert f"\n{line}\n" in card
    assert "| text.jsonl: accuracy, 4 questions | " in card
    for field in ("run_name", "hub_model_id", "trackio", "report_to", "output_dir", "cache_dir"):
        assert field not in card


def test_the_next_command_finds_the_adapter(life: Life, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def following(*arguments: object) -> str:
        app(["select", *map(str, arguments), "--within", "100%"], standalone_mode=False)
        return capsys.readouterr().out.partition("\n\n")[2]

    assert f"matryoshka export {life.run} --rank 1 -o mine-rank-1" in following(life.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(life.run.parent)
        assert "matryoshka export mine --rank 1 -o mine-rank-1" in following("mine/evaluation/evaluation.json")
        patch.chdir(life.run / "evaluation")
        assert f"matryoshka export {life.run} --rank 1 -o mine-rank-1" in following("evaluation.json")
    elsewhere = following(life.out / "evaluation")
    assert "matryoshka export mine --rank 1 -o mine-rank-1" in elsewhere
    assert "mine is the name of the adapter that was evaluated: write the path of its folder." in elsewhere


def test_two_files_of_one_name_are_not_one_task(life: Life, tmp_path: Path) -> None:
    other = Path(shutil.copy(life.task, tmp_path))
    with pytest.raises(
        MatryoshkaError, match=r"two tasks are called mine.yaml: evaluate one of them with another --out"
    ):
        app(
            ["eval", str(life.run), "--tasks", f"{life.task},{other}", "-o", str(tmp_path / "out")],
            standalone_mode=False,
        )


def test_an_evaluation_that_an_older_version_began_goes_on(life: Life, tmp_path: Path) -> None:
    """Whose answers name the base model by its whole path."""
    answers = (life.run / "evaluation" / "answers.jsonl").read_text().splitlines()
    header = json.loads(answers[0])
    header["subject"]["model"] = str(life.base)
    (tmp_path / "answers.jsonl").write_text("\n".join([json.dumps(header), *answers[1:]]) + "\n")
    before = len(answers)
    small = ("--ranks", "1,4", "--limit", "4", "--dtype", "fp32", "-o", str(tmp_path))
    app(["eval", str(life.run), "--data", str(life.text), *small], standalone_mode=False)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == before


# A run goes on


class Killed(BaseException): ...


def test_a_run_goes_on_with_another_token_and_with_its_best_checkpoint(life: Life, tmp_path: Path) -> None:
    found = {}
    for name, options in (("whole", {}), ("cut", {"token": TOKEN})):
        # Of a loss that falls, the first one is the greatest: the best checkpoint is not that which is resumed from.
        changes: dict[str, Any] = {
            "learning_rate": 1e-2,
            "greater_is_better": True,
            "report_to": "none",
            "chat_template_path": None,
        }
        changes["nesting"] = {"reorder": "svd"}
        given = {**life.given, **changes, "output_dir": str(tmp_path / name), "model_init_kwargs": options}
        if name == "cut":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(NestingCallback, "on_train_end", kill)
                with pytest.raises(Killed):
                    train(make_config(given))
            given |= {"hub_token": None, "model_init_kwargs": {"token": OTHER}}
            assert plan(make_config(given)).step == 4
        train(make_config(given))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] is None
        found[name] = state["best_global_step"], load_file(tmp_path / name / "adapter_model.safetensors")
    assert found["whole"][0] == found["cut"][0] == 2
    for key, tensor in found["whole"][1].items():
        assert tensor.equal(found["cut"][1][key])


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def test_a_run_of_an_older_version_goes_on(life: Life, tmp_path: Path) -> None:
    """Whose train.yaml has tokens and whole paths."""
    run = Path(shutil.copytree(life.run, tmp_path / "mine"))
    given = {**life.given, "output_dir": str(run)}
    config = make_config(given)
    assert plan(config).finished
    (run / "train.yaml").write_text(json.dumps({**config.to_dict(), "hub_token": "old", "output_dir": "/srv/old/mine"}))
    assert plan(config).finished
    other = make_config({**given, "model": str(life.home / "elsewhere" / "tiny")})
    with pytest.raises(MatryoshkaError, match=r"another config: model was .*/tiny and is now .*/tiny") as caught:
        plan(other)
    assert OTHER not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert PLACE not in str(caught.value).partition("another config")[2]
