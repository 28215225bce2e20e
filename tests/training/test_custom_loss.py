"""Losses of the user, and adapters without PEFT's wrapper: a small U-Net and a transformer."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.examples import collate, lookup_examples, make_trainer
from helpers.models import lora_config, nested_llama, randomize, tiny_llama
from helpers.plain_peft import distance
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import default_collate

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError, load, nest

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from helpers.diffusers_models import small_flux, small_unet  # noqa: E402

R = 8
NUM_PICTURES = 4
Example = dict[str, Any]


def noisy_pictures(count: int, first_seed: int) -> list[Example]:
    """Noisy pictures at random times. An example holds its noise."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(NUM_PICTURES, 4, 8, 8, generator=generator)
    prompts = torch.randn(NUM_PICTURES, 5, 12, generator=generator)
    examples: list[Example] = []
    for number in range(count):
        generator = torch.Generator().manual_seed(first_seed + number)
        noise = torch.randn(4, 8, 8, generator=generator)
        time = int(torch.randint(1000, (1,), generator=generator))
        share = 1 - time / 1000
        noisy = share**0.5 * pictures[number % NUM_PICTURES] + (1 - share) ** 0.5 * noise
        prompt = prompts[number % NUM_PICTURES]
        examples.append({"noisy": noisy, "time": time, "prompt": prompt, "noise": noise})
    return examples


TRAINING = noisy_pictures(200, 0)
VALIDATION = noisy_pictures(48, 10**6)


def denoising_loss(model: Any, batch: Example) -> Tensor:
    return mse_loss(model(batch["noisy"], batch["time"], batch["prompt"]).sample, batch["noise"])


def new_unet() -> Any:
    torch.manual_seed(0)
    model = small_unet().requires_grad_(False).eval()
    model.add_adapter(LoraConfig(r=R, lora_alpha=R, target_modules=["to_q", "to_v", "conv1"]))
    return model


@cache
def trained_factors() -> dict[str, tuple[Tensor, Tensor]]:
    model = new_unet()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for step in range(80):
        batch = default_collate([TRAINING[(16 * step + i) % len(TRAINING)] for i in range(16)])
        optimizer.zero_grad()
        denoising_loss(model, batch).backward()
        optimizer.step()
    return nest(model).factors.copy()


def trained_unet() -> NestedAdapter:
    adapter = nest(new_unet())
    adapter.factors.write(trained_factors())
    return adapter


def loss_at(adapter: NestedAdapter, rank: int) -> float:
    adapter.set_rank(rank)
    with torch.no_grad():
        return float(denoising_loss(adapter.model, default_collate(VALIDATION)))


def train_ranks(adapter: NestedAdapter, factor: float = 1.0) -> ml.TrainRanksResult:
    return adapter.train_ranks(
        TRAINING,
        loss=lambda model, batch: factor * denoising_loss(model, batch),
        eval_data=VALIDATION,
        max_examples=400,
    )


def test_the_low_ranks_of_an_image_model_are_trained_with_its_loss(tmp_path: Path) -> None:
    adapter = trained_unet()
    adapter.reorder()
    factors = adapter.factors.copy()
    before = {rank: loss_at(adapter, rank) for rank in (1, 2, R)}
    result = train_ranks(adapter)
    assert result.outcome == "kept"
    assert loss_at(adapter, 1) < before[1] - 0.2 * (before[1] - before[R])
    assert loss_at(adapter, 1) == pytest.approx(result.losses_after[1], rel=1e-4)
    assert loss_at(adapter, R) == before[R]
    for name, pair in adapter.factors.copy().items():
        assert all(map(torch.equal, pair, factors[name]))

    adapter.save(tmp_path / "nested")
    assert ml.open(tmp_path / "nested").small_rank == result.small_rank
    loaded = load(copy.deepcopy(base_unet(adapter)), tmp_path / "nested", rank=1)
    assert loss_at(loaded, 1) == pytest.approx(loss_at(adapter, 1), rel=1e-5)


def base_unet(adapter: NestedAdapter) -> Any:
    """Return the model without adapters."""
    model = small_unet()
    model.load_state_dict(
        {
            key.replace(".base_layer", ""): tensor
            for key, tensor in adapter.model.state_dict().items()
            if "lora_" not in key
        }
    )
    return model.eval()


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_multiple_of_the_loss_has_the_same_result(factor: float) -> None:
    expected, actual = trained_unet(), trained_unet()
    result, multiple = train_ranks(expected), train_ranks(actual, factor)
    assert (multiple.outcome, multiple.small_rank) == (result.outcome, result.small_rank)
    assert multiple.examples_by_rank == result.examples_by_rank
    for rank, loss in result.losses_after.items():
        assert multiple.losses_after[rank] == pytest.approx(factor * loss, rel=1e-3)


def test_examples_weight_the_order_by_the_loss() -> None:
    """A prefix then changes the outputs less, where the update is small."""
    adapter = trained_unet()
    factors = {name: (A, 0.2 * B) for name, (A, B) in adapter.factors.copy().items()}
    adapter.factors.write(factors)
    adapter.reorder()
    before = [change_of_outputs(adapter, rank) for rank in (2, 4)]
    result = adapter.reorder(TRAINING, loss=denoising_loss, max_examples=64)
    assert (adapter.order, len(result.weighted_errors)) == ("weighted", 4)
    after = [change_of_outputs(adapter, rank) for rank in (2, 4)]
    assert all(new < old for new, old in zip(after, before, strict=True))


def change_of_outputs(adapter: NestedAdapter, rank: int) -> float:
    """Return the squared difference of the outputs of a rank and of R."""
    batch = default_collate(VALIDATION)
    outputs: list[Tensor] = []
    for each in (R, rank):
        adapter.set_rank(each)
        with torch.no_grad():
            outputs.append(adapter.model(batch["noisy"], batch["time"], batch["prompt"]).sample)
    return float(mse_loss(*outputs))


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_a_rank_is_one_file_for_the_pipeline(tmp_path: Path, kind: str) -> None:
    """diffusers computes the same with the file as the adapter at this rank."""
    torch.manual_seed(1)
    base = small_unet() if kind == "unet" else small_flux()
    inputs: dict[str, Any] = {"sample": torch.randn(2, 4, 8, 8), "timestep": 3}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 12)
    if kind == "flux":
        inputs = {
            "hidden_states": torch.randn(2, 6, 4),
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "pooled_projections": torch.randn(2, 12),
            "timestep": torch.tensor([0.3, 0.3]),
            "img_ids": torch.zeros(6, 3),
            "txt_ids": torch.zeros(5, 3),
        }
    plain = copy.deepcopy(base).eval()
    base.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0"]))
    adapter = nest(base.eval())
    randomize(base)
    adapter.reorder()
    adapter.export(tmp_path / "rank-2.safetensors", 2)
    adapter.set_rank(2)
    mixin: Any = diffusers.loaders.StableDiffusionLoraLoaderMixin
    part = "unet"
    if kind == "flux":
        mixin, part = diffusers.loaders.FluxLoraLoaderMixin, "transformer"
    pipeline = type("Pipeline", (mixin,), {"components": {}, "hf_device_map": None})()
    setattr(pipeline, part, plain)
    pipeline.text_encoder = None
    file = tmp_path / "rank-2.safetensors"
    with pytest.raises(MatryoshkaError, match=r"load_lora_weights.*nest"):
        load(plain, file)
    pipeline.load_lora_weights(str(file), adapter_name="default")
    with torch.no_grad():
        expected, actual = (model(**inputs).sample for model in (base, plain))
        adapter.set_rank(0)
        without = base(**inputs).sample
        adapter.set_rank(1)
        nested = nest(plain)
        nested.reorder()
        nested.set_rank(1)
        expected_rank_1, rank_1 = (model(**inputs).sample for model in (base, plain))
    assert distance(actual, expected) < 1e-5
    assert distance(rank_1, expected_rank_1) < 1e-5
    assert distance(without, expected) > 1e-3
    assert distance(rank_1, expected) > 1e-3


@pytest.mark.parametrize("route", ["inject_adapter_in_model", "PeftModel"])
def test_an_adapter_without_a_wrapper_is_an_ordinary_adapter(tmp_path: Path, route: str) -> None:
    nesting = Nesting((1, 2, 4), "none", 1.0)
    config = lora_config(nesting, target_modules=["q_proj", "down_proj"])
    model: Any = tiny_llama()
    if route == "PeftModel":
        model = get_peft_model(model, config)
    else:
        inject_adapter_in_model(config, model)
    adapter = nest(model.eval())
    randomize(model)
    adapter.reorder()
    batch = collate(lookup_examples(4))
    adapter.save(tmp_path / "nested")
    adapter.export(tmp_path / "rank-2", 2)
    for rank, folder in ((2, "rank-2"), (4, "nested")):
        adapter.set_rank(rank)
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        with torch.no_grad():
            assert distance(model(**batch).logits, plain(**batch).logits) < 1e-5
    with adapter.rows([1, 2, 4, 0]), torch.no_grad():
        rows = model(**batch).logits
    adapter.set_rank(1)
    with torch.no_grad():
        torch.testing.assert_close(rows[0], model(**batch).logits[0])
    assert adapter.train_ranks(lookup_examples(64), max_examples=64).losses_before.keys() == {
        1,
        2,
        4,
    }


def test_batches_may_have_any_form() -> None:
    """A loader gives the collator and the size of the batches. Dropout is no noise."""
    config = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.5)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    adapter = nest(get_peft_model(network, config))
    randomize(adapter.model)
    adapter.model.train()
    examples = [(torch.randn(4), torch.randn(4)) for _ in range(16)]
    sizes: list[int] = []

    def collate_pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        sizes.append(len(pairs))
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    loader: Any = torch.utils.data.DataLoader(examples, 3, collate_fn=collate_pairs)  # type: ignore[arg-type]
    adapter.train_ranks(loader, loss=loss, eval_data=examples, max_examples=32)
    assert max(sizes) == 3
    assert adapter.model.training


def test_a_loss_that_ignores_the_model_is_named() -> None:
    adapter, other = trained_unet(), new_unet()
    with pytest.warns(UserWarning, match="ignores"):
        result = adapter.train_ranks(
            TRAINING, loss=lambda model, batch: denoising_loss(other, batch), max_examples=16
        )
    assert result.outcome == "nothing to train"


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(NotFiniteError):
        trained_unet().train_ranks(
            TRAINING, loss=lambda model, batch: math.nan * denoising_loss(model, batch)
        )


def random_loss(model: Any, batch: Example) -> Tensor:
    return denoising_loss(model, {**batch, "noise": torch.randn_like(batch["noise"])})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": random_loss}, "same noise"),
        ({"collate": default_collate}, "loss"),
    ],
)
def test_losses_that_cannot_be_used_are_errors(options: dict[str, Any], match: str) -> None:
    adapter = trained_unet()
    with pytest.raises(MatryoshkaError, match=match):
        adapter.train_ranks(TRAINING, **options)
    assert adapter.order is None


def test_examples_that_cannot_be_used_are_an_error() -> None:
    with pytest.raises(MatryoshkaError, match="`eval_data` has no examples"):
        trained_unet().train_ranks(TRAINING, loss=denoising_loss, eval_data=[])


def test_a_trainer_has_its_own_loss(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting((1, 2)), "lora", layers=1)
    trainer = make_trainer(adapter.model, tmp_path, lookup_examples(8))
    with pytest.raises(MatryoshkaError, match="Trainer"):
        adapter.train_ranks(trainer, loss=denoising_loss)


def test_an_image_model_needs_a_loss() -> None:
    with pytest.raises(MatryoshkaError, match="loss"):
        trained_unet().train_ranks([{"input_ids": [1, 2], "labels": [1, 2]}])


def test_the_losses_of_the_user_may_be_zero() -> None:
    """There is no gain, so there is nothing to train."""
    adapter = trained_unet()
    result = adapter.train_ranks(
        TRAINING, loss=lambda model, batch: 0 * denoising_loss(model, batch)
    )
    assert result.outcome == "nothing to train"
    assert not any(map(math.isnan, result.losses_before.values()))
