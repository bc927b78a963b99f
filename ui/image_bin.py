"""A data set's own bin: images changed on the page can be put back, whatever was done with them.

A restore point is a folder ``FOLDER/.sdlora-bin/DATE/`` with what the files were before, and ``record.json``,
which is on the disk before anything is changed. Data sets travel with their bins, so a record is not trusted:
it can only name images, captions and sidecars inside of the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from sdlora.data.reading.captions import CAPTION_ENDINGS
from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.data.reading.metadata_files import SIDECAR_ENDING
from sdlora.errors import DatasetError, OutputError
from sdlora.files import parse_json, write_bytes, write_json, write_problem

FOLDER = ".sdlora-bin"
EXCLUDED = ".sdlora-excluded"
"""Where images lie that are not trained on; as in all hidden folders, nothing in it is read."""
MAX_RECORD_BYTES = 16 * 2**20
_RECORD = "record.json"
_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
_KEPT = re.compile(r"\d{1,6}")
_ENDINGS = IMAGE_ENDINGS | CAPTION_ENDINGS | {SIDECAR_ENDING}


def points(folder: Path) -> list[str]:
    """Return the names of a folder's restore points, the oldest first."""
    place = folder / FOLDER
    if place.is_symlink() or not place.is_dir():
        return []
    return sorted(file.name for file in place.iterdir() if _is_point(file))


def _is_point(place: Path) -> bool:
    return _NAME.fullmatch(place.name) is not None and place.is_dir() and not place.is_symlink()


def described(folder: Path, name: str) -> tuple[str, int]:
    """Return what a restore point takes back, in words, and how many files it is about."""
    with suppress(DatasetError):
        record = _read(folder, name)
        return str(record["what"]), len(record["files"])
    return "a change that cannot be read", 0


def change(
    folder: Path,
    what: str,
    *,
    written: Mapping[str, bytes] | None = None,
    removed: tuple[str, ...] = (),
    moved: Mapping[str, str] | None = None,
) -> str:
    """Change files of a data set; return the name of the restore point.

    Args:
        folder: the data set.
        what: is done, in words.
        written: name below the folder -> its new bytes.
        removed: names of files that go into the bin.
        moved: name -> its new one, which nobody has yet.

    Raises:
        OutputError: when the folder may not be written, or the disk is full.
    """
    name = _new_name(folder)
    point = folder / FOLDER / name
    files: list[dict[str, Any]] = []
    for target, data in (written or {}).items():
        there = (folder / target).is_file()
        files.append({"name": target, "kept": str(len(files)) if there else None, "after": _sha256(data)})
    files += [{"name": target, "kept": str(len(files) + i)} for i, target in enumerate(removed)]
    files += [{"name": source, "moved": target} for source, target in (moved or {}).items()]
    if (folder / FOLDER).is_symlink():
        raise OutputError(f"{folder / FOLDER}: is a link, but the bin is kept there; move it away")
    write_json(point / _RECORD, {"what": what, "files": files})
    try:
        for entry in files:
            _do(folder, point, entry, (written or {}).get(entry["name"]))
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from error
    return name


def _new_name(folder: Path) -> str:
    """Return a name for a restore point that sorts by its time."""
    while True:
        now = datetime.now()
        name = f"{now:%Y%m%d-%H%M%S}-{now.microsecond:06x}"
        if not (folder / FOLDER / name).exists():
            return name


def undo(folder: Path, name: str) -> tuple[int, int]:
    """Put back what a restore point holds; return how many files were, and how many could not be.

    A file that someone changed since stays as it is; its old version then stays in the bin.

    Raises:
        DatasetError: when there is no such restore point, or it cannot be read.
        OutputError: when the folder may not be written.
    """
    if not _NAME.fullmatch(name):
        raise DatasetError(f"{name}: is not a restore point")
    record, point = _read(folder, name), folder / FOLDER / name
    restored = kept = 0
    try:
        for entry in reversed(record["files"]):
            back = _put_back(folder, point, entry)
            restored, kept = restored + back, kept + (not back)
        if kept:
            os.replace(point, point.with_name(f"kept-{name}"))
        else:
            shutil.rmtree(point)
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from error
    return restored, kept


def _do(folder: Path, point: Path, entry: Mapping[str, Any], data: bytes | None) -> None:
    target = folder / entry["name"]
    if "moved" in entry:
        goal = folder / entry["moved"]
        goal.parent.mkdir(parents=True, exist_ok=True)
        if goal.exists():
            raise OutputError(f"{goal}: is there already; move it away")
        os.replace(target, goal)
    elif data is None:
        os.replace(target, point / entry["kept"])
    else:
        if entry["kept"] is not None:
            shutil.copy2(target, point / entry["kept"])
        write_bytes(target, data)


def _put_back(folder: Path, point: Path, entry: Mapping[str, Any]) -> bool:
    target = _inside(folder, entry["name"])
    if "moved" in entry:
        source = _inside(folder, entry["moved"])
        if target is None or source is None or target.exists() or not source.is_file():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        return True
    kept = point / entry["kept"] if entry["kept"] is not None else None
    if target is None:
        return False
    if kept is None and not target.exists():
        return True  # a crash came before it was written, or someone removed it
    if kept is not None and (kept.is_symlink() or not kept.is_file()):
        return target.exists()  # a crash came before it was changed
    if not (_is(target, entry) if entry.get("after") else not target.exists()):
        return False
    if kept is None:
        target.unlink()
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(kept, target)
    return True


def _is(target: Path, entry: Mapping[str, Any]) -> bool:
    """Tell whether a file is still what was written."""
    return target.is_file() and _sha256(target.read_bytes()) == entry.get("after")


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / FOLDER / name / _RECORD
    if (folder / FOLDER).is_symlink() or file.parent.is_symlink():
        raise DatasetError(f"{file.parent}: is a link, and not followed; nothing was changed")
    try:
        if file.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError("has more than 16 MiB")
        record = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("files"), list):
            raise ValueError("is not a record")
        for entry in record["files"]:
            kept = entry.get("kept")
            if not isinstance(entry.get("name"), str) or not isinstance(entry.get("moved", ""), str):
                raise ValueError("names no file")
            if kept is not None and not _KEPT.fullmatch(str(kept)):
                raise ValueError("names no kept file")
            entry["kept"] = None if kept is None else str(kept)
    except (OSError, ValueError, AttributeError) as error:
        raise DatasetError(f"{file}: cannot be read ({error}); nothing was changed") from None
    return record | {"what": str(record.get("what", ""))}


def _inside(folder: Path, name: str) -> Path | None:
    """Return where a recorded file lies, None unless it is one of a data set, in the folder itself."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        return None
    if os.name == "nt" and ("\\" in name or ":" in name):
        return None
    target = folder.joinpath(*parts)
    if target.suffix.lower() not in _ENDINGS or target.is_symlink():
        return None
    real = Path(os.path.realpath(target.parent))
    return target if real.is_relative_to(os.path.realpath(folder)) else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
