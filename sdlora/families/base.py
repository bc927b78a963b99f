"""What a model family is: the interface through which every base model is used.

A family knows its components, how images and captions are encoded and how the denoiser is called.
It knows neither adapters nor file formats; for those it only declares data (:mod:`sdlora.families.facts`).
:data:`Conditioning` is opaque to everyone else: named tensors that only the family reads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..diffusion.process import NoiseProcess
from .facts import FamilyInfo
from .fingerprint import file_digest

Conditioning = dict[str, Tensor]
"""Encoded captions: name -> (B, ...); only the family knows what the names mean."""


@dataclass(frozen=True)
class BaseModelInfo:
    """What is known about one loaded base model.

    Attributes:
        source: what the user gave (``mini``, a path, a hub id).
        title: name for people and for file headers.
        weights: the checkpoint, or the file of a folder's denoiser.
        recommended: settings the base's author suggests, by dotted key (``sdlora.json`` of the base).
    """

    source: str
    title: str
    weights: Path
    recommended: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of :attr:`weights`; identifies the base. Read on first use: files are large."""
        return file_digest(self.weights)


@dataclass(frozen=True)
class SizeHint:
    """Pixel sizes some families condition on, each (height, width) or (top, left)."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents, unscaled: mean and log-variance, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw latents (B, C, h, w) in float32 with noise from a CPU generator."""
        mean = self.mean.float()
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32).to(mean.device)
        # z = mean + deviation * noise, deviation = sqrt(exp(logvar)), (B, C, h, w); clamped as diffusers does
        return mean + torch.exp(0.5 * self.logvar.float().clamp(-30.0, 20.0)) * noise


@dataclass(frozen=True)
class LatentSpace:
    """The latents that a denoiser works on: how large they are, and how they follow from the autoencoder's.

    Attributes:
        channels: C.
        factor: px of an image's side that one latent stands for.
        scaling: factor that brings the deviation of the autoencoder's latents near 1.
        shift: subtracted first, which brings their mean near 0.
    """

    channels: int
    factor: int
    scaling: float
    shift: float = 0.0

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of an image of that size in px."""
        return self.channels, height // self.factor, width // self.factor

    def scaled(self, latents: Tensor) -> Tensor:
        """Bring the autoencoder's latents (B, C, h, w) to the scale that the denoiser works at."""
        return (latents - self.shift) * self.scaling

    def unscaled(self, latents: Tensor) -> Tensor:
        """Undo :meth:`scaled`."""
        return latents / self.scaling + self.shift


@dataclass(frozen=True)
class ModelFacts:
    """What follows from how a base is built and loaded.

    Attributes:
        native_resolution: side in px of the square images the base was trained on.
        size_multiple: image sides must be multiples of this many px.
        latents: what the denoiser works on.
        device: where the denoiser runs.
        dtype: number format of the frozen weights.
    """

    native_resolution: int
    size_multiple: int
    latents: LatentSpace
    device: torch.device
    dtype: torch.dtype


class DiffusionModel(ABC):
    """A loaded base model of one family, ready to train or generate."""

    info: ClassVar[FamilyInfo]
    base: BaseModelInfo
    facts: ModelFacts
    process: NoiseProcess

    @abstractmethod
    def components(self) -> Mapping[str, nn.Module]:
        """Return all modules by their names in diffusers' pipelines: those that can be adapted
        (:attr:`FamilyInfo.components`) and the autoencoder, ``vae``."""

    @abstractmethod
    def encoder_fingerprint(self, which: Literal["images", "captions"]) -> str:
        """Return a hex digest that changes whenever the encoder's weights or settings change."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Posterior:
        """Encode pixels (B, 3, H, W) in [-1, 1] to the unscaled posterior over latents."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1], float32."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Encode prompts of any length, with gradients if the caller has enabled them.

        Each is encoded as if it were alone; states of shorter ones are repeated (:func:`stack_conditioning`).

        Brackets weight words (:mod:`sdlora.families.emphasis`); literal ones are escaped.
        """

    @abstractmethod
    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Sequence[SizeHint]
    ) -> Tensor:
        """Run the denoiser.

        Args:
            noisy: (B, C, h, w) noisy latents, any float type.
            timesteps: (B,) step index 0..999.
            text: conditioning of B captions.
            sizes: one hint an image.

        Returns:
            (B, C, h, w) in float32, to be compared with the process's target.
        """

    @abstractmethod
    def prepare(
        self,
        *,
        training: bool,
        gradient_checkpointing: bool = False,
        keep_text: bool = True,
        keep_images: bool = False,
        lean: bool = False,
    ) -> None:
        """Set modes, devices and the attention that is fastest for what comes next.

        Args:
            training: train mode, with the image encoder off the accelerator; else eval mode, with all on it.
            gradient_checkpointing: compute activations twice instead of keeping them.
            keep_text: keep the text encoders on the accelerator while training, or if lean.
            keep_images: keep the image encoder there, too.
            lean: when not training, bring encoders that are not kept to the accelerator only while they work,
                so that previews take little more memory than training itself.
        """


def stack_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """Join conditionings of single captions, each tensor without batch axis, into one of B captions.

    Captions with different numbers of 75-token chunks are repeated to a common length: cross-attention to a
    repeated context equals attention to the original, as the softmax weights are split evenly.
    """
    joined: Conditioning = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        longest = max(t.shape[0] for t in tensors)
        if tensors[0].ndim == 2 and any(t.shape[0] != longest for t in tensors):
            least = _common_length([t.shape[0] for t in tensors])
            tensors = [t.repeat(least // t.shape[0], 1) for t in tensors]
        joined[name] = torch.stack(tensors)
    return joined


def _common_length(lengths: Sequence[int]) -> int:
    return math.lcm(*lengths)
