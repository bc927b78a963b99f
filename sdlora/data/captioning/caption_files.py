"""The captions a folder has, and new ones written where the trainer reads them.

An image's caption is in the file beside it (``cup.txt``, ``cup.caption``, ``cup.png.txt``) or in a line of
``metadata.jsonl`` or ``metadata.csv``; a new one goes where the old one is, and beside the image if there
was none.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import DatasetError, OutputError
from ...files import write_bytes
from ..reading.captions import Caption, CaptionRules, caption_of
from ..reading.listing import FoundFile, clashes, list_files, no_images
from ..reading.metadata_files import caption_column, image_key, name_key, read_metadata, read_row, rows_of
from ..reading.problems import Problem
from .restore import Change, Recorder, text_of

WRITTEN = ("txt", "caption", "metadata")
"""Sources of captions that someone wrote, as :class:`sdlora.data.reading.captions.Caption` names them."""


class CaptionFolder:
    """The images of a folder with what their captions are.

    Attributes:
        folder: the data set.
        images: its images, in the order of their names.
        notes: what was passed over.
    """

    def __init__(
        self, folder: Path, *, recursive: bool = True, follow_links: bool = False, column: str | None = None
    ) -> None:
        """List the folder.

        Args:
            folder: the data set.
            recursive: also look into folders inside.
            follow_links: also take what links lead to outside the folder.
            column: of a metadata file with the caption; the first known one when None.

        Raises:
            DatasetError: when the folder is missing, is a file, or holds no images.
        """
        self.folder = Path(folder)
        self._column = column
        self._listing = list_files(self.folder, recursive, follow_links=follow_links)
        self.images: list[FoundFile] = self._listing.images
        if not self.images:
            raise DatasetError(no_images(self.folder, self._listing, recursive))
        metadata = read_metadata(
            self._listing.metadata_files(), [image.name for image in self.images], column
        )
        self._metadata = metadata.captions
        self.notes = [*map(str, self._listing.problems), *map(str, metadata.problems)]
        self._clashing = {
            name: clash for clash in clashes(self._listing) for name in clash.where.split(" and ")
        }
        self._waiting: dict[str, dict[str, str]] = {}

    def written(self, image: FoundFile) -> Caption | Problem | None:
        """Return the caption that someone wrote for an image, None where there is only its name."""
        metadata = self._metadata.get(name_key(image.name))
        rules = CaptionRules(wordless=True)
        caption = caption_of(image.name, self._listing.captions_of(image), metadata, None, rules)
        if isinstance(caption, Problem) or caption.source in WRITTEN:
            return caption
        return None

    def place(self, image: FoundFile) -> Path | Problem:
        """Return the file that a new caption of an image goes to, or why there is none."""
        if image.name in self._clashing:
            return self._clashing[image.name]
        if metadata := self._metadata_of(image):
            return metadata
        if files := self._listing.captions_of(image):
            return files[0][0]
        target = image.path.with_suffix(".txt")
        if os.path.lexists(target):
            what = f"{target.name} is in its place and is not read"
            return Problem("bad caption", image.name, what, "look at `sdlora check`, or move it away")
        return target

    def write(self, captions: Mapping[FoundFile, Sequence[str]], recorder: Recorder) -> list[Problem]:
        """Write captions of images; those of metadata files wait for :meth:`flush`. Return what failed.

        Args:
            captions: image -> the lines of its caption.
            recorder: of the restore point.

        Raises:
            OutputError: when the restore point cannot be written (then no caption is), or the disk is full.
        """
        problems: list[Problem] = []
        changes: list[tuple[FoundFile, Path, Change]] = []
        for image, lines in captions.items():
            place = self.place(image)
            text = "\n".join(lines)
            try:
                if isinstance(place, Problem):
                    problems.append(place)
                elif self.in_metadata(image):
                    self._waiting.setdefault(self._name(place), {})[name_key(image.name)] = text
                else:
                    changes.append((image, place, Change(self._name(place), text_of(place), text + "\n")))
            except DatasetError as error:
                problems.append(Problem("bad caption", image.name, str(error), "correct it"))
        recorder.before_writing([change for _, _, change in changes])
        for image, place, change in changes:
            try:
                write_bytes(place, change.after.encode("utf-8"))
            except OutputError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EROFS):
                    raise  # the next image would fare no better
                problems.append(Problem("unreadable", image.name, "its caption was not written", str(error)))
                continue
            self._listing.captions.setdefault(image.key, [FoundFile(place, change.name)])
        return problems

    def flush(self, recorder: Recorder) -> None:
        """Write what waits for metadata files: each is written whole, its other lines unchanged.

        Raises:
            DatasetError: when one cannot be read any more.
            OutputError: when one cannot be written.
        """
        for name, captions in self._waiting.items():
            path = self.folder / name
            before = text_of(path)
            if before is None:
                raise OutputError(f"{path}: is gone; its captions were not written")
            after = with_captions(before, name, captions, self._column)
            if after != before:
                recorder.before_writing([Change(name, before, after)])
                write_bytes(path, after.encode("utf-8"))
        self._waiting.clear()

    def in_metadata(self, image: FoundFile) -> bool:
        """Tell whether an image's caption is in a metadata file."""
        return self._metadata_of(image) is not None

    def _metadata_of(self, image: FoundFile) -> Path | None:
        lines, where = self._metadata.get(name_key(image.name), ((), ""))
        return self.folder / where.rpartition(" line ")[0] if lines else None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def with_captions(text: str, name: str, captions: Mapping[str, str], column: str | None) -> str:
    """Return the text of a metadata file with other captions for some images.

    Args:
        text: of the file.
        name: its path below the folder, with forward slashes.
        captions: an image's key (see :func:`image_key`) -> its caption.
        column: that holds captions; the first known one when None.

    Raises:
        DatasetError: for a CSV with a line that cannot be read.
    """
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    changed: dict[int, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for number, values in rows_of(text.removeprefix("\ufeff"), name):
        row = read_row(values, name, column)
        if isinstance(values, str):
            if name.endswith(".csv"):  # it is written anew as a whole, and would lose this line
                raise DatasetError(f"{name} line {number}: {values}; correct it first")
            continue
        if not isinstance(row, Problem) and (caption := captions.get(image_key(name, row[0]))) is not None:
            wanted = caption_column(values, column)
            assert wanted is not None  # read_row found it
            values = {**values, wanted: caption}
            changed[number] = values
        rows.append(values)
    if not changed:
        return text
    if PurePosixPath(name).suffix == ".csv":
        return mark + _csv_text(rows, "\r\n" if "\r\n" in text else "\n")
    lines = text.removeprefix("\ufeff").split("\n")
    for number, values in changed.items():
        ending = "\r" if lines[number - 1].endswith("\r") else ""
        lines[number - 1] = json.dumps(values, ensure_ascii=False) + ending
    return mark + "\n".join(lines)


def _csv_text(rows: Sequence[Mapping[str, Any]], line_end: str) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
