"""A repaired copy of a folder of images: files are repaired or left out, and every change is reported.

The folder itself is never changed. Files that need no repair are copied byte for byte. Only images and
what describes them are copied: captions, metadata and sidecars.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...errors import OutputError
from ...files import refuse_used_folder, replacing
from ..reading.captions import MAX_CAPTION_BYTES
from ..reading.image_files import read_file
from ..reading.listing import FoundFile, Listing, list_files
from ..reading.measure import Progress
from ..reading.metadata_files import name_key, read_focus
from ..reading.problems import Problem, Unusable
from .metadata_copy import mended_metadata
from .salvage import Mended, mend

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Change:
    """What was done with a file; ``written`` is its name in the copy, None when it was left out."""

    name: str
    what: str
    written: str | None


def repair(
    folder: Path,
    output: Path,
    *,
    recursive: bool = True,
    follow_links: bool = False,
    progress: Progress | None = None,
) -> list[Change]:
    """Write a repaired copy of a folder and return what was changed in it.

    Args:
        folder: the data set.
        output: of the copy; missing or empty.
        recursive: also look into folders inside.
        follow_links: also copy what links lead to outside the folder.
        progress: is told (images done, images in all).

    Raises:
        DatasetError: when the folder is missing or is a file.
        OutputError: when ``output`` is in use, lies inside the folder, or cannot be written.
    """
    folder, output = Path(folder), Path(output)
    listing = list_files(folder, recursive, follow_links=follow_links)
    refuse_used_folder(output, "a repaired copy")
    if output.resolve().is_relative_to(folder.resolve()):
        raise OutputError(
            f"{output}: lies inside {folder}, which would then hold it; choose another --output"
        )
    if output.is_dir():
        output.rmdir()  # empty; Windows cannot rename over it
    with replacing(output) as unfinished:
        unfinished.mkdir(parents=True)
        return _Copy(listing, unfinished).make(progress)


def preview(
    folder: Path, *, recursive: bool = True, follow_links: bool = False, progress: Progress | None = None
) -> list[Change]:
    """Return what :func:`repair` would change in a copy, without writing one; its arguments are the same.

    Raises:
        DatasetError: when the folder is missing or is a file.
    """
    return _Copy(list_files(Path(folder), recursive, follow_links=follow_links), None).make(progress)


class _Copy:
    """One copy being made; ``changes`` grows with every file that is not copied as it is.

    Without a ``target`` nothing is written.
    """

    def __init__(self, listing: Listing, target: Path | None) -> None:
        self._listing, self._target = listing, target
        self._changes: list[Change] = []
        self._first_of: dict[str, str] = {}
        self._taken: set[tuple[str, str]] = set()
        self._written: dict[str, str | None] = {name_key(file.name): None for file in listing.images}

    def make(self, progress: Progress | None) -> list[Change]:
        for problem in self._listing.problems:
            self._changes.append(Change(problem.where, f"left out: {problem.what}", None))
        for note in self._listing.notes:
            self._changes.append(Change(note.partition(": ")[0], f"left out: {note}", None))
        for done, image in enumerate(self._listing.images, start=1):
            self._image(image)
            if progress is not None:
                progress(done, len(self._listing.images))
        for name in self._listing.orphans():
            self._changes.append(Change(name, "left out: belongs to no image", None))
        for path, name in self._listing.metadata_files():
            self._metadata(path, name)
        return self._changes

    def _metadata(self, path: Path, name: str) -> None:
        """Copy a metadata file, with the names that its images have in the copy."""
        try:
            data, done = to_utf8(read_file(path, name), name)
        except Unusable as error:
            self._changes.append(Change(name, f"left out: {error.problem.what}", None))
            return
        captioned = {name_key(file.name) for file in self._listing.images if self._listing.captions_of(file)}
        text, notes = mended_metadata(data.decode("utf-8-sig"), name, self._written, captioned)
        if not text:
            self._changes.append(Change(name, f"left out: {'; '.join(notes) or 'is empty'}", None))
            return
        if done or notes:
            self._changes.append(Change(name, "; ".join([done, *notes] if done else notes), name))
        self._write(name, text.encode("utf-8") if notes else data)

    def _image(self, file: FoundFile) -> None:
        try:
            data = read_file(file.path, file.name)
        except Unusable as error:
            self._leave_out(file, error.problem.what)
            return
        first = self._first_of.setdefault(hashlib.sha256(data).hexdigest(), file.name)
        if first != file.name:
            self._leave_out(file, f"is the same file as {first}")
            return
        try:
            mended = mend(data, file.name)
        except Unusable as error:
            self._leave_out(file, error.problem.what)
            return
        written = self._free_name(file, mended)
        if written != file.name or mended.done:
            renamed = [] if PurePosixPath(written).stem == PurePosixPath(file.name).stem else ["renamed"]
            self._changes.append(Change(file.name, "; ".join([*mended.done, *renamed]), written))
        self._written[name_key(file.name)] = written
        self._write(written, mended.data)
        self._beside(file, PurePosixPath(written))

    def _leave_out(self, image: FoundFile, why: str) -> None:
        with_caption = " with its caption" if self._listing.captions_of(image) else ""
        self._changes.append(Change(image.name, f"left out{with_caption}: {why}", None))

    def _free_name(self, file: FoundFile, mended: Mended) -> str:
        """Return a name whose stem no other image of the copy has, so that each has its own caption."""
        path = PurePosixPath(file.name)
        if mended.suffix is not None:
            path = path.with_suffix(mended.suffix)
        wanted, number = path, 1
        while (key := FoundFile(file.path, str(wanted)).key) in self._taken:
            number += 1
            wanted = path.with_stem(f"{path.stem}-{number}")
        self._taken.add(key)
        return str(wanted)

    def _beside(self, image: FoundFile, written: PurePosixPath) -> None:
        """Copy an image's captions and sidecar under the image's new name."""
        sidecar = self._listing.sidecars.get(image.key)
        wrong = read_focus(sidecar.path, sidecar.name) if sidecar else None
        if isinstance(wrong, Problem):
            self._changes.append(Change(wrong.where, f"left out: {wrong.what}", None))
        elif sidecar:
            self._write(str(written.with_suffix(sidecar.path.suffix)), sidecar.path.read_bytes())
        texts = list(self._captions(image))
        if texts:
            name, data = texts[0]
            self._write(str(written.with_suffix(PurePosixPath(name).suffix.lower())), data)
        for name, data in texts[1:]:
            same = "says the same" if data == texts[0][1] else f"{texts[0][0]} is taken"
            self._changes.append(Change(name, f"left out: a second caption of one image, {same}", None))

    def _captions(self, image: FoundFile) -> Iterator[tuple[str, bytes]]:
        """Yield the caption files of an image that can be read, as UTF-8."""
        for path, name in self._listing.captions_of(image):
            try:
                data, done = to_utf8(read_file(path, name, MAX_CAPTION_BYTES), name)
            except Unusable as error:
                self._changes.append(Change(name, f"left out: {error.problem.what}", None))
                continue
            if done:
                self._changes.append(Change(name, done, name))
            yield name, data

    def _write(self, name: str, data: bytes) -> None:
        if self._target is None:
            return
        file = self._target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def to_utf8(data: bytes, name: str) -> tuple[bytes, str]:
    """Return a text as UTF-8, and what was changed (empty when nothing was).

    A byte order mark identifies UTF-16 and UTF-32; zero bytes in every second place, UTF-16. Anything else
    that is not UTF-8 is taken for Windows-1252, the common encoding of western European systems.

    Raises:
        Unusable: when it is not text at all.
    """
    try:
        if "\0" not in data.decode("utf-8-sig"):
            return data, ""
    except UnicodeDecodeError:
        pass
    for encoding, title in _candidates(data):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text.lstrip("\ufeff").encode("utf-8"), f"converted to UTF-8 from {title}"
    raise Unusable(Problem("bad caption", name, "is not text in any known encoding", "write it again"))


def _candidates(data: bytes) -> list[tuple[str, str]]:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return [(encoding, encoding.upper())]
    if b"\0" in data:
        little = data[1::2].count(0) >= data[::2].count(0)
        return [("utf-16-le", "UTF-16 without mark")] if little else [("utf-16-be", "UTF-16 without mark")]
    return [("cp1252", "Windows-1252 (assumed: look at it)"), ("latin-1", "Latin-1 (assumed: look at it)")]
