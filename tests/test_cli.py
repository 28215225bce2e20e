"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import lora_config, nest_as, randomize
from peft import PeftModel, get_peft_model
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM

from matryoshka_lora import Nesting, load
from matryoshka_lora.cli.main import main
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.training import load_config

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit status, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["matryoshka", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        code = stopped.value.code
        return code if isinstance(code, int) else 0, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter of ranks 1, 2, 4 with random factors, as trained."""
    nesting = Nesting([1, 2, 4])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(nesting))
    randomize(model)
    folder = tmp_path_factory.mktemp("adapter")
    nest_as(model, nesting, deploy="paper").save(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) for i in range(6)]
    file.write_text("\n".join(lines))
    return file


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_explained(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 1
    assert any(line.startswith("error: ") for line in err.splitlines())  # a progress bar may stand before it
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def test_help_names_every_verb(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("train", "eval", "reorder", "info", "export", "push", "select", "demo"):
        assert f" {verb} " in out
        code, text, _ = run(verb, "--help")
        assert code == 0
        assert f"Example: matryoshka {verb} " in text


def test_a_missing_extra_is_named(run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    config = tmp_path / "train.yaml"
    config.write_text(f"data: {rows}\n")
    assert_explained(run("train", config), "trl", "pip install -e '.[train,eval]'")


PUBLISHED = {  # the columns of each file's dataset
    "gsm8k": ("question", "answer"),
    "open-platypus": ("instruction", "output"),
    "metamath": ("query", "response"),
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/paper/*.yaml")), ids=lambda path: path.stem)
def test_published_settings_train_on_files_of_the_same_columns(
    run: Run, base: Path, tmp_path: Path, path: Path
) -> None:
    columns = PUBLISHED[path.stem]
    rows = [dict(zip(columns, (f"{i} + 1?", str(i + 1)), strict=True)) | {"input": "", "type": "x"} for i in range(8)]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(path)
    source = {"path": str(file)} | {key: config.data[key] for key in ("template",) if key in config.data}
    assert ("template" in source) == (path.stem == "metamath")
    small = ["max_steps=2", "per_device_train_batch_size=2", "gradient_accumulation_steps=1", "lora.r=4"]
    steps = ["eval_strategy=steps", "save_strategy=steps", "eval_steps=2", "save_steps=2"]
    data = [f"{key}={json.dumps(source)}" for key in ("data", "eval_data")]
    code, _, err = run("train", path, f"model={base}", "dtype=fp32", *data, *small, *steps, f"output_dir={out}")
    assert code == 0, err
    saved = open_adapter(out).nested
    assert saved.nesting.ranks == (1, 2, 4)
    # The paper's recipe is as it was trained; the other one is reordered.
    how = (saved.deploy, saved.reordered)
    assert how == (("reordered", "svd") if path.stem == "metamath" else ("paper", None))


def test_help_waits_for_no_library() -> None:
    code = "import sys, matryoshka_lora.cli.main; print({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "matryoshka_lora", "export", "absent", "--rank", "1", "-o", "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert_explained((result.returncode, result.stdout, result.stderr), "absent does not exist", "hf download")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["train"],
        ["export", "x", "--rank", "four", "-o", "y"],
        ["export", "x", "--rank", "4"],
        ["eval", "x"],
        ["select", "x"],
        ["select", "x", "--within", "1"],
        ["select", "x", "--within", "-1%"],
        ["select", "x", "--within", "101%"],
        ["select", "x", "--max-bytes", "0"],
        ["eval", "x", "--tasks", "t", "--batch-size", "²"],
        ["eval", "x", "--task", "t", "--data", "d.jsonl"],
        ["eval", "x", "--task", "t", "--ranks", "1;2"],
        ["eval", "x", "--task", "t", "--ranks", "2,1"],
        ["eval", "x", "--task", "t", "--split", "train"],
        ["eval", "x", "--tasks", "t", "--batch-size", "many"],
        ["eval", "x", "--tasks", "t", "--num-fewshot", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(run: Run, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_export_writes_what_plain_peft_reads(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("export", adapter, "--rank", 2, "-o", tmp_path / "two")
    assert code == 0
    assert "PeftModel.from_pretrained" in out.splitlines()[-1]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "two")
    assert model.peft_config["default"].r == 2


def test_export_explains_what_it_cannot_do(run: Run, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    assert_explained(run("export", adapter, "--rank", 3, "-o", tmp_path / "out"), "rank 3 was not trained", "1, 2, 4")
    assert_explained(run("export", adapter, "--rank", 0, "-o", tmp_path / "out"), "rank 0 is not positive")
    assert_explained(run("export", adapter, "--rank", 8, "-o", tmp_path / "out"), "above the largest rank 4")
    assert_explained(run("export", tmp_path, "--rank", 1, "-o", tmp_path / "out"), "adapter_config.json is missing")
    assert_explained(run("export", adapter, "--rank", 2, "-o", file), "a file stands where a folder is needed")
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_eval_of_a_file(run: Run, adapter: Path, rows: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "out"
    code, out, _ = run("eval", adapter, "--data", rows, "--limit", 4, "--dtype", "fp32", "-o", out_folder)
    assert code == 0
    assert f"matryoshka export {adapter}" in out.splitlines()[-1]
    data = json.loads((out_folder / "evaluation.json").read_text())
    assert data["format"] == 3
    assert data["dtype"] == "float32"
    assert data["ranks"] == [1, 2, 4]
    assert data["bytes"][2] == 4 * data["bytes"][0] > 0
    assert all(latency > 0 for latency in data["latency_ms"])
    task = data["tasks"][rows.name]
    assert (task["kind"], task["items"], task["metric"]) == ("file", 4, "accuracy,none")
    loss = task["metrics"]["loss,none"]
    assert len(set(loss["value"])) == 3
    assert loss["base"]["value"] > 0
    lines = [json.loads(line) for line in (out_folder / "examples.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert set(lines[0]["answers"]) == {"0", "1", "2", "4"}
    assert (out_folder / "curve.png").stat().st_size > 10_000
    assert json.dumps(data["adapter"]["sha256"]) in (out_folder / "report.html").read_text()
    assert out.splitlines()[-1].startswith(f"Next: matryoshka select {out_folder} --within 1%, then ")
    code, out, _ = run("select", out_folder, "--within", "1%")
    assert code == 0
    assert "question by question" in out
    assert f"Next: matryoshka export {adapter.name} --rank " in out


def test_eval_has_no_base_model_where_parts_of_it_were_trained(
    run: Run, base: Path, rows: Path, tmp_path: Path
) -> None:
    nesting = Nesting([1, 2, 4])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(nesting, modules_to_save=["norm"]))
    randomize(model)
    nest_as(model, nesting, deploy="paper").save(tmp_path / "adapter")
    assert run("eval", tmp_path / "adapter", "--data", rows, "--limit", 2, "--dtype", "fp32")[0] == 0
    data = json.loads((tmp_path / "adapter" / "evaluation" / "evaluation.json").read_text())
    loss = data["tasks"][rows.name]["metrics"]["loss,none"]
    assert loss["base"] is None
    assert len(loss["value"]) == 3
    assert run("select", tmp_path / "adapter", "--within", "1%")[0] == 0


def test_the_card_shows_an_evaluation_beside_the_adapter(run: Run, adapter: Path, rows: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(adapter, tmp_path / "copy")
    assert "How good each rank is" not in (copied / "README.md").read_text()
    code, _, _ = run("eval", copied, "--data", rows, "--limit", 2, "--ranks", "1,4", "--dtype", "fp32")
    assert code == 0
    card = (copied / "README.md").read_text()
    assert f"| {rows.name}: accuracy, 2 questions | " in card
    assert "![Every task at every rank](evaluation/curve.png)" in card


def test_eval_of_tasks_at_chosen_ranks(run: Run, adapter: Path, tmp_path: Path) -> None:
    names = "chain_sum,family_relationships"
    options = ("--tasks", names, "--limit", 3, "--ranks", "1,4", "--split", "validation", "-o", tmp_path)
    code, out, _ = run("eval", adapter, *options)
    assert code == 0
    assert "chain_sum: accuracy, 3 questions, 0 shots" in out
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert data["settings"]["split"] == "validation"
    assert data["ranks"] == [1, 4]
    assert list(data["tasks"]) == names.split(",")
    code, _, err = run("eval", adapter, *options, "--dtype", "fp32")
    assert code == 1
    assert "is the evaluation of another dtype. Give another folder with --out, or drop it with --force" in err


def test_a_second_eval_keeps_the_tasks_of_the_first(run: Run, adapter: Path, tmp_path: Path) -> None:
    def evaluate(tasks: str, limit: int, *more: object) -> tuple[int, str, str]:
        return run("eval", adapter, "--tasks", tasks, "--limit", limit, "--ranks", "1,4", "-o", tmp_path, *more)

    def read() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        lines = (tmp_path / "examples.jsonl").read_text().splitlines()
        return json.loads((tmp_path / "evaluation.json").read_text()), list(map(json.loads, lines))

    assert evaluate("chain_sum", 2)[0] == 0
    first, first_examples = read()
    assert evaluate("family_relationships", 3, "--split", "validation")[0] == 0
    second, second_examples = read()
    kept = second["tasks"]["chain_sum"]
    assert (kept.pop("settings"), kept.pop("versions")) == (first["settings"], first["versions"])
    assert kept == first["tasks"]["chain_sum"]
    assert second["settings"] == {"num_fewshot": None, "limit": 3, "split": "validation"}
    assert list(second["tasks"]) == ["chain_sum", "family_relationships"]
    assert second_examples[:2] == first_examples
    assert [example["task"] for example in second_examples[2:]] == ["family_relationships"] * 3
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in second["tasks"])
    assert run("select", tmp_path, "--within", "1%", "--task", "chain_sum")[0] == 0

    # The same task again takes its own place, and no other one's.
    assert evaluate("chain_sum", 4)[0] == 0
    third, third_examples = read()
    assert third["tasks"]["chain_sum"]["items"] == 4
    assert third["tasks"]["family_relationships"]["settings"] == second["settings"]
    assert len(third_examples) == 7

    # What has other ranks or another mode cannot stand in the same tables.
    before = fingerprint(tmp_path)
    assert_explained(
        evaluate("chain_sum", 2, "--ranks", "1,2"), "holds family_relationships at other ranks, 1, 4", "--force"
    )
    assert_explained(evaluate("chain_sum", 2, "--fixed-shots"), "in another mode, exact", "--out", "--force")
    assert fingerprint(tmp_path) == before
    assert evaluate("chain_sum,family_relationships", 2, "--ranks", "1,2")[0] == 0  # nothing is dropped
    assert evaluate("chain_sum", 2, "--ranks", "1", "--force")[0] == 0
    assert list(read()[0]["tasks"]) == ["chain_sum"]
    assert len(read()[1]) == 2


def test_an_evaluation_of_other_weights_is_replaced_only_when_told(
    run: Run, base: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    nesting = Nesting([1, 2, 4])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(nesting))
    randomize(model, seed=9)
    own = tmp_path / "own"
    nest_as(model, nesting, deploy="paper").save(own)

    def evaluate(which: Path, *more: object) -> tuple[int, str, str]:
        return run("eval", which, "--data", rows, "--limit", 2, "--dtype", "fp32", *more)

    assert evaluate(own)[0] == 0
    before = fingerprint(own)
    assert_explained(evaluate(adapter, "-o", own / "evaluation"), "is the evaluation of another adapter", "--force")
    assert_explained(
        evaluate(own, "--dtype", "bf16", "-o", own / "evaluation"), "is the evaluation of another dtype", "--force"
    )
    assert_explained(evaluate(adapter, "-o", own), "holds an adapter already", "--force")
    (own / "evaluation" / "evaluation.json").rename(tmp_path / "away")
    assert_explained(evaluate(adapter, "-o", own / "evaluation"), "holds answers of another adapter", "--force")
    (tmp_path / "away").rename(own / "evaluation" / "evaluation.json")
    assert fingerprint(own) == before

    assert evaluate(adapter, "-o", own / "evaluation", "--force")[0] == 0
    shutil.copytree(own / "evaluation", tmp_path / "forced")
    assert evaluate(adapter, "-o", tmp_path / "fresh")[0] == 0
    for name in ("evaluation.json", "examples.jsonl", "answers.jsonl"):
        forced, fresh = ((tmp_path / folder / name).read_text() for folder in ("forced", "fresh"))
        if name == "evaluation.json":
            assert {**json.loads(forced), "latency_ms": None} == {**json.loads(fresh), "latency_ms": None}
        else:
            assert forced == fresh


def test_select_says_that_an_evaluation_is_of_other_weights(
    run: Run, base: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    again = load(AutoModelForCausalLM.from_pretrained(base), adapter)
    again.save(own)
    assert run("eval", own, "--data", rows, "--limit", 2, "--dtype", "fp32")[0] == 0
    again.save(own)  # the same weights
    for place in (own, own / "evaluation", own / "evaluation" / "evaluation.json"):
        assert run("select", place, "--within", "1%")[0] == 0
    randomize(again.model, seed=9)
    again.save(own)
    for place in (own, own / "evaluation", own / "evaluation" / "evaluation.json"):
        assert_explained(run("select", place, "--within", "1%"), "was measured on other weights", "--force")
    assert run("eval", own, "--data", rows, "--limit", 2, "--dtype", "fp32", "--force")[0] == 0
    assert run("select", own, "--within", "1%")[0] == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 4}', '{"format": 3}', '{"format": 3, "ranks": [1], "tasks": {}}']
)
def test_a_damaged_evaluation_is_not_gone_over_unasked(
    run: Run, adapter: Path, rows: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text(text)
    options = ("eval", adapter, "--data", rows, "--limit", 1, "--ranks", 1, "-o", tmp_path / "out")
    assert_explained(run(*options), "evaluation.json", "--force")
    assert (tmp_path / "out" / "evaluation.json").read_text() == text
    assert run(*options, "--force")[0] == 0


def test_what_was_finished_before_an_error_is_kept(run: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x"}))
    (tmp_path / "long.yaml").write_text(
        "task: long\ndataset_path: json\noutput_type: generate_until\ntest_split: test\ndoc_to_text: '{{text}}'\n"
        f"doc_to_target: y\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "generation_kwargs: {until: [x], max_gen_toks: 9999}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    options = ("--tasks", f"chain_sum,{tmp_path / 'long.yaml'}", "--limit", 2, "-o", tmp_path / "out")
    code, _, err = run("eval", adapter, *options)
    assert code == 1
    assert "prompt and 9999 new tokens need 10000 tokens, and the model's context has 512" in err
    assert "Traceback" not in err
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]) == ["chain_sum"]


def test_eval_explains_what_it_cannot_do(run: Run, adapter: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    assert_explained(run("eval", adapter, "--data", rows, "--ranks", "1,3"), "rank 3 was not trained")
    assert_explained(run("eval", adapter, "--task", "chain_sun"), "did you mean chain_sum")
    assert_explained(run("eval", adapter, "--data", "chain_sum"), "write --tasks chain_sum")
    assert_explained(run("eval", adapter, "--data", tmp_path / "no.jsonl"), "there is no file")
    assert_explained(run("eval", adapter, "--data", rows, "-o", file), "a file stands where a folder is needed")
    assert_explained(run("eval", adapter, "--data", rows, "--model", tmp_path), "cannot load the tokenizer")
    assert_explained(run("eval", adapter, "--tasks", "chain_sum,chain_sum"), "write each name once")
    assert_explained(run("eval", adapter, "--tasks", "chain_sum", "--num-fewshot", 3), "asked without shots")
    assert_explained(run("eval", adapter, "--tasks", "no.yaml"), "there is no file no.yaml")
    assert_explained(run("eval", tmp_path, "--data", rows), "adapter_config.json is missing")
    plain = shutil.copytree(adapter, tmp_path / "plain")
    (plain / "nesting.json").unlink()
    assert_explained(run("eval", plain, "--data", rows), "not a nested adapter", "matryoshka reorder")
    assert file.read_text() == "precious"
    assert not (adapter / "evaluation").exists()


def test_train_takes_overrides_and_says_what_is_next(run: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {base}\ndata: {rows}\ndtype: fp32\nmax_steps: 2\nper_device_train_batch_size: 2\n")
    out_folder = tmp_path / "run"
    code, out, _ = run("train", config, "lora.r=4", f"output_dir={out_folder}", "use_cpu=true", "disable_tqdm=true")
    assert code == 0
    assert out.splitlines()[-1].startswith(f"Next: matryoshka eval {out_folder} --data {rows}")
    assert json.loads((out_folder / "adapter_config.json").read_text())["r"] == 4
    assert json.loads((out_folder / "nesting.json").read_text())["ranks"] == [1, 2, 4]


def test_train_explains_what_it_cannot_do(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: family_relationships\nlearning_rat: 1e-3\n")
    assert_explained(run("train", config), str(config), "learning_rat", "learning_rate")
    assert_explained(run("train", tmp_path / "absent.yaml"), "absent.yaml")
    config.write_text("data: family_relationships\n")
    assert_explained(run("train", config, "lora.r"), "write key=value, for example lora.r=8")
