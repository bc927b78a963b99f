"""A turned image file shows what it showed, turned, and keeps its pixels where its format allows it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from sdlora.data.check.quarter_turn import turned
from sdlora.data.reading.image_files import decode
from sdlora.errors import DatasetError


def drawn(mode: str = "RGB") -> Image.Image:
    image = Image.radial_gradient("L").resize((37, 22)).convert("RGB")
    image.paste((200, 30, 40), (3, 2, 15, 9))
    return image.convert(mode)


def saved(image: Image.Image, format: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


def seen(data: bytes) -> Image.Image:
    return decode(data, "it", "#ffffff")[0]


def turned_by_hand(image: Image.Image, quarters: int) -> Image.Image:
    """Move every pixel by itself: right becomes down."""
    for _ in range(quarters):
        new = Image.new("RGB", (image.height, image.width))
        for y in range(image.height):
            for x in range(image.width):
                new.putpixel((image.height - 1 - y, x), image.getpixel((x, y)))  # type: ignore[arg-type]
        image = new
    return image


@pytest.mark.parametrize("orientation", range(9))
def test_a_jpeg_of_any_orientation_keeps_its_compressed_pixels(orientation: int) -> None:
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    data = saved(drawn(), "JPEG", quality=80, exif=exif.tobytes() if orientation else b"")
    before = seen(data)
    for quarters in (1, 3):
        result, lossless = turned(data, "a.jpg", quarters)
        assert lossless and seen(result).tobytes() == turned_by_hand(before, quarters).tobytes()
        assert data[data.index(b"\xff\xda") :] == result[result.index(b"\xff\xda") :]


def test_four_quarters_of_a_jpeg_are_the_file_again() -> None:
    exif = Image.Exif()
    exif[274] = 6
    first = data = saved(drawn(), "JPEG", exif=exif.tobytes())
    for _ in range(4):
        data, _ = turned(data, "a.jpg")
    assert data == first


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_formats_without_loss_lose_nothing(kind: str) -> None:
    data = saved(drawn(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    result, lossless = turned(data, "a", 2)
    assert lossless and seen(result).tobytes() == turned_by_hand(drawn(), 2).tobytes()
    assert Image.open(io.BytesIO(result)).format == kind


def test_a_png_keeps_transparency_and_the_settings_it_was_drawn_with() -> None:
    image = drawn("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a cat\nSteps: 5")
    result = Image.open(io.BytesIO(turned(saved(image, "PNG", pnginfo=texts), "a.png")[0]))
    assert result.mode == "RGBA" and result.info["parameters"] == "a cat\nSteps: 5"
    assert result.getpixel((0, 0)) == image.getpixel((0, image.height - 1))


def test_camera_data_without_an_orientation_is_written_anew() -> None:
    exif = Image.Exif()
    exif[271] = "a maker"
    data = saved(drawn(), "JPEG", exif=exif.tobytes())
    result, lossless = turned(data, "a.jpg")
    assert not lossless and seen(result).size == (22, 37)


def test_what_cannot_be_turned_says_so() -> None:
    moving = saved(drawn("P"), "GIF", save_all=True, append_images=[Image.new("P", (37, 22))])
    with pytest.raises(DatasetError, match="animated"):
        turned(moving, "a.gif")
    with pytest.raises(DatasetError, match=r"a\.png"):
        turned(b"\x89PNG and no more", "a.png")
