"""Trains the image autoencoder."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from . import checkpoint, parallel
from .models import autocast_type
from .progress import Progress
from .renders import to_tensor

# Rec. 601 luma; what is left of a colour without it is its hue and saturation.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class VaeSettings:
    """How to train the VAE.

    Attributes:
        samples: Images to train on in all.
        batch: Images in a step, all workers together.
        lr: Peak learning rate.
        decoder_only: Whether to leave the encoder alone, so that latents keep.
        icons: Icons of each set to learn from; all of them when ``None``.
        seed: Seed of every random draw.
        checkpoint_seconds: Time between checkpoints.
    """

    samples: int = 60_000
    batch: int = 16
    lr: float = 1e-3
    decoder_only: bool = False
    icons: int | None = None
    seed: int = 0
    checkpoint_seconds: float = 120.0


def chroma(images: Tensor) -> Tensor:
    """Returns the images without their luminance."""
    weights = images.new_tensor(_LUMA).view(1, 3, 1, 1)
    return images - (images * weights).sum(1, keepdim=True)


def slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns horizontal and vertical differences of neighbouring pixels."""
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(drawn: Tensor, true: Tensor) -> Tensor:
    """Returns a loss that asks for hue, place and edges.

    Plain L1 learns luminance first and hue very late, so colour without
    luminance and colour over 4x4 blocks have terms of their own.
    """
    edges = [F.l1_loss(a, b) for a, b in zip(slopes(drawn), slopes(true), strict=True)]
    return (
        0.5 * F.l1_loss(drawn, true)
        + F.mse_loss(drawn, true)
        + 3.0 * F.mse_loss(chroma(drawn), chroma(true))
        + 2.0 * F.mse_loss(F.avg_pool2d(drawn, 4), F.avg_pool2d(true, 4))
        + 0.5 * sum(edges, torch.zeros_like(edges[0]))
    )


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """Returns the mean over images of the PSNR of reconstructions, in decibels."""
    vae = vae.to(device).eval()
    values: list[float] = []
    for chunk in np.array_split(images, math.ceil(len(images) / 64)):
        true = to_tensor(chunk).to(device)
        drawn = vae.decode(vae.encode(true).latent_dist.mean).sample.clamp(-1, 1)
        # Peak to peak is 2, for values in [-1, 1].
        error = (drawn - true).square().mean((1, 2, 3)).clamp_min(1e-10)
        values += (10 * torch.log10(4 / error)).tolist()
    return sum(values) / len(values)


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """Returns the factor that brings latents to unit variance."""
    vae = vae.to(device).eval()
    chunks = np.array_split(images, math.ceil(len(images) / 64))
    latents = [vae.encode(to_tensor(c).to(device)).latent_dist.mean for c in chunks]
    return 1.0 / torch.cat(latents).std().item()


def restore(vae: AutoencoderKL, folder: Path) -> None:
    """Loads the latest checkpoint into ``vae``, if there is one."""
    state = checkpoint.load(folder, {"vae": vae}, [])
    if state is not None and state.get("scale"):
        vae.register_to_config(scaling_factor=state["scale"])


class VaeTrainer:
    """One training run of the VAE, resumable at any checkpoint."""

    def __init__(
        self,
        vae: AutoencoderKL,
        images: np.ndarray,
        settings: VaeSettings,
        device: torch.device,
    ) -> None:
        """Prepares the optimiser; ``images`` are bytes (N, H, W, 3)."""
        self.vae, self.images = vae.to(device).train(), images
        self.settings, self.device = settings, device
        if settings.decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        trained = [p for p in vae.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.done = self.step_count = 0

    def _batch(self) -> Tensor:
        size = self.settings.batch // parallel.world()
        seed = (self.settings.seed * 1_000_003 + self.step_count) * 64 + parallel.rank()
        self.generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.images), (size,), generator=self.generator)
        images = to_tensor(self.images[chosen.numpy()])
        flip = torch.rand(len(images), 1, 1, 1, generator=self.generator) < 0.5
        return torch.where(flip, images.flip(-1), images).to(self.device)

    def step(self) -> float:
        """Trains on one batch and returns this worker's loss."""
        share = self.done / self.settings.samples
        warm = min(1.0, (self.step_count + 1) / 50)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * warm * 0.5 * (1 + math.cos(math.pi * share))
        true = self._batch()
        kind = autocast_type(self.device)
        with torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            with torch.set_grad_enabled(not self.settings.decoder_only):
                moments = self.vae.encode(true).latent_dist.parameters
            # The spread and its price are counted in float32, as the loss is.
            posterior = DiagonalGaussianDistribution(moments.float())
            noise = torch.randn(posterior.mean.shape, generator=self.generator).to(self.device)
            drawn = self.vae.decode(posterior.mean + noise * posterior.std).sample.float()
        loss = reconstruction_loss(drawn, true)
        if not self.settings.decoder_only:
            loss = loss + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        parallel.average([p.grad for p in self.vae.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self.done += self.settings.batch
        return loss.item()

    def save(self, folder: Path) -> None:
        """Writes a checkpoint; the last one knows the scale of the latents."""
        finished = self.done >= self.settings.samples and not self.settings.decoder_only
        scale = latent_scale(self.vae, self.images, self.device) if finished else None
        if scale is not None:
            self.vae.register_to_config(scaling_factor=scale)
        state = {"done": self.done, "step": self.step_count, "scale": scale}
        checkpoint.save(folder, {"vae": self.vae}, [self.optimizer], state)

    def run(self, folder: Path) -> None:
        """Trains to the end, going on from a checkpoint in ``folder``."""
        state = checkpoint.load(folder, {"vae": self.vae}, [self.optimizer])
        if state is not None:
            self.done, self.step_count = state["done"], state["step"]
        progress = Progress("vae", self.settings.samples, self.done, self.done / self.settings.samples)
        saved = time.time()
        while self.done < self.settings.samples:
            value = self.step()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss is {value} at step {self.step_count}; lower the learning rate."
                )
            if parallel.rank() > 0:
                continue
            progress.update(self.done, value)
            if time.time() - saved > self.settings.checkpoint_seconds:
                self.save(folder)
                saved = time.time()
        if parallel.rank() == 0 and (state is None or self.done != state["done"]):
            self.save(folder)
