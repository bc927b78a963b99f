"""Losses on held-out images: at which noise they are measured, and what two measurements say of each other.

Each image is noised again in each of K equal parts of the range of timesteps, at a place that differs from
image to image so that all places together cover the range evenly (a Kronecker sequence; Niederreiter 1992,
section 3.1). Noise and place follow from the image, not from seed or step. So the difference between two
steps, or between a step and the base alone, is taken image by image: what makes some images harder than
others, by far the largest part of the variance, cancels out.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from ..events import Estimate, NoiseBand
from .intervals import estimate

Losses = tuple[tuple[float, ...], ...]
"""Of each held-out image (outer) in each part of the range of timesteps (inner)."""

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples cover 0..1 as evenly as any number's
_BANDS = 3


@dataclass
class Measured:
    """What was measured so far in a run.

    Attributes:
        base: losses of the base alone.
        best_step: the step with the lowest mean; None before the first.
        best: its losses.
    """

    base: Losses
    best_step: int | None = None
    best: Losses = ()

    def add(self, step: int, losses: Losses) -> None:
        """Take in what a step had."""
        if self.best_step is None or mean_loss(losses) < mean_loss(self.best):
            self.best_step, self.best = step, losses


def difference(losses: Losses, others: Losses) -> Estimate | None:
    """Return ``losses`` minus ``others``, the mean over the images with its interval; None for one image."""
    return estimate(
        [statistics.fmean(row) - statistics.fmean(other) for row, other in zip(losses, others, strict=True)]
    )


def places(image: int, draws: int) -> list[float]:
    """Return where in the range of timesteps (0..1, ascending) an image is measured, one in each part.

    Args:
        image: its number among the held-out images, from 0.
        draws: K, number of equal parts.
    """
    within = (0.5 + image * _GOLDEN) % 1.0
    return [(part + within) / draws for part in range(draws)]


def mean_loss(losses: Losses) -> float:
    """Return the mean over images and draws."""
    return statistics.fmean(statistics.fmean(row) for row in losses)


def bands(losses: Losses, base: Losses) -> tuple[NoiseBand, ...]:
    """Return what each third of the range of timesteps says; one where there are fewer than three draws."""
    draws = len(losses[0])
    count = min(_BANDS, draws)
    parts = []
    for band in range(count):
        first, after = band * draws // count, (band + 1) * draws // count
        here, there = (tuple(row[first:after] for row in rows) for rows in (losses, base))
        against = difference(here, there)
        parts.append(NoiseBand(first / draws, after / draws, mean_loss(here), against))
    return tuple(parts)
