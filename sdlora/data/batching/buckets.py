"""Where every image of a run ends up: image sizes -> bucket and crop geometry; pure arithmetic.

A bucket is a training size (height, width). An image goes to the bucket whose aspect ratio is nearest in
log space, so portrait and landscape are mirror images of each other; it is resized until it just covers
the bucket, and the middle is kept. :func:`placer` is the one rule that training follows and the doctor shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...errors import ConfigError
from ..reading.items import ImageItem

Size = tuple[int, int]
"""(height, width) in px."""

MAX_ASPECT = 4.0
"""Longest side over shortest of a bucket; images beyond it are cropped to it."""

NEGLIGIBLE_UPSCALE = 1.05
"""Images may be enlarged this much even if enlarging is switched off: nobody sees a twentieth."""
MAX_UPSCALE = 1.5
"""There is a warning for images that are enlarged more than this."""


@dataclass(frozen=True)
class Placement:
    """Where an image ends up: all in px, (height, width) order; ``crop`` is (top, left)."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    """Corner of the bucket inside the RESIZED image, which is what SDXL is given."""

    @property
    def cropped_share(self) -> float:
        """Share of the image's area that is cut away, 0 to below 1."""
        return 1 - math.prod(self.bucket) / math.prod(self.resized)


Placer = Callable[[ImageItem], Placement]


@dataclass(frozen=True)
class BucketCount:
    """How many images a bucket has, and how many visits in an epoch."""

    bucket: Size
    num_images: int
    num_visits: int


def make_buckets(resolution: int, multiple: int, max_aspect: float = MAX_ASPECT) -> list[Size]:
    """Return the buckets with an area of at most ``resolution`` squared, from portrait to landscape.

    Sides are multiples of ``multiple``; with every (h, w) there is (w, h); the largest square is always
    among them. For 1024 and 64 all are sizes SDXL was trained on (Podell et al. 2023, appendix I).

    Raises:
        ConfigError: when the resolution is smaller than the size multiple.
    """
    square = square_bucket(resolution, multiple)[0][0]
    buckets = {(square, square)}
    for short in range(multiple, square + 1, multiple):
        long = resolution * resolution // short // multiple * multiple
        if short < long <= short * max_aspect:
            buckets |= {(long, short), (short, long)}
    return sorted(buckets, key=lambda size: (math.log(size[1]) - math.log(size[0]), size))


def square_bucket(resolution: int, multiple: int) -> list[Size]:
    """Return the only bucket if bucketing is switched off: the largest square.

    Raises:
        ConfigError: when the resolution is smaller than the size multiple.
    """
    if resolution < multiple:
        raise ConfigError(
            f"`data.resolution={resolution}` is below {multiple} px, the smallest size this base works at; "
            f"set data.resolution={multiple} or more"
        )
    side = resolution // multiple * multiple
    return [(side, side)]


def place(
    height: int, width: int, buckets: Sequence[Size], focus: tuple[float, float] | None = None
) -> Placement:
    """Return the bucket of nearest aspect ratio, the covering size and the crop.

    The crop is centred on ``focus`` (x, y as shares from the top left) as far as the image reaches, or
    else on the middle. A tie goes to the larger bucket, then to the one nearer to a square: an image and
    its transpose get transposed buckets.
    """
    aspect = math.log(width) - math.log(height)  # a difference, so that the transpose is exactly -aspect

    def far(bucket: Size) -> tuple[float, int, float, Size]:
        bucket_aspect = math.log(bucket[1]) - math.log(bucket[0])
        return abs(bucket_aspect - aspect), -math.prod(bucket), abs(bucket_aspect), bucket

    bucket = min(buckets, key=far)
    return _placement(height, width, bucket, focus)


def place_without_upscaling(
    height: int,
    width: int,
    resolution: int,
    multiple: int,
    buckets: Sequence[Size],
    focus: tuple[float, float] | None = None,
    max_aspect: float = MAX_ASPECT,
) -> Placement:
    """Return a placement that does not enlarge the image by more than :data:`NEGLIGIBLE_UPSCALE`.

    An image that is large enough goes where :func:`place` puts it. A smaller one gets a bucket of its
    own: of all sizes with sides in multiples of ``multiple`` that it covers, the one that keeps most of
    its pixels (those cropped away and those lost to reduction count alike). So 1023 px become 1024,
    not 960. Only an image smaller than one multiple must still be enlarged.

    Args:
        height: of the image, px.
        width: of the image, px.
        resolution: largest area is its square.
        multiple: of all sides, px.
        buckets: of larger images.
        focus: see :func:`place`.
        max_aspect: longest side over shortest.
    """
    usual = place(height, width, buckets, focus)
    if upscale(height, width, usual) <= NEGLIGIBLE_UPSCALE:
        return usual
    limit = NEGLIGIBLE_UPSCALE
    sizes = [
        (tall, wide)
        for tall in range(multiple, max(multiple, int(height * limit)) + 1, multiple)
        for wide in range(multiple, max(multiple, int(width * limit)) + 1, multiple)
        if tall * wide <= resolution * resolution and max(tall, wide) <= max_aspect * min(tall, wide)
    ]
    aspect = math.log(width) - math.log(height)

    def cost(size: Size) -> tuple[float, int, float, Size]:
        scale = max(size[0] / height, size[1] / width)
        lost = 1 - math.prod(size) / (height * width * max(1.0, scale * scale))
        off = abs(math.log(size[1]) - math.log(size[0]) - aspect)
        return round(lost, 9), -math.prod(size), round(off, 9), size

    return _placement(height, width, min(sizes, key=cost), focus)


def _placement(height: int, width: int, bucket: Size, focus: tuple[float, float] | None) -> Placement:
    resized = _cover(height, width, bucket)
    slack = resized[0] - bucket[0], resized[1] - bucket[1]
    if focus is None:
        return Placement(bucket, resized, (slack[0] // 2, slack[1] // 2))
    wanted = (
        round(share * whole - kept / 2)
        for share, whole, kept in zip((focus[1], focus[0]), resized, bucket, strict=True)
    )
    top, left = (max(0, min(most, start)) for start, most in zip(wanted, slack, strict=True))
    return Placement(bucket, resized, (top, left))


def _cover(height: int, width: int, bucket: Size) -> Size:
    """Return the smallest size with the image's aspect ratio that covers the bucket."""
    bucket_height, bucket_width = bucket
    if bucket_height * width >= bucket_width * height:
        return bucket_height, max(bucket_width, (2 * width * bucket_height + height) // (2 * height))
    return max(bucket_height, (2 * height * bucket_width + width) // (2 * width)), bucket_width


def placer(resolution: int, multiple: int, *, grouped: bool = True, enlarge: bool = True) -> Placer:
    """Return the function that places images at one resolution.

    Args:
        resolution: side of a square of the area trained at, px.
        multiple: of all sides, px.
        grouped: keep aspect ratios by buckets; off, crop to squares.
        enlarge: enlarge images that are smaller than the resolution.

    Raises:
        ConfigError: when the resolution is smaller than the size multiple.
    """
    buckets = (make_buckets if grouped else square_bucket)(resolution, multiple)

    def placed(item: ImageItem) -> Placement:
        if enlarge:
            return place(item.height, item.width, buckets, item.focus)
        aspect = MAX_ASPECT if grouped else 1.0
        return place_without_upscaling(
            item.height, item.width, resolution, multiple, buckets, item.focus, aspect
        )

    return placed


def further(item: ImageItem, usual: Placement, others: Iterable[Placer]) -> Iterator[Placement]:
    """Yield the placements an image gets at further resolutions: those it is large enough for.

    Args:
        item: the image.
        usual: its placement at the resolution of the run.
        others: what places images at the further resolutions.
    """
    most = max(MAX_UPSCALE, upscale(item.height, item.width, usual))
    for placed in others:
        other = placed(item)
        if other.bucket != usual.bucket and upscale(item.height, item.width, other) <= most:
            yield other


def flipped(placement: Placement) -> Placement:
    """Return the placement of the mirrored image whose crop shows the same part."""
    left = placement.resized[1] - placement.bucket[1] - placement.crop[1]
    return replace(placement, crop=(placement.crop[0], left))


def source_box(height: int, width: int, placement: Placement) -> tuple[float, float, float, float]:
    """Return the kept part as (left, top, right, bottom) in px of the image before resizing.

    Fits Pillow: ``image.resize((w, h), box=source_box(...))`` resizes and crops at once, and so never
    makes a huge image of one that is extremely long.
    """
    down, across = height / placement.resized[0], width / placement.resized[1]
    top, left = placement.crop
    bottom, right = top + placement.bucket[0], left + placement.bucket[1]
    return left * across, top * down, min(right * across, float(width)), min(bottom * down, float(height))


def upscale(height: int, width: int, placement: Placement) -> float:
    """Return the factor by which the image is enlarged; below 1 it is made smaller."""
    return max(placement.resized[0] / height, placement.resized[1] / width)


def count_buckets(placements: Iterable[Placement], repeats: Iterable[int]) -> list[BucketCount]:
    """Return the counts of each used bucket, from portrait to landscape."""
    images: Counter[Size] = Counter()
    visits: Counter[Size] = Counter()
    for placement, times in zip(placements, repeats, strict=True):
        images[placement.bucket] += 1
        visits[placement.bucket] += times
    ordered = sorted(images, key=lambda size: (math.log(size[1]) - math.log(size[0]), size))
    return [BucketCount(bucket, images[bucket], visits[bucket]) for bucket in ordered]
