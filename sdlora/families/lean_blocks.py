"""The forward pass of diffusers' transformer blocks, with gradients laid out for what follows.

The results are diffusers', bit for bit. What is kept for the backward pass is told by a rung
(:mod:`.recompute`). Where the gradient of a norm meets that of what goes past it, the sum
can leave room beside each row, which saves a product to whoever multiplies it next (``adapters.direct``).
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels import added_norm, is_usual_norm
from .recompute import Kept, Rungs, keeping

_PAST = "_sdlora_past"  # on what a block puts out: what is to be added to it yet


class _Forked(torch.autograd.Function):
    """x and its layer norm, both (B, S, C); their gradients are added with room beside the sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, room: int
    ) -> tuple[Tensor, Tensor]:
        normed, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], weight, bias, epsilon)
        ctx.save_for_backward(x, mean, deviation, weight, bias)
        ctx.room = room
        return x.view_as(x), normed

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, deviation, weight, bias = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        through_norm, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            of_normed, x, x.shape[-1:], mean, deviation, weight, bias, wanted
        )
        if not wanted[0]:
            return None, of_weight, of_bias, None, None
        if not ctx.room:
            return through_norm.add_(of_x), of_weight, of_bias, None, None
        both = x.new_empty(*x.shape[:-1], x.shape[-1] + ctx.room)
        return torch.add(through_norm, of_x, out=both[..., : x.shape[-1]]), of_weight, of_bias, None, None


def with_room(gradient: Tensor, room: int) -> Tensor | None:
    """Return a gradient (N, C) that a lean block has left room beside together with the room, (N, C + room).

    None for any other: the memory must be exactly that of N rows of C + room.
    """
    rows, width = gradient.shape
    whole = width + room
    size = gradient.untyped_storage().nbytes()
    if gradient.stride() != (whole, 1) or size != rows * whole * gradient.element_size():
        return None
    return gradient.as_strided((rows, whole), (whole, 1), 0)


class SumAndNorm(Protocol):
    """The last projection of an attention, added to the states, and the norm of these."""

    @property
    def acts(self) -> bool:
        """Whether it stands in for the attention's own last layer now."""

    def __call__(self, merged: Tensor, x: Tensor, norm: nn.LayerNorm, /) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm, from what the heads put out and the states, all (B, S, C)."""


class LeanBlock:
    """The forward pass of one of diffusers' ``BasicTransformerBlock``, to be set on it as ``forward``.

    Attributes:
        rooms: how many numbers beside each row the gradient of the three norms' inputs leaves free, for
            whoever multiplies it next and can use that (:func:`with_room`).
        kernels: whether sums and their norms are computed together (:mod:`.kernels`).
        sums: give the states after each of the two attentions and the norm of these, if kernels are used and
            it is not done by the attention's own last layer.
        rung: how much is made again in the backward pass.
        then: the block that follows in a row of them, if it adds what this one leaves to it.
    """

    def __init__(self, block: Any) -> None:
        self._module = weakref.ref(block)  # it holds this object
        self.rooms = [0, 0, 0]
        self.kernels = False
        self.sums: list[SumAndNorm | None] = [None, None]
        self.then: LeanBlock | None = None
        self.rung = Rungs.nothing

    @property
    def module(self) -> Any:
        """The block that this is the forward pass of."""
        return self._module()

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return what diffusers' own forward does; (B, S, C) to (B, S, C)."""
        module: Any = self._module()
        options = cross_attention_kwargs or {}
        masked = attention_mask is not None or encoder_attention_mask is not None
        past: Tensor | None = getattr(hidden_states, _PAST, None)
        if past is not None and (masked or not self._takes):
            hidden_states, past = hidden_states + past, None
        if masked or hidden_states.ndim != 3 or "gligen" in options:
            plain: Tensor = type(module).forward(
                module,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return plain
        if self.rung == Rungs.blocks and torch.is_grad_enabled():
            # nothing is drawn in a lean block, and other threads may compute other parts of the batch
            options_of_torch: Any = {"use_reentrant": False, "preserve_rng_state": False}
            again: Tensor = checkpoint(
                self._computed, hidden_states, encoder_hidden_states, options, **options_of_torch
            )
            return again
        with keeping(self.rung) as kept:
            if self._takes:
                return self._computed_by_kernels(hidden_states, past, encoder_hidden_states, options, kept)
            return self._computed(hidden_states, encoder_hidden_states, options, kept)

    @property
    def _ours(self) -> bool:
        """Whether this block computes its sums and norms by kernels of our own."""
        module: Any = self._module()
        return self.kernels and all(map(is_usual_norm, (module.norm1, module.norm2, module.norm3)))

    @property
    def _takes(self) -> bool:
        """Whether this block adds what the one before left to it; not if its input is all that it keeps."""
        return self.rung < Rungs.blocks and self._ours

    def _computed(
        self, x: Tensor, text: Tensor | None, options: dict[str, Any], kept: Kept | None = None
    ) -> Tensor:
        module: Any = self._module()
        if self._ours:
            return self._computed_by_kernels(x, None, text, options, kept)
        for number, (norm, attention) in enumerate(
            ((module.norm1, module.attn1), (module.norm2, module.attn2))
        ):
            x, normed = self._forked(number, norm, x, kept)
            given = {"encoder_hidden_states": text, **options} if number else options
            x = _attended(attention, normed, x, given, kept)
        x, normed = self._forked(2, module.norm3, x, kept)
        output: Tensor = module.ff(normed) + x
        return output

    def _computed_by_kernels(
        self, x: Tensor, past: Tensor | None, text: Tensor | None, options: dict[str, Any], kept: Kept | None
    ) -> Tensor:
        """Do the same with ``past`` added to x; the last sum may be left to the next block."""
        module: Any = self._module()
        x, more = (x, None) if past is None else (past, x)
        x, normed = self._added(0, module.norm1, x, more, None, kept)
        for number, (attention, norm) in enumerate(
            ((module.attn1, module.norm2), (module.attn2, module.norm3))
        ):
            given = {"encoder_hidden_states": text, **options} if number else options
            attend, merged = getattr(attention.forward, "attend", None), None
            makes_sum_again = kept is not None and kept.rung >= Rungs.projections
            together = self.sums[number]
            if together is not None and together.acts and attend is not None and not makes_sum_again:
                x, normed = together(attend(normed, **given), x, norm)
                _note_norm(normed, norm, x, kept)
                continue
            if attend is None or not makes_sum_again:
                put_out = attention(normed, **given)
            else:
                merged = attend(normed, **given)
                put_out = attention.to_out[0](merged)
            x, normed = self._added(number + 1, norm, x, put_out, (attention, merged), kept)
        output: Tensor = module.ff(normed)
        if self.then is None or self.rung >= Rungs.blocks or not self.then._takes:
            return output + x
        setattr(output, _PAST, x)
        return output

    def _added(
        self,
        number: int,
        norm: nn.LayerNorm,
        x: Tensor,
        put_out: Tensor | None,
        source: tuple[Any, Tensor | None] | None,
        kept: Kept | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the states x and what an attention put out (if any), added, and the norm of that.

        Args:
            number: of the norm in the block.
            norm: that norm.
            x: states (B, S, C).
            put_out: as x.
            source: the attention, and what went into its last projection if that is kept.
            kept: what the block keeps.
        """
        total, normed = added_norm(x, put_out, norm, self.rooms[number])
        if kept is None:
            return total, normed
        if source is not None:
            attention, merged = source
            if merged is not None:
                last = attention.to_out[0]
                kept.again(Rungs.projections, total, lambda parts, states: last(parts) + states, merged, x)
        _note_norm(normed, norm, total, kept)
        return total, normed

    def _forked(self, number: int, norm: nn.LayerNorm, x: Tensor, kept: Kept | None) -> tuple[Tensor, Tensor]:
        forked: tuple[Tensor, Tensor] = _Forked.apply(x, norm.weight, norm.bias, norm.eps, self.rooms[number])
        if kept is not None:
            kept.again(Rungs.norms, forked[1], norm.forward, x)
        return forked


def _note_norm(normed: Tensor, norm: nn.LayerNorm, total: Tensor, kept: Kept | None) -> None:
    """Have the norm of a sum be made again from it, which is all that is kept from here on."""
    if kept is not None:
        kept.only(total)
        kept.again(Rungs.norms, normed, lambda states: added_norm(states, None, norm)[1], total)


def _attended(
    attention: Any, normed: Tensor, x: Tensor, options: dict[str, Any], kept: Kept | None
) -> Tensor:
    """Return what an attention makes of the normed states, added to the states x, all (B, S, C)."""
    attend = getattr(attention.forward, "attend", None)  # of a lean one
    if kept is None or kept.rung < Rungs.projections or attend is None:
        output: Tensor = attention(normed, **options) + x
    else:
        merged, last = attend(normed, **options), attention.to_out[0]
        output = last(merged) + x
        kept.again(Rungs.projections, output, lambda parts, states: last(parts) + states, merged, x)
    if kept is not None:
        kept.only(output)
    return output


def lean_blocks(model: nn.Module) -> list[list[tuple[Any, LeanBlock]]]:
    """Return the transformer blocks of a model that have a lean forward pass, each with that, by the list
    that they follow each other in."""
    rows = []
    for module in model.modules():
        if isinstance(blocks := getattr(module, "transformer_blocks", None), nn.ModuleList):
            pairs = [(block, block.__dict__.get("forward")) for block in blocks]
            rows.append([(block, lean) for block, lean in pairs if isinstance(lean, LeanBlock)])
    return rows


def is_plain_block(module: Any) -> bool:
    """Tell whether a block does nothing that :class:`LeanBlock` leaves out."""
    return (
        module.norm_type == "layer_norm"
        and module.pos_embed is None
        and module.attn2 is not None
        and not module.only_cross_attention
        and module._chunk_size is None
        and all(
            type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None
            for norm in (module.norm1, module.norm2, module.norm3)
        )
    )
