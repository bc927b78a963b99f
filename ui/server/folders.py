"""Folders inside what may be read, to be chosen from on the page: names and a first count, bounded."""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.files import is_text

from .allowed_paths import STATE, AllowedPaths

MOST_LISTED = 500
MOST_COUNTED = 2000
"""Names that are looked at to count a folder's images."""


def list_folders(paths: AllowedPaths, text: str) -> dict[str, Any]:
    """Return a folder's folders, each with how many images lie in it; without a text, where one may begin.

    Raises:
        PathRefused: for a folder outside of what may be read.
        MissingPath: for one that does not exist.
    """
    if not text.strip():
        starts = [paths.data, *paths.named, paths.runs, paths.images]
        listed = [
            _entry(paths, folder, paths.shown(folder)) for folder in dict.fromkeys(starts) if folder.is_dir()
        ]
        return {
            "path": "",
            "shown": "",
            "up": None,
            "images": 0,
            "folders": listed,
            "more": False,
            "unnamed": 0,
        }
    folder = paths.folder(text)
    names: list[str] = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MOST_COUNTED):
            with suppress(OSError):
                names += [entry.name] if entry.is_dir() and not entry.name.startswith(".") else []
    # a link that leads out is no folder of the server's
    inside = [
        folder / name
        for name in sorted(names, key=str.lower)
        if name != STATE and paths.reaches(folder / name)
    ]
    unnamed = sum(not is_text(name) for name in names)
    is_start = folder in (paths.data, paths.runs, paths.images, *paths.named)
    return {
        "path": str(folder),
        "shown": paths.shown(folder),
        "up": "" if is_start or not paths.reaches(folder.parent) else str(folder.parent),
        "images": _count(folder),
        "folders": [_entry(paths, each, each.name) for each in inside[:MOST_LISTED]],
        "more": len(inside) > MOST_LISTED,
        "unnamed": unnamed,
    }


def _entry(paths: AllowedPaths, folder: Path, name: str) -> dict[str, Any]:
    return {"name": name or ".", "path": str(folder), "images": _count(folder)}


def _count(folder: Path) -> int:
    """Return the number of images directly in a folder, as far as is looked."""
    with suppress(OSError), os.scandir(folder) as entries:
        names = (entry.name for entry in itertools.islice(entries, MOST_COUNTED))
        return sum(os.path.splitext(name)[1].lower() in IMAGE_ENDINGS for name in names if name[0] != ".")
    return 0
