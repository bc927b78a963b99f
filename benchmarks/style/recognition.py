"""Whether the base recognises in an image what its prompt names: a diffusion classifier.

A base that denoises an image better with the image's own caption than with other captions sees in it what
the caption says (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier"). It needs nothing
but the base, and takes any subject and any style that the base can make something of. Compared are the
captions of one panel: each image is noised at some timesteps, always with the same noise, and denoised with
its own caption and with those of some others. What a caption costs on any image (long ones explain more of
everything), and what an image costs with any caption, is taken off, as the means of a table's columns and
rows are; what is left of the own caption is counted in deviations of what is left of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sdlora.data.batching.buckets import place, square_bucket
from sdlora.data.batching.cache import to_pixels
from sdlora.families.base import Conditioning, SizeHint, stack_conditioning

from .measure import Array

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlora.families.base import DiffusionModel

RIVALS = 5
"""Other captions that an image is denoised with."""
TIMES = (0.45, 0.6, 0.75)
"""Where an image is noised, as shares of the range: shapes show there, not lines and tones."""
_ROUNDS = 30
_SEED = 2


class Recognition:
    """Tells how well a base recognises the subjects of one panel of prompts.

    Args:
        model: the base, without an adapter, ready to predict when :meth:`evidence` is called.
        encode: returns the conditioning of a caption, without batch axis.
        captions: of the panel, without trigger words, in its order; two or more must differ.
        side: px of the panel's images.
        rows: images that are denoised at once.

    Raises:
        ValueError: if all captions are alike.
    """

    def __init__(
        self,
        model: DiffusionModel,
        encode: Callable[[str], Conditioning],
        captions: Sequence[str],
        side: int,
        rows: int = 4,
    ) -> None:
        self._model, self._rows = model, max(1, rows)
        self.captions = tuple(dict.fromkeys(captions))
        if len(self.captions) < 2:
            raise ValueError("all captions are alike")
        self._places = [self.captions.index(caption) for caption in captions]
        self._text = [encode(caption) for caption in self.captions]
        self._side = side
        self.rivals = min(RIVALS, len(self.captions) - 1)

    def evidence(self, images: Sequence[Image]) -> Array:
        """Return how much better its own caption explains each image than others do, (n,), in deviations.

        About 0 for an image that shows nothing of its caption; 3 and more for the base's own images.

        Args:
            images: square, one a caption of the panel, in its order.
        """
        if len(images) != len(self._places):
            raise ValueError(f"{len(images)} images for {len(self._places)} captions")
        columns = [self._columns(place) for place in self._places]
        losses = np.stack([self._losses(*pair) for pair in zip(images, columns, strict=True)], axis=1)
        return np.mean([evidence(table, columns, len(self.captions)) for table in losses], axis=0)

    def _columns(self, first: int) -> list[int]:
        """Return the captions that an image is denoised with, its own first; each comes equally often."""
        count = len(self.captions)
        step = max(1, (count - 1) // self.rivals)
        return [(first + number * step) % count for number in range(self.rivals + 1)]

    @torch.no_grad()
    def _losses(self, image: Image, columns: Sequence[int]) -> Array:
        """Return the mean squared errors (times, captions)."""
        model = self._model
        bucket = square_bucket(self._side, model.facts.size_multiple)
        pixels = to_pixels(image, place(image.height, image.width, bucket), mirror=False)
        clean = model.facts.latents.scaled(model.encode_images(pixels).mean.float()).cpu()
        scale = model.process.spread_timesteps(1000)
        table = []
        for number, share in enumerate(TIMES):
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(_SEED + number))
            time = scale[int(share * 1000)].reshape(1)
            corrupted = model.process.corrupt(clean, noise, time)
            errors = []
            for start in range(0, len(columns), self._rows):
                some = columns[start : start + self._rows]
                text = stack_conditioning([self._text[column] for column in some])
                square = (self._side, self._side)
                size = SizeHint(original=square, crop=(0, 0), target=square)
                output = model.predict(
                    corrupted.noisy.repeat(len(some), 1, 1, 1),
                    corrupted.timesteps.repeat(len(some)),
                    text,
                    [size] * len(some),
                )
                errors += (output.float().cpu() - corrupted.target).square().mean((1, 2, 3)).tolist()
            table.append(errors)
        return np.array(table)


def evidence(losses: Array, columns: Sequence[Sequence[int]], count: int) -> Array:
    """Return what is left of the own captions' losses, (n,), in deviations of the others'; more is better.

    Args:
        losses: (n, 1 + rivals), the own caption's first.
        columns: which of the captions each of them is of.
        count: captions in all.
    """
    places = np.array(columns)
    row, column = losses[:, 1:].mean(1), np.zeros(count)
    known = np.zeros(count)
    np.add.at(known, places[:, 1:], 1.0)
    for _ in range(_ROUNDS):  # means of rows and columns in turn: the least squares of a table with holes
        column = np.zeros(count)
        np.add.at(column, places[:, 1:], losses[:, 1:] - row[:, None])
        column /= np.maximum(known, 1.0)
        row = (losses[:, 1:] - column[places[:, 1:]]).mean(1)
    left = losses[:, 1:] - row[:, None] - column[places[:, 1:]]
    freedom = max(1, left.size - len(row) - int((known > 0).sum()) + 1)
    spread = math.sqrt(float((left**2).sum()) / freedom)
    return (row + column[places[:, 0]] - losses[:, 0]) / max(spread, 1e-12)
