"""An adapter folded into the weights for a while draws what it draws attached, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlora.adapters.attach import adapters_disabled, attach, create_adapter, set_strengths
from sdlora.adapters.canonical import AdapterWeights
from sdlora.adapters.folded import folded
from sdlora.config.adapter import AdapterConfig
from sdlora.families.base import DiffusionModel, SizeHint
from sdlora.families.loading import load_model


@pytest.fixture
def model(tiny_base: Path) -> DiffusionModel:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


def moved(model: DiffusionModel, kind: str) -> AdapterWeights:
    """Return an adapter that changes something: its factors are random."""
    config = AdapterConfig.model_validate({"kind": kind, "rank": 4, "alpha": 4.0, "targets": "all"})
    start = create_adapter(model, config, 0)
    generator = torch.Generator().manual_seed(1)
    return AdapterWeights(
        {
            key: update.with_tensors(
                {
                    name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
                    for name, tensor in update.tensors().items()
                }
            )
            for key, update in start.updates.items()
        }
    )


@torch.no_grad()
def output(model: DiffusionModel) -> torch.Tensor:
    model.prepare(training=False)
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    size = SizeHint((32, 32), (0, 0), (32, 32))
    text = model.encode_text(["a cat", "a dog"])
    return model.predict(noisy, torch.tensor([100, 700]), text, [size, size])


@pytest.mark.parametrize("kind", ["lora", "loha", "dora"])
def test_folded_draws_as_attached_and_puts_every_weight_back(model: DiffusionModel, kind: str) -> None:
    if kind == "dora":
        config = AdapterConfig.model_validate(
            {"kind": "lora", "dora": True} if "dora" in AdapterConfig.model_fields else {"kind": "dora"}
        )
        kind = config.kind
    before = {name: value.clone() for name, value in model.components()["unet"].state_dict().items()}
    base, weights = output(model), moved(model, kind)
    with folded(model, weights, 0.7):
        drawn = output(model)
    after = model.components()["unet"].state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(output(model), base)
    attach(model, weights, "x")
    set_strengths(model, {"x": 0.7})
    torch.testing.assert_close(drawn, output(model), rtol=1e-3, atol=1e-4)
    assert float((drawn - base).abs().max()) > 0.01


def test_what_is_attached_does_not_act_and_acts_again(model: DiffusionModel) -> None:
    attach(model, moved(model, "lora"), "other")
    set_strengths(model, {"other": 1.0})
    acting = output(model)
    with adapters_disabled(model):
        base = output(model)
    with folded(model, moved(model, "lora"), 0.0):
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), acting) and not torch.equal(acting, base)


def test_an_error_within_puts_the_weights_back_too(model: DiffusionModel) -> None:
    base = output(model)
    with pytest.raises(RuntimeError, match="drawing"), folded(model, moved(model, "lora"), 1.0):
        raise RuntimeError("drawing")
    assert torch.equal(output(model), base)
