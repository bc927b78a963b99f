"""The only place where image files are opened.

Pillow chooses a decoder by a file's content, whatever its name says, and one of them starts another program
(EPS: Ghostscript). So every image of the project is opened here: only by decoders on a list, never with more
pixels than the limit, and never more pixels at a time than fit into the memory set aside for decoding.

What counts in an image is its pixels. Text, profiles and camera data that are damaged or too large to be
unpacked are left out, and :attr:`LoadedImage.damaged_metadata` says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ...errors import SdloraError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
"""The formats that Pillow may decode; none of their decoders starts another program."""
MAX_FILE_BYTES = 2**30
MAX_PIXELS_AT_ONCE = 96_000_000
"""Pixels being decoded by all threads together; at 4 bytes a pixel and one copy, about 0.8 GB."""
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT"})
_COLOUR_CHUNKS = frozenset({b"sRGB", b"gAMA", b"cHRM", b"sBIT", b"iCCP", b"eXIf"})


@dataclass(frozen=True)
class Plugin:
    """A package that teaches Pillow a format.

    Attributes:
        format: Pillow's name of it.
        title: what users call it.
        package: what pip installs.
        module: what is imported.
        register: the function of the module that has to be called, or None.
        endings: of file names.
        starts: (offset, bytes); such a file has one of these.
    """

    format: str
    title: str
    package: str
    module: str
    register: str | None
    endings: frozenset[str]
    starts: tuple[tuple[int, bytes], ...]


PLUGINS = (
    Plugin(
        "HEIF",
        "HEIC",
        "pillow-heif",
        "pillow_heif",
        "register_heif_opener",
        frozenset({".heic", ".heif", ".hif"}),
        tuple((4, b"ftyp" + brand) for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")),
    ),
    Plugin(
        "JXL",
        "JPEG XL",
        "pillow-jxl-plugin",
        "pillow_jxl",
        None,
        frozenset({".jxl"}),
        ((0, b"\xff\x0a"), (4, b"JXL \r\n\x87\n")),
    ),
)

_open_lock = threading.Lock()
# Pillow warns of camera data that it cannot read; LoadedImage.damaged_metadata says so with the image's name.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class ImageFileError(SdloraError):
    """An image that cannot be read.

    Attributes:
        what: what is wrong with it.
        fix: what to do.
    """

    def __init__(self, name: str, what: str, fix: str = "replace or delete it") -> None:
        super().__init__(f"{name}: {what}; {fix}")
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class LoadedImage:
    """A decoded image.

    Attributes:
        image: its first frame in its own mode, upright; ``image.info`` has its texts.
        format: Pillow's name of the file's format.
        animated: whether there are further frames.
        turned: whether camera data said that it was to be rotated or mirrored, which was done.
        damaged_metadata: whether texts, a profile or camera data were left out, because they cannot be read.
    """

    image: Image.Image
    format: str
    animated: bool
    turned: bool
    damaged_metadata: bool


class PixelBudget:
    """Pixels that may be decoded at the same time; a larger image waits until nothing else is decoded."""

    def __init__(self, pixels: int) -> None:
        self._pixels, self._taken = pixels, 0
        self._condition = threading.Condition()

    @contextmanager
    def taking(self, pixels: int) -> Iterator[None]:
        """Wait for a share of the budget, and give it back at the end."""
        share = min(pixels, self._pixels)
        with self._condition:
            self._condition.wait_for(lambda: self._taken + share <= self._pixels)
            self._taken += share
        try:
            yield
        finally:
            with self._condition:
                self._taken -= share
                self._condition.notify_all()


_budget = PixelBudget(MAX_PIXELS_AT_ONCE)


def read_image_bytes(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageFileError: when there is none, it is not a regular file, or has more than 1 GiB.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a named pipe would wait for ever
            raise ImageFileError(str(path), "is not a file", "give an image file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageFileError(str(path), f"has {status.st_size} bytes, more than 1 GiB", "save it smaller")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageFileError(str(path), "no such image", "check the path") from None
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise ImageFileError(str(path), what, "check the path, its permissions or the disk") from None


@contextmanager
def opened_image(path: Path) -> Iterator[LoadedImage]:
    """Give a decoded image; until the block ends, its pixels count towards the memory for decoding.

    Raises:
        ImageFileError: as :func:`decoded_image` and :func:`read_image_bytes`.
    """
    with decoded_image(read_image_bytes(path), str(path)) as loaded:
        yield loaded


@contextmanager
def decoded_image(data: bytes, name: str, least_side: int | None = None) -> Iterator[LoadedImage]:
    """Give a decoded image from its bytes; keep the block short, as other images may wait for its end.

    Args:
        data: the whole file.
        name: of the file, for messages.
        least_side: a JPEG may be decoded at a fraction of its size as long as its longer side keeps twice
            as many px; without it, it keeps its size.

    Raises:
        ImageFileError: when it is no image of the known formats, is damaged, has too many pixels, or needs a
            package that is not installed.
    """
    if not data:
        raise ImageFileError(name, "is empty (0 bytes)")
    formats = _formats_for(data, name)
    header, stripped = _header(data, formats, name)
    with _budget.taking(header.width * header.height):
        yield _decoded(header, data, formats, name, stripped=stripped, least_side=least_side)


def stripped_png(data: bytes, *, colours: bool) -> bytes | None:
    """Return a PNG without texts and other extras, found in one pass over its chunks; None for other data.

    Args:
        data: the file.
        colours: keep the profile and the camera data, too.
    """
    if not data.startswith(_PNG_START):
        return None
    kept = _PIXEL_CHUNKS | _COLOUR_CHUNKS if colours else _PIXEL_CHUNKS
    parts, at = [_PNG_START], len(_PNG_START)
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if data[at + 4 : at + 8] in kept:
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _header(data: bytes, formats: tuple[str, ...], name: str) -> tuple[Image.Image, bool]:
    """Return an image of which only the header was read, and whether its extras had to be left out."""
    try:
        return _open(data, formats), False
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        for colours in (True, False):
            try:
                return _open(stripped_png(data, colours=colours) or b"", formats), True
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):
                raise _too_large(name) from None
            except Exception:
                continue
        raise _cannot_decode(error, data, name) from None


def _decoded(
    header: Image.Image,
    data: bytes,
    formats: tuple[str, ...],
    name: str,
    *,
    stripped: bool,
    least_side: int | None,
) -> LoadedImage:
    try:
        return _loaded(header, name, stripped, least_side)
    except ImageFileError:
        raise
    except MemoryError:
        raise ImageFileError(name, "is too large for the memory", "save it smaller") from None
    except Exception as error:
        for colours in (True, False):
            plain = stripped_png(data, colours=colours)
            if plain is None:
                break
            try:
                return _loaded(_open(plain, formats), name, True, least_side)
            except ImageFileError:
                raise
            except Exception:
                continue
        raise _cannot_decode(error, data, name) from error


def _loaded(image: Image.Image, name: str, stripped: bool, least_side: int | None) -> LoadedImage:
    format = image.format or ""
    # Phones store a second, smaller image in MPO files, and several in HEIC files: these are no animations.
    animated = format not in ("MPO", "HEIF") and bool(getattr(image, "is_animated", False))
    if animated:
        image.seek(0)
    if least_side is not None:
        image.draft("RGB" if image.mode != "L" else "L", (2 * least_side, 2 * least_side))
    image.load()
    if format == "PNG" and image.mode == "I":  # how Pillow before 11 opens 16-bit greyscale
        image = image.convert("I;16")
    damaged, turned = stripped, False
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # broken camera data: SyntaxError, struct.error, KeyError, ...
        damaged = True
    if image.mode in ("I", "F"):
        what = f"has 32 bits per value (mode {image.mode})"
        raise ImageFileError(name, what, "save it with 8 or 16 bits")
    if image.mode in ("P", "PA") and image.palette is None:  # Pillow asserts that there is one
        raise ImageFileError(name, "has lost its palette, so its colours are unknown")
    return LoadedImage(image, format, animated, turned, damaged)


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    # Pillow only warns between one and two times its limit; catch_warnings swaps process-wide state, so
    # one thread at a time (reading the header is short, decoding is outside).
    with _open_lock, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        except KeyError:  # raised by Pillow before 11.3, which does not know the name AVIF in ``formats``
            raise UnidentifiedImageError from None


def _formats_for(data: bytes, name: str) -> tuple[str, ...]:
    """Return the formats that a file may have; loads the package that reads it, if it needs one.

    Raises:
        ImageFileError: naming the package that would read it, if it is not installed.
    """
    for plugin in PLUGINS:
        if any(data[at : at + len(start)] == start for at, start in plugin.starts):
            if importlib.util.find_spec(plugin.module) is None:
                what = f"is a {plugin.title} image, which needs the package {plugin.package}"
                raise ImageFileError(name, what, f"run `pip install {plugin.package}`, or convert it to PNG")
            with _open_lock:
                module = importlib.import_module(plugin.module)
                if plugin.register is not None and plugin.format not in Image.OPEN:
                    getattr(module, plugin.register)()
            return (*FORMATS, plugin.format)
    return FORMATS


def _too_large(name: str) -> ImageFileError:
    limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
    return ImageFileError(name, f"has more than {limit} million pixels", "save it smaller")


def _cannot_decode(error: Exception, data: bytes, name: str) -> ImageFileError:
    if isinstance(error, MemoryError):
        return ImageFileError(name, "is too large for the memory", "save it smaller")
    if not isinstance(error, UnidentifiedImageError):
        why = " ".join(str(error).split()) or type(error).__name__
        return ImageFileError(name, f"cannot be decoded ({why})")
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        if "AVIF" in Image.OPEN:
            return ImageFileError(name, "cannot be decoded (is a damaged or incomplete AVIF image)")
        fix = "run `pip install 'pillow>=11.3'`, or convert it to PNG"
        return ImageFileError(name, "is an AVIF image that this Pillow cannot read", fix)
    return ImageFileError(name, "is not an image of a known format, whatever its ending says")
