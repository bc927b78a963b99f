"""(seed, step, micro-batch, rank) -> :class:`Batch`: everything random about it follows from these four.

Nothing has to be saved to resume: asking again gives the same pictures, mirrors, dropped captions,
latents, noise and timesteps.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.base import Conditioning, DiffusionModel, SizeHint, stack_conditioning
from .cache import EncodedDataset
from .order import Visit


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket, ready to be noised.

    Attributes:
        latents: (B, C, h, w) float32, scaled.
        captions: the B captions after dropout.
        text: their conditioning, or None when the text encoder is trained and must run in the loop.
        sizes: pixel sizes of the B pictures.
        names: file names, for messages.
        weights: (B,) float32, how much each picture counts in the loss.
    """

    latents: Tensor
    captions: tuple[str, ...]
    text: Conditioning | None
    sizes: tuple[SizeHint, ...]
    names: tuple[str, ...]
    weights: Tensor


def generator_for(*parts: int | str) -> torch.Generator:
    """Return a CPU generator whose seed is a stable hash of ``parts``."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def make_batch(
    data: EncodedDataset,
    model: DiffusionModel,
    visits: Sequence[Visit],
    generator: torch.Generator,
    *,
    seed: int,
    caption_dropout: float = 0.0,
) -> Batch:
    """Gather one micro-batch; the posterior is sampled with ``generator``."""
    latents, captions, sizes, names = [], [], [], []
    for visit in visits:
        mirror = data.flip and _draw(seed, "flip", visit) < 0.5
        dropped = _draw(seed, "caption", visit) < caption_dropout
        encoded = data.image(visit.index, mirror=mirror)
        latents.append(model.scale_latents(encoded.posterior.sample(generator)))
        captions.append("" if dropped else data.items[visit.index].caption)
        sizes.append(encoded.size)
        names.append(data.items[visit.index].name)
    text = stack_conditioning([data.caption(c) for c in captions]) if data.encode_captions else None
    weights = torch.tensor([data.items[visit.index].weight for visit in visits], dtype=torch.float32)
    return Batch(torch.cat(latents), tuple(captions), text, tuple(sizes), tuple(names), weights)


def _draw(seed: int, what: str, visit: Visit) -> float:
    return random.Random(f"{seed}/{what}/{visit.epoch}/{visit.index}/{visit.repeat}").random()
