"""Images that are nearly the same: a perceptual hash finds candidates, small thumbnails confirm them.

The hash alone would join unrelated drawings on a plain ground. The thumbnails of such pairs hardly correlate,
while resizing, JPEG and brightening leave the correlation above 0.99. Mirror images count as nearly the
same, because with ``data.flip`` training shows them. The hash is the difference hash (whether the lightness
rises from field to field): on 96 drawings, resizing, JPEG, blur, brightness and contrast changed at most 9 of
its 64 bits, but up to 22 bits of the perceptual hash, which looks at the lowest cosine frequencies.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps, ImageStat

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

NEAR_BITS = 12
_NEAR_CORRELATION = 0.97
_NEAR_COLOURS = 4.0  # mean difference of 0..255 between plain images that count as one
_PLAIN_SPREAD = 4.0  # variance of a thumbnail's values below which it has no shape to correlate
_THUMBNAIL_SIDE = 16
_FIELDS = (9, 8)
_COARSE = (36, 32)  # what is reduced to the fields; from a larger image that takes longer than decoding
_ROWS = 256  # images compared with all others at once
_PAIRS = 4096  # thumbnails confirmed at once
_FEW = 128  # images, and
_FEW_PAIRS = 64  # pairs of like hashes, up to which numpy's import takes longer than doing without


@dataclass(frozen=True)
class Likeness:
    """What an image looks like from afar.

    ``bits`` is the 64-bit difference hash (whether the lightness rises from each of 9x8 fields to the
    next), ``mirrored`` that of the mirror image, ``thumbnail`` the RGB bytes of a 16x16 reduction.
    """

    bits: int
    mirrored: int
    thumbnail: bytes


class Imaged(Protocol):
    """Anything with a content digest and a likeness, such as an ``ImageItem``."""

    @property
    def digest(self) -> str: ...
    @property
    def likeness(self) -> Likeness | None: ...


def likeness_of(image: Image.Image) -> Likeness:
    """Return the perceptual hashes and the thumbnail of an RGB image."""
    # Averaging whole blocks first is several times faster than one large resize, and reads every pixel.
    small = image.reduce((max(1, image.width // 128), max(1, image.height // 128)))
    thumbnail = small.resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
    coarse = small.convert("L").resize(_COARSE, Image.Resampling.BOX)
    return Likeness(_rises(coarse), _rises(ImageOps.mirror(coarse)), thumbnail.tobytes())


def _rises(lightness: Image.Image) -> int:
    """Return 64 bits, row by row: whether each of 9x8 fields is lighter than the one before it."""
    columns, rows = _FIELDS
    fields = lightness.resize(_FIELDS, Image.Resampling.LANCZOS).tobytes()
    bits = 0
    for start in range(0, rows * columns, columns):
        for place in range(start + 1, start + columns):
            bits = bits << 1 | (fields[place] > fields[place - 1])
    return bits


def near_duplicates(items: Sequence[Imaged]) -> list[tuple[int, ...]]:
    """Return groups (two or more indices, ascending) of images that are equal or nearly so.

    Recognises copies that were resized, recompressed, brightened, mirrored or slightly cropped. Likeness
    carries over: if A is like B and B is like C, all three are one group.
    """
    groups = _Groups(len(items))
    first_of: dict[str, int] = {}
    for index, item in enumerate(items):
        groups.join(first_of.setdefault(item.digest, index), index)
    distinct = [index for index in first_of.values() if items[index].likeness is not None]
    if len(distinct) > 1:
        likenesses = [likeness for index in distinct if (likeness := items[index].likeness) is not None]
        pairs = pairs_of_few(likenesses) if len(likenesses) <= _FEW else None
        for first, second in like_pairs(likenesses) if pairs is None else pairs:
            groups.join(distinct[first], distinct[second])
    return groups.of_several()


class _Groups:
    """Indices that belong together, merged pair by pair."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def _root(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def join(self, first: int, second: int) -> None:
        lower, upper = sorted((self._root(first), self._root(second)))
        self._parent[upper] = lower

    def of_several(self) -> list[tuple[int, ...]]:
        members: dict[int, list[int]] = {}
        for index in range(len(self._parent)):
            members.setdefault(self._root(index), []).append(index)
        return [tuple(group) for group in members.values() if len(group) > 1]


def pairs_of_few(likenesses: Sequence[Likeness]) -> list[tuple[int, int]] | None:
    """Return the pairs of :func:`like_pairs`, without numpy; None if too many images look alike."""
    thumbnails = [_Thumbnail(likeness.thumbnail) for likeness in likenesses]
    pairs: list[tuple[int, int]] = []
    candidates = 0
    for second in range(len(likenesses)):
        for first in range(second):
            thumbnail, other = thumbnails[first], thumbnails[second]
            if thumbnail.plain or other.plain:
                alike = thumbnail.plain and other.plain and thumbnail.colour_like(other)
            else:
                bits = likenesses[first].bits
                pair = (bits ^ likenesses[second].bits, bits ^ likenesses[second].mirrored)
                near = [distance.bit_count() <= NEAR_BITS for distance in pair]
                candidates += sum(near)
                if candidates > _FEW_PAIRS:
                    return None
                alike = any(
                    close and thumbnail.correlates(other, mirror) for mirror, close in enumerate(near)
                )
            if alike:
                pairs.append((first, second))
    return pairs


class _Thumbnail:
    """A thumbnail as numbers, each colour by itself."""

    def __init__(self, thumbnail: bytes) -> None:
        image = Image.frombytes("RGB", (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), thumbnail)
        statistics = ImageStat.Stat(image)
        self._image, self._means = image, statistics.mean
        self.plain = sum(statistics.var) / 3 < _PLAIN_SPREAD

    def colour_like(self, other: _Thumbnail) -> bool:
        away = sum(abs(a - b) for a, b in zip(self._means, other._means, strict=True))
        return away / 3 <= _NEAR_COLOURS

    def correlates(self, other: _Thumbnail, mirror: int) -> bool:
        mine, two = self._centred(False), other._centred(bool(mirror))
        product = sum(map(operator.mul, mine, two))
        squares = sum(a * a for a in mine) * sum(b * b for b in two)
        return product >= _NEAR_CORRELATION * math.sqrt(squares)

    def _centred(self, mirror: bool) -> list[float]:
        image = ImageOps.mirror(self._image) if mirror else self._image
        bands = zip(image.split(), self._means, strict=True)
        return [value - mean for band, mean in bands for value in band.tobytes()]


def like_pairs(likenesses: Sequence[Likeness]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of images that are nearly the same, as ascending indices, found with numpy."""
    import numpy as np

    bits = np.array([likeness.bits for likeness in likenesses], dtype=np.uint64)
    mirrored = np.array([likeness.mirrored for likeness in likenesses], dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(likeness.thumbnail for likeness in likenesses), dtype=np.uint8)
    thumbnails = thumbnails.reshape(len(likenesses), -1, 3)
    plain = thumbnails.reshape(len(likenesses), -1, 3).var(axis=1).mean(axis=1) < _PLAIN_SPREAD
    yield from _plain_pairs(thumbnails, np.flatnonzero(plain))
    shaped = np.flatnonzero(~plain)
    for start in range(0, len(shaped), _ROWS):
        here, there = shaped[start : start + _ROWS], shaped[start:]
        for others, mirror in ((bits, False), (mirrored, True)):
            distance = np.bitwise_count(bits[here, None] ^ others[None, there])
            rows, columns = np.nonzero(distance <= NEAR_BITS)
            first, second = here[rows], there[columns]
            later = second > first
            yield from _confirmed(thumbnails, first[later], second[later], mirror)


def _confirmed(thumbnails: Array, first: Array, second: Array, mirror: bool) -> Iterator[tuple[int, int]]:
    """Yield the pairs whose thumbnails correlate, each colour by itself around its own mean."""
    import numpy as np

    for start in range(0, len(first), _PAIRS):
        left, other = first[start : start + _PAIRS], second[start : start + _PAIRS]
        a, b = thumbnails[left].astype(np.float32), thumbnails[other].astype(np.float32)
        if mirror:
            b = b.reshape(len(b), _THUMBNAIL_SIDE, _THUMBNAIL_SIDE, 3)[:, :, ::-1].reshape(a.shape)
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        product = (a * b).sum(axis=(1, 2))
        alike = product >= _NEAR_CORRELATION * np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
        yield from zip(left[alike].tolist(), other[alike].tolist(), strict=True)


def _plain_pairs(thumbnails: Array, plain: Array) -> Iterator[tuple[int, int]]:
    """Yield pairs of plain areas of nearly one colour: they have no shape, and hashes of noise only."""
    import numpy as np

    colours = thumbnails[plain].astype(np.float32).mean(axis=1)
    for place, index in enumerate(plain.tolist()):
        away = np.abs(colours[place + 1 :] - colours[place]).mean(axis=1)
        yield from ((index, other) for other in plain[place + 1 :][away <= _NEAR_COLOURS].tolist())
