"""Weights that come to the device only for their use: same numbers, bounded memory, counted copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdlora.families.offload import (
    OffloadedBlocks,
    blocks_to_offload,
    is_offloaded,
    move,
    offloadable_blocks,
    offloaded_bytes,
)

CPU = torch.device("cpu")


class Block(nn.Module):
    """Layers that a denoiser has, and a factor that learns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.outer = nn.Linear(6, width), nn.Linear(width, 6, bias=False)
        self.requires_grad_(False)
        self.learns = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(torch.nn.functional.silu(self.norm(x)))
        return x + self.outer(self.inner(x @ self.learns))


class Net(nn.Module):
    """Blocks in a row; ``again`` computes each again in the backward pass."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(Block(width) for width in (12, 20, 16, 4, 8))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return x


def gradients(net: Net, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(3, 8, 5, 6, requires_grad=True)
    output = net(x)
    net.zero_grad()
    output.square().sum().backward()
    learned = [block.learns.grad for block in net.blocks]
    return [output.detach(), x.grad, *(g.clone() for g in learned)]  # type: ignore[union-attr, list-item]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("moved", [[0, 1, 2, 3, 4], [1, 3, 4], [2]])
def test_the_numbers_are_the_same_bit_for_bit(again: bool, moved: list[int]) -> None:
    net = Net(again)
    expected = [gradients(net, seed) for seed in range(3)]
    offloaded = OffloadedBlocks([net.blocks[index] for index in moved], CPU)
    assert is_offloaded(net)
    for seed in range(3):
        for value, wanted in zip(gradients(net, seed), expected[seed], strict=True):
            assert torch.equal(value, wanted)
    assert offloaded.copied > 0


def test_a_step_copies_each_block_once_a_way() -> None:
    net = Net()
    sizes = [offloaded_bytes(block) for block in net.blocks]
    offloaded = OffloadedBlocks(list(net.blocks), CPU)
    assert offloaded.sizes == sizes and min(sizes) > 0
    gradients(net, 0)
    before = offloaded.copied
    gradients(net, 1)
    # what the two buffers hold at each turn is still there: 4 and 3 on the way back, 0 and 1 on the way on
    assert offloaded.copied - before == 2 * sum(sizes) - sizes[4] - sizes[3] - sizes[0] - sizes[1]


def test_the_next_block_is_there_before_it_is_asked_for() -> None:
    net = Net()
    offloaded = OffloadedBlocks(list(net.blocks), CPU)
    _ = net.blocks[1].inner.weight
    held = set(offloaded.held)
    assert held == {1, 2}
    _ = net.blocks[2].inner.weight
    assert set(offloaded.held) == {2, 3}
    _ = net.blocks[1].outer.weight
    assert set(offloaded.held) == {1, 0}, "on the way back the one before is sent"


def test_what_is_written_to_the_weights_is_seen() -> None:
    """An adapter is folded into the base for a while, to be judged."""
    net, plain = Net(), Net()
    OffloadedBlocks(list(net.blocks), CPU)
    gradients(net, 0)
    for model in (net, plain):
        with torch.no_grad():
            # a base's own weight: not asked for, so that it is the one in main memory
            dict(model.named_parameters())["blocks.0.inner.weight"].add_(0.5)
    for value, wanted in zip(gradients(net, 1), gradients(plain, 1), strict=True):
        assert torch.equal(value, wanted)


def test_only_weights_move_and_what_is_listed_is_in_main_memory() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    OffloadedBlocks(list(net.blocks), CPU)
    assert [name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])] == []
    moved = {
        name for name, tensor in net.named_parameters() if tensor.untyped_storage().nbytes() > tensor.nbytes
    }
    assert moved == {
        f"blocks.{number}.{layer}.weight" for number in range(5) for layer in ("conv", "inner", "outer")
    }


@pytest.fixture(scope="module")
def denoiser() -> Any:
    from tools.narrow_models import fresh

    return fresh("sd1")["unet"]


def test_blocks_are_in_the_order_in_which_they_compute(denoiser: Any) -> None:
    blocks, called = offloadable_blocks(denoiser), []
    assert len(blocks) > 15

    def note(index: int) -> Callable[..., None]:
        return lambda *_: called.append(index)

    handles = [block.register_forward_pre_hook(note(index)) for index, block in enumerate(blocks)]
    text = torch.randn(1, 77, denoiser.config.cross_attention_dim)
    with torch.no_grad():
        denoiser(torch.randn(1, 4, 8, 8), torch.tensor([5]), text)
    for handle in handles:
        handle.remove()
    assert called == list(range(len(blocks)))


def test_the_largest_blocks_are_offloaded(denoiser: Any) -> None:
    blocks = offloadable_blocks(denoiser)
    chosen = blocks_to_offload(denoiser, 4)
    least = min(offloaded_bytes(block) for block in chosen)
    assert len(chosen) == 4
    assert all(offloaded_bytes(block) <= least for block in blocks if block not in chosen)
    assert [blocks.index(block) for block in chosen] == sorted(blocks.index(block) for block in chosen)


def test_what_is_left_in_an_offloaded_layer_moves_with_its_module() -> None:
    """Else a card would be asked to add a bias that lies in main memory."""
    layer = nn.Linear(64, 64).requires_grad_(False)
    block = nn.Sequential(layer)
    OffloadedBlocks([block], torch.device("cpu"))
    weight = dict(layer.named_parameters())["weight"]
    move(block, torch.device("meta"))
    there = dict(layer.named_parameters())
    assert there["bias"].is_meta and not there["bias"].requires_grad
    assert there["weight"] is weight and not weight.is_meta
