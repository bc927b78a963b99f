"""A small judge: names the noun that an image shows."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from . import renders
from .captions import load_nouns
from .config import ALL_SETS
from .files import write_bytes
from .progress import Progress
from .renders import to_tensor

STEPS = 700
BATCH = 64


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """A plain convolutional classifier of 64-pixel images."""

    def __init__(self, classes: int) -> None:
        """Makes an untrained judge of ``classes`` nouns."""
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        pairs = pairwise(widths)
        self.features = nn.Sequential(*(_block(a, b) for a, b in pairs))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(192 * 16, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Returns class scores for images in [-1, 1]."""
        return self.head(self.features(images))


def _blur(images: Tensor, rng: random.Random) -> Tensor:
    """Softens an image as the VAE does, so that softness is not a clue."""
    size = rng.choice((64, 48, 40, 32))
    small = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[-1], mode="bilinear")


def augment(images: Tensor, rng: random.Random) -> Tensor:
    """Flips, moves, recolours and softens: what is left is the shape."""
    if rng.random() < 0.5:
        images = images.flip(-1)
    down, right = rng.randint(-5, 5), rng.randint(-5, 5)
    images = F.pad(images, (5, 5, 5, 5), value=1.0)[..., 5 + down : 69 + down, 5 + right : 69 + right]
    mix = torch.eye(3) + 0.25 * torch.randn(3, 3, generator=_generator(rng))
    if rng.random() < 0.3:
        mix = torch.full((3, 3), 1 / 3)
    # On inverted images, so that the white ground stays white.
    ink = torch.einsum("oc,nchw->nohw", mix, 1 - images)
    images = (1 - ink).clamp(-1, 1)
    images = _blur(images, rng)
    return images + rng.choice((0.0, 0.1)) * torch.randn(images.shape, generator=_generator(rng))


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(32))


def dataset(cache_dir: Path) -> tuple[np.ndarray, Tensor]:
    """Renders every noun of every set, ink included, with its class number."""
    icon_images = renders.base_images(cache_dir, ALL_SETS)
    names = list(load_nouns().phrases)
    images = renders.render_variants(icon_images, cache_dir, count=4, seed=1)
    classes = torch.tensor([names.index(icon_image.name) for icon_image in icon_images])
    return images.reshape(-1, *images.shape[2:]), classes.repeat_interleave(images.shape[1])


def train(cache_dir: Path, device: torch.device, steps: int = STEPS) -> Judge:
    """Trains a judge on the icon sets."""
    torch.manual_seed(0)
    images, classes = dataset(cache_dir)
    judge = Judge(len(load_nouns().phrases)).to(device).train()
    optimizer = AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    progress = Progress("classifier", steps)
    for step in range(steps):
        rng = random.Random(step)
        chosen = torch.randint(len(images), (BATCH,), generator=_generator(rng))
        # Eighths of the batch are augmented alike: cheap, and varied enough.
        parts = to_tensor(images[chosen.numpy()]).chunk(8)
        batch = torch.cat([augment(part, rng) for part in parts]).to(device)
        scores = judge(batch)
        loss = F.cross_entropy(scores, classes[chosen].to(device), label_smoothing=0.05)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.update(step + 1, loss.item())
    return judge.eval()


def train_or_load(folder: Path, cache_dir: Path, device: torch.device, steps: int = STEPS) -> Judge:
    """Returns the judge kept in ``folder``, training it the first time."""
    path = folder / "judge.safetensors"
    if path.exists():
        judge = Judge(len(load_nouns().phrases))
        judge.load_state_dict(safetensors.torch.load_file(path))
        return judge.to(device).eval()
    judge = train(cache_dir, device, steps)
    weights = {name: tensor.cpu().contiguous() for name, tensor in judge.state_dict().items()}
    write_bytes(path, safetensors.torch.save(weights))
    return judge
