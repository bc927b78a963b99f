"""Master weights, the optimizer over them, and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdlora.config.schema import OptimizerConfig
from sdlora.training.masters import MasterWeights, ParameterGroup, clip_
from sdlora.training.optimizers import make_optimizer


def parameters(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator) for shape in ((4, 3), (2, 4, 1, 1), (5,))]
    return [nn.Parameter(value.to(dtype)) for value in values], values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_computes_with_the_rounded_master(dtype: torch.dtype) -> None:
    params, values = parameters(dtype)
    master = MasterWeights(params, values)
    for param, value, kept in zip(params, values, master.tensors(), strict=True):
        assert torch.equal(kept, value)
        assert torch.equal(param.data, value.to(dtype))


def test_steps_equal_plain_adamw_on_separate_fp32_tensors() -> None:
    config = OptimizerConfig(weight_decay=0.1)
    params, values = parameters(torch.float32)
    reference = [nn.Parameter(value.clone()) for value in values]
    plain = torch.optim.AdamW(reference, lr=1e-2, betas=config.betas, weight_decay=0.1, eps=config.epsilon)
    group = ParameterGroup("unet", MasterWeights(params, values), 1e-2)
    ours = make_optimizer(config, [group])
    for step in range(4):
        for parameter, other in zip(params, reference, strict=True):
            gradient = torch.full_like(other, 0.1 * (step + 1)) * other.detach().sign()
            (parameter * gradient).sum().backward()
            other.grad = gradient.clone()
        group.master.collect()
        ours.step()
        group.master.publish()
        plain.step()
    for parameter, other in zip(params, reference, strict=True):
        torch.testing.assert_close(parameter.data, other.data, rtol=1e-6, atol=1e-7)


def test_small_updates_add_up_in_bf16() -> None:
    param = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    group = ParameterGroup("unet", MasterWeights([param], [torch.ones(8)]), 1e-4)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0), [group])
    for _ in range(100):
        param.float().sum().backward()
        group.master.collect()
        optimizer.step()
        group.master.publish()
    # one step of 1e-4 is far below bf16's spacing of 2^-8 at 1, a hundred of them are not
    assert float(group.master.flat.data[0]) == pytest.approx(0.99, abs=1e-4)
    assert float(param.data[0]) == pytest.approx(0.99, abs=2**-8)


def test_gradients_of_micro_batches_are_summed_and_then_cleared() -> None:
    param = nn.Parameter(torch.zeros(3))
    master = MasterWeights([param], [torch.zeros(3)])
    for factor in (1.0, 2.0):
        (param * factor).sum().backward()
        master.collect()
    assert master.flat.grad is not None
    assert master.flat.grad.tolist() == [3.0, 3.0, 3.0]
    master.publish()
    assert master.flat.grad is None, "while activations are kept there is no fp32 gradient"
    (param * 4.0).sum().backward()
    master.collect()
    assert master.flat.grad is not None and master.flat.grad.tolist() == [4.0, 4.0, 4.0]


def test_views_that_an_optimizer_steps_get_their_parts_of_the_gradient() -> None:
    params, values = parameters(torch.bfloat16)
    master = MasterWeights(params, values)
    views = master.optimized(shaped=True)
    for _ in range(2):
        sum((param * (number + 1.0)).sum() for number, param in enumerate(params)).backward()  # type: ignore[union-attr]
        master.collect()
        assert [view.grad.unique().tolist() for view in views if view.grad is not None] == [
            [1.0],
            [2.0],
            [3.0],
        ]
        assert [view.shape for view in views] == [param.shape for param in params]
        master.publish()
        assert [view.grad for view in views] == [None] * 3
    master.freeze()
    master.collect()
    assert [view.grad for view in views] == [None] * 3 and master.flat.grad is None


def test_clipping_shortens_all_groups_together() -> None:
    groups = []
    for value in (3.0, 4.0):
        master = MasterWeights([nn.Parameter(torch.zeros(1))], [torch.zeros(1)])
        master.flat.grad = torch.tensor([value])
        groups.append(ParameterGroup("g", master, 1.0))

    def left(limit: float) -> list[float]:
        assert clip_(groups, limit) == pytest.approx(5.0)
        return [float(group.master.flat.grad[0]) for group in groups if group.master.flat.grad is not None]

    assert left(0.0) == [3.0, 4.0], "0 switches clipping off"
    assert left(10.0) == [3.0, 4.0], "shorter gradients are never lengthened"
    assert left(1.0) == pytest.approx([0.6, 0.8], rel=1e-5)
