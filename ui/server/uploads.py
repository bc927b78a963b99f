"""Uploads from a browser: images, captions, and zips of them; checked, limited, never overwriting."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from sdlora.data.reading.captions import CAPTION_ENDINGS
from sdlora.data.reading.folder import load_pixels
from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.errors import DatasetError, OutputError, shown
from sdlora.files import as_file_name, replacing

MAX_FILE_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 2 * 2**30
MAX_FILES = 5000
_BLOCK = 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Imported:
    """The folder of an upload, its number of images, and what was left out and why."""

    folder: Path
    num_images: int
    left_out: tuple[str, ...]


def folder_name(text: str, fallback: str = "images") -> str:
    """Return a valid folder name made from what a user typed or dropped."""
    return as_file_name(text, fallback)


def import_files(
    files: Sequence[Path], parent: Path, name: str, progress: Progress | None = None
) -> Imported:
    """Put images, captions and the contents of zips into a new folder below ``parent``.

    Every image is decoded in full; other files are left out and listed. The folder appears when
    everything is in it.

    Raises:
        DatasetError: when nothing usable is left, or a zip is malicious or too large.
        OutputError: when the folder cannot be written.
    """
    target = _free(parent, folder_name(name))
    left_out: list[str] = []
    with replacing(target) as temporary:
        temporary.mkdir(parents=True)
        budget = _Budget()
        for file in files:
            if file.suffix.lower() == ".zip":
                unpack(file, temporary, left_out, budget)
            else:
                with file.open("rb") as stream:
                    _take(
                        stream, file.name, PurePosixPath(folder_name(file.name)), temporary, left_out, budget
                    )
        images = _check_images(temporary, left_out, progress)
        if not images:
            reasons = f" ({'; '.join(left_out[:5])})" if left_out else ""
            raise DatasetError(
                f"no usable image among {len(files)} file(s){reasons}; drop PNG, JPEG or WebP files"
            )
    return Imported(target, images, tuple(left_out))


def unpack(archive: Path, folder: Path, left_out: list[str], budget: _Budget | None = None) -> None:
    """Write a zip's images and captions below ``folder``, counting the bytes that are really unpacked.

    Raises:
        DatasetError: for a zip that is broken, encrypted, too large, or names places outside the folder.
    """
    budget = budget or _Budget()
    with ExitStack() as stack:
        with _reading(archive):
            opened = stack.enter_context(zipfile.ZipFile(archive))
        for info in opened.infolist():
            if not info.is_dir():
                inside = _safe_name(archive.name, info)
                with _reading(archive):
                    stream = stack.enter_context(opened.open(info))
                _take(_Member(stream, archive), shown(info.filename), inside, folder, left_out, budget)
                stream.close()


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Turn whatever the libraries raise on a damaged zip into one error; there are a dozen kinds."""
    try:
        yield
    except Exception as error:  # zlib.error, LZMAError, OSError (bz2, a bad offset), ...
        why = shown(" ".join(str(error).split()) or type(error).__name__)
        raise DatasetError(f"{archive.name}: cannot be unpacked ({why}); make the zip again") from None


class _Member:
    """A file in a zip: what goes wrong with reading it is told from what goes wrong with writing."""

    def __init__(self, stream: IO[bytes], archive: Path) -> None:
        self._stream, self._archive = stream, archive

    def read(self, count: int) -> bytes:
        with _reading(self._archive):
            return self._stream.read(count)


class _Budget:
    """Counts files and bytes, so that no upload fills the disk."""

    def __init__(self) -> None:
        self.files, self.bytes = 0, 0

    def add_file(self) -> None:
        self.files += 1
        if self.files > MAX_FILES:
            raise DatasetError(
                f"more than {MAX_FILES} files; put them into a folder and name it with --allow"
            )

    def add_bytes(self, count: int) -> None:
        self.bytes += count
        if self.bytes > MAX_TOTAL_BYTES:
            limit = MAX_TOTAL_BYTES // 2**30
            raise DatasetError(f"more than {limit} GiB; put them into a folder and name it with --allow")


def _safe_name(archive: str, info: zipfile.ZipInfo) -> PurePosixPath:
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DatasetError(
            f"{archive}: holds the link `{shown(info.filename)}`; make a zip of the files themselves"
        )
    if info.flag_bits & 1:
        raise DatasetError(f"{archive}: is encrypted; make a zip without a password")
    text = info.filename.replace("\\", "/")
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or re.match(r"^[A-Za-z]:", text) or "\0" in text:
        raise DatasetError(
            f"{archive}: names a place outside its folder (`{shown(info.filename)}`); nothing was unpacked"
        )
    return PurePosixPath(*(folder_name(part) for part in path.parts))


def _take(
    stream: IO[bytes] | _Member,
    shown_name: str,
    inside: PurePosixPath,
    folder: Path,
    left_out: list[str],
    budget: _Budget,
) -> None:
    ending = inside.suffix.lower()
    if (
        ending not in IMAGE_ENDINGS | CAPTION_ENDINGS
        or "__MACOSX" in inside.parts
        or inside.name.startswith("._")
    ):
        left_out.append(f"{shown_name}: neither an image nor a caption")
        return
    budget.add_file()
    target = folder / inside
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        left_out.append(f"{shown_name}: a second file of this name")
        return
    written = 0
    with target.open("wb") as out:
        while block := stream.read(_BLOCK):
            written += len(block)
            budget.add_bytes(len(block))
            if written > MAX_FILE_BYTES:
                raise DatasetError(
                    f"{shown_name}: larger than {MAX_FILE_BYTES // 2**20} MiB; save it smaller"
                )
            out.write(block)


def _check_images(folder: Path, left_out: list[str], progress: Progress | None) -> int:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_ENDINGS]
    good = 0
    for number, file in enumerate(files, 1):
        try:
            load_pixels(file)
            good += 1
        except DatasetError as error:
            left_out.append(str(error).replace(f"{folder}/", "").replace(str(folder), ""))
            file.unlink()
        if progress is not None:
            progress(number, len(files))
    return good


def _free(parent: Path, name: str) -> Path:
    for number in range(1, 1000):
        target = parent / (name if number == 1 else f"{name}-{number}")
        if not target.exists():
            return target
    raise OutputError(f"{parent / name}: a thousand folders have this name already; choose another name")


def copy_folder(
    source: Path, parent: Path, endings: Iterable[str] = (*IMAGE_ENDINGS, *CAPTION_ENDINGS)
) -> Path:
    """Return a copy of a data set's files below ``parent``; an existing folder is kept as it is."""
    target, wanted = parent / source.name, set(endings) | {".md"}
    if target.is_dir():
        return target
    with replacing(target) as temporary:
        temporary.mkdir(parents=True)
        for file in sorted(source.iterdir()):
            if file.suffix.lower() in wanted or file.name == "LICENSE":
                shutil.copyfile(file, temporary / file.name)
    return target
