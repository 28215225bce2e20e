"""The verbs on files: which format an output has, what contradicts, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from safetensors.torch import save_file
from strangers import best, by_peft, distance, logits, plain_adapter, updates
from tiny_chat import save_tiny_chat, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from matryoshka_lora import MatryoshkaError, export, reorder
from matryoshka_lora.convert import export_all
from matryoshka_lora.files.peft import WEIGHTS_NAME, open_adapter
from matryoshka_lora.reordering.data import read_data

R = 8


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    plain_adapter(tmp_path / "lora", r=R)
    return tmp_path / "lora"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    state = {"a.lora_down.weight": torch.randn(4, 6), "a.lora_up.weight": torch.randn(5, 4)}
    save_file(state, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on the disk, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "target", "wish", "message"),
    [
        ("lora", "x.safetensors", {"rank": 2}, "name a folder$"),
        ("lora", "x", {"rank": [1, 2]}, "several ranks make a ladder"),
        ("lora", "x.gguf", {"max_bytes": "1MB"}, "gguf cannot be cut like that: .*or --keep"),
        ("lora", "x", {"rank": 2, "style": "kohya"}, "name a folder, and no --style"),
        ("lora", "x.safetensors", {"rank": 2, "format": "peft"}, "becomes a folder"),
        ("lora", "x.gguf", {"rank": 2, "format": "mlx"}, "becomes a folder"),
        ("lora", "x", {"rank": 2, "format": "gguf"}, r"name it .*x\.gguf"),
        ("lora", "x", {}, "say how much to keep: --rank 8"),
        ("lora", "x", {"keep": "90%", "format": "ladder"}, "ladder cannot be cut like that"),
        ("lora", "x", {"keep": "90%", "format": "mlx"}, "mlx cannot be cut .*: give --rank$"),
        ("lora", "x", {"max_bytes": 50_000, "format": "merged"}, "merged cannot be cut like that"),
        ("lora", "x", {"rank": 9}, "has no rank 9: choose one of 1 to 8"),
        ("lora", "x", {"rank": 0}, "has no rank 0"),
        ("lora", "x", {"rank": 9, "format": "ladder"}, "has no rank 9"),
        ("lora", "x", {"max_bytes": 1000}, "the smallest file, with rank 1 in every layer"),
        ("lora", "x", {"rank": 2, "format": "merged"}, "names no base model"),
        ("lora", "x.gguf", {"rank": 2}, "names no base model"),
        ("single", "cat8", {"rank": 2}, r"name a file such as small\.safetensors$"),
        ("single", "x.safetensors", {"rank": 2, "format": "mlx"}, "without --format"),
        ("single", "x.safetensors", {"rank": 5}, "has no rank 5: choose one of 1 to 4"),
    ],
)
def test_a_contradiction_is_refused_with_the_way_out(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    source: str,
    target: str,
    wish: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        export(request.getfixturevalue(source), tmp_path / target, **wish)
    assert not (tmp_path / target).exists()


def test_no_causal_model_is_loaded_for_a_classifier(base: Path, tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", task_type="SEQ_CLS")
    with pytest.raises(MatryoshkaError, match="is for SEQ_CLS"):
        export(tmp_path / "lora", tmp_path / "x", 2, "merged", model=str(base))


def test_reorder_refuses_what_it_cannot_use(lora: Path, single: Path, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="'svd' takes no data: write --by trained"):
        reorder(lora, tmp_path / "x", data=[])
    with pytest.raises(MatryoshkaError, match="'trained' takes data: give it rows with --data"):
        reorder(lora, tmp_path / "x", by="trained")
    with pytest.raises(MatryoshkaError, match="has no rows"):
        reorder(lora, tmp_path / "x", by="trained", data=[])
    with pytest.raises(MatryoshkaError, match="names no base model to train"):
        reorder(single, tmp_path / "x.safetensors", by="trained", data=[])
    with pytest.raises(MatryoshkaError, match="becomes a folder"):
        reorder(lora, tmp_path / "x.safetensors")


def test_a_rank_beside_a_share_is_the_most_that_a_layer_gets(lora: Path, tmp_path: Path) -> None:
    free: Any = export(lora, tmp_path / "free", keep=0.6)
    made = export(lora, tmp_path / "out", 2, keep=0.6)
    assert made.ranks == {name: min(2, rank) for name, rank in free.ranks.items()}
    sized: Any = export(lora, tmp_path / "sized", 3, max_bytes=free.after)
    assert max(sized.ranks.values()) <= 3
    both: Any = export(lora, tmp_path / "both", keep=0.6, max_bytes=sized.after)
    assert both.after <= sized.after
    assert all(rank <= free.ranks[name] for name, rank in both.ranks.items())
    size = (lora / WEIGHTS_NAME).stat().st_size  # with so much room every rank stays
    whole: Any = export(lora, tmp_path / "all", max_bytes=size)
    assert set(whole.ranks.values()) == {R}


def test_it_says_sizes_and_the_error(lora: Path, tmp_path: Path) -> None:
    made = export(lora, tmp_path / "out", 4)
    given = updates(lora).values()
    lost = sum(float(((update - best(update, 4)) ** 2).sum()) for update in given)
    error = (lost / sum(float((update**2).sum()) for update in given)) ** 0.5
    assert made.error == pytest.approx(error, rel=1e-6)
    kept = 100 * (1 - error**2)
    sizes = [(folder / WEIGHTS_NAME).stat().st_size / 1000 for folder in (lora, tmp_path / "out")]
    assert made.lines() == [
        f"{tmp_path / 'out'}: rank 4, {sizes[0]:.1f} kB -> {sizes[1]:.1f} kB",
        f"error {100 * error:.1f} % of the update's norm ({kept:.1f} % of its square kept)",
    ]


@pytest.mark.parametrize("asked", [None, 4, (1, 6)])
def test_a_ladder_has_pefts_folder_for_each_rank(
    lora: Path, tmp_path: Path, asked: int | tuple[int, ...] | None
) -> None:
    given, out = updates(lora), tmp_path / "ladder"
    made: Any = export(lora, out, asked, "ladder")
    assert made.ranks == {None: (1, 2, 4, 8), 4: (4,), (1, 6): (1, 6)}[asked]
    assert sorted(x.name for x in out.iterdir()) == [f"lora@{rank}" for rank in made.ranks]
    for rank in made.ranks:
        for name, update in updates(out / f"lora@{rank}").items():
            np.testing.assert_allclose(update, best(given[name], rank), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_is_the_base_with_the_rank(tmp_path: Path, tied: bool) -> None:
    """A weight that the embeddings share with the head gets no update of the other."""

    def base() -> Any:
        return tiny_llama(tie_word_embeddings=tied)

    base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    named = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain_adapter(tmp_path / "lora", named, target_modules=["embed_tokens", "q_proj"])
    tiny_tokenizer().save_pretrained(tmp_path / "lora")  # as beside a Trainer's checkpoint
    (tmp_path / "lora" / "chat_template.jinja").write_text("mine")
    save_file({"v_head.weight": torch.ones(1)}, tmp_path / "lora" / "value_head.safetensors")
    export(tmp_path / "lora", tmp_path / "merged", 3, "merged")
    export(tmp_path / "lora", tmp_path / "rank", 3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(model), by_peft(tmp_path / "rank", base)) < 1e-5
    assert distance(logits(model), logits(base())) > 0.1
    for written in ("merged", "rank"):
        assert AutoTokenizer.from_pretrained(tmp_path / written).chat_template == "mine"
    assert (tmp_path / "rank" / "value_head.safetensors").is_file()
    with pytest.raises(MatryoshkaError, match="is or holds the source"):
        export(tmp_path / "lora", tmp_path / "base", 3, "merged", force=True)
    text = (tmp_path / "merged" / "config.json").read_text()
    assert json.loads(text)["rope_theta"] == 1e4  # mlx-lm and others look for it there
    assert str(tmp_path) not in text


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_merged_model_is_quantized_no_more(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted = plain_adapter(tmp_path / "lora", model)
    export(tmp_path / "lora", tmp_path / "merged", R, "merged", model=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert distance(logits(merged), logits(adapted)) < 0.1


def test_a_gguf_file_holds_the_rank(lora: Path, base: Path, tmp_path: Path) -> None:
    """By the formula of llama.cpp: alpha over the tensor's rank. `tests/readers` has llama.cpp."""
    gguf = pytest.importorskip("gguf")
    export(lora, tmp_path / "x.gguf", keep="60%", model=str(base))
    export(lora, tmp_path / "peft", keep="60%")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, update in updates(tmp_path / "peft").items():
        block, last = name.split(".")[2], name.split(".")[-2]
        words = {**{f"{x}_proj": f"attn_{x}" for x in "qkv"}, "o_proj": "attn_output"}
        words |= {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
        A, B = (found[f"blk.{block}.{words[last]}.weight.lora_{x}"] for x in "ab")
        made = B @ A * alpha / len(A)
        if last in ("q_proj", "k_proj"):  # two halves of a head alternate in llama.cpp
            half = 64 // 4 // 2
            made = made.reshape(-1, half, 2, 64).swapaxes(1, 2).reshape(made.shape)
        np.testing.assert_allclose(made, update, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "target", "reader"), [("gguf", "x.gguf", "llama.cpp"), ("mlx", "x", "mlx-lm")]
)
def test_what_another_format_cannot_hold_is_refused(
    tmp_path: Path, base: Path, format: Any, target: str, reader: str
) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(MatryoshkaError, match=f"lm_head.*{reader} cannot read.*merged"):
        export(tmp_path / "lora", tmp_path / target, 2, format, model=str(base))
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "short").mkdir()
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    with pytest.raises(MatryoshkaError, match=f"layers.1.*{reader} cannot read with this base"):
        export(tmp_path / "plain", tmp_path / target, 2, format, model=str(tmp_path / "short"))
    with pytest.raises(MatryoshkaError, match=f"models of type 'bloom', which {reader}"):
        export(tmp_path / "plain", tmp_path / target, 2, format, model=str(tmp_path))


@pytest.mark.slow
def test_an_adapter_is_reordered_by_training_data(tmp_path: Path) -> None:
    """Any adapter that knows its rows, here with ranks by layer: the file names its order."""
    save_tiny_chat(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}
    lora = plain_adapter(tmp_path / "lora", model, r=4, **options)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(64)]
    data = read_data(lora, rows, tiny_tokenizer())
    adam = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=2e-2)
    for batch in data.batches(range(64)) * 8:
        adam.zero_grad()
        data.loss(batch).backward()
        adam.step()
    lora.save_pretrained(tmp_path / "lora")
    base: dict[str, Any] = {"model": str(tmp_path / "base"), "dtype": torch.float32}
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    with pytest.raises(MatryoshkaError, match="is or holds the source"):
        reorder(tmp_path / "lora", tmp_path / "base", "trained", rows, **base, force=True)
    reorder(tmp_path / "lora", tmp_path / "nested", "trained", rows, rows=160, **base)
    opened = open_adapter(tmp_path / "nested")
    assert (opened.order, opened.max_rank) == ("trained", 4)
    assert (tmp_path / "nested" / "tokenizer_config.json").is_file()

    def loss(folder: str) -> float:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(model, tmp_path / folder)
        data = read_data(model, rows, tiny_tokenizer())
        with torch.no_grad():
            return float(data.loss(data.batches(range(64))[0]))

    assert loss("nested") == pytest.approx(loss("lora"), abs=0.05)  # before training it is 4.6
    with pytest.raises(MatryoshkaError, match="order is 'trained'"):
        export(tmp_path / "nested", tmp_path / "x", keep="90%")


# Many adapters at once.


def test_every_adapter_of_a_folder_is_exported(tmp_path: Path, base: Path) -> None:
    """One keeps its smaller rank, a file stays a file, and what cannot be cut stops nothing."""
    folder = tmp_path / "loras"
    for name, rank in (("large", 8), ("small", 2), ("dora", 8)):
        plain_adapter(folder / name, r=rank, use_dora=name == "dora")
    state = {"a.lora_down.weight": torch.randn(4, 6), "a.lora_up.weight": torch.randn(5, 4)}
    save_file(state, folder / "single.SAFETENSORS")
    (folder / "notes.txt").write_text("not an adapter")
    plain_adapter(folder / "inside" / "another")
    with pytest.raises(MatryoshkaError, match=r"is a folder of adapters, and .*x\.gguf is none"):
        export_all(folder, tmp_path / "x.gguf", rank=3)
    lines = export_all(folder, tmp_path / "cut", rank=3)
    assert {x.name: open_adapter(x).max_rank for x in (tmp_path / "cut").iterdir()} == {
        **{"large": 3, "small": 2},
        "single.SAFETENSORS": 3,
    }
    assert [line.split(":")[0] for line in lines] == [
        *("large", "single.SAFETENSORS", "small"),
        *("not inside", "not dora"),
    ]
    wanted = export(folder / "large", tmp_path / "one", rank=3)
    assert by_peft(tmp_path / "cut/large").equal(by_peft(tmp_path / "one"))
    assert f"error {100 * wanted.error:.1f} %" in lines[0]
    ladders = export_all(folder, tmp_path / "ladders", rank=[1, 2], format="ladder")
    assert {x.name for x in (tmp_path / "ladders/large").iterdir()} == {"large@1", "large@2"}
    assert "error" not in ladders[0]
    export_all(folder, tmp_path / "ggufs", rank=3, format="gguf", model=str(base))
    assert {x.name for x in (tmp_path / "ggufs").iterdir()} == {"large.gguf", "small.gguf"}
    state = {"a.lora_A.weight": torch.randn(4, 6), "a.lora_B.weight": torch.randn(5, 4)}
    save_file(state, folder / "other.safetensors")
    export_all(folder, tmp_path / "folders", style="peft")
    assert open_adapter(tmp_path / "folders/other").max_rank == 4
    (folder / "other.safetensors").unlink()
    shutil.rmtree(folder / "large")
    for name in ("small", "single.SAFETENSORS"):
        (folder / name).rename(tmp_path / name)
    with pytest.raises(MatryoshkaError, match=r"of 1 adapters could be exported: .*; not dora"):
        export_all(folder, tmp_path / "none", rank=3)
    assert not (tmp_path / "none").exists()


OTHER_TYPES: dict[str, dict[str, Any]] = {
    **{key: {"r": 4} for key in ("LoHa", "LoKr", "Miss", "Vera", "Gralora")},
    **{"FourierFT": {"n_frequency": 40}, "C3A": {"block_size": 8}, "RandLora": {"r": 4}},
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_what_peft_turns_into_lora_can_be_reordered(tmp_path: Path, kind: str) -> None:
    """And `reorder` names that way."""
    config = getattr(peft, f"{kind}Config", None)
    if config is None or not hasattr(peft, "save_as_lora"):
        pytest.skip(f"this PEFT has no {kind}, or no save_as_lora")
    model = peft.get_peft_model(
        tiny_llama(), config(target_modules=["q_proj", "o_proj"], **OTHER_TYPES[kind])
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "given")
    with pytest.raises(MatryoshkaError, match="PEFT's save_as_lora makes LoRA of many"):
        reorder(tmp_path / "given", tmp_path / "nested")
    peft.save_as_lora(tmp_path / "lora", model, rank=8)
    reorder(tmp_path / "lora", tmp_path / "nested")
    assert distance(by_peft(tmp_path / "nested"), by_peft(tmp_path / "lora")) < 1e-4
    export(tmp_path / "nested", tmp_path / "small", rank=2)
    by_peft(tmp_path / "small")
