"""Reading images: every kind of file becomes upright sRGB, or an error that names it."""

from __future__ import annotations

import io
import stat
from pathlib import Path

from PIL import Image, ImageCms

from ...errors import DatasetError
from .decoding import PLUGINS, ImageFileError, decoded_image
from .items import ImageItem, Trait
from .problems import Problem, Unusable

PIXELS_VERSION = "2"
"""Part of the key of encoded images: raise it when the same file gives other pixels."""


IMAGE_ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"}
).union(*(plugin.endings for plugin in PLUGINS))
UNREAD_IMAGE_ENDINGS = frozenset(
    {
        ".svg",
        ".psd",
        ".tga",
        ".jp2",
        ".ico",
        ".eps",
        ".raw",
        ".cr2",
        ".nef",
        ".arw",
        ".dng",
        ".exr",
        ".hdr",
        ".ppm",
        ".qoi",
    }
)
_PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}

WHOLE_PIXELS = 2**24
"""Up to this many pixels an image is converted as a whole, larger ones in bands: 9,400 x 9,400 px with
transparency took 2.1 GiB as a whole."""
BAND_PIXELS = 2**22  # of one band


def load_pixels(image: ImageItem | Path, background: str = "#ffffff") -> Image.Image:
    """Return an image as upright sRGB: EXIF rotation applied, transparency laid on ``background``.

    Palette, greyscale, 16-bit and CMYK images are converted, colour profiles are followed; of an
    animation the first frame is taken.

    Raises:
        DatasetError: when the file cannot be read or decoded.
    """
    path = image.path if isinstance(image, ImageItem) else image
    try:
        return decode(read_file(path, str(path)), str(path), background)[0]
    except Unusable as error:
        raise DatasetError(str(error)) from error


def load_small(path: Path, side: int) -> Image.Image:
    """Return an image as upright sRGB on white, its longer side at most ``side`` px, in little memory.

    Raises:
        DatasetError: when the file cannot be read or decoded.
    """
    try:
        with decoded_image(read_file(path, str(path)), str(path), least_side=side) as loaded:
            image = loaded.image
            factor = max(image.size) // (2 * side)
            if factor > 1 and image.mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK"):
                info = image.info
                image = reduced(image, factor)
                image.info = info
            rgb, _ = to_rgb(image, "#ffffff")
    except (Unusable, ImageFileError) as error:
        raise DatasetError(str(error)) from error
    rgb.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return rgb


def reduced(image: Image.Image, factor: int) -> Image.Image:
    """Return an image at a whole fraction of its size; in bands, as Pillow copies what is transparent."""
    mode = "L" if image.mode == "1" else image.mode
    size = -(-image.width // factor), -(-image.height // factor)
    rows = factor * max(1, BAND_PIXELS // (image.width * factor))
    small = Image.new(mode, size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert(mode)
        small.paste(band.reduce(factor), (0, top // factor))
    return small


def load_alpha(path: Path) -> Image.Image | None:
    """Return an image's opacity (mode L, upright), or None if it is opaque everywhere.

    Raises:
        DatasetError: when the file cannot be read or decoded.
    """
    try:
        with decoded_image(read_file(path, str(path)), str(path)) as loaded:
            image = loaded.image
            return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    except (Unusable, ImageFileError) as error:
        raise DatasetError(str(error)) from error


def read_file(path: Path, name: str, limit: int | None = None) -> bytes:
    """Return a regular file's bytes.

    Raises:
        Unusable: when it cannot be read, is not a regular file, or has more than ``limit`` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a named pipe would wait for ever
            raise Unusable(Problem("unreadable", name, "is not a regular file", "delete it"))
        if limit is not None and status.st_size > limit:
            what = f"has {status.st_size} bytes, too many for a caption"
            raise Unusable(Problem("unreadable", name, what, f"shorten it to {limit} bytes"))
        return path.read_bytes()
    except OSError as error:
        fix = "check the link, its permissions or the disk"
        what = f"cannot be read ({error.strerror or error})"
        raise Unusable(Problem("unreadable", name, what, fix)) from error


def decode(data: bytes, name: str, background: str) -> tuple[Image.Image, tuple[Trait, ...]]:
    """Return upright sRGB pixels and what was odd about the file.

    Raises:
        Unusable: when it is not an image, is damaged or too large, or needs a package that is not installed.
    """
    try:
        with decoded_image(data, name) as loaded:
            rgb, transparent = to_rgb(loaded.image, background)
    except ImageFileError as error:
        raise unusable(error, name) from error
    except MemoryError:
        what = "is too large for the memory"
        raise Unusable(Problem("undecodable", name, what, "save it smaller")) from None
    present: list[tuple[Trait, bool]] = [
        ("animated", loaded.animated),
        ("transparent", transparent),
        ("damaged metadata", loaded.damaged_metadata),
    ]
    return rgb, tuple(trait for trait, holds in present if holds)


def unusable(error: ImageFileError, name: str) -> Unusable:
    """Return the error of an image that cannot be read as a problem of its folder."""
    return Unusable(Problem("undecodable", name, error.what, error.fix))


def to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """Return an image as sRGB on ``background``, and whether it was transparent anywhere.

    Each pixel is converted by itself, so a large image is converted in bands: the result is the same, but
    the copies in between are small.
    """
    if image.width * image.height <= WHOLE_PIXELS:
        return _converted(image, background)
    rows = max(1, BAND_PIXELS // image.width)
    whole = Image.new("RGB", image.size)
    transparent = False
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        converted, some = _converted(band, background)
        whole.paste(converted, (0, top))
        transparent = transparent or some
    return whole, transparent


def _converted(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns a 16-bit image white.
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        return _to_srgb(image, profile), False
    layers = image.convert("RGBA")
    alpha = layers.getchannel("A")
    colours = _to_srgb(image.convert("L") if image.mode == "LA" else layers.convert("RGB"), profile)
    if alpha.getextrema() == (255, 255):
        return colours, False
    canvas = Image.new("RGB", layers.size, background)
    colours.putalpha(alpha)
    over = canvas.convert("RGBA")
    over.alpha_composite(colours)
    return over.convert("RGB"), True


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an opaque image as RGB, its colours brought from its own profile to sRGB.

    A profile that is damaged or meant for another kind of image is ignored, as image viewers do.
    """
    plain = image if image.mode == "RGB" else image.convert("RGB")
    if not profile or image.mode not in _PROFILE_SPACES:
        return plain
    try:
        source_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source_profile.profile.xcolor_space.strip() != _PROFILE_SPACES[image.mode]:
            return plain
        if "srgb" in (source_profile.profile.profile_description or "").lower():
            return plain
        converted = ImageCms.profileToProfile(
            image, source_profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return plain
    return plain if converted is None else converted
