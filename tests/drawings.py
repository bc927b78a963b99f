"""Real image files for the tests of the data side: plain ones, odd ones and broken ones."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageDraw


def drawing(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return an RGB image of coloured boxes; different seeds look different."""
    draw = random.Random(seed).random
    image = Image.new("RGB", (width, height), (int(draw() * 255), int(draw() * 255), int(draw() * 255)))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = draw() * width * 0.8, draw() * height * 0.8
        box = (left, top, left + 4 + draw() * width / 2, top + 4 + draw() * height / 2)
        pen.rectangle(box, fill=(int(draw() * 255), int(draw() * 255), int(draw() * 255)))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def put(file: Path, content: bytes | str | Image.Image) -> Path:
    """Write bytes, UTF-8 text or an image (as PNG), making the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = encoded(content) if isinstance(content, Image.Image) else content
    file.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return file


def folder_of(root: Path, count: int, *, captions: bool = True) -> Path:
    """Make a folder of ``count`` different images, with captions ``image N`` beside them."""
    for number in range(count):
        put(root / f"p{number:02}.png", drawing(number))
        if captions:
            put(root / f"p{number:02}.txt", f"picture {number}")
    return root


def png_that_claims(width: int, height: int) -> bytes:
    """Return a tiny PNG whose header claims any size: a decompression bomb."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def animation(format: str = "GIF") -> bytes:
    """Return an animation whose first frame is red and whose second is blue."""
    red, blue = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 255))
    return encoded(red, format, save_all=True, append_images=[blue])
