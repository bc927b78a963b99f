"""Where every image of a run ends up: the one rule that training follows and the doctor shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..reading.items import ImageItem
from .buckets import (
    MAX_ASPECT,
    MAX_UPSCALE,
    Placement,
    make_buckets,
    place,
    place_without_upscaling,
    square_bucket,
    upscale,
)

Placer = Callable[[ImageItem], Placement]


def placer(resolution: int, multiple: int, *, grouped: bool = True, enlarge: bool = True) -> Placer:
    """Return what places images at one resolution.

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
