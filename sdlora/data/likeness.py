"""What a picture looks like from afar, and which pictures are therefore nearly the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from .items import ImageItem

# Two pictures are near duplicates when few bits of the difference hash differ AND their thumbnails
# correlate. The hash alone joins unrelated drawings on a plain ground: of 24,090 pairs of Adwaita icons
# it joined "menu" with "remove" at 4 bits of 64, whose thumbnails correlate at -0.15; resizing and JPEG
# cost at most 5 bits and leave the correlation above 0.99.
_NEAR_BITS = 6
_NEAR_CORRELATION = 0.97
_THUMBNAIL_SIDE = 16


@dataclass(frozen=True)
class Likeness:
    """What a picture looks like from afar, for finding near duplicates.

    ``bits`` is a 64-bit difference hash, ``thumbnail`` the RGB bytes of a 16x16 reduction. Written
    here because imagehash imports numpy, scipy and PyWavelets, which takes longer than the whole check.
    """

    bits: int
    thumbnail: bytes


def likeness_of(image: Image.Image) -> Likeness:
    """Return the difference hash and the thumbnail of an RGB picture."""
    side = _THUMBNAIL_SIDE
    # Averaging whole blocks first is several times faster than one large resize, and reads every pixel.
    small = image.reduce((max(1, image.width // 64), max(1, image.height // 64)))
    thumbnail = small.resize((side, side), Image.Resampling.BOX)
    grey = small.resize((9, 8), Image.Resampling.BOX).convert("L").tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            at = 9 * row + column
            bits = bits << 1 | (grey[at + 1] > grey[at] + 2)  # by 2, or noise on plain grounds counts
    return Likeness(bits, thumbnail.tobytes())


def near_duplicates(items: Sequence[ImageItem]) -> list[tuple[int, ...]]:
    """Return groups (two or more indices, ascending) of pictures that are equal or nearly so.

    Recognises copies that were resized, recompressed, brightened or slightly cropped; likeness is carried
    on: if A is like B and B like C, they are one group.
    """
    parent = list(range(len(items)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, second in _like_pairs(items):
        a, b = sorted((root(first), root(second)))
        parent[b] = a
    groups: dict[int, list[int]] = {}
    for index in range(len(items)):
        groups.setdefault(root(index), []).append(index)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _like_pairs(items: Sequence[ImageItem]) -> Iterator[tuple[int, int]]:
    by_digest: dict[str, int] = {}
    for index, item in enumerate(items):
        first = by_digest.setdefault(item.digest, index)
        if first != index:
            yield first, index
    # Two 64-bit numbers at most 6 bits apart agree in at least one of 7 slices: only those are compared.
    slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index in by_digest.values():
        likeness = items[index].likeness
        if likeness is None:
            continue
        bits, near = likeness.bits, set[int]()
        for part in range(_NEAR_BITS + 1):
            key = part, bits >> part * 9 & (0x1FF if part < _NEAR_BITS else 0x3FF)
            members = slices.setdefault(key, [])
            near.update(other for other, seen in members if (seen ^ bits).bit_count() <= _NEAR_BITS)
            members.append((index, bits))
        for other in sorted(near):
            if _alike(items[other].likeness, likeness):
                yield other, index


def _alike(a: Likeness | None, b: Likeness) -> bool:
    assert a is not None  # only pictures with a likeness are compared
    count = len(a.thumbnail)
    away_a, away_b = _away_from_mean(a.thumbnail), _away_from_mean(b.thumbnail)
    spread_a, spread_b = sum(v * v for v in away_a), sum(v * v for v in away_b)
    if min(spread_a, spread_b) < 4 * count:  # a plain area has no shape to correlate: compare colours
        return sum(abs(x - y) for x, y in zip(a.thumbnail, b.thumbnail, strict=True)) <= 4 * count
    product = sum(x * y for x, y in zip(away_a, away_b, strict=True))
    return product >= _NEAR_CORRELATION * math.sqrt(spread_a * spread_b)


def _away_from_mean(thumbnail: bytes) -> list[float]:
    means = [sum(thumbnail[channel::3]) * 3 / len(thumbnail) for channel in range(3)]
    return [value - means[index % 3] for index, value in enumerate(thumbnail)]
