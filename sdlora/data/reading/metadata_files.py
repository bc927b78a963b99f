"""What files beside the images say of them: captions for many in one table, the subject's place for one.

Captions come from ``metadata.jsonl`` and ``metadata.csv``, as Hugging Face image folders have them: each line
names an image relative to the metadata file (column ``file_name``) and says what it shows.

A sidecar is the JSON file beside an image that says where its subject is: ``{"focus": [x, y]}``. x goes
from 0 (left) to 1 (right), y from 0 (top) to 1 (bottom), in the upright image. JSON files of other programs,
which have no ``focus``, are left alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import parse_json
from .image_files import read_file
from .items import Point
from .problems import Problem, Unusable

METADATA_NAMES = frozenset({"metadata.jsonl", "metadata.csv"})
_CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
MAX_METADATA_BYTES = 512 * 1024 * 1024
SIDECAR_ENDING = ".json"
MAX_SIDECAR_BYTES = 1024 * 1024
_FIX = "correct that line"
_MOST_PROBLEMS = 1000
"""Of one metadata file that are named one by one: a table of something else has as many as lines."""


@dataclass(frozen=True)
class MetadataCaptions:
    """What metadata files say: image -> the lines of its caption, with problems and notes."""

    captions: Mapping[str, tuple[tuple[str, ...], str]]
    """Image's name (see :func:`name_key`) -> (lines of its caption, file and line it is in)."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def name_key(name: str) -> str:
    """Return an image's name with its letters composed (NFC): file systems give either form."""
    return unicodedata.normalize("NFC", name)


def read_metadata(
    files: Sequence[tuple[Path, str]], images: Sequence[str], column: str | None
) -> MetadataCaptions:
    """Read the metadata files of a folder.

    Args:
        files: their paths, and their names from the folder with forward slashes.
        images: names of the images of the folder.
        column: which column holds the caption; the first known one when None.
    """
    known = {name_key(name) for name in images}
    captions: dict[str, tuple[tuple[str, ...], str]] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for path, name in files:
        lost: list[str] = []
        num_found = 0
        wrong: list[Problem] = []
        for row in _rows(path, name, column):
            if isinstance(row, Problem):
                wrong.append(row)
                continue
            image, lines, where = row
            key = image_key(name, image)
            if key not in known:
                lost.append(image)
            elif key in captions and captions[key] != (lines, where):
                what = f"names {image} again, after {captions[key][1]}"
                wrong.append(Problem("bad caption", where, what, "delete one of the lines"))
            else:
                num_found += 1
                captions[key] = lines, where
        problems += wrong[:_MOST_PROBLEMS]
        if len(wrong) > _MOST_PROBLEMS:
            what = f"has {len(wrong) - _MOST_PROBLEMS} more lines that cannot be used"
            problems.append(Problem("bad caption", name, what, "correct the file, or delete it"))
        if lost and not num_found and not any(problem.where.startswith(name) for problem in problems):
            what = f"names no image of this folder (first: {lost[0]})"
            problems.append(Problem("bad caption", name, what, "put it beside its images, or delete it"))
        elif lost:
            notes.append(f"{name}: names {len(lost)} images that are not there (first: {lost[0]})")
    return MetadataCaptions(captions, tuple(problems), tuple(notes))


def _rows(path: Path, name: str, column: str | None) -> Iterator[tuple[str, tuple[str, ...], str] | Problem]:
    """Yield (file name, lines of the caption, where it stands) of each line, or what is wrong with it."""
    try:
        text = read_file(path, name, MAX_METADATA_BYTES).decode("utf-8-sig")
    except Unusable as error:
        yield error.problem
        return
    except UnicodeDecodeError as error:
        yield Problem(
            "bad caption", name, f"is not UTF-8 text (byte {error.start} is not)", "save it as UTF-8"
        )
        return
    for number, values in rows_of(text, name):
        where = f"{name} line {number}"
        row = read_row(values, where, column)
        yield row if isinstance(row, Problem) else (*row, where)


def rows_of(text: str, name: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield number and values of each line of a metadata file, or what is wrong with it."""
    return (_json_lines if name.endswith(".jsonl") else _csv_rows)(text)


def read_row(
    values: dict[str, Any] | str, where: str, column: str | None
) -> tuple[str, tuple[str, ...]] | Problem:
    """Return the file name and the lines of the caption of one line, or what is wrong with it."""
    if isinstance(values, str):
        return Problem("bad caption", where, values, _FIX)
    image = values.get("file_name")
    if not isinstance(image, str) or not image.strip():
        return Problem("bad caption", where, "has no `file_name`", "add the column `file_name`")
    wanted = caption_column(values, column)
    if wanted is None or wanted not in values:
        has = ", ".join(str(name) for name in values if name != "file_name") or "nothing else"
        what = f"has no column `{wanted or 'text'}` (it has {has})"
        return Problem("bad caption", where, what, "name its caption column in data.metadata_caption")
    lines = _lines(values[wanted])
    if lines is None:
        return Problem("bad caption", where, f"has no text in `{wanted}`", "write the caption as a string")
    return image.strip().replace("\\", "/"), lines


def caption_column(values: Mapping[str, Any], column: str | None) -> str | None:
    """Return the column of a line that holds the caption, None where it has none of the known ones."""
    return column or next((name for name in _CAPTION_COLUMNS if name in values), None)


def image_key(metadata: str, image: str) -> str:
    """Return the :func:`name_key` of an image as a metadata file names it.

    Args:
        metadata: name of the metadata file from the folder, with forward slashes.
        image: as written in the file, relative to it.
    """
    return name_key(posixpath.normpath(posixpath.join(posixpath.dirname(metadata), image)))


def _lines(value: Any) -> tuple[str, ...] | None:
    parts = [value] if isinstance(value, str) else value
    if parts is None:
        parts = []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return None
    return tuple(line.strip() for part in parts for line in part.splitlines() if line.strip())


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            yield number, f"is not valid JSON ({error})"
            continue
        yield number, value if isinstance(value, dict) else "is not a JSON object"


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        try:
            line = 1 + (reader.line_num if reader.fieldnames is not None else 0)
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield 1 + reader.line_num, f"is not valid CSV ({error})"
            return
        if None in row or None in row.values():
            yield line, "has more or fewer values than the first line has columns"
        else:
            yield line, dict(row)


def read_focus(path: Path, name: str) -> Point | Problem | None:
    """Return the point of interest a sidecar gives, None where it gives none, or what is wrong with it."""
    try:
        data = read_file(path, name, MAX_SIDECAR_BYTES)
    except Unusable as error:
        return error.problem
    if b'"focus"' not in data:
        return None
    try:
        value: Any = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        return Problem("bad sidecar", name, f"is not valid JSON ({error})", "correct it, or delete it")
    focus = value.get("focus") if isinstance(value, dict) else None
    if focus is None:
        return None
    good = isinstance(focus, list) and len(focus) == 2 and all(_is_share(share) for share in focus)
    if not good:
        what = f"has `focus` {json.dumps(focus)}"
        return Problem("bad sidecar", name, what, "give [x, y], each from 0 (left, top) to 1 (right, bottom)")
    return float(focus[0]), float(focus[1])


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1
