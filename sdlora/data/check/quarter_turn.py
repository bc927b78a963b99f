"""An image file turned by quarters, without loss where its format allows it.

A JPEG keeps its compressed pixels: only its EXIF orientation changes, which sdlora, browsers and other
trainers follow. PNG, lossless WebP, BMP and TIFF are written anew, which loses nothing. Every result is
decoded and compared with the image before.

The orientation's values: Exif 2.32 (CIPA DC-008), tag 274.
"""

from __future__ import annotations

import io
import struct
from typing import Any

from PIL import Image, PngImagePlugin

from ...errors import DatasetError
from ..reading.decoding import ImageFileError, decoded_image
from ..reading.image_files import decode
from ..reading.problems import Unusable

_ORIENTATION = 274
_NEXT = {1: 6, 6: 3, 3: 8, 8: 1, 2: 7, 7: 4, 4: 5, 5: 2}
"""Orientation -> the one that shows the image a quarter further clockwise."""
_TURNS = {1: Image.Transpose.ROTATE_270, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_90}
"""Quarters clockwise -> Pillow's word, which counts the other way round."""
_QUALITY = 97
_EXIF = b"Exif\0\0"
_SHORT = 3
_WRITTEN = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF")


def turned(data: bytes, name: str, quarters: int = 1) -> tuple[bytes, bool]:
    """Return an image file turned clockwise, and whether its pixels are exactly those of before.

    Args:
        data: the whole file.
        name: of the file, for messages.
        quarters: 1, 2 or 3 quarter turns.

    Raises:
        DatasetError: when it cannot be decoded, is animated, or its format cannot be written here.
    """
    wanted = _pixels(data, name).transpose(_TURNS[quarters])
    result = _by_orientation(data, quarters) if data.startswith(b"\xff\xd8") else None
    if result is None or not _same(result, name, wanted):
        result = _rewritten(data, name, quarters)
    return result, _same(result, name, wanted)


def turned_image(image: Image.Image, quarters: int) -> Image.Image:
    """Return an image that is already decoded, turned clockwise by 1, 2 or 3 quarters."""
    return image.transpose(_TURNS[quarters])


def _same(data: bytes, name: str, wanted: Image.Image) -> bool:
    now = _pixels(data, name)
    return now.size == wanted.size and now.tobytes() == wanted.tobytes()


def _pixels(data: bytes, name: str) -> Image.Image:
    try:
        return decode(data, name, "#ffffff")[0]
    except Unusable as error:
        raise DatasetError(str(error)) from error


def _by_orientation(data: bytes, quarters: int) -> bytes | None:
    """Return a JPEG with another orientation in its camera data; None where that cannot be written."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == _EXIF:
            place = _orientation_in(data[at + 10 : end])
            if place is None:
                return None
            offset, order, value = place
            for _ in range(quarters):
                value = _NEXT.get(value, 6)
            here = at + 10 + offset
            return data[:here] + struct.pack(order + "H", value) + data[here + 2 :]
        at = end
    value = 1
    for _ in range(quarters):
        value = _NEXT[value]
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, _ORIENTATION, _SHORT, 1, value, 0, 0)
    segment = _EXIF + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def _orientation_in(tiff: bytes) -> tuple[int, str, int] | None:
    """Return offset, byte order and value of the orientation in camera data, None where it has none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", tiff, entry)
        if (tag, kind, number) == (_ORIENTATION, _SHORT, 1):
            return entry + 8, order, struct.unpack_from(order + "H", tiff, entry + 8)[0]
    return None


def _rewritten(data: bytes, name: str, quarters: int) -> bytes:
    try:
        with decoded_image(data, name) as loaded:
            if loaded.animated:
                raise DatasetError(f"{name}: is animated; turn it with the program that made it")
            if loaded.format not in _WRITTEN:
                what = f"{name}: {loaded.format} files are not written by sdlora; save it as PNG to turn it"
                raise DatasetError(what)
            image, format = loaded.image.transpose(_TURNS[quarters]), loaded.format
            info = dict(loaded.image.info)
    except ImageFileError as error:
        raise DatasetError(str(error)) from error
    buffer = io.BytesIO()
    more: dict[str, Any] = {"icc_profile": info.get("icc_profile")}
    if format in ("JPEG", "MPO"):
        format, more = "JPEG", more | {"quality": _QUALITY, "subsampling": 0}
    elif format == "WEBP":
        more |= {"lossless": True, "exact": True} if b"VP8L" in data[:128] else {"quality": _QUALITY}
    elif format == "PNG":
        more["pnginfo"] = _texts(info)
    elif format in ("BMP", "DIB"):
        format, more = "BMP", {}
    try:
        image.save(buffer, format, **more)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{name}: cannot be written again ({error}); save it as PNG to turn it") from error
    return buffer.getvalue()


def _texts(info: dict[Any, Any]) -> PngImagePlugin.PngInfo:
    """Return the texts of a PNG, among them the settings that it was drawn with."""
    kept = PngImagePlugin.PngInfo()
    for key, value in info.items():
        if isinstance(key, str) and isinstance(value, str) and 0 < len(key) < 80:
            kept.add_itxt(key, value)
    return kept
