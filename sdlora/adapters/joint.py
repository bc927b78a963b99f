"""Projections of attention computed together: q, k and v of a self-attention, the text's keys and values.

n layers that see the same input are one product with their weights in one piece, and n updates are one
batched product each for A and B, so rank, scale and sides must agree; where they do not, the layers stay
single. The base's weights keep their place in the model: its parameters become views into the piece they were
copied to.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families.kernels import add_lora_gradients
from ..families.lean import AHEAD, LeanAttention, Projections
from .direct import Anchors, DirectLayer, Factors, Gradients


class JointLayers:
    """n adapted linear layers of the same sides, rank and scale, without bias, computed as one.

    Attributes:
        layers: those layers.
        key: equal for the same layers taken together the same way.
        output_kept: whether what they put out is kept for the backward pass anyway.
        factors: theirs, stacked.
        gradients: of the factors, one a part of the batch.
    """

    def __init__(
        self, layers: Sequence[DirectLayer], *, wide: bool = False, output_kept: bool = False
    ) -> None:
        """Take layers together; ``wide`` puts A below the weights, so that both are one product."""
        self.layers, self.output_kept, self._wide = tuple(layers), output_kept, wide
        self.key = (wide, *map(id, layers))
        self.factors: Factors | None = None
        self.gradients: list[Gradients] = []
        self._weights: list[Tensor] = []

    def place(self) -> None:
        """Have the base's weights lie in one piece; to be called where they stay from now on."""
        bases = [layer.base for layer in self.layers]
        if not self._weights or not _lie_in(bases, self._weights[0]):
            rank = self.layers[0].down.shape[0] if self._wide else 0
            self._weights = [_in_one_piece(bases, below=rank * len(bases))]

    @property
    def weights(self) -> Tensor:
        """The base's weights, (n, out, in)."""
        base = self.layers[0].base
        return self._weights[0][: base.out_features * len(self.layers)].view(-1, *base.weight.shape)

    @property
    def all_rows(self) -> Tensor | None:
        """The base's weights and A below them, (n out + n rank, in), if they lie together."""
        return self._weights[0] if self._wide else None

    def room_for_down(self) -> Tensor:
        """Return where A belongs, (n, rank, in)."""
        first, count = self.layers[0].down, len(self.layers)
        if self._wide:
            return self._weights[0][-first.shape[0] * count :].view(count, *first.shape)
        return first.new_empty(count, *first.shape)

    @property
    def act(self) -> bool:
        """Whether the adapter is part of the computation."""
        return self.layers[0].acts


class SideBySide(torch.autograd.Function):
    """n outputs (..., out) from x (..., in), which lie beside each other, such as q, k and v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, joint: JointLayers, part: int) -> tuple[Tensor, ...]:
        factors = joint.factors
        assert factors is not None
        flat, (count, rank) = x.reshape(-1, x.shape[-1]), factors.down.shape[:2]  # (N, in)
        if joint.all_rows is None:
            output = flat @ joint.weights.flatten(0, 1).t()  # (N, n out)
            inner = flat @ factors.down.flatten(0, 1).t()  # (N, n rank)
        else:
            wide = flat @ joint.all_rows.t()  # (N, n out + n rank)
            output, inner = wide[:, : -count * rank], wide[:, -count * rank :]
            # a view would keep the output alive
            inner = inner if joint.output_kept else inner.clone()
        apart = output.unflatten(1, (count, -1)).transpose(0, 1)  # (n, N, out)
        apart.baddbmm_(inner.unflatten(1, (count, rank)).transpose(0, 1), factors.up.transpose(1, 2))
        ctx.save_for_backward(flat, inner)
        ctx.joint, ctx.factors, ctx.sink, ctx.shape = joint, factors, joint.gradients[part], x.shape
        return output.view(*x.shape[:-1], count, -1).unbind(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        flat, inner = ctx.saved_tensors
        factors, (count, rank) = ctx.factors, ctx.factors.down.shape[:2]
        both = None
        if count > 1 and ctx.joint.all_rows is not None:
            both = gradients[0].new_empty(len(flat), count * (factors.up.shape[1] + rank))
            gradient, of_inner = both[:, : -count * rank], both[:, -count * rank :]
            torch.cat([part.reshape(len(flat), -1) for part in gradients], 1, out=gradient)
        else:
            gradient = torch.cat(gradients, -1) if count > 1 else gradients[0]
            gradient = gradient.reshape(len(flat), -1)  # (N, n out)
            of_inner = gradient.new_empty(len(flat), count * rank)  # (N, n rank)
        apart = gradient.unflatten(1, (count, -1)).transpose(0, 1)  # (n, N, out)
        torch.bmm(apart, factors.up, out=of_inner.unflatten(1, (count, rank)).transpose(0, 1))
        sink: Gradients = ctx.sink
        if factors.kernels:
            add_lora_gradients(gradient, inner, of_inner, flat, sink.up, sink.down, factors.scale)
        else:
            inner = inner.unflatten(1, (count, rank)).transpose(0, 1)
            sink.up.baddbmm_(apart.transpose(1, 2), inner, alpha=factors.scale)
            sink.down.flatten(0, 1).addmm_(of_inner.t(), flat)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if both is None:
            of_input = gradient @ ctx.joint.weights.flatten(0, 1)
            of_input.addmm_(of_inner, factors.down.flatten(0, 1))
        else:
            of_input = both @ ctx.joint.all_rows
        return of_input.view(ctx.shape), None, None, None


class OneByOne(torch.autograd.Function):
    """n outputs (B, S, out) of n layers from the same states (B, S, in)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, _: Tensor, joint: JointLayers, part: int) -> tuple[Tensor, ...]:
        factors = joint.factors
        assert factors is not None
        weights = joint.weights  # (n, out, in)
        flat = states.reshape(1, -1, states.shape[-1])  # (1, N, in)
        several = flat.expand(len(weights), -1, -1)
        output = torch.bmm(several, weights.transpose(1, 2))  # (n, N, out)
        inner = torch.bmm(several, factors.down.transpose(1, 2))  # (n, N, rank)
        output.baddbmm_(inner, factors.up.transpose(1, 2))
        ctx.save_for_backward(flat, inner)
        ctx.joint, ctx.factors, ctx.sink, ctx.shape = joint, factors, joint.gradients[part], states.shape
        return output.view(len(weights), *states.shape[:-1], -1).unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        flat, inner = ctx.saved_tensors
        factors, count = ctx.factors, len(gradients)
        gradient = torch.stack(gradients).view(count, flat.shape[1], -1)  # (n, N, out)
        of_inner = torch.bmm(gradient, factors.up)  # (n, N, rank)
        ctx.sink.up.baddbmm_(gradient.transpose(1, 2), inner, alpha=factors.scale)
        ctx.sink.down.baddbmm_(of_inner.transpose(1, 2), flat.expand(count, -1, -1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        of_states = torch.bmm(gradient, ctx.joint.weights).baddbmm_(of_inner, factors.down).sum(0)
        return of_states.view(ctx.shape), None, None, None


class SelfProjections:
    """Query, key and value of one self-attention; see :attr:`LeanAttention.self_projections`."""

    def __init__(self, joint: JointLayers, anchors: Anchors) -> None:
        self._joint, self._anchors = joint, anchors

    def __call__(self, x: Tensor) -> Projections:
        """Return them, each (..., out), from x (..., in)."""
        if not self._joint.act:
            query, key, value = (layer.base(x) for layer in self._joint.layers)
            return query, key, value
        applied: Projections = SideBySide.apply(x, self._anchors.leaf, self._joint, self._anchors.part.index)
        return applied


class QueryProjection:
    """The query of one attention to the text; see :attr:`LeanAttention.query_projection`."""

    def __init__(self, joint: JointLayers, anchors: Anchors) -> None:
        self._joint, self._anchors = joint, anchors

    def __call__(self, x: Tensor) -> Tensor:
        """Return it, (..., out), from x (..., in)."""
        if not self._joint.act:
            return self._joint.layers[0].base(x)
        (query,) = SideBySide.apply(x, self._anchors.leaf, self._joint, self._anchors.part.index)
        return query


class TextProjections:
    """Keys and values of all attentions to the text, computed before a denoiser's first block.

    Registered as a forward pre-hook of the denoiser; see :data:`sdlora.families.lean.AHEAD`.
    """

    def __init__(
        self, joints: Sequence[JointLayers], places: Mapping[nn.Module, tuple[int, int]], anchors: Anchors
    ) -> None:
        self._joints, self._anchors = tuple(joints), anchors
        self._places = dict(places)  # attention -> which of all outputs are its key and its value

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the keys and values to what the denoiser is told."""
        states = options.get("encoder_hidden_states")
        if states is None or options.get("cross_attention_kwargs") or not self._joints[0].act:
            return None
        outputs: list[Tensor] = []
        for joint in self._joints:
            outputs += OneByOne.apply(states, self._anchors.leaf, joint, self._anchors.part.index)
        ahead = {attention: (outputs[k], outputs[v]) for attention, (k, v) in self._places.items()}
        return args, {**options, "cross_attention_kwargs": {AHEAD: ahead}}


def self_joints(
    attentions: Sequence[LeanAttention], layers: Mapping[nn.Module, DirectLayer]
) -> list[tuple[LeanAttention, JointLayers]]:
    """Return the self-attentions whose q, k and v can be computed as one, each with these three."""
    joints = []
    for attention in attentions:
        module = attention.module
        three = [layers.get(getattr(module, name)) for name in ("to_q", "to_k", "to_v")]
        known = [layer for layer in three if layer is not None]
        makes = {_make(layer) for layer in known}
        if not module.is_cross_attention and len(known) == 3 and len(makes) == 1 and None not in makes:
            joint = JointLayers(known, wide=can_be_wide(known), output_kept=attention.keeps_projections)
            joints.append((attention, joint))
    return joints


def query_joints(
    attentions: Sequence[LeanAttention], layers: Mapping[nn.Module, DirectLayer]
) -> list[tuple[LeanAttention, JointLayers]]:
    """Return the attentions to the text whose query can be computed in one product with its A."""
    joints = []
    for attention in attentions:
        layer = layers.get(attention.module.to_q)
        if not attention.module.is_cross_attention or not attention.keeps_projections or layer is None:
            continue
        if _make(layer) is not None and can_be_wide([layer]):
            joints.append((attention, JointLayers([layer], wide=True, output_kept=True)))
    return joints


def can_be_wide(layers: Sequence[DirectLayer]) -> bool:
    """Tell whether rows of outputs and inner values side by side begin where fused attention can read."""
    rows = sum(layer.base.out_features + layer.down.shape[0] for layer in layers)
    return rows % 8 == 0 and all(layer.base.weight.dtype == layer.down.dtype for layer in layers)


def text_joints(
    attentions: Sequence[LeanAttention], layers: Mapping[nn.Module, DirectLayer]
) -> tuple[list[JointLayers], dict[nn.Module, tuple[int, int]]]:
    """Return keys and values of the attentions to the text, layers of one make together, and where each is.

    Nothing, unless all such attentions have both adapted.
    """
    cross = [attention.module for attention in attentions if attention.module.is_cross_attention]
    pairs = [(layers.get(module.to_k), layers.get(module.to_v)) for module in cross]
    groups: dict[Any, list[DirectLayer]] = {}
    for pair in pairs:
        for layer in pair:
            if layer is None or _make(layer) is None:
                return [], {}
            groups.setdefault(_make(layer), []).append(layer)
    order = {id(layer): number for number, layer in enumerate(itertools.chain(*groups.values()))}
    places = {
        module: (order[id(key)], order[id(value)]) for module, (key, value) in zip(cross, pairs, strict=True)
    }
    return [JointLayers(group) for group in groups.values()], places


def can_be_joined(peft: Any) -> bool:
    """Tell whether one of PEFT's layers is of a build that can be computed together with others.

    Not over a quantised layer: the full weights of all of them would be alive at once.
    """
    base = peft.get_base_layer()
    return type(base) is nn.Linear and base.bias is None and base.out_features % 8 == 0


def _make(layer: DirectLayer) -> tuple[Any, ...] | None:
    """Return what must agree between layers that are computed together; None for one that stays single."""
    base = layer.base
    if not can_be_joined(layer.peft):
        return None
    return tuple(base.weight.shape), tuple(layer.down.shape), layer.scale, base.weight.dtype


def _lie_in(bases: Sequence[Any], stacked: Tensor) -> bool:
    memory = stacked.untyped_storage()._cdata
    return all(base.weight.untyped_storage()._cdata == memory for base in bases)


@torch.no_grad()
def _in_one_piece(bases: Sequence[Any], *, below: int) -> Tensor:
    """Move the weights of n layers into one tensor (n out + below, in), and have the layers keep them there.

    They wait in main memory meanwhile, so that a card does not hold them twice.
    """
    device, dtype, shape = bases[0].weight.device, bases[0].weight.dtype, bases[0].weight.shape
    waiting = []
    for base in bases:
        weight = base.weight.detach()
        waiting.append(weight if weight.is_meta else weight.to("cpu"))
        base.weight.data = torch.empty(0, dtype=dtype, device=device)
    stacked = torch.empty((len(bases) * shape[0] + below, shape[1]), dtype=dtype, device=device)
    pieces = stacked[: len(bases) * shape[0]].view(len(bases), *shape)
    for piece, base in zip(pieces.unbind(), bases, strict=True):
        piece.copy_(waiting.pop(0))
        base.weight.data = piece
    return stacked
