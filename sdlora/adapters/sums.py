"""Layers whose output is added to the states of a lean block: products that share a sum's memory.

Such a layer has A below its base's weight. Backward, the block leaves room beside the gradient g of the sum;
the layer writes g (s B) there, and has the gradient of its input in one product. Forward, with kernels of our
own, one product gives the base's output with A x beside it; to the former the update, then the states are
added in place. The sum is kept for the norm behind it anyway, so what is beside it takes no more memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families.kernels import add_and_norm_, add_lora_gradients, before_norm
from ..families.lean_blocks import LeanBlock
from .direct import Anchors, DirectLayer, Factors, Gradients
from .joint import JointLayers, can_be_wide


def following_sums(
    rows_of_blocks: Sequence[Sequence[tuple[Any, LeanBlock]]], layers: Mapping[nn.Module, DirectLayer]
) -> dict[DirectLayer, JointLayers]:
    """Return the layers whose output is added to the states of a lean block, with A below their weight.

    The blocks are told to leave room for them (:func:`.lean_blocks.with_room`).
    """
    stacks = {}
    for blocks in rows_of_blocks:
        following = [*blocks[1:], (None, None)]
        for (block, lean), (_, then) in zip(blocks, following, strict=True):
            # what is added before a norm has the gradient of that norm's input
            attentions = (block.attn1.to_out[0], lean, 1), (block.attn2.to_out[0], lean, 2)
            for module, leaving, number in (*attentions, (block.ff.net[2], then, 0)):
                layer = layers.get(module)
                if leaving is None or layer is None or type(layer.base) is not nn.Linear:
                    continue
                if can_be_wide([layer]):
                    leaving.rooms[number] = layer.down.shape[0]
                    stacks[layer] = JointLayers([layer], wide=True)
    return stacks


def add_in_place(
    rows_of_blocks: Sequence[Sequence[tuple[Any, LeanBlock]]],
    layers: Mapping[nn.Module, DirectLayer],
    anchors: Anchors,
) -> None:
    """Have lean blocks that compute by kernels add what their attentions put out this way.

    Args:
        rows_of_blocks: those blocks.
        layers: by module, with the factors that they compute with.
        anchors: of the adapter.
    """
    for block, lean in (pair for blocks in rows_of_blocks for pair in blocks):
        for number, attention in enumerate((block.attn1, block.attn2)):
            layer = layers.get(attention.to_out[0])
            if layer is not None and layer.factors is not None and layer.factors.rows is not None:
                lean.sums[number] = ProjectedSum(layer, anchors)


class ProjectedSum:
    """The last projection of an attention, added to states, and their norm; see :attr:`.LeanBlock.sums`."""

    def __init__(self, layer: DirectLayer, anchors: Anchors) -> None:
        self._layer, self._anchors = layer, anchors
        bias = layer.base.bias
        # A has none
        self._bias = None if bias is None else torch.cat([bias, bias.new_zeros(layer.down.shape[0])]).detach()

    @property
    def acts(self) -> bool:
        """Whether the adapter is part of the computation."""
        return self._layer.acts

    def __call__(self, merged: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return ``x + W m + b + (s B) A m`` (B, S, out) and the norm of that.

        Args:
            merged: m, what the heads put out, (B, S, in).
            x: states (B, S, out).
            norm: frozen.
        """
        factors, sink = self._layer.factors, self._layer.gradients[self._anchors.part.index]
        both: tuple[Tensor, Tensor] = _SumAndNorm.apply(
            merged, x, self._anchors.leaf, self._bias, norm, factors, sink
        )
        return both


class _SumAndNorm(torch.autograd.Function):
    """See :class:`ProjectedSum`; the gradients of the factors are added where they belong."""

    @staticmethod
    def forward(
        ctx: Any,
        merged: Tensor,
        x: Tensor,
        _: Tensor,
        bias: Tensor | None,
        norm: nn.LayerNorm,
        factors: Factors,
        sink: Gradients,
    ) -> tuple[Tensor, Tensor]:
        assert factors.rows is not None
        flat, rank = merged.reshape(-1, merged.shape[-1]), factors.down.shape[0]  # (N, in)
        rows = factors.rows.t()
        wide = flat @ rows if bias is None else torch.addmm(bias, flat, rows)  # (N, out + rank)
        put_out, inner = wide[:, :-rank], wide[:, -rank:]
        put_out.addmm_(inner, factors.up.t())
        total = put_out.view(x.shape)
        normed, mean, rstd = add_and_norm_(total, x, norm)
        ctx.save_for_backward(flat, inner, total, mean, rstd)
        ctx.norm, ctx.factors, ctx.sink, ctx.shape = norm, factors, sink, merged.shape
        return total, normed

    @staticmethod
    def backward(ctx: Any, past: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, total, mean, rstd = ctx.saved_tensors
        factors: Factors = ctx.factors
        sink: Gradients = ctx.sink
        rank = factors.down.shape[0]
        assert factors.rows is not None
        wide = before_norm(of_normed, past, total, ctx.norm, mean, rstd, rank)
        of_sum, both = wide[..., :-rank], wide.view(-1, wide.shape[-1])
        gradient = both[:, :-rank]  # (N, out)
        of_inner = torch.mm(gradient, factors.up, out=both[:, -rank:])  # (N, rank)
        if factors.kernels:
            add_lora_gradients(gradient, inner, of_inner, flat, sink.up, sink.down, factors.scale)
        else:
            sink.up.addmm_(gradient.t(), inner, alpha=factors.scale)
            sink.down.addmm_(of_inner.t(), flat)
        of_merged = None
        if ctx.needs_input_grad[0]:
            of_merged = (both @ factors.rows).view(ctx.shape)  # g W + (g s B) A
        return of_merged, of_sum, None, None, None, None, None
