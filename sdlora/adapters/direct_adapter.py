"""An adapter's layers computed directly (:mod:`.direct`, :mod:`.joint`): what they compute with.

PEFT's parameters stay the truth: the masters write them, and their ``grad`` is what the masters collect.
Where the computation needs another form (a scaled B, several layers stacked) there are copies, renewed after
every step by :meth:`DirectAdapter.renew`; gradients that were added elsewhere come home by
:meth:`DirectAdapter.gather`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..families.base import DiffusionModel
from ..families.kernels import MOST_RANK_BYTES
from ..families.lean import LeanAttention
from ..families.lean_blocks import lean_blocks
from .canonical import LowRankPair
from .direct import Anchors, DirectForward, DirectLayer, Factors, Gradients
from .joint import (
    JointLayers,
    QueryProjection,
    SelfProjections,
    TextProjections,
    query_joints,
    self_joints,
    text_joints,
)
from .module_paths import module_at
from .peft_library import LoraLayer
from .sums import add_in_place, following_sums
from .trainable_layers import TrainedLayer


class DirectAdapter:
    """Takes over the forward passes of an adapter's layers, and gives them back.

    Args:
        model: the adapter is in it.
        layers: all that learn; their parameters have a ``grad``, see
            :class:`sdlora.training.masters.MasterWeights`.
    """

    def __init__(self, model: DiffusionModel, layers: Sequence[TrainedLayer]) -> None:
        first = next(iter(layers[0].parameters.values()))
        leaf = torch.zeros((), device=first.device, dtype=torch.float32, requires_grad=True)
        self.anchors = Anchors(leaf)
        self._denoiser = model.components()[model.info.denoiser.component]
        self.layers = [_direct(module_at(model, layer.key), layer) for layer in layers]
        self._self_joints: list[tuple[LeanAttention, JointLayers]] = []
        self._query_joints: list[tuple[LeanAttention, JointLayers]] = []
        self._text_hook: RemovableHandle | None = None
        self._kernels = False
        self._joints: dict[tuple[Any, ...], JointLayers] = {}
        self._stacks: dict[DirectLayer, JointLayers] = {}  # single ones whose A lies below their weight
        self._copies: list[tuple[Tensor, Tensor]] = []  # of a parameter, which it is copied into
        self._scaled: list[tuple[Tensor, float]] = []
        self._homes: list[
            tuple[list[Tensor], list[Tensor]]
        ] = []  # for each part: gradients, where they were added
        self._elsewhere: list[Tensor] = []  # the buffers that the latter are views into

    def put_in_place(
        self, attentions: Sequence[LeanAttention] = (), *, parts: int = 1, kernels: bool = False
    ) -> None:
        """Take over all forward passes.

        Args:
            attentions: those whose projections may be computed together.
            parts: in how many parts a batch may be computed at once.
            kernels: whether gradients are computed by a kernel of our own.
        """
        self._kernels = kernels
        by_module = {layer.peft: layer for layer in self.layers}
        self._self_joints = [(a, self._kept(joint)) for a, joint in self_joints(attentions, by_module)]
        self._query_joints = [(a, self._kept(joint)) for a, joint in query_joints(attentions, by_module)]
        new_texts, places = text_joints(attentions, by_module)
        texts = [self._kept(joint) for joint in new_texts]
        joints = [joint for _, joint in (*self._self_joints, *self._query_joints)] + texts
        blocks = lean_blocks(self._denoiser) if attentions else ()
        sums = following_sums(blocks, by_module)
        self._stacks = {layer: self._kept(stack) for layer, stack in sums.items()}
        for joint in (*joints, *self._stacks.values()):
            joint.place()
        self._make_room(joints, parts)
        for layer in self.layers:
            module: Any = layer.peft
            module.forward = DirectForward(layer, self.anchors)
        for attention, joint in self._self_joints:
            attention.self_projections = SelfProjections(joint, self.anchors)
        for attention, joint in self._query_joints:
            attention.query_projection = QueryProjection(joint, self.anchors)
        add_in_place(blocks, by_module, self.anchors)
        if texts:
            self._text_hook = self._denoiser.register_forward_pre_hook(
                TextProjections(texts, places, self.anchors), with_kwargs=True
            )
        self.renew()

    def _kept(self, joint: JointLayers) -> JointLayers:
        """Return what took the same layers together before: the base's weights need not move again."""
        kept = self._joints.setdefault(joint.key, joint)
        kept.output_kept = joint.output_kept
        return kept

    def take_out(self) -> None:
        """Give all forward passes back."""
        for layer in self.layers:
            if "forward" in layer.peft.__dict__:
                del layer.peft.forward
        for attention, _ in self._self_joints:
            attention.self_projections = None
        for attention, _ in self._query_joints:
            attention.query_projection = None
        if self._text_hook is not None:
            self._text_hook.remove()
        self._self_joints, self._query_joints, self._text_hook = [], [], None
        self._copies, self._scaled, self._homes, self._elsewhere = [], [], [], []

    @torch.no_grad()
    def renew(self) -> None:
        """Renew what is computed with; to be called whenever the parameters have changed."""
        if self._copies:
            torch._foreach_copy_([copy for copy, _ in self._copies], [value for _, value in self._copies])
        if self._scaled:
            torch._foreach_mul_([copy for copy, _ in self._scaled], [scale for _, scale in self._scaled])

    @torch.no_grad()
    def gather(self) -> None:
        """Add gradients that were added elsewhere to those of the parameters, in the order of the parts."""
        for homes, elsewhere in self._homes:
            torch._foreach_add_(homes, elsewhere)
        for buffer in self._elsewhere:
            buffer.zero_()

    def _make_room(self, joints: Sequence[JointLayers], parts: int) -> None:
        """Give every layer and joint what it computes with, and gradients for each part."""
        joined = {id(layer) for joint in joints for layer in joint.layers}
        single = [layer for layer in self.layers if id(layer) not in joined]
        self._copies, self._scaled, self._homes, self._elsewhere = [], [], [], []
        for layer in single:
            down, rows, stack = layer.down.data, None, self._stacks.get(layer)
            if stack is not None:
                (down,), rows = stack.room_for_down(), stack.all_rows
                self._copies.append((down, layer.down.data))
            layer.factors = Factors(
                down, self._usable(layer), layer.scale, rows, self._has_kernel(layer.down)
            )
            layer.gradients = []
        for joint in joints:
            joint.factors, joint.gradients = self._stacked(joint), []
        for part in range(parts):
            self._make_part(single, joints, direct=part == 0)

    def _usable(self, layer: DirectLayer) -> Tensor:
        """Return what is computed with as B: the parameter itself, if the scale is 1."""
        if layer.scale == 1.0:
            return layer.up.data
        scaled = torch.empty_like(layer.up.data)
        self._copies.append((scaled, layer.up.data))
        self._scaled.append((scaled, layer.scale))
        return scaled

    def _stacked(self, joint: JointLayers) -> Factors:
        first, count = joint.layers[0], len(joint.layers)
        down, up = joint.room_for_down(), first.up.new_empty(count, *first.up.shape)
        for number, layer in enumerate(joint.layers):
            self._copies += [(down[number], layer.down.data), (up[number], layer.up.data)]
        if first.scale != 1.0:
            self._scaled.append((up, first.scale))
        return Factors(down, up, first.scale, kernels=self._has_kernel(down.flatten(0, 1)))

    def _has_kernel(self, down: Tensor) -> bool:
        return self._kernels and down.ndim == 2 and len(down) * down.element_size() <= MOST_RANK_BYTES

    def _make_part(
        self, single: Sequence[DirectLayer], joints: Sequence[JointLayers], *, direct: bool
    ) -> None:
        """Make the gradients of one part; of the first one, single layers' are the parameters' own."""
        homes: list[Tensor] = []
        elsewhere: list[Tensor] = []
        apart = [] if direct else list(single)
        stacks = [factors for joint in joints if (factors := joint.factors) is not None]
        size = sum(layer.down.numel() + layer.up.numel() for layer in apart)
        size += sum(stack.down.numel() + stack.up.numel() for stack in stacks)
        buffer = self.anchors.leaf.new_zeros(size, dtype=self.layers[0].down.dtype)
        rest = buffer.detach()

        def taken(shape: torch.Size) -> Tensor:
            nonlocal rest
            piece, rest = rest[: shape.numel()].view(shape), rest[shape.numel() :]
            return piece

        for layer in single:
            down, up = layer.down.grad, layer.up.grad
            assert down is not None and up is not None
            if direct:
                layer.gradients.append(Gradients(down, up))
                continue
            layer.gradients.append(Gradients(taken(down.shape), taken(up.shape)))
            homes += [down, up]
            elsewhere += [layer.gradients[-1].down, layer.gradients[-1].up]
        for joint, stack in zip(joints, stacks, strict=True):
            gradients = Gradients(taken(stack.down.shape), taken(stack.up.shape))
            joint.gradients.append(gradients)
            for layer, down, up in zip(joint.layers, gradients.down, gradients.up, strict=True):
                assert layer.down.grad is not None and layer.up.grad is not None
                homes += [layer.down.grad, layer.up.grad]
                elsewhere += [down, up]
        if homes:
            self._homes.append((homes, elsewhere))
            self._elsewhere.append(buffer)


def _direct(peft: LoraLayer, layer: TrainedLayer) -> DirectLayer:
    assert isinstance(layer.update, LowRankPair)
    down, up = layer.parameters["lora_down.weight"], layer.parameters["lora_up.weight"]
    assert isinstance(peft, nn.Module)
    return DirectLayer(peft, down, up, layer.update.scale)
