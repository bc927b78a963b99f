"""What is made again in the backward pass has the same bits as what is kept, and takes less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdlora.adapters.attach import create_adapter
from sdlora.adapters.direct_adapter import DirectAdapter
from sdlora.adapters.trainable_layers import attach_for_training
from sdlora.config.schema import AdapterConfig
from sdlora.families.base import SizeHint
from sdlora.families.lean import LeanResidual, join_times, make_lean, undo_lean
from sdlora.families.loading import load_model
from sdlora.families.recompute import Rungs, again, keeping
from sdlora.families.rungs import Recompute, blocks_by_saving, can_recompute
from sdlora.training.memory_count import counting_memory

CPU = torch.device("cpu")
ABOVE = [rung for rung in Rungs if rung]


class Learning:
    """A base with an adapter whose B are not zero."""

    def __init__(self, base: Path, dtype: torch.dtype, **settings: Any) -> None:
        self.model = load_model(str(base), dtype=torch.float32, device=CPU)
        for name in self.model.info.components:
            self.model.components()[name].to(dtype)
        self.model.facts = replace(self.model.facts, dtype=dtype)
        config = AdapterConfig(**{"rank": 8, "alpha": 4.0} | settings)
        weights = create_adapter(self.model, config, 0)
        self.layers = attach_for_training(self.model, weights, "run")
        self.parameters = [p for layer in self.layers for p in layer.parameters.values()]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
                parameter.requires_grad_(True)
                parameter.grad = torch.zeros_like(parameter)
        self.model.prepare(training=True)
        self.unet: Any = self.model.components()["unet"]
        self.noisy = torch.randn(2, 4, 8, 8, generator=generator)
        with torch.no_grad():
            self.text = self.model.encode_text(["a cat", "a dog"])

    def backward(self, gather: Callable[[], None] = lambda: None) -> tuple[Tensor, list[Tensor], int]:
        """Return the loss, all gradients, and the bytes that the forward pass keeps."""
        for parameter in self.parameters:
            parameter.grad.zero_()
        sizes = [SizeHint((32, 32), (0, 0), (32, 32))] * 2
        with counting_memory() as memory:
            predicted = self.model.predict(self.noisy, torch.tensor([3, 900]), self.text, sizes)
            loss = predicted.square().mean()
            kept = memory.alive
        loss.backward()  # type: ignore[no-untyped-call]
        gather()
        return loss.detach(), [parameter.grad.clone() for parameter in self.parameters], kept

    @contextmanager
    def lean(self, *, direct: bool) -> Iterator[Callable[[], None]]:
        attentions, adapter = make_lean(self.unet), None
        if direct:
            adapter = DirectAdapter(self.model, self.layers)
            join_times(self.unet)
            adapter.put_in_place(attentions)
        yield adapter.gather if adapter else lambda: None
        if adapter:
            adapter.take_out()
        undo_lean(self.unet)


def same(first: list[Tensor], other: list[Tensor]) -> bool:
    assert len(first) == len(other) > 10 and any(gradient.norm() > 0 for gradient in first)
    return all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


CASES: dict[str, tuple[torch.dtype, bool, dict[str, Any]]] = {
    "fp32, direct": (torch.float32, True, {}),
    "bf16, direct": (torch.bfloat16, True, {}),
    "bf16, direct, all": (torch.bfloat16, True, {"targets": "all", "rank": 4, "alpha": 4.0}),
    "fp32, peft, linear": (torch.float32, False, {"targets": "linear"}),
    "bf16, peft, dora": (torch.bfloat16, False, {"kind": "dora"}),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_what_is_kept_bit_for_bit(case: str, tiny_base: Path) -> None:
    dtype, direct, settings = CASES[case]
    learning = Learning(tiny_base, dtype, **settings)
    with learning.lean(direct=direct) as gather:
        loss, wanted, most = learning.backward(gather)
        sizes = [most]
        for rung in ABOVE:
            assert can_recompute(learning.unet, rung)
            Recompute(rung).put_in_place(learning.unet)
            again_loss, given, kept = learning.backward(gather)
            assert torch.equal(loss, again_loss) and same(wanted, given), rung.name
            sizes.append(kept)
            assert same(wanted, learning.backward(gather)[1]), "what was kept is used up"
    assert sizes == sorted(set(sizes), reverse=True), sizes  # each keeps less than the one before
    assert sizes[-1] < 0.5 * sizes[0]


def test_gradients_are_those_of_diffusers_own_checkpointing(tiny_base: Path) -> None:
    learning = Learning(tiny_base, torch.float32)
    learning.unet.enable_gradient_checkpointing()
    loss, wanted, _ = learning.backward()
    learning.unet.disable_gradient_checkpointing()
    with learning.lean(direct=True) as gather:
        for rung in ABOVE:
            Recompute(rung).put_in_place(learning.unet)
            given_loss, given, _ = learning.backward(gather)
            assert float((given_loss - loss).abs()) < 1e-6 * float(loss)
            for gradient, again_made in zip(wanted, given, strict=True):
                assert float((gradient - again_made).norm()) < 1e-4 * float(gradient.norm()), rung.name


def test_any_amount_between_two_rungs_can_be_kept(tiny_base: Path) -> None:
    learning = Learning(tiny_base, torch.float32)
    with learning.lean(direct=True) as gather:
        sizes, gradients = [], []
        for rung in ABOVE:
            blocks = blocks_by_saving(learning.unet, rung, 64)
            assert len(set(map(id, blocks))) == len(blocks) > 3
            for count in (0, 1, len(blocks) // 2, len(blocks)):
                Recompute(rung, count, 64).put_in_place(learning.unet)
                _, given, kept = learning.backward(gather)
                sizes.append(kept)
                gradients.append(given)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 12, sizes
    assert all(same(gradients[0], given) for given in gradients[1:])


def test_work_is_spared_where_it_saves_least() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(
            block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
        )
    make_lean(unet)
    channels = [
        block.module.norm1.normalized_shape[0] for block in blocks_by_saving(unet, Rungs.projections, 64 * 64)
    ]
    assert channels == sorted(channels) and set(channels) == {64, 128}
    # 32 x 32 positions looked at cost more than a convolution of 64 channels, less than one of 128
    first = blocks_by_saving(unet, Rungs.blocks, 32 * 32)
    kinds = [
        "residual" if isinstance(block, LeanResidual) else block.module.attn1.inner_dim for block in first
    ]
    assert kinds[:4].count(128) == 4, kinds  # their images have a quarter of the positions
    assert kinds.index("residual") < kinds.index(64)


def test_a_model_that_draws_or_has_other_blocks_is_left_to_diffusers() -> None:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    plain = BasicTransformerBlock(8, 2, 4, cross_attention_dim=8, activation_fn="geglu")
    assert can_recompute(nn.ModuleList([plain]), Rungs.blocks)
    other = ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, up=True)
    assert not can_recompute(nn.ModuleList([plain, other]), Rungs.norms)
    dropping = BasicTransformerBlock(8, 2, 4, cross_attention_dim=8, dropout=0.1, activation_fn="geglu")
    assert not can_recompute(nn.ModuleList([dropping]), Rungs.projections)
    assert not can_recompute(nn.Linear(2, 2), Rungs.norms)


def test_a_tensor_is_made_once_for_all_that_wait_for_it_and_then_let_go() -> None:
    calls: list[int] = []
    x = torch.randn(4, requires_grad=True)

    def doubled(value: Tensor) -> Tensor:
        calls.append(1)
        return value * 2

    with keeping(Rungs.norms):
        double = again(Rungs.norms, x * 2, doubled, x)
        later = again(Rungs.gates, double.exp(), torch.exp, double)  # a rung that is not reached: kept
        result = (double.sin() + double.cos() + later.sin()).sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(result, x, retain_graph=True)
    wanted = 2 * (torch.cos(2 * x) - torch.sin(2 * x) + torch.cos(torch.exp(2 * x)) * torch.exp(2 * x))
    assert torch.allclose(gradient, wanted)
    assert len(calls) == 2  # once in each backward pass, for both of its uses


def test_what_lies_in_memory_that_was_given_back_is_not_mistaken() -> None:
    """Names hold what they name: a later tensor in the same place would be taken for it."""
    x = torch.randn(1000, requires_grad=True)
    with keeping(Rungs.norms):
        for number in range(20):
            first = again(Rungs.norms, x * 2, lambda value: value * 2, x)
            del first
            y = (x * number).sin()
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert torch.allclose(gradient, number * torch.cos(x * number))
