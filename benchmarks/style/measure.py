"""The four measures of a set of images, one a held-out subject, with intervals by one bootstrap.

Style is :class:`sdlora.judging.score.StyleRuler`'s score; closeness and copying use
:func:`sdlora.judging.copying.likeness`. All intervals, those of differences between entries too, come
from the same draws of subjects with replacement, so that what the entries share cancels out. README.md
beside this file gives the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdlora.errors import ConfigError
from sdlora.judging.copying import likeness
from sdlora.judging.score import StyleRuler, StyleScore, distances
from sdlora.judging.style_features import Array, Mask

if TYPE_CHECKING:
    from PIL.Image import Image

Ranks = Callable[[Sequence["Image"], Sequence[str]], Array]
"""Images and their subjects -> place of each subject among a judge's guesses, NaN where it has none."""

DRAWS = 1000
FLAGGED = 0.05
"""Copying is flagged when the low end of the copied share is above this; chance alone gives 1 / (n + 1)."""
UNSTEADY = 0.5
"""True images against each other may spread this much; more, and the base is too near to the style."""
MEASURES: Mapping[str, str] = {
    "style": "style",
    "named": "subject named",
    "named_in_five": "in five guesses",
    "closer": "closer than others",
    "likeness": "likeness to true",
    "nearest": "nearest training",
    "copied": "copied",
}
"""Key -> heading, in the order of tables."""


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 90 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return it as JSON values."""
        return {name: round(getattr(self, name), 4) for name in ("value", "low", "high")}


@dataclass(frozen=True)
class Measured:
    """A set of images, measured subject by subject.

    Attributes:
        style: its score with partial scores, as ``sdlora demo`` would print it.
        per_subject: measure -> (n,); a subject's share of the measure. Style has none.
        draws: measure -> (DRAWS,); its value in every draw of subjects.
        closest: index of the training image nearest to each image.
    """

    style: StyleScore
    per_subject: Mapping[str, Array]
    draws: Mapping[str, Array]
    closest: tuple[int, ...]

    def figure(self, measure: str) -> Interval | None:
        """Return a measure with its interval, or None where it could not be taken."""
        if measure not in self.draws:
            return None
        value = self.style.value if measure == "style" else float(np.nanmean(self.per_subject[measure]))
        return _interval(value, self.draws[measure])

    def difference(self, other: Measured, measure: str) -> Interval | None:
        """Return how far this set is above another in a measure; the subjects are the same."""
        ours, theirs = self.figure(measure), other.figure(measure)
        if ours is None or theirs is None:
            return None
        return _interval(ours.value - theirs.value, self.draws[measure] - other.draws[measure])

    @property
    def flagged(self) -> bool:
        """Whether more images repeat training images than chance can explain."""
        copied = self.figure("copied")
        return copied is not None and copied.low > FLAGGED


class Yardstick:
    """Measures sets of images of the same subjects.

    Args:
        subjects: names, one an image of every set that is measured.
        base: images by the base alone, in the order of ``subjects``.
        true: the true images, in the same order, through the base's autoencoder.
        training: what adapters were trained on, through the autoencoder as well.
        ranks: the judge of subjects; without one, ``named`` is not measured.
        seed: of the bootstrap.

    Raises:
        SdloraError: when the sets do not go together or are too small.
    """

    def __init__(
        self,
        subjects: Sequence[str],
        base: Sequence[Image],
        true: Sequence[Image],
        training: Sequence[Image],
        *,
        ranks: Ranks | None = None,
        seed: int = 0,
    ) -> None:
        if not len(subjects) == len(base) == len(true):
            raise ConfigError(f"{len(subjects)} subjects, {len(base)} base and {len(true)} true images")
        self.subjects, self.training = tuple(subjects), tuple(training)
        self.base, self.true = tuple(base), tuple(true)
        self.ruler = StyleRuler(base, true, seed=seed)
        self._ranks, count = ranks, len(subjects)
        self._weights = (
            np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS).astype(float)
        )
        self._true_features = self.ruler.features(true)
        base_features = self.ruler.features(base)
        self._within_true = self._within(self._true_features)
        self._unit = self._distance(base_features)
        usual = likeness(self.true, self.training).max(1)
        self.bar = float(usual.max())
        """Likeness to a training image that no true image of another subject reaches."""

    def measure(self, images: Sequence[Image]) -> Measured:
        """Measure a set of images, one a subject, in the order of the subjects."""
        if len(images) != len(self.subjects):
            raise ConfigError(f"{len(images)} images for {len(self.subjects)} subjects")
        both = likeness(images, [*self.training, *self.true])
        table, to_true = np.split(both, [len(self.training)], axis=1)
        per_subject = self._closeness(to_true)
        per_subject["nearest"] = table.max(1)
        per_subject["copied"] = (per_subject["nearest"] > self.bar).astype(float)
        if self._ranks is not None:
            ranks = self._ranks(images, self.subjects)
            per_subject["named"] = _where_known(ranks, ranks <= 1)
            per_subject["named_in_five"] = _where_known(ranks, ranks <= 5)
        draws = {name: self._means(values) for name, values in per_subject.items()}
        draws["style"] = 1 - self._distance(self.ruler.features(images)) / np.maximum(self._unit, 1e-9)
        return Measured(self.ruler.score(images), per_subject, draws, tuple(table.argmax(1).tolist()))

    def ceiling(self) -> Interval:
        """Return the style score of true images against others of them: what is within reach."""
        return _interval(self.ruler.ceiling(), np.array(self.ruler.splits()))

    @property
    def measurable(self) -> bool:
        """Whether the base is far enough from the style: else the unit of the style score is noise."""
        ceiling = self.ceiling()
        return ceiling.high - ceiling.low <= UNSTEADY

    def _closeness(self, table: Array) -> dict[str, Array]:
        """Return the measures that follow from the likeness of each image to each true one."""
        diagonal = table.diagonal()
        below = (table < diagonal[:, None]).sum(1)
        ties = (table == diagonal[:, None]).sum(1) - 1
        return {"likeness": diagonal.copy(), "closer": (below + ties / 2) / (len(diagonal) - 1)}

    def _means(self, values: Array) -> Array:
        known = ~np.isnan(values)
        weights = self._weights[:, known]
        means: Array = weights @ values[known] / np.maximum(weights.sum(1), 1e-9)
        return means

    def _distance(self, features: Array) -> Array:
        """Return the energy distance to the true images in every draw of subjects."""
        return 2 * self._across(features) - self._within(features) - self._within_true

    def _across(self, features: Array) -> Array:
        """Return the mean distance of images to true ones.

        A subject that was drawn k times meets its own true image k times, not k squared times: it would
        count as a closeness that is not there with each subject once.
        """
        table = distances(features, self._true_features)
        diagonal = table.diagonal()
        squares = self._weights**2
        total = self._pairs(table) - squares @ diagonal + self._weights @ diagonal
        count = len(diagonal)
        mean: Array = total / (count**2 - squares.sum(1) + count)
        return mean

    def _within(self, features: Array) -> Array:
        count = len(features)
        mean: Array = self._pairs(distances(features, features)) / np.maximum(
            count**2 - (self._weights**2).sum(1), 1.0
        )
        return mean

    def _pairs(self, table: Array) -> Array:
        total: Array = ((self._weights @ table) * self._weights).sum(1)
        return total


def _where_known(ranks: Array, right: Mask) -> Array:
    return np.where(np.isnan(ranks), np.nan, right.astype(float))


def _interval(value: float, draws: Array) -> Interval:
    low, high = np.percentile(draws, [5, 95])
    return Interval(value, float(low), float(high))
