"""Trains the text encoder and the U-Net together on cached latents."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from transformers import CLIPTextModel, CLIPTokenizer

from . import checkpoint, parallel
from .captions import caption, load_nouns
from .config import BASE_SETS
from .files import read_json, write_bytes, write_json
from .models import choose_numerics, new_scheduler
from .muon import Muon
from .progress import Progress
from .renders import IconImage, to_tensor

SET_WEIGHTS = {"noto": 0.6, "noto-v1": 0.4, "fluent": 1.0, "fluent-flat": 1.0}
"""How often each set is drawn.

Fluent and Fluent Flat share their shapes: leaning on them gives plain prompts
one coherent look, which a small network learns sooner than four.
"""

MUON_FACTOR = 2.0
"""Learning rate of Muon's weights as a multiple of AdamW's."""


@dataclass(frozen=True)
class DenoiserSettings:
    """How to train.

    Attributes:
        samples: Images to train on in all.
        minutes: Wall-clock budget; when set, the learning rate falls to zero by
            whichever of the two ends first.
        batch: Images in a step, all workers together. Many small steps: with 32 it drew after 121,000
            images what it did not draw after 140,000 with 64.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        ema: Final decay of the averaged weights.
        min_snr: Signal-to-noise ratio above which time steps are drawn less often;
            the usual 5 spends a quarter of the samples on texture, which is
            learned early and for all subjects alike.
        prediction: What the U-Net predicts: ``epsilon`` or ``v_prediction``.
        seed: Seed of every random draw.
        checkpoint_seconds: Time between checkpoints.
        compile: Whether to compile the U-Net (worth minutes of compiling only
            for a long run).
    """

    samples: int = 208_000
    minutes: float | None = None
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.995
    min_snr: float = 1.0
    prediction: str = "epsilon"
    seed: int = 0
    checkpoint_seconds: float = 120.0
    compile: bool = False


@dataclass(frozen=True)
class Latents:
    """Posterior of every placing of every image, and what each image is."""

    mean: Tensor
    std: Tensor
    images: list[IconImage]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, icon_images: list[IconImage], device: torch.device) -> Latents:
    """Encodes byte images (N, variants, H, W, 3) to scaled posteriors in memory."""
    count, variants = images.shape[:2]
    means, stds = [], []
    for chunk in images.flatten(0, 1).split(64):
        # Moments are kept, not samples: each visit draws its own.
        posterior = vae.encode(to_tensor(chunk.numpy()).to(device)).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        stds.append(posterior.std * vae.config.scaling_factor)
    mean = torch.cat(means).unflatten(0, (count, variants)).cpu()
    return Latents(mean, torch.cat(stds).view_as(mean).cpu(), icon_images)


def save_latents(latents: Latents, folder: Path) -> None:
    """Writes posteriors and what they are of."""
    tensors = {"mean": latents.mean.contiguous(), "std": latents.std.contiguous()}
    write_bytes(folder / "latents.safetensors", safetensors.torch.save(tensors))
    write_json(folder / "latents.json", [[p.icon_set.key, p.name] for p in latents.images])


def load_latents(folder: Path) -> Latents:
    """Undoes ``save_latents``."""
    tensors = safetensors.torch.load_file(folder / "latents.safetensors")
    sets = {icon_set.key: icon_set for icon_set in BASE_SETS}
    images = [IconImage(sets[key], name) for key, name in read_json(folder / "latents.json")]
    return Latents(tensors["mean"], tensors["std"], images)


def split_parameters(
    unet: nn.Module, text_encoder: nn.Module
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the weights for Muon and the rest, for AdamW.

    Embeddings, and the layers that meet pixels or predictions, are not linear
    maps between feature spaces and keep AdamW.
    """
    edges = ("conv_in", "conv_out", "embedding", "time_emb")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in (unet, text_encoder):
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim >= 2 and not any(edge in name for edge in edges)
            (matrices if hidden else others).append(parameter)
    return matrices, others


class Trainer:
    """One training run of the denoiser, resumable at any checkpoint."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        latents: Latents,
        settings: DenoiserSettings,
        device: torch.device,
    ) -> None:
        """Prepares optimisers, averages and the noise schedule."""
        self.settings, self.device, self.latents = settings, device, latents
        self.tokenizer = tokenizer
        self.unet, self.text_encoder = unet.to(device).train(), text_encoder.to(device).train()
        self.autocast = choose_numerics(self.unet, device)
        self.ema_unet = deepcopy(self.unet).requires_grad_(False).eval()
        self.ema_text = deepcopy(self.text_encoder).requires_grad_(False).eval()
        matrices, others = split_parameters(self.unet, self.text_encoder)
        self.optimizers: list[Optimizer] = [
            Muon(matrices, settings.lr),
            AdamW(others, settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        alphas = new_scheduler().alphas_cumprod
        ratio = alphas / (1 - alphas)
        rises = settings.prediction == "v_prediction"  # min-SNR of Hang et al. 2023 in either target's terms
        weight = ratio.clamp(max=settings.min_snr) / (ratio + 1 if rises else ratio)
        self.times_cdf = weight.cumsum(0) / weight.sum()
        self.alphas = alphas.to(device)
        # NaN-free and fast: subnormal numbers take a CPU a hundred times longer.
        torch.set_flush_denormal(True)
        self.weights = torch.tensor([SET_WEIGHTS[p.icon_set.key] for p in latents.images])
        self.done = self.step_count = 0
        self.elapsed_before = 0.0
        self.started = time.time()
        self.forward: Callable[..., Any] = torch.compile(self.unet) if settings.compile else self.unet

    @property
    def elapsed(self) -> float:
        """Wall-clock seconds of training, earlier runs included."""
        return self.elapsed_before + time.time() - self.started

    @property
    def fraction(self) -> float:
        """Share of the training that is done."""
        share = self.done / self.settings.samples
        if self.settings.minutes is not None:
            # Workers must agree, or one would stop while the others wait for it.
            elapsed = parallel.agree(self.elapsed)
            share = max(share, elapsed / (60 * self.settings.minutes))
        return min(share, 1.0)

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "ema_unet": self.ema_unet,
            "ema_text_encoder": self.ema_text,
        }

    def save(self, folder: Path) -> None:
        """Writes a checkpoint."""
        state = {"done": self.done, "step": self.step_count, "elapsed": self.elapsed}
        checkpoint.save(folder, self._modules(), self.optimizers, state)

    def resume(self, folder: Path) -> bool:
        """Goes on from a checkpoint, if there is one."""
        state = checkpoint.load(folder, self._modules(), self.optimizers)
        if state is None:
            return False
        self.done, self.step_count = state["done"], state["step"]
        self.elapsed_before, self.started = state["elapsed"], time.time()
        return True

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Draws latents and token ids; each step has its own seed, so runs resume exactly."""
        size = self.settings.batch // parallel.world()
        seed = (self.settings.seed * 1_000_003 + self.step_count) * 64 + parallel.rank()
        self.generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        chosen = torch.multinomial(self.weights, size, generator=self.generator)
        variants = self.latents.mean.shape[1]
        which = torch.randint(variants, (size,), generator=self.generator)
        mean = self.latents.mean[chosen, which]
        noise = torch.randn(mean.shape, generator=self.generator)
        phrases = load_nouns().phrases
        images = [self.latents.images[i] for i in chosen.tolist()]
        texts = [caption(phrases[p.name], p.icon_set, rng) for p in images]
        ids = self.tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        drawn = mean + noise * self.latents.std[chosen, which]
        return drawn.to(self.device), ids.to(self.device)

    def _times(self, size: int) -> Tensor:
        """Draws time steps as often as min-SNR weighs them.

        Drawing by weight instead of weighing the loss wastes no sample on a
        step that counts for little, and one draw from each of ``size`` equal
        shares of the distribution has less variance than free draws.
        """
        spread = torch.rand(size, generator=self.generator) + torch.arange(size)
        return torch.searchsorted(self.times_cdf, spread / size).clamp_(max=999).to(self.device)

    def loss(self) -> Tensor:
        """Returns the prediction's error on one batch."""
        latents, ids = self._batch()
        size = len(latents)
        times = self._times(size)
        noise = torch.randn(latents.shape, generator=self.generator).to(self.device)
        alpha = self.alphas[times]
        signal, spoil = alpha.sqrt().view(-1, 1, 1, 1), (1 - alpha).sqrt().view(-1, 1, 1, 1)
        noisy = signal * latents + spoil * noise
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden = self.text_encoder(ids)[0]
            predicted = self.forward(noisy, times, hidden, return_dict=False)[0]
        # v of Salimans and Ho 2022: what is left of the noise when the image is taken out, and more
        wanted = signal * noise - spoil * latents if self.settings.prediction == "v_prediction" else noise
        return F.mse_loss(predicted.float(), wanted)

    def _set_rate(self, fraction: float) -> None:
        warm = min(1.0, (self.step_count + 1) / self.settings.warmup)
        rate = self.settings.lr * warm * 0.5 * (1 + math.cos(math.pi * fraction))
        for optimizer in self.optimizers:
            factor = MUON_FACTOR if isinstance(optimizer, Muon) else 1.0
            for group in optimizer.param_groups:
                group["lr"] = factor * rate

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step_count) / (10 + self.step_count))
        pairs = ((self.ema_unet, self.unet), (self.ema_text, self.text_encoder))
        for averaged, live in pairs:
            torch._foreach_lerp_(list(averaged.parameters()), [p.data for p in live.parameters()], 1 - decay)

    def step(self, fraction: float) -> float:
        """Trains on one batch and returns this worker's loss.

        Args:
            fraction: Share of the training that is done; it sets the rate.
        """
        self._set_rate(fraction)
        loss = self.loss()
        loss.backward()
        parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        parallel.average([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self.done += self.settings.batch
        self._average()
        return loss.item()

    def run(self, folder: Path) -> None:
        """Trains to the end of the budget, with checkpoints in ``folder``."""
        progress = Progress("denoiser", self.settings.samples, self.done, self.fraction)
        saved = time.time()
        while (fraction := self.fraction) < 1.0:
            value = self.step(fraction)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss is {value} at step {self.step_count}; lower the learning rate."
                )
            if parallel.rank() > 0:
                continue
            progress.update(self.done, value, fraction)
            if time.time() - saved > self.settings.checkpoint_seconds:
                self.save(folder)
                saved = time.time()
        if parallel.rank() == 0:
            self.save(folder)


def restore_average(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, folder: Path) -> None:
    """Loads the averaged weights of the latest checkpoint, if there is one."""
    checkpoint.load(folder, {"ema_unet": unet, "ema_text_encoder": text_encoder}, [])
