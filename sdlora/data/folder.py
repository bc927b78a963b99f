"""Image folder -> :class:`Dataset`: which files count, what each picture shows and says, what is wrong.

Every picture is read and decoded once in full, because a truncated file has a perfect header. The order
of the items depends on names only, never on the file system. Nothing is left out silently: what is not
taken is a problem or a note. Pillow only, no numpy and no torch: ``sdlora check`` must answer at once.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DatasetError

CaptionSource = Literal["txt", "caption", "file name"]
Trait = Literal["animated", "transparent"]
ProblemKind = Literal["unreadable", "undecodable", "bad caption", "no caption", "name clash"]
Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all) while a folder is read."""

PICTURE_ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"}
)
CAPTION_ENDINGS = frozenset({".txt", ".caption"})
# Told to Image.open, so that a file is never handed to a decoder that starts other programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
_UNREAD_PICTURE_ENDINGS = frozenset(
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
_UTILITY_FOLDERS = frozenset({"__macosx", "@eadir"})  # thumbnails and forks left by macOS and Synology
_NOT_CAPTIONS = frozenset(
    {"readme", "license", "licence", "notice", "copying", "authors", "changelog", "sources"}
)
_MAX_CAPTION_BYTES = 64 * 1024
_MAX_LISTED = 20

# Two pictures are near duplicates when few bits of the difference hash differ AND their thumbnails
# correlate. The hash alone joins unrelated drawings on a plain ground: of 24,090 pairs of Adwaita icons
# it joined "menu" with "remove" at 4 bits of 64, whose thumbnails correlate at -0.15; resizing and JPEG
# cost at most 5 bits and leave the correlation above 0.99.
_NEAR_BITS = 6
_NEAR_CORRELATION = 0.97
_THUMBNAIL_SIDE = 16

_open_lock = threading.Lock()


@dataclass(frozen=True)
class Problem:
    """Something that must be mended before training: what, where and how."""

    kind: ProblemKind
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Likeness:
    """What a picture looks like from afar, for finding near duplicates.

    ``bits`` is a 64-bit difference hash, ``thumbnail`` the RGB bytes of a 16x16 reduction. Written
    here because imagehash imports numpy, scipy and PyWavelets, which takes longer than the whole check.
    """

    bits: int
    thumbnail: bytes


@dataclass(frozen=True)
class ImageItem:
    """One picture of a dataset. Height and width in px, after EXIF rotation."""

    path: Path
    caption: str
    height: int
    width: int
    repeats: int
    digest: str
    """SHA-256 of the file's bytes, as hex digits."""
    name: str
    """Path from the dataset's folder with forward slashes, for messages."""
    caption_source: CaptionSource = "txt"
    trigger_added: bool = False
    """The trigger word was put in front, because the caption lacked it."""
    traits: tuple[Trait, ...] = ()
    likeness: Likeness | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Dataset:
    """The pictures of a folder in the order of their names, with remarks about what was not taken."""

    folder: Path
    items: tuple[ImageItem, ...]
    trigger_word: str | None = None
    notes: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    """Caption files that belong to no picture."""

    @property
    def num_visits(self) -> int:
        """Pictures seen in one epoch: the sum of the repeats."""
        return sum(item.repeats for item in self.items)


@dataclass(frozen=True)
class Survey:
    """A folder as it is: the pictures that can be used, and the problems of the others."""

    dataset: Dataset
    problems: tuple[Problem, ...]
    num_pictures: int
    """Picture files found, usable or not."""


def scan(
    folder: Path,
    *,
    recursive: bool = True,
    trigger_word: str | None = None,
    repeats: int = 1,
    progress: Progress | None = None,
) -> Dataset:
    """Return the pictures of a folder with their captions, every one of them decoded in full.

    Raises:
        DatasetError: when the folder is missing, is a file or holds no pictures, or when any picture or
            caption cannot be used; lists all of them (up to 20 lines).
    """
    found = survey(folder, recursive=recursive, trigger_word=trigger_word, repeats=repeats, progress=progress)
    if found.problems:
        raise DatasetError(_listing(found.problems, folder))
    return found.dataset


def survey(
    folder: Path,
    *,
    recursive: bool = True,
    trigger_word: str | None = None,
    repeats: int = 1,
    progress: Progress | None = None,
) -> Survey:
    """Return the usable pictures and the problems of the rest, as :func:`scan` without stopping at them.

    Raises:
        DatasetError: when the folder is missing, is a file, or holds no pictures.
    """
    folder = Path(folder)
    if repeats < 1:
        raise DatasetError(f"{folder}: repeats={repeats} would never show a picture; give 1 or more")
    trigger_word = (trigger_word or "").strip() or None
    listing = _list_files(folder, recursive)
    if not listing.pictures and not listing.problems:
        raise DatasetError(_no_pictures(folder, listing, recursive))
    problems = listing.problems + _clashes(listing)
    items: list[ImageItem] = []
    for file, measured in zip(listing.pictures, _measure_all(listing.pictures, progress), strict=True):
        caption = _caption_of(file, listing, trigger_word)
        problems += [part for part in (measured, caption) if isinstance(part, Problem)]
        if not isinstance(measured, Problem) and not isinstance(caption, Problem):
            items.append(_item(file, measured, caption, repeats))
    notes = listing.notes + [
        f"{item.name}: is animated; its first frame is taken" for item in items if "animated" in item.traits
    ]
    dataset = Dataset(folder, tuple(items), trigger_word, tuple(notes), tuple(listing.orphans()))
    problems.sort(key=lambda problem: _sort_key(problem.where))
    return Survey(dataset, tuple(problems), len(listing.pictures))


def load_pixels(picture: ImageItem | Path, background: str = "#ffffff") -> Image.Image:
    """Return a picture as upright RGB: EXIF rotation applied, transparency laid on ``background``.

    Palette, greyscale, 16-bit and CMYK pictures are converted; of an animation the first frame is taken.

    Raises:
        DatasetError: when the file cannot be read or decoded.
    """
    path = picture.path if isinstance(picture, ImageItem) else picture
    try:
        return _decode(_read_file(path, str(path)), str(path), background)[0]
    except _Unusable as error:
        raise DatasetError(str(error)) from error


# --- which files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    path: Path
    name: str

    @property
    def key(self) -> tuple[str, str]:
        """Folder and stem without case: what a picture and its caption file share on every system."""
        folder, _, base = self.name.rpartition("/")
        return folder, unicodedata.normalize("NFC", base.rpartition(".")[0]).casefold()


@dataclass(frozen=True)
class _Listing:
    pictures: list[_File]
    captions: dict[tuple[str, str], list[_File]]
    problems: list[Problem]
    notes: list[str]
    others: Counter[str]
    folders: list[str]

    def orphans(self) -> Iterator[str]:
        """Yield the caption files without a picture; texts about the folder itself do not count."""
        pictured = {picture.key for picture in self.pictures}
        for key in sorted(set(self.captions) - pictured):
            if key[1] not in _NOT_CAPTIONS:
                yield from (file.name for file in self.captions[key])


def _list_files(root: Path, recursive: bool) -> _Listing:
    if not root.exists():
        raise DatasetError(f"{root}: no such folder; check the path")
    if not root.is_dir():
        raise DatasetError(
            f"{root}: is a file where a folder of pictures is needed; give the folder it is in"
        )
    listing = _Listing([], {}, [], [], Counter(), [])
    unread: Counter[str] = Counter()
    seen: set[str] = set()

    def refused(error: OSError) -> None:
        where = _relative(Path(error.filename), root) or str(root)
        fix = "change its permissions or move it out"
        listing.problems.append(Problem("unreadable", where, f"cannot be opened ({error.strerror})", fix))

    for current, folders, names in os.walk(root, onerror=refused, followlinks=True):
        here, real = Path(current), os.path.realpath(current)
        if real in seen:  # a link in a circle, or two links to one place
            listing.notes.append(f"{_relative(here, root)}/: leads to a folder already read; taken once")
            folders[:] = []
            continue
        seen.add(real)
        _sort_files(listing, [_File(here / name, _relative(here / name, root)) for name in names], unread)
        wanted = _folders_to_enter(here, root, folders, listing)
        listing.folders.extend(_relative(here / name, root) for name in wanted)
        folders[:] = wanted if recursive else []
    listing.pictures.sort(key=lambda file: _sort_key(file.name))
    for ending, count in sorted(unread.items()):
        listing.notes.append(f"{count} {ending} file(s) are not read; convert them to PNG to use them")
    return listing


def _sort_files(listing: _Listing, files: Iterable[_File], unread: Counter[str]) -> None:
    for file in sorted(files, key=lambda file: _sort_key(file.name)):
        ending = file.path.suffix.lower()
        if file.path.name.startswith(".") or _unprintable(file.path, file.name, listing):
            continue
        if ending in PICTURE_ENDINGS:
            listing.pictures.append(file)
        elif ending in CAPTION_ENDINGS:
            listing.captions.setdefault(file.key, []).append(file)
        if ending not in PICTURE_ENDINGS:
            listing.others[ending or "files without ending"] += 1
        if ending in _UNREAD_PICTURE_ENDINGS:
            unread[ending] += 1


def _folders_to_enter(here: Path, root: Path, names: Iterable[str], listing: _Listing) -> list[str]:
    """Return the folders that hold data; what a run of ours wrote, or the system, is not training data."""
    wanted = []
    inside_run = _is_run(here)
    for name in sorted(names, key=_sort_key):
        relative = _relative(here / name, root)
        if name.startswith(".") or name.casefold() in _UTILITY_FOLDERS:
            continue
        if _unprintable(here / name, relative, listing):
            continue
        if _is_run(here / name) or (inside_run and name in {"samples", "checkpoints"}):
            listing.notes.append(f"{relative}/: left out, it was written by a training run")
        elif Path(name).suffix.lower() in CAPTION_ENDINGS:
            fix = "rename the folder, or put a text file in its place"
            what = "is a folder where a caption file is expected"
            listing.problems.append(Problem("bad caption", relative, what, fix))
        else:
            wanted.append(name)
    return wanted


def _unprintable(path: Path, name: str, listing: _Listing) -> bool:
    """Report a name that is not UTF-8: it could be neither shown nor written into a file."""
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError:
        listing.problems.append(Problem("unreadable", name, "has a name that is not UTF-8", "rename it"))
        return True
    return False


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file() and any(
        (folder / name).exists() for name in ("checkpoints", "samples", "events.jsonl")
    )


def _no_pictures(folder: Path, listing: _Listing, recursive: bool) -> str:
    for name in () if recursive else listing.folders:
        if any(path.suffix.lower() in PICTURE_ENDINGS for path in (folder / name).rglob("*")):
            return (
                f"{folder}: holds no pictures itself, but the folder `{name}` in it does; "
                "set data.recursive=true or give that folder"
            )
    held = [f"{count} {ending}" for ending, count in sorted(listing.others.items())]
    held += [f"{len(listing.folders)} folder(s)"] if listing.folders else []
    endings = ", ".join(sorted(ending.lstrip(".") for ending in PICTURE_ENDINGS))
    what = f"holds no pictures, only {', '.join(held)}" if held else "is empty"
    return "; ".join([f"{folder}: {what}", *listing.notes, f"put pictures there ({endings})"])


def _clashes(listing: _Listing) -> list[Problem]:
    by_key: dict[tuple[str, str], list[str]] = {}
    for picture in listing.pictures:
        by_key.setdefault(picture.key, []).append(picture.name)
    what, fix = "have one stem and would share a caption", "rename one of them"
    return [
        Problem("name clash", " and ".join(names), what, fix) for names in by_key.values() if len(names) > 1
    ]


def _relative(path: Path, root: Path) -> str:
    name = "" if path == root else path.relative_to(root).as_posix()
    return name.encode("utf-8", "backslashreplace").decode("utf-8")  # names that are not UTF-8


def _sort_key(name: str) -> tuple[str, str]:
    return unicodedata.normalize("NFC", name).casefold(), name


def _listing(problems: Sequence[Problem], folder: Path) -> str:
    if len(problems) == 1:
        return f"{folder}: {problems[0]}"
    lines = [f"  - {problem}" for problem in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        lines.append(f"  and {len(problems) - _MAX_LISTED} more; `sdlora check` lists all")
    return "\n".join([f"{folder}: {len(problems)} problems", *lines])


# --- captions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Caption:
    text: str
    source: CaptionSource
    trigger_added: bool


def with_trigger(caption: str, trigger_word: str | None) -> str:
    """Return the caption with the trigger word in it, put in front as ``TRIGGER, caption`` if it lacks it."""
    if trigger_word is None or has_word(caption, trigger_word):
        return caption
    return f"{trigger_word}, {caption}" if caption else trigger_word


def has_word(caption: str, word: str) -> bool:
    """Return whether the caption has the word (or phrase) as a whole, in any case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def words_of(stem: str) -> str:
    """Return the words of a file's stem: ``teapot_small-02`` gives ``teapot small``.

    Counters at the end are dropped, and so are names that cameras and downloads give (``IMG_0123``,
    ``3f2a90bc11d2``): they say nothing about the picture.
    """
    words = re.sub(r"[_\-\s]+", " ", stem).strip()
    words = re.sub(r"(\s*\(\d+\)|(^|\s+)\d+)+$", "", words).strip()
    if re.fullmatch(
        r"(img|image|dsc[nf]?|pxl|photo|pict?|picture|scan|screenshot|untitled|unnamed)\d*", words, re.I
    ):
        return ""
    if re.fullmatch(r"(?=.*\d)[0-9a-f]{8,}( [0-9a-f]{4,})*", words, re.I):
        return ""
    return words


def _caption_of(picture: _File, listing: _Listing, trigger_word: str | None) -> _Caption | Problem:
    files = listing.captions.get(picture.key, [])
    if len(files) > 1:
        names = " and ".join(file.path.name for file in files)
        return Problem("bad caption", picture.name, f"has two caption files, {names}", "delete one of them")
    if not files:
        text = words_of(picture.path.stem)
        if not text and trigger_word is None:
            what = "has no caption, and its file name says nothing"
            fix = f"write `{picture.path.stem}.txt` beside it, or set data.trigger_word"
            return Problem("no caption", picture.name, what, fix)
        full = with_trigger(text, trigger_word)
        return _Caption(full, "file name", full != text)
    read = _read_caption(files[0])
    if isinstance(read, Problem):
        return read
    full = with_trigger(read, trigger_word)
    source: CaptionSource = "txt" if files[0].path.suffix.lower() == ".txt" else "caption"
    return _Caption(full, source, full != read)


def _read_caption(file: _File) -> str | Problem:
    try:
        data = _read_file(file.path, file.name, _MAX_CAPTION_BYTES)
    except _Unusable as error:
        return replace(error.problem, kind="bad caption")
    fix = "save it as UTF-8 text"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start} is not"
        return Problem("bad caption", file.name, f"is not UTF-8 text ({hint})", fix)
    if "\0" in text:
        return Problem("bad caption", file.name, "holds zero bytes, so it is not UTF-8 text", fix)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


# --- pictures ---------------------------------------------------------------------------------------


class _Unusable(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class _Measured:
    height: int
    width: int
    digest: str
    traits: tuple[Trait, ...]
    likeness: Likeness


def _item(file: _File, measured: _Measured, caption: _Caption, repeats: int) -> ImageItem:
    return ImageItem(
        file.path,
        caption.text,
        measured.height,
        measured.width,
        repeats,
        measured.digest,
        file.name,
        caption.source,
        caption.trigger_added,
        measured.traits,
        measured.likeness,
    )


def _measure_all(files: Sequence[_File], progress: Progress | None) -> list[_Measured | Problem]:
    measured: list[_Measured | Problem] = []
    workers = max(1, min(32, os.cpu_count() or 1, len(files)))
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:  # Pillow decodes without the GIL
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd EXIF and TIFF tags
        for result in pool.map(_measure, files):
            measured.append(result)
            if progress is not None:
                progress(len(measured), len(files))
    return measured


def _measure(file: _File) -> _Measured | Problem:
    try:
        data = _read_file(file.path, file.name)
        image, traits = _decode(data, file.name, "#ffffff")
    except _Unusable as error:
        return error.problem
    return _Measured(image.height, image.width, hashlib.sha256(data).hexdigest(), traits, likeness_of(image))


def _read_file(path: Path, name: str, limit: int | None = None) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe would be waited for without end
            raise _Unusable(Problem("unreadable", name, "is not a regular file", "delete it"))
        if limit is not None and status.st_size > limit:
            what = f"has {status.st_size} bytes, too many for a caption"
            raise _Unusable(Problem("unreadable", name, what, f"shorten it to {limit} bytes"))
        return path.read_bytes()
    except OSError as error:
        fix = "check the link, its permissions or the disk"
        what = f"cannot be read ({error.strerror or error})"
        raise _Unusable(Problem("unreadable", name, what, fix)) from error


def _decode(data: bytes, name: str, background: str) -> tuple[Image.Image, tuple[Trait, ...]]:
    """Return upright RGB pixels and what was odd about the file."""

    def unusable(what: str, fix: str = "replace or delete it") -> _Unusable:
        return _Unusable(Problem("undecodable", name, what, fix))

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
    except _Unusable:
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


# --- near duplicates and the hold-out ----------------------------------------------------------------


def likeness_of(image: Image.Image) -> Likeness:
    """Return the difference hash and the thumbnail of an RGB picture."""
    side = _THUMBNAIL_SIDE
    # Averaging whole blocks first is several times faster than one large resize, and reads every pixel.
    small = image.reduce((max(1, image.width // 64), max(1, image.height // 64)))
    thumbnail = small.resize((side, side), Image.Resampling.BOX)
    grey = small.resize((9, 8), Image.Resampling.BOX).convert("L").tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            at = 9 * row + column
            bits = bits << 1 | (grey[at + 1] > grey[at] + 2)  # by 2, or noise on plain grounds counts
    return Likeness(bits, thumbnail.tobytes())


def near_duplicates(items: Sequence[ImageItem]) -> list[tuple[int, ...]]:
    """Return groups (two or more indices, ascending) of pictures that are equal or nearly so.

    Recognises copies that were resized, recompressed, brightened or slightly cropped; likeness is carried
    on: if A is like B and B like C, they are one group.
    """
    parent = list(range(len(items)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, second in _like_pairs(items):
        a, b = sorted((root(first), root(second)))
        parent[b] = a
    groups: dict[int, list[int]] = {}
    for index in range(len(items)):
        groups.setdefault(root(index), []).append(index)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _like_pairs(items: Sequence[ImageItem]) -> Iterator[tuple[int, int]]:
    by_digest: dict[str, int] = {}
    for index, item in enumerate(items):
        first = by_digest.setdefault(item.digest, index)
        if first != index:
            yield first, index
    # Two 64-bit numbers at most 6 bits apart agree in at least one of 7 slices: only those are compared.
    slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index in by_digest.values():
        likeness = items[index].likeness
        if likeness is None:
            continue
        bits, near = likeness.bits, set[int]()
        for part in range(_NEAR_BITS + 1):
            key = part, bits >> part * 9 & (0x1FF if part < _NEAR_BITS else 0x3FF)
            members = slices.setdefault(key, [])
            near.update(other for other, seen in members if (seen ^ bits).bit_count() <= _NEAR_BITS)
            members.append((index, bits))
        for other in sorted(near):
            if _alike(items[other].likeness, likeness):
                yield other, index


def _alike(a: Likeness | None, b: Likeness) -> bool:
    assert a is not None  # only pictures with a likeness are compared
    count = len(a.thumbnail)
    away_a, away_b = _away_from_mean(a.thumbnail), _away_from_mean(b.thumbnail)
    spread_a, spread_b = sum(v * v for v in away_a), sum(v * v for v in away_b)
    if min(spread_a, spread_b) < 4 * count:  # a plain area has no shape to correlate: compare colours
        return sum(abs(x - y) for x, y in zip(a.thumbnail, b.thumbnail, strict=True)) <= 4 * count
    product = sum(x * y for x, y in zip(away_a, away_b, strict=True))
    return product >= _NEAR_CORRELATION * math.sqrt(spread_a * spread_b)


def _away_from_mean(thumbnail: bytes) -> list[float]:
    means = [sum(thumbnail[channel::3]) * 3 / len(thumbnail) for channel in range(3)]
    return [value - means[index % 3] for index, value in enumerate(thumbnail)]


def split(dataset: Dataset, validation: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return (training, held out): a share of the pictures below 1, or a number of them; 0 holds out none.

    Near duplicates stay on one side, so the hold-out does not leak. The choice depends on the seed and on
    the pictures' content, so adding a picture changes little. At least one picture is left to train on; if
    fewer can be held out than asked for, a note of the training side says so.
    """
    if validation < 0:
        raise DatasetError(
            f"data.validation={validation}: a share or a number of pictures cannot be negative"
        )
    total = len(dataset.items)
    asked = max(1, int(validation * total + 0.5)) if 0 < validation < 1 else int(validation)
    held = _hold_out(dataset.items, min(asked, total - 1), seed)
    notes = dataset.notes
    if len(held) != asked:
        notes += (f"{len(held)} of {asked} wanted pictures are held out; near duplicates stay together",)
    training = tuple(item for index, item in enumerate(dataset.items) if index not in held)
    kept_out = tuple(item for index, item in enumerate(dataset.items) if index in held)
    return replace(dataset, items=training, notes=notes), replace(
        dataset, items=kept_out, notes=(), orphans=()
    )


def _hold_out(items: Sequence[ImageItem], wanted: int, seed: int) -> set[int]:
    if wanted < 1:
        return set()
    groups = near_duplicates(items)
    grouped = {index for group in groups for index in group}
    groups += [(index,) for index in range(len(items)) if index not in grouped]

    def rank(group: tuple[int, ...]) -> str:
        first = min(items[index].digest for index in group)
        return hashlib.sha256(f"{seed}/{first}".encode()).hexdigest()

    held: set[int] = set()
    for group in sorted(groups, key=rank):
        if len(held) + len(group) <= wanted:
            held.update(group)
    if not held:  # every group is larger than what was asked for: rather a few more than none
        smallest = min(groups, key=lambda group: (len(group), rank(group)))
        held.update(smallest if 2 * len(smallest) <= len(items) else ())
    return held
