"""How alike two images are in what is drawn where, whatever the tones, the colours and the width of lines.

An image becomes its edges: how strong they are and along which line they run, in 16 x 16 cells. The edges
come from the structure tensor (Bigun and Granlund 1987), summed over lightness and both colour axes, which
takes no sides: light on dark gives what dark on light gives, and so does any other pair of colours. Strength
saturates, so that faint lines count almost as bold ones. Numpy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style_features import Array, oklab

if TYPE_CHECKING:
    from PIL.Image import Image

_CELLS = 16
_SIDE = 64  # px at which edges are found
_FINE = 32  # cells before moves; two of them make one
_SHIFTS = (-2, -1, 0, 1, 2)  # in fine cells: up to a sixteenth of the side
_CHANNELS = 3


def structure_likeness(first: Sequence[Image], second: Sequence[Image]) -> Array:
    """Return the likeness (n, m) in drawing of every image of ``first`` to every one of ``second``.

    The correlation of the edges, the highest over small moves (a sixteenth of the side at most). 1 is the
    same drawing; drawings of different things have about 0 to 0.5. An image without edges is like none: 0.
    """
    known = np.stack([_standardised(_pooled(fine_edges(image))) for image in second])
    best = []
    for image in first:
        views = np.stack([_standardised(view) for view in _moved(fine_edges(image))])
        best.append((views @ known.T).max(0))
    return np.stack(best)


def pair_likeness(first: Sequence[Image], second: Sequence[Image]) -> Array:
    """Return the likeness (n,) of each image of ``first`` to the one of ``second`` at the same place."""
    pairs = zip(first, second, strict=True)
    return np.array([structure_likeness([image], [other])[0, 0] for image, other in pairs])


def fine_edges(image: Image) -> Array:
    """Return an image's edges, (32, 32, 3): strength 0..1, and that times cos and sin of twice the angle."""
    from PIL import Image as Pil

    small = image.convert("RGB").resize((_SIDE, _SIDE), Pil.Resampling.BOX)
    lab = oklab(np.asarray(small, dtype=np.float64) / 255)
    lab = np.pad(lab, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = (lab[2:, 1:-1] - lab[:-2, 1:-1]) / 2  # (64, 64, 3)
    right = (lab[1:-1, 2:] - lab[1:-1, :-2]) / 2
    vertical, horizontal, mixed = ((a * b).sum(2) for a, b in ((down, down), (right, right), (down, right)))
    # the tensor of a few px together: a line's two sides count as one
    vertical, horizontal, mixed = (_pair_sums(part) for part in (vertical, horizontal, mixed))
    energy = vertical + horizontal
    strength = energy / (energy + _SATURATION**2)
    along = np.hypot(horizontal - vertical, 2 * mixed) + 1e-12
    cos, sin = (horizontal - vertical) / along, 2 * mixed / along
    coherence = along / (energy + 1e-12)
    return np.stack([strength, strength * coherence * cos, strength * coherence * sin], axis=2)


_SATURATION = 0.06  # root of the summed squares of Oklab steps at which an edge has half its strength


def _pair_sums(values: Array) -> Array:
    """Return sums over squares of 2 px: (64, 64) -> (32, 32)."""
    sums: Array = values.reshape(_FINE, 2, _FINE, 2).sum((1, 3))
    return sums


def _moved(fine: Array) -> Iterator[Array]:
    margin = max(_SHIFTS)
    padded = np.pad(fine, ((margin, margin), (margin, margin), (0, 0)))
    for down in _SHIFTS:
        for right in _SHIFTS:
            top, left = margin + down, margin + right
            yield _pooled(padded[top : top + _FINE, left : left + _FINE])


def _pooled(fine: Array) -> Array:
    """Return means over 2 x 2 fine cells, smoothed over neighbours: (32, 32, 3) -> (16, 16, 3)."""
    cells = fine.reshape(_CELLS, 2, _CELLS, 2, _CHANNELS).mean((1, 3))
    for axis in (0, 1):
        padding = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(cells, padding)
        parts = [np.take(padded, range(k, k + _CELLS), axis) for k in range(3)]
        cells = (parts[0] + 2 * parts[1] + parts[2]) / 4
    pooled: Array = cells
    return pooled


def _standardised(cells: Array) -> Array:
    """Return a vector of length 1; of the strength, what differs from its mean."""
    cells = cells.copy()
    cells[..., 0] -= cells[..., 0].mean()
    vector = cells.ravel()
    standardised: Array = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return standardised
