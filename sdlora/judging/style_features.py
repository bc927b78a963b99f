"""An image's look as a few dozen hand-made numbers: colour, tone, edges, texture, strokes.

Nothing is learned and no network is used: Pillow images in, numpy arrays out; no torch. ``docs/score.md``
gives the reasons; :mod:`sdlora.judging.score` compares sets of images by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_COLOURED = 0.04  # Oklab chroma that the eye calls coloured
_INK = 0.5  # Oklab lightness below which a pixel is ink; 0.5 is sRGB grey 99
_TONES = 8  # soft bins of lightness
_OCTAVES = 4
_DIRECTIONS = 4
_WIDTHS = (1 / 32, 1 / 16, 1 / 8)  # stroke widths, in shares of the image's side
_SPECK = 1 / 1024  # smaller spots (share of the image's area) are not counted


def _names() -> dict[str, tuple[str, ...]]:
    octaves = [f"1/{2**k}" for k in range(1, _OCTAVES + 1)]
    widths = [f"1/{round(1 / width)}" for width in _WIDTHS]
    return {
        "colour": ("mean chroma", "coloured share", "high chroma", "mean green-red", "mean blue-yellow"),
        "tone": tuple(f"lightness bin {k + 1} of {_TONES}" for k in range(_TONES)),
        "edges": ("edge density", "strong edge share", "edge sharpness", "outline length"),
        "texture": (
            *(f"energy at {octave} of the finest scale" for octave in octaves),
            *(f"sparsity at {octave} of the finest scale" for octave in octaves),
            *(f"gradient energy at {180 * k // _DIRECTIONS} degrees" for k in range(_DIRECTIONS)),
        ),
        "strokes": (
            "ink share",
            *(f"ink wider than {width}" for width in widths),
            *(f"gaps narrower than {width}" for width in widths),
            "pieces of ink",
            "holes in the ink",
            "largest piece",
        ),
    }


FEATURES: Mapping[str, tuple[str, ...]] = _names()
"""Group -> names of its features, in the order of :func:`features_of`; every group weighs the same."""


def features_of(image: Image) -> Array:
    """Return the features (d,) of one image, in the order of :data:`FEATURES`; all are about 0 to 1."""
    lab = oklab(np.asarray(image.convert("RGB"), dtype=np.float64) / 255)
    lightness = lab[..., 0]
    values = [
        *_colour(lab),
        *_tone(lightness),
        *_edges(lightness),
        *_texture(lightness),
        *_strokes(lightness < _INK),
    ]
    return np.array(values)


def oklab(rgb: Array) -> Array:
    """Return Oklab (Ottosson 2020) of sRGB (h, w, 3) in 0..1: lightness 0..1, green-red, blue-yellow."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ _TO_CONES.T)
    lab: Array = cones @ _TO_LAB.T
    return lab


_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _colour(lab: Array) -> list[float]:
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    return [
        5 * float(chroma.mean()),  # times 5: vivid colours have a chroma of about 0.2
        float((chroma > _COLOURED).mean()),
        5 * float(np.percentile(chroma, 95)),
        5 * float(lab[..., 1].mean()),
        5 * float(lab[..., 2].mean()),
    ]


def _tone(lightness: Array) -> list[float]:
    """Return the square roots of a histogram with soft bins, the first all black, the last all white."""
    place = np.clip(lightness, 0, 1) * (_TONES - 1)
    shares = [float(np.clip(1 - np.abs(place - k), 0, None).mean()) for k in range(_TONES)]
    return [math.sqrt(share) for share in shares]


def _edges(lightness: Array) -> list[float]:
    step = np.hypot(*_gradient(lightness))
    strong = step > 0.2
    total = step.sum()
    sharpness = float((step**2).sum() / total) if total > 0 else 0.0
    side = math.sqrt(lightness.size)
    ink = lightness < _INK
    crossings = (ink[1:] != ink[:-1]).sum() + (ink[:, 1:] != ink[:, :-1]).sum()
    return [
        float(step.mean()) * side / 16,
        float(strong.mean()) * side / 64,
        sharpness,
        float(crossings) / (16 * side),
    ]


def _gradient(lightness: Array) -> tuple[Array, Array]:
    """Return differences along y and x between neighbours, both (h - 1, w - 1)."""
    down = lightness[1:, :-1] - lightness[:-1, :-1]
    right = lightness[:-1, 1:] - lightness[:-1, :-1]
    return down, right


def _texture(lightness: Array) -> list[float]:
    """Return energy and sparsity of band-pass octaves, and how gradients spread over directions."""
    energies, sparsities = [], []
    current = lightness
    for _ in range(_OCTAVES):
        smooth = _blur(current)
        band = current - smooth
        energy = math.sqrt(float((band**2).mean()))
        energies.append(4 * energy)
        sparsities.append(float(np.abs(band).mean()) / energy if energy > 1e-6 else 0.0)
        current = smooth[::2, ::2]
    down, right = _gradient(lightness)
    strength = np.hypot(down, right)
    angle = np.arctan2(down, right) % math.pi
    bins = np.round(angle / (math.pi / _DIRECTIONS)).astype(int) % _DIRECTIONS
    total = max(float(strength.sum()), 1e-9)
    shares = [float(strength[bins == k].sum()) / total for k in range(_DIRECTIONS)]
    return [*energies, *sparsities, *shares]


def _blur(values: Array) -> Array:
    """Blur with 1 4 6 4 1 in both directions (Burt and Adelson 1983)."""
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    for axis in (0, 1):
        padding = [(2, 2) if a == axis else (0, 0) for a in range(2)]
        padded = np.pad(values, padding, mode="symmetric")
        shifted = [np.take(padded, range(k, k + values.shape[axis]), axis) for k in range(len(kernel))]
        values = np.tensordot(kernel, np.stack(shifted), axes=1)
    return values


def _strokes(ink: Mask) -> list[float]:
    area, side = float(ink.sum()), math.sqrt(ink.size)
    wide, narrow = [], []
    for share in _WIDTHS:
        width = max(2, round(share * side))
        wide.append(float(_opened(ink, width).sum()) / area if area else 0.0)
        # the part of the ground into which no square of that width fits: fine lines left white
        narrow.append(float((~ink & ~_opened(~ink, width)).sum()) / ink.size)
    least = _SPECK * ink.size
    pieces = [size for size in _pieces(ink) if size >= least]
    holes = [size for size in _pieces(~ink) if size >= least]
    return [
        float(ink.mean()),
        *wide,
        *(8 * value for value in narrow),
        math.log2(1 + len(pieces)) / 4,
        math.log2(1 + len(holes)) / 4,
        max(pieces, default=0) / area if area else 0.0,
    ]


def _opened(mask: Mask, width: int) -> Mask:
    """Return the union of all squares of ``width`` px inside the mask (opening; Serra 1982).

    What lies beyond the image's edge continues it, so that the ground does not end there.
    """
    padded = np.pad(mask, width, mode="edge")
    full = _box_sums(padded, width) == width * width
    covered = _box_sums(np.pad(full, width - 1), width) > 0
    return covered[width:-width, width:-width]


def _box_sums(mask: Mask, width: int) -> npt.NDArray[np.int64]:
    """Return the number of true pixels in each square of ``width``, (h - width + 1, w - width + 1)."""
    table = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return table[width:, width:] - table[:-width, width:] - table[width:, :-width] + table[:-width, :-width]


def _pieces(mask: Mask) -> list[int]:
    """Return the areas in px of the connected pieces (4 neighbours), by joining runs of each row."""
    parents: list[int] = []
    areas: list[int] = []

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = np.argwhere(steps == 1), np.argwhere(steps == -1)
    above: list[tuple[int, int, int]] = []
    here: list[tuple[int, int, int]] = []
    current = -1
    for (y, start), stop in zip(starts.tolist(), stops[:, 1].tolist(), strict=True):
        if y != current:
            above, here, current = (here if y == current + 1 else []), [], y
        label = len(parents)
        parents.append(label)
        areas.append(stop - start)
        for begin, end, other in above:
            if begin < stop and start < end:
                first, two = root(label), root(other)
                if first != two:
                    parents[first] = two
                    areas[two] += areas[first]
        here.append((start, stop, label))
    return [areas[label] for label in range(len(parents)) if parents[label] == label]
