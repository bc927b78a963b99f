"""Frozen weights of a denoiser's blocks that lie in main memory and come to the device just before their use.

The weights of a block's linear layers and convolutions (whole or quantised ones; norms, biases and adapters
stay where they are) lie in one page-locked piece of main memory, and the device has two buffers of the size
of the largest block. Whoever asks a layer for its weight gets the one in a buffer: the block is copied there
first, if it is not there, and the block that comes next in the same direction is sent after it on a stream of
its own. So forward passes, backward passes and what is computed again need not say that they begin.

Autograd must not keep what lies in a buffer, as it is overwritten before the backward pass: an offloaded
layer keeps nothing but itself, and asks for its weight again. It computes with the same kernels, so the
numbers are the same, bit for bit (``tests/families/test_offload.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .frozen_layers import FrozenConvolution, FrozenLinear

_ALIGNED = 256  # bytes: what a card's kernels like the beginning of a matrix to be a multiple of
_SLOTS = 2
_LARGE = ("weight", "codes", "scales")  # what a layer gives up: its weight, or the parts of a quantised one


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a block lies: in whose dictionary, under which name, at which byte."""

    tensors: _Looking
    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    start: int

    def within(self, piece: Tensor) -> Tensor:
        """Return the tensor in a piece of memory (uint8)."""
        offset = self.start // self.dtype.itemsize
        tensor = piece.view(self.dtype).as_strided(self.shape, self.stride, offset)
        return nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor


class _Looking(dict[str, Any]):
    """The parameters or buffers of a module; asking for one by name brings its block to the device.

    Only asking as ``module.weight`` does so: going through all of them (``parameters()``, ``state_dict()``)
    gives those in main memory.
    """

    def __init__(self, tensors: Any, block: _Block) -> None:
        super().__init__(tensors)
        self.block = block
        self.there: dict[str, tuple[Tensor, ...]] = {}  # by name: in each buffer

    def __getitem__(self, name: str) -> Any:
        if name not in self.there:
            return super().__getitem__(name)
        return self.there[name][self.block.owner._slot_of(self.block)]


@dataclass(eq=False)
class _Block:
    """One block: its piece of main memory, and where each tensor lies in it."""

    owner: OffloadedBlocks
    index: int
    piece: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    places: list[_Place] = field(default_factory=list)


class OffloadedBlocks:
    """Keeps the frozen weights of some blocks in main memory, and brings them to the device for their work.

    Args:
        blocks: in the order of the forward pass; their frozen tensors move at once.
        device: where they work.

    Attributes:
        copied: bytes sent to the device so far.
        held: number of the block in each buffer.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device, self.copied = device, 0
        self._blocks = [_Block(self, index) for index in range(len(blocks))]
        with torch.no_grad():
            for block, module in zip(self._blocks, blocks, strict=True):
                _move(block, module, pinned=device.type == "cuda")
        largest = max((block.piece.shape[0] for block in self._blocks), default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        for block in self._blocks:
            for place in block.places:
                place.tensors.there[place.name] = tuple(place.within(buffer) for buffer in self._buffers)
        self.held: list[int | None] = [None] * _SLOTS
        self._versions = [0] * _SLOTS
        self._arriving: list[Any] = [None] * _SLOTS
        self._last, self._step = -1, 1
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each block."""
        return [block.piece.shape[0] for block in self._blocks]

    def _slot_of(self, block: _Block) -> int:
        """Return the buffer that holds a block, which is brought there if it is not."""
        if block.index == self._last:
            slot = self.held.index(block.index)
            if self._versions[slot] == block.piece._version:
                return slot
        slot = self._fetched(block, spared=self._last)
        if self._arriving[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arriving[slot])
            self._arriving[slot] = None
        if self._last >= 0 and block.index != self._last:
            self._step = 1 if block.index > self._last else -1
        self._last = block.index
        following = block.index + self._step
        if 0 <= following < len(self._blocks):
            self._fetched(self._blocks[following], spared=block.index)
        return slot

    def _fetched(self, block: _Block, *, spared: int) -> int:
        """Begin to copy a block to a buffer, unless it is there; return which.

        Args:
            block: to be copied.
            spared: number of the block that is worked with now, whose buffer stays.
        """
        if block.index in self.held:
            slot = self.held.index(block.index)
            if self._versions[slot] == block.piece._version:  # nobody has changed the weights since
                return slot
        else:
            slot = next(s for s in range(_SLOTS) if self.held[s] is None or self.held[s] != spared)
        buffer = self._buffers[slot][: block.piece.shape[0]]
        if self._stream is None:
            buffer.copy_(block.piece)
        else:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
            self._stream.wait_event(done)  # what was in the buffer is worked with until then
            with torch.cuda.stream(self._stream):
                buffer.copy_(block.piece, non_blocking=True)
                self._arriving[slot] = torch.cuda.Event()
                self._arriving[slot].record(self._stream)
        self.copied += block.piece.shape[0]
        self.held[slot], self._versions[slot] = block.index, block.piece._version
        return slot


def _move(block: _Block, module: nn.Module, *, pinned: bool) -> None:
    """Bring the weights of a block's layers into one piece of main memory; the layers then look there."""
    start, moved = 0, []
    for layer in _layers(module):
        for kind in ("_parameters", "_buffers"):
            usual = layer.__dict__[kind]
            frozen = {name: usual[name] for name in _LARGE if usual.get(name) is not None}
            if not frozen:
                continue
            looking = _Looking(usual, block)
            for name, tensor in frozen.items():
                assert not tensor.requires_grad, "only frozen weights are offloaded"
                place = _Place(
                    looking, name, tensor.shape, tensor.stride(), tensor.dtype, kind == "_parameters", start
                )
                moved.append((place, tensor))
                start += -(-_extent(tensor) // _ALIGNED) * _ALIGNED
            layer.__dict__[kind] = looking
        if type(layer) in (nn.Linear, nn.Conv2d):  # quantised ones keep nothing of their weights anyway
            layer.forward = _Forward(layer)
    piece = torch.empty(start, dtype=torch.uint8, pin_memory=pinned)
    for place, tensor in moved:
        there = place.within(piece)
        there.detach().copy_(tensor)
        dict.__setitem__(place.tensors, place.name, there)
        block.places.append(place)
    block.piece = piece


def _layers(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]


class _Forward:
    """The forward pass of an offloaded layer, to be set on it as ``forward``."""

    def __init__(self, layer: Any) -> None:
        self._layer = weakref.ref(layer)  # it holds this object
        self._function: Any = FrozenLinear if isinstance(layer, nn.Linear) else FrozenConvolution

    def __call__(self, input: Tensor) -> Tensor:
        """Return what the layer's own forward pass does."""
        layer: Any = self._layer()
        output: Tensor = self._function.apply(input, layer)
        return output


def _extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first number to its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def offloadable_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return a denoiser's transformer and residual blocks in the order of the forward pass."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    root: Any = denoiser
    parts = [*root.down_blocks, root.mid_block, *root.up_blocks]
    blocks: list[nn.Module] = []
    for part in parts:
        attentions = list(getattr(part, "attentions", None) or ())
        resnets = list(part.resnets)
        ahead = len(resnets) - len(attentions) if part is root.mid_block else 0
        rows: list[nn.Module] = resnets[:ahead]
        for number, resnet in enumerate(resnets[ahead:]):
            pair = [resnet, *attentions[number : number + 1]]
            rows += pair[::-1] if ahead else pair
        blocks += [
            block
            for row in rows
            for block in row.modules()
            if isinstance(block, BasicTransformerBlock | ResnetBlock2D)
        ]
    return blocks


def blocks_to_offload(denoiser: nn.Module, count: int) -> list[nn.Module]:
    """Return the ``count`` blocks with the largest weights, in the order of the forward pass."""
    blocks = offloadable_blocks(denoiser)
    largest = sorted(range(len(blocks)), key=lambda index: (-offloaded_bytes(blocks[index]), index))
    return [blocks[index] for index in sorted(largest[:count])]


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module as ``module.to(device)`` does, but for what is offloaded."""
    for part in module.modules():
        kept = (part.__dict__["_parameters"], part.__dict__["_buffers"])
        if not any(isinstance(tensors, _Looking) for tensors in kept):
            part._apply(lambda tensor: tensor.to(device), recurse=False)
            continue
        for tensors in kept:  # what is left in an offloaded layer, such as its bias
            for name, tensor in list(tensors.items()):
                if tensor is not None and name not in getattr(tensors, "there", ()):
                    moved = tensor.to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether weights of a module are offloaded."""
    return any(isinstance(part.__dict__["_parameters"], _Looking) for part in module.modules()) or any(
        isinstance(part.__dict__["_buffers"], _Looking) for part in module.modules()
    )


def offloaded_bytes(block: nn.Module) -> int:
    """Return how many bytes of a block would be offloaded."""
    tensors = [
        tensor
        for layer in _layers(block)
        for tensors in (layer._parameters, layer._buffers)
        for name in _LARGE
        if (tensor := tensors.get(name)) is not None
    ]
    return sum(-(-_extent(tensor) // _ALIGNED) * _ALIGNED for tensor in tensors)
