"""Plain LoRA computed directly and jointly agrees with PEFT's layers in all gradients, but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora.adapters.attach import adapters_disabled, create_adapter
from sdlora.adapters.direct_adapter import DirectAdapter
from sdlora.adapters.trainable_layers import TrainedLayer, attach_for_training
from sdlora.config.schema import AdapterConfig
from sdlora.families.base import DiffusionModel, SizeHint
from sdlora.families.lean import join_times, make_lean, undo_lean, use_kernels
from sdlora.families.loading import load_model

CPU = torch.device("cpu")
Backward = Callable[[], tuple[Tensor, list[Tensor]]]


class Learning:
    """An adapter with B that are not zero, in a base of narrow sizes computed in fp64."""

    def __init__(self, base: Path, dtype: torch.dtype = torch.float64, **settings: Any) -> None:
        model = load_model(str(base), dtype=torch.float32, device=CPU)
        for name in model.info.components:
            model.components()[name].to(dtype)
        model.facts = replace(model.facts, dtype=dtype)
        config = AdapterConfig(
            **{"rank": 3, "alpha": 2.0, "text_encoder_rank": 3, "text_encoder_alpha": 2.0} | settings
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.layers: list[TrainedLayer] = attach_for_training(
                model, create_adapter(model, config, 0), "run"
            )
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
                parameter.requires_grad_(True)
                parameter.grad = torch.zeros_like(parameter)
        model.prepare(training=True)
        self.model: DiffusionModel = model
        self.noisy = torch.randn(2, 4, 8, 8, generator=generator)
        self.learns_text, self.count = config.text_encoder, 2

    def parameters(self) -> list[Any]:
        return [parameter for layer in self.layers for parameter in layer.parameters.values()]

    def backward(self, after: Callable[[], None] = lambda: None) -> tuple[Tensor, list[Tensor]]:
        """Return the prediction and all gradients of one backward pass."""
        for parameter in self.parameters():
            parameter.grad.zero_()
        with torch.set_grad_enabled(self.learns_text):
            text = self.model.encode_text(["a cat", "a dog"][: self.count])
        sizes = [SizeHint((32, 32), (0, 0), (32, 32))] * self.count
        outputs: list[Tensor] = []  # the denoiser's own, as predict hands out fp32
        unet = self.model.components()["unet"]
        hook = unet.register_forward_hook(lambda _, __, given: outputs.append(given[0]))
        times = torch.tensor([3, 900])[: self.count]
        self.model.predict(self.noisy[: self.count], times, text, sizes)
        hook.remove()
        (output,) = outputs
        output.square().sum().backward()  # type: ignore[no-untyped-call]
        after()
        return output.detach(), [parameter.grad.clone() for parameter in self.parameters()]

    @contextmanager
    def directly(self, *, joint: bool, parts: int = 1, kernels: bool = False) -> Iterator[DirectAdapter]:
        unet = self.model.components()["unet"]
        adapter = DirectAdapter(self.model, self.layers)
        attentions = make_lean(unet) if joint else []
        if joint:
            join_times(unet)
        if kernels:
            use_kernels(unet)
        adapter.put_in_place(attentions, parts=parts, kernels=kernels)
        yield adapter
        adapter.take_out()
        undo_lean(unet)
        assert not any("forward" in module.__dict__ for module in unet.modules())


def farthest(wanted: list[Tensor], given: list[Tensor]) -> float:
    """Return the largest distance of two gradients as a share of their length."""
    assert len(wanted) == len(given) > 10 and all(gradient.norm() > 0 for gradient in wanted)
    return max(float((a - b).norm() / a.norm()) for a, b in zip(wanted, given, strict=True))


def usual(wanted: list[Tensor], given: list[Tensor]) -> float:
    """Return the mean distance of two gradients as a share of their length."""
    shares = [float((a - b).norm() / a.norm()) for a, b in zip(wanted, given, strict=True)]
    return sum(shares) / len(shares)


CASES: dict[str, dict[str, Any]] = {
    "attention": {},
    "all": {"targets": "all", "rank": 4, "alpha": 4.0},
    "ranks": {"block_ranks": {"mid_block": 5, "*.*.attentions.*.transformer_blocks.*.attn1.to_q": 2}},
    "text encoder": {"text_encoder": True, "targets": "linear"},
    "side by side": {"rank": 8, "targets": "linear"},
}


@pytest.mark.long
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_all_gradients_are_pefts_in_fp64(case: str, joint: bool, narrow_sdxl: Path, tiny_base: Path) -> None:
    learning = Learning(narrow_sdxl if (case, joint) == ("attention", True) else tiny_base, **CASES[case])
    wanted, gradients = learning.backward()
    with learning.directly(joint=joint) as adapter:
        given, directs = learning.backward(adapter.gather)
        again, once_more = learning.backward(adapter.gather)
    assert torch.allclose(given, wanted, rtol=1e-12, atol=1e-12) and torch.equal(again, given)
    assert farthest(gradients, directs) < 1e-11
    assert all(torch.equal(a, b) for a, b in zip(directs, once_more, strict=True)), (
        "gradients were left behind"
    )
    back, as_before = learning.backward()
    assert torch.equal(back, wanted), "the forward passes are not PEFT's again"
    assert all(torch.equal(a, b) for a, b in zip(gradients, as_before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_costs_no_more_than_with_pefts_layers(dtype: torch.dtype, tiny_base: Path) -> None:
    learning = Learning(tiny_base, dtype, targets="linear")
    _, reference = learning.backward()
    with learning.directly(joint=True) as adapter:
        _, directs = learning.backward(adapter.gather)
    learning.model.components()["unet"].double()  # the same values, without rounding
    learning.model.facts = replace(learning.model.facts, dtype=torch.float64)
    _, exact = learning.backward()
    # of all gradients together; a single one may be off by more by chance, here and there
    assert 0 < usual(exact, directs) < 1.3 * usual(exact, reference)
    assert farthest(exact, directs) < 2.5 * farthest(exact, reference)


def test_with_checkpointing_and_gathered_from_two_parts(tiny_base: Path) -> None:
    learning = Learning(tiny_base)
    _, gradients = learning.backward()
    with learning.directly(joint=True, parts=2) as adapter:
        learning.model.prepare(training=True, gradient_checkpointing=True)
        _, checkpointed = learning.backward(adapter.gather)
        with adapter.anchors.computing(1):
            _, second = learning.backward(adapter.gather)
    for directs in (checkpointed, second):
        assert farthest(gradients, directs) < 1e-11


def test_a_single_image_is_computed_the_same(tiny_base: Path) -> None:
    learning = Learning(tiny_base)
    learning.count = 1
    wanted, gradients = learning.backward()
    with learning.directly(joint=True) as adapter:
        given, directs = learning.backward(adapter.gather)
    assert len(given) == 1 and torch.allclose(given, wanted, rtol=1e-12, atol=1e-12)
    assert farthest(gradients, directs) < 1e-11


def test_the_weights_of_the_base_stay_what_they_are(tiny_base: Path) -> None:
    learning = Learning(tiny_base)
    unet = learning.model.components()["unet"]
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    with learning.directly(joint=True) as adapter:
        learning.backward(adapter.gather)
    assert len(before) > 100 and before.keys() == dict(unet.named_parameters()).keys()
    assert all(torch.equal(before[name], parameter) for name, parameter in unet.named_parameters())
    with learning.directly(joint=True):
        assert all(torch.equal(before[name], parameter) for name, parameter in unet.named_parameters())


def test_disabled_adapters_leave_the_base_bit_for_bit(tiny_base: Path) -> None:
    learning = Learning(tiny_base, torch.float32)
    base = load_model(str(tiny_base), dtype=torch.float32, device=CPU)
    base.prepare(training=True)

    def predicted(model: DiffusionModel) -> Tensor:
        with torch.no_grad():
            text = model.encode_text(["a cat", "a dog"])
            sizes = [SizeHint((32, 32), (0, 0), (32, 32))] * 2
            return model.predict(learning.noisy, torch.tensor([3, 900]), text, sizes)

    wanted = predicted(base)
    with learning.directly(joint=True):
        assert not torch.equal(predicted(learning.model), wanted)
        with adapters_disabled(learning.model):
            assert torch.equal(predicted(learning.model), wanted)


def test_new_values_are_computed_with_once_they_are_renewed(tiny_base: Path) -> None:
    learning = Learning(tiny_base)
    with learning.directly(joint=True) as adapter:
        learning.backward(adapter.gather)
        with torch.no_grad():
            for parameter in learning.parameters():
                parameter.mul_(1.5)
        adapter.renew()
        given, directs = learning.backward(adapter.gather)
    wanted, gradients = learning.backward()
    assert torch.allclose(given, wanted, rtol=1e-12, atol=1e-12) and farthest(gradients, directs) < 1e-11


def test_a_wrong_factor_is_seen_by_these_tests(tiny_base: Path) -> None:
    learning = Learning(tiny_base)
    _, gradients = learning.backward()
    with learning.directly(joint=False) as adapter:
        for layer in adapter.layers:
            assert layer.factors is not None
            layer.factors = replace(layer.factors, down=layer.factors.down * 1.01)
        _, directs = learning.backward(adapter.gather)
    assert farthest(gradients, directs) > 1e-3


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.count += name.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def test_sums_with_room_save_a_product_for_each_layer_that_follows_one(tiny_base: Path) -> None:
    counts = {}
    for rank in (3, 8):  # of 3, rows would begin where fused attention cannot read, so nothing is widened
        learning = Learning(tiny_base, rank=rank, targets="linear")
        with learning.directly(joint=True) as adapter, Products() as products:  # type: ignore[no-untyped-call]
            learning.backward(adapter.gather)
        counts[rank] = products.count
    blocks = [
        m for m in learning.model.components()["unet"].modules() if isinstance(m, BasicTransformerBlock)
    ]
    # q, k, v: one product less forward and one backward; the text's q: one; both outputs: one each
    assert counts[3] - counts[8] == 5 * len(blocks) > 4
