"""One image file repaired, if needed: rotated upright, cut where its end is lost, with one frame only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageFile, ImageOps

from ..reading.decoding import ImageFileError, decoded_image
from ..reading.image_files import unusable
from ..reading.problems import Unusable, is_cut_short

_LEAST_INTACT = 0.9
_JPEG_QUALITY = 97
_BY_ROWS = ("JPEG", "PNG")  # stored from top to bottom, so that a lost end means lost rows at the bottom
_BLOCK = 16


@dataclass(frozen=True)
class Mended:
    """An image file as it should be: its bytes, their new file ending, if any, and what was done."""

    data: bytes
    suffix: str | None = None
    done: tuple[str, ...] = ()


def mend(data: bytes, name: str) -> Mended:
    """Return an image file that training accepts.

    Raises:
        Unusable: when it cannot be repaired.
    """
    try:
        with decoded_image(data, name) as loaded:
            image, format = loaded.image, loaded.format
    except ImageFileError as error:
        return _without_lost_end(data, unusable(error, name))
    if loaded.animated:
        return Mended(_saved(image, "PNG"), ".png", ("its first frame alone",))
    if not (loaded.turned or loaded.damaged_metadata):
        return Mended(data)
    done = "rotated upright" if loaded.turned else "without its damaged metadata"
    if format in ("JPEG", "MPO"):
        return Mended(_saved(image, "JPEG"), None, (done,))
    return Mended(_saved(image, "PNG"), None if format == "PNG" else ".png", (done,))


def _without_lost_end(data: bytes, error: Unusable) -> Mended:
    """Return the rows of a truncated image that were decoded, if they are nearly all."""
    if not is_cut_short(error.problem):
        raise error  # damaged otherwise: which pixels are wrong is not known
    with _lenient():
        try:
            image = Image.open(io.BytesIO(data), formats=_BY_ROWS)
            by_rows = not (image.info.get("progressive") or image.info.get("interlace"))
            image.load()
        except Exception:
            raise error from None
    intact = _intact_rows(image)
    if not by_rows or not _LEAST_INTACT * image.height <= intact < image.height:
        raise error
    done = f"the last {image.height - intact} of {image.height} rows were lost and are cut off"
    kept = ImageOps.exif_transpose(image.crop((0, 0, image.width, intact)))
    return Mended(_saved(kept, "PNG"), ".png", (done,))


def _intact_rows(image: Image.Image) -> int:
    """Return how many rows from the top were decoded; decoders fill the rest with one colour."""
    fill = image.getpixel((image.width - 1, image.height - 1))
    box = ImageChops.difference(image, Image.new(image.mode, image.size, fill)).getbbox(alpha_only=False)
    rows = box[3] if box else 0
    # the last row of blocks may be decoded in part
    return max(0, rows - _BLOCK) if image.format == "JPEG" else rows


def _saved(image: Image.Image, format: str) -> bytes:
    profile = image.info.get("icc_profile")
    if format == "PNG" and image.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
        image, profile = image.convert("RGB"), None
    buffer = io.BytesIO()
    more = {"quality": _JPEG_QUALITY, "subsampling": 0} if format == "JPEG" else {}
    image.save(buffer, format, icc_profile=profile, **more)
    return buffer.getvalue()


@contextmanager
def _lenient() -> Iterator[None]:
    """Let Pillow decode as much of a truncated file as there is; its switch is global, for all files."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
