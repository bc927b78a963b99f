"""Reading images: every kind of file becomes upright sRGB, or an error that names it."""

from __future__ import annotations

import importlib
import importlib.util
import io
import stat
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ...errors import DatasetError
from .items import ImageItem, Trait
from .problems import Problem, Unusable

PIXELS_VERSION = "2"
"""Part of what identifies encoded images: raise it when the same file gives other pixels."""


@dataclass(frozen=True)
class _Plugin:
    """A package that teaches Pillow a format."""

    format: str
    title: str
    package: str
    module: str
    register: str | None
    endings: frozenset[str]
    starts: tuple[tuple[int, bytes], ...]
    """What such a file holds at an offset."""


_PLUGINS = (
    _Plugin(
        "HEIF",
        "HEIC",
        "pillow-heif",
        "pillow_heif",
        "register_heif_opener",
        frozenset({".heic", ".heif", ".hif"}),
        tuple((4, b"ftyp" + brand) for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")),
    ),
    _Plugin(
        "JXL",
        "JPEG XL",
        "pillow-jxl-plugin",
        "pillow_jxl",
        None,
        frozenset({".jxl"}),
        ((0, b"\xff\x0a"), (4, b"JXL \r\n\x87\n")),
    ),
)
IMAGE_ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"}
).union(*(plugin.endings for plugin in _PLUGINS))
# Told to Image.open, so that a file is never handed to a decoder that starts other programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
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

_open_lock = threading.Lock()


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


def load_alpha(path: Path) -> Image.Image | None:
    """Return how opaque an image is (mode L, upright), or None where it is opaque everywhere.

    Raises:
        DatasetError: when the file cannot be read or decoded.
    """
    try:
        image, _ = _opened(read_file(path, str(path)), str(path))
    except Unusable as error:
        raise DatasetError(str(error)) from error
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def read_file(path: Path, name: str, limit: int | None = None) -> bytes:
    """Return a regular file's bytes.

    Raises:
        Unusable: when it cannot be read, is not a regular file, or has more than ``limit`` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe would be waited for without end
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
    image, animated = _opened(data, name)
    try:
        rgb, transparent = _to_rgb(image, background)
    except MemoryError:
        raise _unusable(name, "is too large for the memory", "save it smaller") from None
    traits: list[Trait] = ["animated"] if animated else []
    return rgb, (*traits, "transparent") if transparent else tuple(traits)


def _unusable(name: str, what: str, fix: str = "replace or delete it") -> Unusable:
    return Unusable(Problem("undecodable", name, what, fix))


def _opened(data: bytes, name: str) -> tuple[Image.Image, bool]:
    """Return an image decoded in its own mode, upright, and whether it is animated."""
    if not data:
        raise _unusable(name, "is empty (0 bytes)")
    formats = _formats_for(data, name)
    try:
        image = _open(data, formats)
        # Phones store a second, smaller view in MPO files, and HEIC files several: that is not an animation.
        animated = image.format not in ("MPO", "HEIF") and bool(getattr(image, "is_animated", False))
        if animated:
            image.seek(0)
        image.load()
        if image.format == "PNG" and image.mode == "I":  # how Pillow before 11 opens 16-bit greyscale
            image = image.convert("I;16")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "F"):
            raise _unusable(name, f"has 32 bits per value (mode {image.mode})", "save it with 8 or 16 bits")
        return image, animated
    except Unusable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise _unusable(name, f"has more than {limit} million pixels", "save it smaller") from None
    except UnidentifiedImageError:
        raise _unidentified(data, name) from None
    except MemoryError:
        raise _unusable(name, "is too large for the memory", "save it smaller") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        why = " ".join(str(error).split()) or type(error).__name__
        raise _unusable(name, f"cannot be decoded ({why})") from error


def _formats_for(data: bytes, name: str) -> tuple[str, ...]:
    """Return the formats a file may have; a package that reads it is loaded on the way.

    Raises:
        Unusable: naming the package that would read it, if it is not installed.
    """
    for plugin in _PLUGINS:
        if any(data[at : at + len(start)] == start for at, start in plugin.starts):
            if importlib.util.find_spec(plugin.module) is None:
                what = f"is a {plugin.title} image, which needs the package {plugin.package}"
                raise _unusable(name, what, f"run `pip install {plugin.package}`, or convert it to PNG")
            with _open_lock:
                module = importlib.import_module(plugin.module)
                if plugin.register is not None and plugin.format not in Image.OPEN:
                    getattr(module, plugin.register)()
            return (*_FORMATS, plugin.format)
    return _FORMATS


def _unidentified(data: bytes, name: str) -> Unusable:
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        if "AVIF" in Image.OPEN:
            return _unusable(name, "cannot be decoded (is a damaged or incomplete AVIF image)")
        what = "is an AVIF image that this Pillow cannot read"
        return _unusable(name, what, "run `pip install 'pillow>=11.3'`, or convert it to PNG")
    return _unusable(name, "is not an image of a known format, whatever its ending says")


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    # Pillow only warns between one and two times its limit; catch_warnings swaps process-wide state, so
    # one thread at a time (reading the header is short, decoding is outside).
    with _open_lock, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        except KeyError:  # what Pillow before 11.3 raises on coming to AVIF, which it does not know
            raise UnidentifiedImageError from None


def _to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
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

    A profile that is damaged or meant for another kind of image is disregarded, as viewers do.
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
