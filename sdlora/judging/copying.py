"""How alike two images are in what they show where, and whether generated images repeat training images.

Unlike the style score, which compares sets, this compares single images: the correlation of their
lightness at 16 x 16 px, the best one over views. A copy that was mirrored, turned by quarters, moved a
little, cropped or drawn smaller or larger is still a copy; the same views are taken of the images it is
judged against.
Numpy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import SdloraError
from .style_features import Array, oklab

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 16  # px at which images are compared
_FINE = 2  # moves are made at this many times as many px
_NEAR = (-2, -1, 0, 1, 2)  # moves in fine px: up to a sixteenth of the side
_FAR = (-6, -4, -2, 0, 2, 4, 6)
_ENLARGED = {1.125: _NEAR, 4 / 3: _FAR}
"""Sizes of the views besides 1, with the moves of each in both directions."""


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

    The correlation of lightness (Oklab) at 16 x 16 px, the highest over views: turned by quarters, mirrored
    or not, at 3/4 to 4/3 of the other's size, moved by up to a sixteenth of the side (by a fifth where it is
    much smaller or larger, so crops of 3/4 are among them). 1 is a copy; images of different things in one
    style have about 0 to 0.8.
    """
    known = [_views(image, _ENLARGED) for image in second]
    plain = _standardised(np.stack([_shrunk(_lightness(image)[None])[0].ravel() for image in second]))
    enlarged = _standardised(np.concatenate([views.reshape(len(views), -1) for views in known]))
    best = []
    for image in first:
        smaller = _standardised(_turned(_views(image, {1.0: _NEAR, **_ENLARGED}))) @ plain.T
        # where the first one shows a crop, it is the second one that has to be enlarged
        larger = _standardised(_turned(_views(image, {1.0: (0,)}))) @ enlarged.T
        cropped = larger.max(0).reshape(len(second), -1).max(1)
        best.append(np.maximum(smaller.max(0), cropped))
    return np.stack(best)


def _lightness(image: Image) -> Array:
    """Return lightness at the fine size, twice that of the comparison."""
    from PIL import Image as Pil

    side = _SIDE * _FINE
    small = image.convert("RGB").resize((side, side), Pil.Resampling.BOX)
    lightness: Array = oklab(np.asarray(small, dtype=np.float64) / 255)[..., 0]
    return lightness


def _views(image: Image, moves: Mapping[float, Sequence[int]]) -> Array:
    """Return an image's views, (views, 16, 16); beyond its edge, the edge's pixels are repeated."""
    from PIL import Image as Pil

    side, margin = _SIDE * _FINE, 8
    lightness = _lightness(image)
    windows = []
    for size, shifts in moves.items():
        length = round(size * side)
        scaled = lightness
        if length != side:
            floats = Pil.fromarray(lightness.astype(np.float32))
            scaled = np.asarray(floats.resize((length, length), Pil.Resampling.BICUBIC), dtype=np.float64)
        padded = np.pad(scaled, margin, mode="edge")
        corner = margin + (length - side) // 2
        for down in shifts:
            for right in shifts:
                top, left = corner + down, corner + right
                windows.append(padded[top : top + side, left : left + side])
    return _shrunk(np.stack(windows))


def _turned(views: Array) -> Array:
    """Return views turned by quarters, mirrored or not, as flat vectors: (n, 16, 16) -> (8 n, 256)."""
    quarters = [np.rot90(views, turns, (1, 2)) for turns in range(4)]
    every = np.concatenate([*quarters, *(view[:, :, ::-1] for view in quarters)])
    flat: Array = every.reshape(len(every), -1)
    return flat


def _shrunk(lightness: Array) -> Array:
    """Return means over squares of the fine px: (n, 32, 32) -> (n, 16, 16)."""
    shrunk: Array = lightness.reshape(len(lightness), _SIDE, _FINE, _SIDE, _FINE).mean((2, 4))
    return shrunk


def _standardised(rows: Array) -> Array:
    """Return rows of mean 0 and length 1."""
    rows = rows - rows.mean(1, keepdims=True)
    standardised: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return standardised
