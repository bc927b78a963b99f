"""(seed, visits) -> :class:`Batch`: everything random about an image follows from the seed and the visit.

Nothing has to be saved to resume: asking again gives the same images, mirrors, dropped captions, latents,
noise and timesteps. Nor does it matter which other images share the micro-batch, or which process makes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...families.base import Conditioning, DiffusionModel, SizeHint, stack_conditioning
from ..reading.items import Visit
from .cache import EncodedDataset
from .views import draw_for


@dataclass(frozen=True)
class Batch:
    """Images of one bucket, ready to be noised.

    Attributes:
        latents: (B, C, h, w) float32, scaled.
        captions: the B captions after dropout, as the text encoder takes them.
        text: their conditioning, or None when the text encoder is trained and must run in the loop.
        sizes: pixel sizes of the B images.
        names: file names, for messages.
        weights: (B,) float32, how much each image counts in the loss.
        mask: (B, 1, h, w) float32, how much each place counts; None where all count alike.
        regularisation: which of the B are regularisation images.
        blank: conditioning of the empty caption, without batch axis; None as for ``text``.
        visits: which B visits these are; what is drawn for an image follows from its visit.
        seed: of the run.
    """

    latents: Tensor
    captions: tuple[str, ...]
    text: Conditioning | None
    sizes: tuple[SizeHint, ...]
    names: tuple[str, ...]
    weights: Tensor
    mask: Tensor | None = None
    regularisation: tuple[bool, ...] = ()
    blank: Conditioning | None = None
    visits: tuple[Visit, ...] = ()
    seed: int = 0

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return a fresh generator for each of the B images, the same ones at every call."""
        return [visit_generator(self.seed, purpose, visit) for visit in self.visits]


def generator_for(*parts: int | str) -> torch.Generator:
    """Return a CPU generator whose seed is a stable hash of ``parts``."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def visit_generator(seed: int, purpose: str, visit: Visit) -> torch.Generator:
    """Return the CPU generator that draws one thing for one visit."""
    return generator_for(seed, purpose, visit.epoch, visit.index, visit.repeat)


def make_batch(
    data: EncodedDataset,
    model: DiffusionModel,
    visits: Sequence[Visit],
    *,
    seed: int,
    caption_dropout: float = 0.0,
    unmasked_weight: float = 0.0,
) -> Batch:
    """Gather one micro-batch; each posterior is sampled with its visit's generator.

    Where a mask is black, the loss has the weight ``unmasked_weight``.
    """
    latents, captions, sizes, names, masks = [], [], [], [], []
    for visit in visits:
        encoded = data.image(visit.index, data.views.at(visit, seed))
        latents.append(
            model.facts.latents.scaled(encoded.posterior.sample(visit_generator(seed, "latents", visit)))
        )
        captions.append(caption_at(data, visit, seed, caption_dropout))
        sizes.append(encoded.size)
        names.append(data.items[visit.index].name)
        masks.append(torch.ones_like(latents[-1][:, :1]) if encoded.mask is None else encoded.mask)
    text = None
    if data.encode_captions:
        text = stack_conditioning([data.caption(caption) for caption in captions])
    items = [data.items[visit.index] for visit in visits]
    return Batch(
        latents=torch.cat(latents),
        captions=tuple(data.prompt(caption) for caption in captions),
        text=text,
        sizes=tuple(sizes),
        names=tuple(names),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        mask=torch.cat(masks) * (1 - unmasked_weight) + unmasked_weight if data.has_masks else None,
        regularisation=tuple(item.regularisation for item in items),
        blank=data.caption("") if data.encode_captions else None,
        visits=tuple(visits),
        seed=seed,
    )


def caption_at(data: EncodedDataset, visit: Visit, seed: int, caption_dropout: float) -> str:
    """Return the caption of one visit: worded as the settings say, or empty if it is dropped."""
    if draw_for(seed, "caption", visit) < caption_dropout:
        return ""
    item = data.items[visit.index]
    wording = data.captions.wording
    return item.caption if wording is None else wording.at(item, visit, seed)
