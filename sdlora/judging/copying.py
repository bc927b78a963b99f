"""How alike two images are in what they show where, and whether generated images repeat training images.

Unlike the style score, which compares sets, this compares single images: the correlation of their
lightness at 16 x 16 px, the best one over small moves. A copy that was mirrored, moved a little or drawn
a little larger is still a copy; the same moves are allowed for the images it is judged against.
Numpy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import SdloraError
from .style_features import Array, oklab

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 16  # px at which images are compared
_FINE = 2  # moves are made at this many times as many px
_SHIFTS = (-2, -1, 0, 1, 2)  # in fine px: up to a sixteenth of the side
_SIZES = (0.875, 1.0, 1.125)


@dataclass(frozen=True)
class Copying:
    """Whether generated images repeat training images.

    Attributes:
        generated: mean over the generated images of the likeness to the nearest training image.
        true: the same for true images that were not trained on: the likeness by chance and style alone.
        share: share of the generated images nearer to a training image than any of these is.
    """

    generated: float
    true: float
    share: float

    def to_dict(self) -> dict[str, float]:
        """Return everything as JSON values."""
        return {name: round(getattr(self, name), 4) for name in ("generated", "true", "share")}


def copying(generated: Sequence[Image], training: Sequence[Image], true: Sequence[Image]) -> Copying:
    """Compare generated images with the training images, by :func:`likeness`.

    True images that were not trained on show what is usual between different images of this style.

    Raises:
        SdloraError: when one of the sets is empty.
    """
    for name, images in (("generated", generated), ("training", training), ("true", true)):
        if not images:
            raise SdloraError(f"copying check: there are no {name} images; give at least one")
    ours, theirs = likeness(generated, training).max(1), likeness(true, training).max(1)
    return Copying(float(ours.mean()), float(theirs.mean()), float((ours > theirs.max()).mean()))


def likeness(first: Sequence[Image], second: Sequence[Image]) -> Array:
    """Return the likeness (n, m) of every image of ``first`` to every one of ``second``.

    The correlation of lightness (Oklab) at 16 x 16 px, the highest over the views of the first one: it and
    its mirror image, at 7/8, 1 and 9/8 of its size, moved by up to a sixteenth of the side. 1 is a copy;
    images of different things in one style have about 0 to 0.8.
    """
    known = _standardised(np.stack([_shrunk(_lightness(image)).ravel() for image in second]))
    views = _standardised(np.stack([view for image in first for view in _views(image)]))
    best: Array = (views @ known.T).reshape(len(first), -1, len(second)).max(1)
    return best


def _lightness(image: Image) -> Array:
    """Return lightness at the fine size, twice that of the comparison."""
    from PIL import Image as Pil

    side = _SIDE * _FINE
    small = image.convert("RGB").resize((side, side), Pil.Resampling.BOX)
    lightness: Array = oklab(np.asarray(small, dtype=np.float64) / 255)[..., 0]
    return lightness


def _views(image: Image) -> Iterator[Array]:
    """Yield the image's views as flat vectors; beyond its edge, the edge's pixels are repeated."""
    from PIL import Image as Pil

    side, margin = _SIDE * _FINE, 8
    lightness = _lightness(image)
    for size in _SIZES:
        length = round(size * side)
        scaled = lightness
        if length != side:
            floats = Pil.fromarray(lightness.astype(np.float32))
            scaled = np.asarray(floats.resize((length, length), Pil.Resampling.BICUBIC), dtype=np.float64)
        padded = np.pad(scaled, margin, mode="edge")
        corner = margin + (length - side) // 2
        for down in _SHIFTS:
            for right in _SHIFTS:
                top, left = corner + down, corner + right
                view = _shrunk(padded[top : top + side, left : left + side])
                yield view.ravel()
                yield view[:, ::-1].ravel()


def _shrunk(lightness: Array) -> Array:
    shrunk: Array = lightness.reshape(_SIDE, _FINE, _SIDE, _FINE).mean((1, 3))
    return shrunk


def _standardised(rows: Array) -> Array:
    """Return rows of mean 0 and length 1."""
    rows = rows - rows.mean(1, keepdims=True)
    standardised: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return standardised
