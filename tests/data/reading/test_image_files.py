"""Formats that need a package, colour profiles, and what alpha a file has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from drawings import drawing, encoded, put
from PIL import Image, ImageCms

from sdlora.data.reading.folder import scan, survey
from sdlora.data.reading.image_files import load_alpha, load_pixels

HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40)


@pytest.mark.parametrize(
    ("name", "data", "title", "package"),
    [
        ("a.heic", HEIC, "HEIC", "pillow-heif"),
        ("phone.jpg", HEIC, "HEIC", "pillow-heif"),
        ("b.jxl", b"\xff\x0a" + bytes(40), "JPEG XL", "pillow-jxl-plugin"),
    ],
)
def test_a_format_without_its_package_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, title: str, package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    put(tmp_path / name, data)
    assert [str(problem) for problem in survey(tmp_path, trigger_word="t").problems] == [
        f"{name}: is a {title} image, which needs the package {package}; "
        f"run `pip install {package}`, or convert it to PNG"
    ]


@pytest.mark.parametrize(
    ("module", "format", "ending"), [("pillow_heif", "HEIF", "heic"), ("pillow_jxl", "JXL", "jxl")]
)
def test_a_format_with_its_package_is_read_upright_and_damage_is_told(
    tmp_path: Path, module: str, format: str, ending: str
) -> None:
    package = pytest.importorskip(module)
    if format == "HEIF":
        package.register_heif_opener()
    data = encoded(drawing(1, 64, 48), format, quality=95)
    put(tmp_path / f"good.{ending}", data)
    put(tmp_path / f"wrong-ending-{ending}.jpg", data)
    put(tmp_path / f"short.{ending}", data[: len(data) // 2])
    survey_result = survey(tmp_path, trigger_word="t")
    assert [(item.name, item.height, item.width, item.traits) for item in survey_result.dataset.items] == [
        (f"good.{ending}", 48, 64, ()),
        (f"wrong-ending-{ending}.jpg", 48, 64, ()),
    ]
    assert [problem.where for problem in survey_result.problems] == [f"short.{ending}"]
    pixels, drawn = load_pixels(tmp_path / f"good.{ending}"), drawing(1, 64, 48)
    difference = [abs(a - b) for a, b in zip(pixels.tobytes(), drawn.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 8


def profile(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()  # type: ignore[arg-type]


def swapped_primaries() -> bytes:
    """An RGB profile whose red and green are exchanged: what follows it is easy to see."""
    data = bytearray(profile("sRGB"))
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(data[128:132]), 12)}
    for tag, other in ((b"rXYZ", b"gXYZ"),):
        first, two = tags[tag], tags[other]
        data[first + 4 : first + 12], data[two + 4 : two + 12] = (
            data[two + 4 : two + 12],
            data[first + 4 : first + 12],
        )
    return bytes(data).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_follow_the_profile_of_the_file(tmp_path: Path, mode: str) -> None:
    colour = (200, 20, 20) if mode == "RGB" else (200, 20, 20, 255)
    image = Image.new(mode, (8, 8), colour)
    swapped = put(tmp_path / "a.png", encoded(image, "PNG", icc_profile=swapped_primaries()))
    same = put(tmp_path / "b.png", encoded(image, "PNG", icc_profile=profile("sRGB")))
    broken = put(tmp_path / "c.png", encoded(image, "PNG", icc_profile=b"nothing of the kind"))
    misplaced = put(tmp_path / "d.png", encoded(image.convert("L"), "PNG", icc_profile=swapped_primaries()))
    red, green, blue = load_pixels(swapped).getpixel((0, 0))  # type: ignore[misc]
    assert (red < 40, green > 180, blue < 40) == (True, True, True)
    assert load_pixels(same).getpixel((0, 0)) == load_pixels(broken).getpixel((0, 0)) == (200, 20, 20)
    assert len(set(load_pixels(misplaced).getpixel((0, 0)))) == 1  # type: ignore[arg-type]
    assert len(scan(tmp_path, trigger_word="t").items) == 4


def test_alpha_is_read_upright_and_absent_where_an_image_is_opaque(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 20), (9, 9, 9, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load_alpha(put(tmp_path / "a.png", encoded(image, "PNG", exif=exif)))
    assert turned is not None
    assert (turned.size, turned.getpixel((19, 0)), turned.getpixel((0, 39))) == ((20, 40), 0, 255)
    assert load_alpha(put(tmp_path / "b.png", drawing(1))) is None
