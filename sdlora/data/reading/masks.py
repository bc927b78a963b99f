"""Which part of an image is trained on: a mask of the same name in another folder, or transparency.

White (or opaque) is trained, black is not, grey counts in between.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ...errors import DatasetError
from .image_files import decode, load_alpha, load_pixels, read_file
from .items import ImageItem
from .listing import FoundFile, list_files
from .problems import Problem, Unusable

_MAX_ASPECT_DIFFERENCE = 0.02


def with_masks(
    items: Sequence[ImageItem], folder: Path, *, follow_links: bool = False
) -> tuple[list[ImageItem], list[Problem], list[str]]:
    """Return the images with their masks, the problems with masks, and notes.

    A mask has its image's name and relative place inside ``folder``, with any ending. Images
    without one are trained as a whole; a note says how many.

    Raises:
        DatasetError: when the folder is missing or is a file.
    """
    masks: dict[tuple[str, str], FoundFile] = {}
    problems: list[Problem] = []
    listing = list_files(folder, recursive=True, follow_links=follow_links)
    problems += [replace(problem, kind="bad mask") for problem in listing.problems]
    for file in listing.images:
        if file.key in masks:
            what = f"{masks[file.key].name} and {file.name} are masks of one image"
            problems.append(Problem("bad mask", str(folder), what, "delete one of them"))
        masks[file.key] = file
    item_masks = [masks.pop(FoundFile(item.path, item.name).key, None) for item in items]
    with ThreadPoolExecutor(max(1, min(32, os.cpu_count() or 1))) as pool:
        checked = list(pool.map(_check, items, item_masks))
    problems += [result for result in checked if isinstance(result, Problem)]
    masked = [result for result in checked if not isinstance(result, Problem)]
    bare = sum(mask is None for mask in item_masks)
    notes = [f"{folder}: {bare} of {len(items)} images have no mask and are trained whole"] if bare else []
    if masks:
        first = min(file.name for file in masks.values())
        notes.append(f"{folder}: {len(masks)} masks belong to no image (first: {first})")
    if bare == len(items) and items:
        fix = "name each mask as its image"
        problems.append(Problem("bad mask", str(folder), "holds no mask of any of the images", fix))
    return masked, problems, notes


def _check(item: ImageItem, mask: FoundFile | None) -> ImageItem | Problem:
    if mask is None:
        return item
    try:
        data = read_file(mask.path, mask.name)
        image, _ = decode(data, mask.name, "#000000")
    except Unusable as error:
        return replace(error.problem, kind="bad mask")
    if abs(image.width * item.height / (image.height * item.width) - 1) > _MAX_ASPECT_DIFFERENCE:
        what = f"has {image.width}x{image.height} px, but its image {item.width}x{item.height}"
        return Problem("bad mask", str(mask.path), what, "make it as large as its image")
    if image.convert("L").getextrema() == (0, 0):
        return Problem("bad mask", str(mask.path), "is all black: nothing would be trained", "paint it white")
    return replace(item, mask=mask.path, mask_digest=hashlib.sha256(data).hexdigest())


def load_mask(item: ImageItem, *, alpha: bool) -> Image.Image | None:
    """Return an image's mask (mode L, as large as the image), or None if all of it is trained.

    Args:
        item: the image.
        alpha: take its transparency; else the file in :attr:`ImageItem.mask`.

    Raises:
        DatasetError: when a file cannot be read or decoded.
    """
    if alpha:
        return load_alpha(item.path)
    if item.mask is None:
        return None
    mask = load_pixels(item.mask, "#000000").convert("L")
    if mask.size != (item.width, item.height):
        mask = mask.resize((item.width, item.height), Image.Resampling.BILINEAR)
    return mask


def refuse_empty(item: ImageItem, share: float) -> None:
    """Check that some part of an image is trained.

    Raises:
        DatasetError: if the share of it that the mask lets through is 0.
    """
    if share <= 0:
        what = "its mask" if item.mask is not None else "it is transparent where it is kept: its mask"
        raise DatasetError(
            f"{item.path}: {what} lets nothing through in the part of the image that is kept; "
            "correct the mask, or give a `focus` that says which part to keep"
        )
