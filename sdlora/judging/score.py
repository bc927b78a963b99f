"""How far images moved from a base's look towards a style, in one number that can be explained.

Each image becomes a few dozen hand-made numbers about colour, tone, edges, texture and strokes
(:mod:`sdlora.judging.style_features`); nothing is learned and no network is used. A style is a *set* of
images, so sets are compared: the energy distance between the generated and the true images, relative
to that between the base's and the true ones::

    score = 1 - D(generated, true) / D(base, true)

0 looks like the base, 1 cannot be told from the true style, below 0 is farther away than the base was.
The ruler (:class:`StyleRuler`) depends on the base's and the true images only, never on what is
measured with it. ``docs/score.md`` gives the formulae and the reasons.

Everything works on Pillow images and numpy arrays; this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SdloraError
from .style_features import FEATURES, Array, features_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..families.base import DiffusionModel

MIN_IMAGES = 4
"""A set of fewer images says nothing about a look."""

_FLOOR = 0.01  # least spread of a feature, so that one that is constant in both sets cannot rule
_DRAWS = 400
_SPLITS = 40


@dataclass(frozen=True)
class StyleScore:
    """Where a set of images stands between a base and a style.

    Attributes:
        value: 0 looks like the base, 1 like the true style; may be negative.
        low: lower end of the 90 % bootstrap interval over the images.
        high: upper end.
        groups: the score by each group of features alone.
        distance: energy distance of the generated images to the true ones.
        base_distance: that of the base's images, which is the unit.
        num_images: generated images.
    """

    value: float
    low: float
    high: float
    groups: Mapping[str, float]
    distance: float
    base_distance: float
    num_images: int

    def render(self) -> str:
        """Return the score in one line for people."""
        return f"{self.value:.2f} (90 % interval {self.low:.2f} to {self.high:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "value": round(self.value, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "groups": {name: round(value, 4) for name, value in self.groups.items()},
            "distance": round(self.distance, 4),
            "base_distance": round(self.base_distance, 4),
            "num_images": self.num_images,
        }


class StyleRuler:
    """Measures sets of images between a base's look (0) and a style (1).

    Args:
        base: images by the base alone, at least :data:`MIN_IMAGES`.
        true: images of the style, of the same size; best of the same subjects, and passed through the
            base's autoencoder, so that its blur is not charged to the adapter.
        seed: fixes the bootstrap's draws.

    Raises:
        SdloraError: when there are too few images, or the base looks like the style already.
    """

    def __init__(self, base: Sequence[Image], true: Sequence[Image], *, seed: int = 0) -> None:
        self._seed = seed
        raw_base, raw_true = features_of_all(base, "base"), features_of_all(true, "true")
        self._scale = _scale(raw_base, raw_true)
        self._base, self._true = raw_base / self._scale, raw_true / self._scale
        self.base_distance = energy_distance(self._base, self._true)
        if self.base_distance <= 0:
            raise SdloraError(
                "style score: the base's images cannot be told from the true ones, so there is no way to "
                "go; check that they come from the base alone, or give more of them"
            )

    def score(self, images: Sequence[Image]) -> StyleScore:
        """Return the score of generated images; their order does not matter."""
        generated = features_of_all(images, "generated") / self._scale
        distance = energy_distance(generated, self._true)
        low, high = self._interval(generated)
        return StyleScore(
            value=1 - distance / self.base_distance,
            low=low,
            high=high,
            groups=self._by_group(generated),
            distance=distance,
            base_distance=self.base_distance,
            num_images=len(images),
        )

    def features(self, images: Sequence[Image]) -> Array:
        """Return features (n, d) in the units in which this ruler takes distances, in the given order."""
        rows: Array = np.stack([features_of(image) for image in images]) / self._scale
        return rows

    def resampled(self, rows: Array, base: Array, weights: Array) -> Array:
        """Return the score (draws,) for each resampling of the subjects.

        Args:
            rows: (n, d) :meth:`features` of generated images.
            base: those of the base's images of the same subjects, in the same order.
            weights: (draws, n) how often each subject is drawn.
        """
        generator = np.random.default_rng(self._seed)
        count = len(self._true)
        others = generator.multinomial(count, np.full(count, 1 / count), len(weights)).astype(float)
        distances = _weighted_energy(rows, self._true, weights, others)
        units = _weighted_energy(base, self._true, weights, others)
        scores: Array = 1 - distances / np.maximum(units, _FLOOR)
        return scores

    def of_features(self, rows: Array) -> float:
        """Return the score of a set of :meth:`features`, (n, d)."""
        return 1 - energy_distance(rows, self._true) / self.base_distance

    def ceiling(self) -> float:
        """Return the mean score of one half of the true images against the other: about 1.

        Its distance from 1 is the uncertainty that the number of images leaves.
        """
        return float(np.mean(self.splits()))

    def splits(self) -> list[float]:
        """Return the score of one half of the true images against the other, for random halves."""
        generator = np.random.default_rng(self._seed)
        half, scores = len(self._true) // 2, []
        for _ in range(_SPLITS):
            order = generator.permutation(len(self._true))
            ours, theirs = self._true[order[:half]], self._true[order[half:]]
            scores.append(1 - energy_distance(ours, theirs) / energy_distance(self._base, theirs))
        return scores

    def _by_group(self, generated: Array) -> dict[str, float]:
        scores = {}
        for group, columns in _columns().items():
            unit = energy_distance(self._base[:, columns], self._true[:, columns])
            distance = energy_distance(generated[:, columns], self._true[:, columns])
            # where base and style agree in a group there is no way to go: the full score for staying there
            scores[group] = 1 - distance / max(unit, _FLOOR)
        return scores

    def _interval(self, generated: Array) -> tuple[float, float]:
        """Return the 5th and 95th percentile over sets drawn with replacement."""
        generator = np.random.default_rng(self._seed)
        sets = [generated, self._base, self._true]
        weights = [
            generator.multinomial(len(features), np.full(len(features), 1 / len(features)), _DRAWS).astype(
                float
            )
            for features in sets
        ]
        distances = _weighted_energy(generated, self._true, weights[0], weights[2])
        units = _weighted_energy(self._base, self._true, weights[1], weights[2])
        low, high = np.percentile(1 - distances / np.maximum(units, _FLOOR), [5, 95])
        return float(low), float(high)


# --- distance between sets -----------------------------------------------------------------------------


def energy_distance(first: Array, second: Array) -> float:
    """Return the energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| (Szekely and Rizzo 2013, equation 5).

    The unbiased form, which leaves out each image's distance to itself: 0 on average for two samples
    of one distribution, whatever their sizes, and so sometimes below 0.

    Args:
        first: (n, d) features, n >= 2.
        second: (m, d) features, m >= 2.
    """
    ones = np.ones((1, len(first))), np.ones((1, len(second)))
    return float(_weighted_energy(first, second, *ones)[0])


def _weighted_energy(first: Array, second: Array, weights: Array, others: Array) -> Array:
    """Return the distance (draws,) for each row of weights, (draws, n) and (draws, m).

    An image drawn twice must not count as two images at distance 0, so pairs of an image with
    itself are left out of the sum of the weights as well.
    """
    across = np.einsum("bi,ij,bj->b", weights, distances(first, second), others, optimize=True)
    across /= weights.sum(1) * others.sum(1)
    return 2 * across - _within(first, weights) - _within(second, others)


def _within(features: Array, weights: Array) -> Array:
    total = np.einsum("bi,ij,bj->b", weights, distances(features, features), weights, optimize=True)
    return total / np.maximum(weights.sum(1) ** 2 - (weights**2).sum(1), 1.0)


def distances(first: Array, second: Array) -> Array:
    """Return the Euclidean distances (n, m) between the rows of (n, d) and (m, d)."""
    return np.sqrt(((first[:, None, :] - second[None, :, :]) ** 2).sum(-1))


def _scale(base: Array, true: Array) -> Array:
    """Return each feature's divisor, (d,): the spread inside the sets times the root of its group's size."""
    spread = np.sqrt((base.var(0, ddof=1) + true.var(0, ddof=1)) / 2)
    sizes = np.concatenate([np.full(len(names), len(names)) for names in FEATURES.values()])
    scale: Array = np.maximum(spread, _FLOOR) * np.sqrt(sizes)
    return scale


def _columns() -> dict[str, slice]:
    columns, start = {}, 0
    for group, names in FEATURES.items():
        columns[group] = slice(start, start + len(names))
        start += len(names)
    return columns


def features_of_all(images: Sequence[Image], what: str = "") -> Array:
    """Return the features of a set as (n, d), its rows sorted, so that their order carries nothing.

    Raises:
        SdloraError: when there are fewer than :data:`MIN_IMAGES`.
    """
    if len(images) < MIN_IMAGES:
        raise SdloraError(
            f"style score: {len(images)} {what} images are too few to tell a look; give {MIN_IMAGES} or more"
        )
    rows = np.stack([features_of(image) for image in images])
    return rows[np.lexsort(rows.T[::-1])]


# --- the base's own eyes ---------------------------------------------------------------------------------


def through_autoencoder(
    model: DiffusionModel, images: Sequence[Image], side: int | None = None
) -> list[Image]:
    """Return images as the base could draw them at best: resized, encoded and decoded again.

    Its autoencoder's blur is then on both sides of a comparison, and not charged to an adapter.

    Args:
        model: the base.
        images: of any size; the middle square is seen.
        side: px of the results; the base's own resolution when None.
    """
    from PIL import Image as Pil

    from ..data.batching.buckets import place, square_bucket
    from ..data.batching.cache import to_pixels

    bucket = square_bucket(side or model.facts.native_resolution, model.facts.size_multiple)
    seen = []
    for image in images:
        pixels = to_pixels(image, place(image.height, image.width, bucket), mirror=False)
        latents = model.facts.latents.scaled(model.encode_images(pixels).mean)
        decoded = model.decode_latents(latents)[0].permute(1, 2, 0).cpu().numpy()
        seen.append(Pil.fromarray(np.round((decoded + 1) * 127.5).astype(np.uint8)))
    return seen
