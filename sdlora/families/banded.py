"""An autoencoder that works on bands of rows, so that what it takes on a card does not grow with the image.

Between two layers the whole image lies in main memory; on the device is one band of it, with the rows
beside it that a 3x3 convolution sees. A group norm needs the statistics of the whole image: they are
gathered band by band first, then applied. So nothing is approximated, unlike with tiles, each of which is
normed by itself; the result differs from that of the whole only as sums of other order do, by no more than
:data:`BOUND` of its largest number (``tests/families/test_banded.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as functional
from torch import Tensor

BOUND = 2e-5
"""How far a result may be from that of the whole image in float32, as a share of its largest number."""
BAND = 1 << 22
"""Numbers in a band; about five of them are on the device at a time, 80 MiB in float32."""


@dataclass
class Copied:
    """Bytes that went from main memory to the device and back."""

    to_device: int = 0
    to_host: int = 0


class BandedAutoencoder:
    """Encodes and decodes with the layers of diffusers' ``AutoencoderKL``, band by band.

    Args:
        vae: its layers are plain, see :func:`can_be_banded`.
        band: numbers in a band.

    Attributes:
        copied: so far; on the meta device, where nothing is kept, what would have been.
    """

    def __init__(self, vae: Any, band: int = BAND) -> None:
        self._vae, self._band = vae, band
        self.copied = Copied()

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the posterior's mean and log-variance beside each other (B, 2C, h, w) of (B, 3, H, W)."""
        moments = _joined([self._encoded(image[None]) for image in pixels])
        return moments if self._vae.quant_conv is None else self._vae.quant_conv(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), in main memory, of unscaled latents (B, C, h, w)."""
        if self._vae.post_quant_conv is not None:
            latents = self._vae.post_quant_conv(latents)
        return _joined([self._decoded(latent[None]) for latent in latents])

    def _encoded(self, image: Tensor) -> Tensor:
        encoder = self._vae.encoder
        device = encoder.conv_in.weight.device
        states = self._convolved(_Image.of(self, image, device), encoder.conv_in)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                states = self._residual(states, resnet)
            for sampler in block.downsamplers or ():
                states = self._halved(states, sampler.conv)
        states = self._middle(states, encoder.mid_block)
        last = self._convolved(states, encoder.conv_out, states.norm(encoder.conv_norm_out))
        return last.rows(0, last.height)

    def _decoded(self, latent: Tensor) -> Tensor:
        decoder = self._vae.decoder
        device = decoder.conv_in.weight.device
        states = self._convolved(_Image.of(self, latent, device), decoder.conv_in)
        states = self._middle(states, decoder.mid_block)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                states = self._residual(states, resnet)
            for sampler in block.upsamplers or ():
                states = self._doubled(states, sampler.conv)
        last = self._convolved(states, decoder.conv_out, states.norm(decoder.conv_norm_out))
        return last.whole

    def _middle(self, states: _Image, block: Any) -> _Image:
        states = self._residual(states, block.resnets[0])
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                states = self._attended(states, attention)
            states = self._residual(states, resnet)
        return states

    def _residual(self, states: _Image, block: Any) -> _Image:
        """Return what a ``ResnetBlock2D`` without a timestep makes of an image."""
        inner = self._convolved(states, block.conv1, states.norm(block.norm1))
        normed = inner.norm(block.norm2)

        def band(start: int, stop: int) -> Tensor:
            past = states.rows(start, stop)
            past = past if block.conv_shortcut is None else block.conv_shortcut(past)
            return past.add_(_beside(inner, block.conv2, normed, start, stop))

        return self._made(states, block.conv2.out_channels, states.height, states.width, band)

    def _convolved(self, states: _Image, conv: Any, norm: _Norm | None = None) -> _Image:
        """Return a 3x3 convolution of an image, which is normed and activated before if there is a norm."""
        return self._made(
            *(states, conv.out_channels, states.height, states.width),
            lambda start, stop: _beside(states, conv, norm, start, stop),
        )

    def _halved(self, states: _Image, conv: Any) -> _Image:
        """Return a 3x3 convolution of every other row and column, with zeros below and on the right."""

        def band(start: int, stop: int) -> Tensor:
            rows = states.rows(2 * start, 2 * stop + 1)
            below = 2 * stop + 1 - min(2 * stop + 1, states.height)
            return functional.conv2d(functional.pad(rows, (0, 1, 0, below)), conv.weight, conv.bias, stride=2)

        height, width = states.height // 2, states.width // 2
        return self._made(states, conv.out_channels, height, width, band, seen=4)

    def _doubled(self, states: _Image, conv: Any) -> _Image:
        """Return a 3x3 convolution of an image enlarged to twice its sides."""
        height = 2 * states.height

        def band(start: int, stop: int) -> Tensor:
            first = max(0, (start - 1) // 2)
            rows = states.rows(first, stop // 2 + 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
            top, bottom = max(0, start - 1) - 2 * first, min(height, stop + 1) - 2 * first
            outside = (0, 0, int(start == 0), int(stop == height))
            return functional.conv2d(
                functional.pad(rows[:, :, top:bottom], outside), conv.weight, conv.bias, padding=(0, 1)
            )

        return self._made(states, conv.out_channels, height, 2 * states.width, band)

    def _attended(self, states: _Image, module: Any) -> _Image:
        """Return the self-attention over all places: keys and values of all, queries band by band."""
        norm, heads = states.norm(module.group_norm), module.heads

        def tokens(start: int, stop: int) -> Tensor:
            return norm.applied(states.rows(start, stop)).flatten(2).transpose(1, 2)  # (1, S, C)

        def split(projected: Tensor) -> Tensor:
            return projected.unflatten(2, (heads, -1)).transpose(1, 2)  # (1, heads, S, C / heads)

        shape = (1, states.height * states.width, module.to_k.out_features)
        keys, values = (states.blank(shape) for _ in range(2))
        for start, stop in self._bands(states.channels, states.height, states.width):
            part = tokens(start, stop)
            place = slice(start * states.width, stop * states.width)
            keys[:, place], values[:, place] = module.to_k(part), module.to_v(part)

        def band(start: int, stop: int) -> Tensor:
            query = split(module.to_q(tokens(start, stop)))
            seen = functional.scaled_dot_product_attention(query, split(keys), split(values))
            out = module.to_out[0](seen.transpose(1, 2).flatten(2)).transpose(1, 2)
            return states.rows(start, stop).add_(out.unflatten(2, (stop - start, states.width)))

        return self._made(states, states.channels, states.height, states.width, band)

    def _made(
        self,
        like: _Image,
        channels: int,
        height: int,
        width: int,
        band: Callable[[int, int], Tensor],
        seen: int = 1,
    ) -> _Image:
        """Return an image that a function makes of the numbers of a band's first row and of the next band's.

        Args:
            like: what it is made of.
            channels: of the result, as ``height`` and ``width``.
            height: see above.
            width: see above.
            band: makes rows of the result.
            seen: places of ``like`` that one place of the result looks at.
        """
        image = _Image(self, (1, channels, height, width), like.dtype, like.device)
        for start, stop in self._bands(max(channels, seen * like.channels), height, width):
            image.put(start, stop, band(start, stop))
        return image

    def _bands(self, channels: int, height: int, width: int) -> Iterator[tuple[int, int]]:
        rows = max(1, self._band // (channels * width))
        for start in range(0, height, rows):
            yield start, min(height, start + rows)


class _Image:
    """Numbers (1, C, H, W) in main memory, of which bands are worked on elsewhere.

    On the meta device nothing is kept, so that only what would be on a card is counted.
    """

    def __init__(
        self, owner: BandedAutoencoder, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.owner, self.dtype, self.device = owner, dtype, device
        _, self.channels, self.height, self.width = shape
        self.whole = torch.empty((), device="meta", dtype=dtype).expand(*shape)
        if device.type != "meta":
            self.whole = torch.empty(*shape, dtype=dtype)

    @classmethod
    def of(cls, owner: BandedAutoencoder, whole: Tensor, device: torch.device) -> Self:
        """Return one that holds what is given."""
        image = cls(owner, whole.shape, whole.dtype, device)
        if device.type != "meta":
            image.whole = whole.cpu()
        return image

    def rows(self, start: int, stop: int) -> Tensor:
        """Return a band on the device, a copy; what lies outside the image is left out."""
        start, stop = max(0, start), min(self.height, stop)
        shape = (1, self.channels, stop - start, self.width)
        band = self.blank(shape)
        if self.device.type != "meta":
            band.copy_(self.whole[:, :, start:stop])
        self.owner.copied.to_device += band.numel() * band.element_size()
        return band

    def put(self, start: int, stop: int, band: Tensor) -> None:
        """Take a band over."""
        if self.device.type != "meta":
            self.whole[:, :, start:stop].copy_(band)
        self.owner.copied.to_host += band.numel() * band.element_size()

    def blank(self, shape: tuple[int, ...]) -> Tensor:
        """Return room on the device."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def norm(self, layer: Any) -> _Norm:
        """Gather the statistics of a group norm over the whole image.

        Mean and squared deviations of the bands are joined as Chan, Golub and LeVeque (1983) do, in float64.
        """
        groups, seen = layer.num_groups, 0
        mean = torch.zeros(groups, dtype=torch.float64)
        squares = torch.zeros(groups, dtype=torch.float64)  # sums of squared deviations from the mean
        for start, stop in self.owner._bands(self.channels, self.height, self.width):
            band = self.rows(start, stop).view(groups, -1)
            variance, middle = torch.var_mean(band, 1, correction=0)
            count = band.shape[1]
            if self.device.type == "meta":
                continue
            variance, middle = variance.cpu().double(), middle.cpu().double()
            apart, both = middle - mean, seen + count
            squares += variance * count + apart.square() * (seen * count / both)
            mean += apart * (count / both)
            seen = both
        deviation = (squares / max(seen, 1) + layer.eps).rsqrt()
        times = self.channels // groups
        scale = deviation.repeat_interleave(times).to(self.device, self.dtype) * layer.weight
        shift = layer.bias - mean.repeat_interleave(times).to(self.device, self.dtype) * scale
        return _Norm(scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1))


@dataclass(frozen=True)
class _Norm:
    """A group norm with the statistics of an image: y = scale x + shift, each (1, C, 1, 1)."""

    scale: Tensor
    shift: Tensor

    def applied(self, band: Tensor) -> Tensor:
        """Norm a band, in place."""
        return band.mul_(self.scale).add_(self.shift)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _beside(states: _Image, conv: Any, norm: _Norm | None, start: int, stop: int) -> Tensor:
    """Return rows of a 3x3 convolution of an image, normed and activated before if there is a norm."""
    rows = states.rows(start - 1, stop + 1)
    if norm is not None:
        rows = functional.silu(norm.applied(rows), inplace=True)
    rows = functional.pad(rows, (0, 0, int(start == 0), int(stop == states.height)))  # zeros, after the norm
    result: Tensor = functional.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))
    return result


def can_be_banded(vae: Any) -> bool:
    """Tell whether an autoencoder consists of nothing but what :class:`BandedAutoencoder` knows."""
    from torch import nn

    halves = (vae.encoder, vae.decoder)
    resnets, attentions, samplers = [], [], []
    for half in halves:
        blocks = [*getattr(half, "down_blocks", ()), *getattr(half, "up_blocks", ())]
        resnets += [resnet for block in (*blocks, half.mid_block) for resnet in block.resnets]
        attentions += [attention for attention in half.mid_block.attentions if attention is not None]
        for block in blocks:
            if getattr(block, "attentions", None):
                return False
            samplers += [*(getattr(block, "downsamplers", None) or ())]
            samplers += [*(getattr(block, "upsamplers", None) or ())]
    norms = [norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2)]
    norms += [attention.group_norm for attention in attentions] + [half.conv_norm_out for half in halves]
    acts = [resnet.nonlinearity for resnet in resnets] + [half.conv_act for half in halves]
    return (
        all(type(norm) is nn.GroupNorm for norm in norms)
        and all(isinstance(act, nn.SiLU) for act in acts)
        and all(_is_plain_residual(resnet) for resnet in resnets)
        and all(_is_plain_attention(attention) for attention in attentions)
        and all(sampler.norm is None and sampler.use_conv for sampler in samplers)
        and not any(getattr(sampler, "use_conv_transpose", False) for sampler in samplers)
        and all(
            getattr(sampler, "padding", 0) == 0 for sampler in samplers if not hasattr(sampler, "interpolate")
        )
    )


def _is_plain_residual(block: Any) -> bool:
    return (
        block.time_emb_proj is None
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1.0
        and block.dropout.p == 0.0
    )


def _is_plain_attention(module: Any) -> bool:
    return (
        bool(module.residual_connection)
        and module.rescale_output_factor == 1.0
        and module.spatial_norm is None
        and type(module.processor).__name__ in ("AttnProcessor2_0", "AttnProcessor", "XFormersAttnProcessor")
    )
