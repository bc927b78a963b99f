"""Small JPEGs of images as data URLs, made on all cores."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ...errors import DatasetError
from ..reading.image_files import load_small
from ..reading.items import ImageItem
from ..reading.lookahead import ahead
from ..reading.masks import load_mask
from ..reading.measure import Progress

_QUALITY = 80
_BLOCKED, _TINT = "#d6336c", 0.6


def thumbnails(
    items: Sequence[tuple[ImageItem, bool]], side: int, progress: Progress | None = None
) -> Iterator[str | None]:
    """Yield each image, reduced to ``side`` px, as a data URL; None where it can no longer be read.

    Args:
        items: the images, and whether they have a mask: the parts that it blocks are tinted.
        side: px of the longer side.
        progress: called after each image.
    """
    workers = max(1, min(32, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(_thumbnail, item, masked, side) for item, masked in items)
        for done, future in enumerate(ahead(futures, 4 * workers), start=1):
            yield future.result()
            if progress is not None:
                progress(done, len(items))


def _thumbnail(item: ImageItem, masked: bool, side: int) -> str | None:
    try:
        image = load_small(item.path, side)
        mask = load_mask(item, alpha=item.mask is None) if masked else None
    except DatasetError:  # changed since it was examined
        return None
    if mask is not None:
        blocked = Image.blend(image, Image.new("RGB", image.size, _BLOCKED), _TINT)
        image = Image.composite(image, blocked, mask.resize(image.size, Image.Resampling.BOX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
