"""Forward passes of diffusers' blocks without what changes nothing there: the same results, bit for bit.

diffusers divides the output of every attention and residual block by a factor that is 1 in all Stable
Diffusion bases, forward and backward, and looks up at every call what its attention processor takes. What is
put in place here leaves that out, and lets the projections of an attention be computed elsewhere
(:mod:`sdlora.adapters.joint`). Blocks of any other form keep their own forward pass.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .kernels import geglu, image_norm, is_usual_norm
from .lean_blocks import LeanBlock, is_plain_block, lean_blocks
from .lean_tokens import LeanTokens
from .recompute import Rungs, again, keeping, recomputed

_TIMES = "_sdlora_times"
Projections = tuple[Tensor, Tensor, Tensor]
"""Query, key and value of an attention, each (B, S, heads * d)."""
AHEAD = "sdlora_ahead"
"""Key among ``cross_attention_kwargs`` for keys and values that were computed before all blocks: attention ->
(key, value)."""


class LeanAttention:
    """The forward pass of one of diffusers' ``Attention`` modules, to be set on it as ``forward``.

    Attributes:
        self_projections: gives query, key and value of a self-attention, if not its own layers.
        query_projection: gives the query of an attention to the text, if not its own layer.
        remembers_text: whether key and value are kept for the next call with the same states of the text.
    """

    def __init__(self, attention: Any) -> None:
        self._module = weakref.ref(attention)  # it holds this object
        self._kernel = _KERNELS[type(attention.processor).__name__]
        self.self_projections: Callable[[Tensor], Projections] | None = None
        self.query_projection: Callable[[Tensor], Tensor] | None = None
        self.remembers_text = False
        self._of_text: tuple[Tensor, Tensor, Tensor] | None = None  # states, key and value

    @property
    def module(self) -> Any:
        """The attention that this is the forward pass of."""
        return self._module()

    @staticmethod
    def is_fused(attention: Any) -> bool:
        """Tell whether an attention can have this forward pass, and is computed by one fused kernel then."""
        return _is_plain_attention(attention) and _KERNELS[type(attention.processor).__name__] is _fused

    @property
    def keeps_projections(self) -> bool:
        """Whether the projections themselves, and not copies, are kept for the backward pass."""
        return self._kernel is _fused

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return what diffusers' own forward does; (B, S, C) to (B, S, C)."""
        module: Any = self._module()
        if attention_mask is not None or hidden_states.ndim != 3:
            return type(module).forward(module, hidden_states, encoder_hidden_states, attention_mask)
        output: Tensor = module.to_out[0](self.attend(hidden_states, encoder_hidden_states, **options))
        return output

    def attend(self, states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any) -> Tensor:
        """Return what the heads put out beside each other, before the last projection; (B, S, C)."""
        module: Any = self._module()
        ahead: Mapping[Any, tuple[Tensor, Tensor]] = options.get(AHEAD) or {}
        if encoder_hidden_states is None and (three := self.self_projections) is not None:
            query, key, value = three(states)
            again(Rungs.projections, query, lambda states: three(states)[0], states)
            return self._kernel(module, query, key, value)
        project = self.query_projection or module.to_q
        query = again(Rungs.projections, project(states), project, states)
        if module in ahead:
            key, value = ahead[module]
        elif encoder_hidden_states is None:
            key = again(Rungs.projections, module.to_k(states), module.to_k, states)
            value = again(Rungs.projections, module.to_v(states), module.to_v, states)
        else:
            key, value = self._text_projections(module, encoder_hidden_states)
        merged = self._kernel(module, query, key, value)
        if self._kernel is _fused and (encoder_hidden_states is not None or module in ahead):
            # the text is short, so this is a small part of what a projection takes
            again(Rungs.gates, merged, lambda *three: _fused(module, *three), query, key, value)
        return merged

    def _text_projections(self, module: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        if self._of_text is not None and self._of_text[0] is states:
            return self._of_text[1:]
        key, value = module.to_k(states), module.to_v(states)
        if self.remembers_text and not torch.is_grad_enabled():
            self._of_text = states, key, value
        return key, value


class _GatedGelu(torch.autograd.Function):
    """``a * gelu(b)`` of the two halves of (..., 2C); both gradients are written where they belong."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, keep_opened: bool) -> Tensor:
        plain, gate = both.chunk(2, dim=-1)
        opened = functional.gelu(gate)
        ctx.save_for_backward(both, *([opened] if keep_opened else []))
        return plain * opened

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        both, *kept = ctx.saved_tensors
        plain, gate = both.chunk(2, dim=-1)
        opened = kept[0] if kept else functional.gelu(gate)
        of_both = torch.empty_like(both)
        of_plain, of_gate = of_both.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=of_plain)
        torch.mul(gradient, plain, out=of_gate)
        torch.ops.aten.gelu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_both, None


def _gated(both: Tensor) -> Tensor:
    plain, gate = both.chunk(2, dim=-1)
    return plain * functional.gelu(gate)


class LeanGatedGelu:
    """The forward pass of one of diffusers' ``GEGLU``, to be set on it as ``forward``.

    Attributes:
        kernels: whether the gate is computed by one of our own (:mod:`.kernels`).
    """

    def __init__(self, module: Any) -> None:
        self._projection = module.proj
        self.kernels = False

    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return what diffusers' own forward does; (..., C) to (..., C')."""
        both = again(Rungs.projections, self._projection(hidden_states), self._projection, hidden_states)
        if self.kernels:
            return again(Rungs.gates, geglu(both), geglu, both)
        gated: Tensor = _GatedGelu.apply(both, not recomputed(Rungs.gates))
        return again(Rungs.gates, gated, _gated, both)


class LeanResidual:
    """The forward pass of one of diffusers' ``ResnetBlock2D``, to be set on it as ``forward``.

    Attributes:
        time_projection: gives what the block adds for a timestep (B, C'), if not its own layer.
        kernels: whether norms and SiLU are computed together (:mod:`.kernels`).
        rung: how much is made again in the backward pass.
    """

    def __init__(self, block: Any) -> None:
        self._module = weakref.ref(block)  # it holds this object
        self._norms, self._act = (block.norm1, block.norm2), block.nonlinearity
        self._convs, self._time = (block.conv1, block.conv2), block.time_emb_proj
        self._shortcut = block.conv_shortcut
        self.time_projection: Callable[[Tensor], Tensor] | None = None
        self.kernels = False
        self.rung = Rungs.nothing

    @property
    def module(self) -> Any:
        """The block that this is the forward pass of."""
        return self._module()

    @property
    def time_layer(self) -> Any:
        """The block's own projection of the timestep's embedding."""
        return self._time

    @property
    def activation(self) -> Any:
        """What the embedding goes through before it is projected."""
        return self._act

    def __call__(self, input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return what diffusers' own forward does; (B, C, h, w) to (B, C', h, w)."""
        with keeping(self.rung):
            states = self._convs[0](self._activated(0, input_tensor))
            together = self.time_projection if self.time_projection and not temb.requires_grad else None
            times = together(temb) if together else self._time(self._act(temb))  # (B, C')
            if self._has_kernel(1) and not times.requires_grad:
                again(Rungs.blocks, states, self._first, input_tensor)
                states = self._convs[1](self._activated(1, states, times))
            else:
                states = states + times[:, :, None, None]
                again(Rungs.blocks, states, self._begun, input_tensor, times)
                states = self._convs[1](self._activated(1, states))
        if self._shortcut is not None:
            module: Any = self._module()
            input_tensor = self._shortcut(input_tensor.contiguous() if module.training else input_tensor)
        return input_tensor + states

    def _first(self, x: Tensor) -> Tensor:
        states: Tensor = self._convs[0](self._activated(0, x))
        return states

    def _begun(self, x: Tensor, times: Tensor) -> Tensor:
        return self._first(x) + times[:, :, None, None]

    def _has_kernel(self, number: int) -> bool:
        return self.kernels and type(self._act) is nn.SiLU and is_usual_norm(self._norms[number])

    def _activated(self, number: int, x: Tensor, times: Tensor | None = None) -> Tensor:
        """Return SiLU of a norm of x, which the kernel adds (B, C) to before."""
        norm = self._norms[number]
        if self._has_kernel(number):

            def make(x: Tensor) -> Tensor:
                return image_norm(x, norm, shift=times, silu=True)

            return again(Rungs.norms, make(x), make, x)
        normed = again(Rungs.norms, norm(x), norm, x)
        return again(Rungs.norms, self._act(normed), self._act, normed)


def make_lean(model: nn.Module) -> list[LeanAttention]:
    """Put the lean forward passes in place in a model; return those of its attentions.

    The way each attention is computed is the one that is set at this moment; :func:`undo_lean` takes them
    out.
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    attentions = []
    for module in model.modules():
        changed: Any = module
        if isinstance(module, Attention) and _is_plain_attention(module):
            changed.forward = lean = LeanAttention(module)
            attentions.append(lean)
        elif isinstance(module, ResnetBlock2D) and is_plain_residual(module):
            changed.forward = LeanResidual(module)
        elif isinstance(module, GEGLU):
            changed.forward = LeanGatedGelu(module)
        elif isinstance(module, BasicTransformerBlock) and is_plain_block(module):
            changed.forward = LeanBlock(module)
    return attentions


def use_kernels(model: nn.Module) -> None:
    """Have the lean forward passes of a model compute norms, sums and gates by kernels of our own."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, LeanResidual | LeanGatedGelu | LeanBlock):
            forward.kernels = True
        if isinstance(module, Transformer2DModel) and LeanTokens.can_be(module):
            LeanTokens(module).put_in_place()
    for row in lean_blocks(model):
        for (_, block), (_, then) in itertools.pairwise(row):
            block.then = then


def join_times(model: nn.Module) -> None:
    """Have lean residual blocks compute what they add for a timestep as one product, without gradients."""
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    blocks = [
        forward
        for forward in forwards
        if isinstance(forward, LeanResidual) and _is_plain_linear(forward.time_layer)
    ]
    if len({(block.time_layer.in_features, type(block.activation)) for block in blocks}) == 1:
        together = _TimeProjections(blocks)
        for place, block in enumerate(blocks):
            block.time_projection = functools.partial(together, place)


class _TimeProjections:
    """What several residual blocks add for a timestep, computed when the first of them asks."""

    @torch.no_grad()
    def __init__(self, blocks: Sequence[LeanResidual]) -> None:
        layers = [block.time_layer for block in blocks]
        self._act, self._sizes = blocks[0].activation, [layer.out_features for layer in layers]
        self._weight = torch.cat([layer.weight for layer in layers])
        self._bias = torch.cat([layer.bias for layer in layers])
        for layer, piece in zip(layers, self._weight.split(self._sizes), strict=True):
            layer.weight.data = piece  # so that the weights are not held twice

    @torch.no_grad()
    def __call__(self, place: int, embedding: Tensor) -> Tensor:
        """Return what one block adds, (B, C'), for the embedding (B, E) that all blocks are given."""
        pieces: Sequence[Tensor] | None = getattr(embedding, _TIMES, None)
        if pieces is None:
            pieces = functional.linear(self._act(embedding), self._weight, self._bias).split(self._sizes, 1)
            setattr(embedding, _TIMES, pieces)
        return pieces[place]


_LEAN = (LeanAttention, LeanResidual, LeanGatedGelu, LeanBlock)


def is_lean(model: nn.Module) -> bool:
    """Tell whether a module of a model has a lean forward pass."""
    return any(isinstance(module.__dict__.get("forward"), _LEAN) for module in model.modules())


def undo_lean(model: nn.Module) -> None:
    """Give every module its own forward pass back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _LEAN):
            del module.forward
        LeanTokens.take_out(module)


def _is_plain_attention(module: Any) -> bool:
    """Tell whether a module's processor does nothing that :class:`LeanAttention` leaves out."""
    return (
        type(module.processor).__name__ in _KERNELS
        and module.rescale_output_factor == 1.0
        and not module.residual_connection
        and not module.norm_cross
        and all(
            getattr(module, name, None) is None for name in ("spatial_norm", "group_norm", "norm_q", "norm_k")
        )
        and isinstance(module.to_out, nn.ModuleList)
        and _does_nothing(module.to_out[1])
    )


def is_plain_residual(module: Any) -> bool:
    """Tell whether a block does nothing that :class:`LeanResidual` leaves out."""
    return (
        module.output_scale_factor == 1.0
        and module.time_embedding_norm == "default"
        and module.time_emb_proj is not None
        and not module.skip_time_act
        and module.upsample is None
        and module.downsample is None
        and _does_nothing(module.dropout)
    )


def _is_plain_linear(layer: Any) -> bool:
    return type(layer) is nn.Linear and layer.bias is not None


def _does_nothing(dropout: Any) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.p == 0.0


def _fused(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's fused attention, as ``AttnProcessor2_0`` has it."""
    batch, heads = query.shape[0], module.heads
    query, key, value = (
        part.view(batch, -1, heads, part.shape[-1] // heads).transpose(1, 2) for part in (query, key, value)
    )
    output = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
    return output.transpose(1, 2).reshape(batch, -1, heads * query.shape[-1])


def _classic(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by its three steps, as ``AttnProcessor`` has it."""
    query, key, value = (module.head_to_batch_dim(part) for part in (query, key, value))
    probabilities = module.get_attention_scores(query, key, None)
    output: Tensor = module.batch_to_head_dim(torch.bmm(probabilities, value))
    return output


def _xformers(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The xformers library's, as ``XFormersAttnProcessor`` has it."""
    operations: Any = importlib.import_module("xformers.ops")
    split = (module.head_to_batch_dim(part).contiguous() for part in (query, key, value))
    output = operations.memory_efficient_attention(*split, attn_bias=None, scale=module.scale)
    merged: Tensor = module.batch_to_head_dim(output.to(query.dtype))
    return merged


_KERNELS: Mapping[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "AttnProcessor2_0": _fused,
    "AttnProcessor": _classic,
    "XFormersAttnProcessor": _xformers,
}
"""What computes an attention from its projections, by the class of diffusers' processor that does so, too."""
