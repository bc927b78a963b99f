"""Reading pictures: every kind of file becomes upright RGB, or an error that names it."""

from __future__ import annotations

import io
import stat
import threading
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DatasetError
from .items import ImageItem, Trait
from .problems import Problem, Unusable

PICTURE_ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"}
)
# Told to Image.open, so that a file is never handed to a decoder that starts other programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
UNREAD_PICTURE_ENDINGS = frozenset(
    {
        ".heic",
        ".heif",
        ".jxl",
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

_open_lock = threading.Lock()


def load_pixels(picture: ImageItem | Path, background: str = "#ffffff") -> Image.Image:
    """Return a picture as upright RGB: EXIF rotation applied, transparency laid on ``background``.

    Palette, greyscale, 16-bit and CMYK pictures are converted; of an animation the first frame is taken.

    Raises:
        DatasetError: when the file cannot be read or decoded.
    """
    path = picture.path if isinstance(picture, ImageItem) else picture
    try:
        return decode(read_file(path, str(path)), str(path), background)[0]
    except Unusable as error:
        raise DatasetError(str(error)) from error


def read_file(path: Path, name: str, limit: int | None = None) -> bytes:
    """Return a regular file's bytes.

    Raises:
        Unusable: when it cannot be read, is no regular file, or has more than ``limit`` bytes.
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
    """Return upright RGB pixels and what was odd about the file."""

    def unusable(what: str, fix: str = "replace or delete it") -> Unusable:
        return Unusable(Problem("undecodable", name, what, fix))

    if not data:
        raise unusable("is empty (0 bytes)")
    try:
        image = _open(data)
        # Phones store a second, smaller view in MPO files: that is no animation.
        animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        image.seek(0)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "F"):
            raise unusable(f"has 32 bits per value (mode {image.mode})", "save it with 8 or 16 bits")
        rgb, transparent = _to_rgb(image, background)
    except Unusable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise unusable(f"has more than {limit} million pixels", "save it smaller") from None
    except UnidentifiedImageError:
        raise unusable("is not a picture of a known format, whatever its ending says") from None
    except MemoryError:
        raise unusable("is too large for the memory", "save it smaller") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise unusable(
            f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    traits: list[Trait] = ["animated"] if animated else []
    return rgb, (*traits, "transparent") if transparent else tuple(traits)


def _open(data: bytes) -> Image.Image:
    # Pillow only warns between one and two times its limit; catch_warnings swaps process-wide state, so
    # one thread at a time (reading the header is short, decoding is outside).
    with _open_lock, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        except KeyError:  # what Pillow before 11.3 raises on coming to AVIF, which it does not know
            raise UnidentifiedImageError from None


def _to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns a 16-bit picture white.
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB"), False
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return layers.convert("RGB"), False
    canvas = Image.new("RGBA", layers.size, background)
    canvas.alpha_composite(layers)
    return canvas.convert("RGB"), True
