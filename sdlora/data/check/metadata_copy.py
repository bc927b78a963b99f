"""Metadata files of a repaired copy: they name only its images, by their names in the copy."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..reading.metadata_files import image_key, read_row, rows_of
from ..reading.problems import Problem


def mended_metadata(
    text: str, name: str, written: Mapping[str, str | None], captioned: Collection[str]
) -> tuple[str, list[str]]:
    """Return the text of a metadata file for the copy, and what was changed in it.

    Lines that need no change stay as they are.

    Args:
        text: of the metadata file.
        name: its path below the folder, with forward slashes; the same in the copy.
        written: an image's key (see :func:`image_key`) -> its name in the copy, None if left out.
        captioned: keys of images that have a caption file, which the copy keeps.
    """
    done: Counter[str] = Counter()
    kept = list(_kept(text, name, written, captioned, done))
    notes = [f"{count} lines {what}" if count > 1 else f"1 line {what}" for what, count in done.items()]
    if not notes:
        return text, []
    return (_json_text if name.endswith(".jsonl") else _csv_text)(kept), notes


def _kept(
    text: str,
    name: str,
    written: Mapping[str, str | None],
    captioned: Collection[str],
    done: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield the lines to keep, and count in ``done`` what was done with the others."""
    seen: set[str] = set()
    for number, values in rows_of(text, name):
        row = read_row(values, f"{name} line {number}", None)
        if isinstance(values, str) or (isinstance(row, Problem) and "file_name" not in values):
            done["left out: not readable"] += 1
            continue
        key = image_key(name, str(values.get("file_name", "")).strip().replace("\\", "/"))
        target = written.get(key)
        if target is None:
            done["left out: its image is not in the copy"] += 1
        elif isinstance(row, Problem):
            done[f"left out: {row.what}"] += 1
        elif key in seen:
            done["left out: its image was named before"] += 1
        elif key in captioned and row[1]:
            done["left out: its image has a caption file"] += 1
        else:
            seen.add(key)
            if image_key(name, row[0]) != image_key("", target):
                relative = posixpath.relpath(target, posixpath.dirname(name) or ".")
                values = {**values, "file_name": relative}
                done["named after the image in the copy"] += 1
            yield values


def _json_text(rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
