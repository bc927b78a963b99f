"""Restore points: what captions were before a command changed them, kept in the data set's own folder.

A restore point is a file ``FOLDER/.sdlora-captions/DATE.jsonl``. Its first line says what changed the
captions, each further one names a file, with its text before its first change and the SHA-256 of what was
written. A line is on the disk before its file is changed, so that whatever a crash leaves can be undone.
Undoing puts the old text back wherever the file still is as it was written; a file that someone changed since
is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from ...errors import DatasetError, OutputError
from ...files import parse_json, write_bytes, write_problem
from ..reading.captions import CAPTION_ENDINGS
from ..reading.metadata_files import METADATA_NAMES

FOLDER = ".sdlora-captions"
MAX_POINT_BYTES = 2**30
MAX_WHAT_BYTES = 2**16
_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}\.jsonl")
_LOCK = "lock"


@dataclass(frozen=True)
class Change:
    """A file that is about to be written.

    Attributes:
        name: its path below the folder, with forward slashes.
        before: its text now, None where there is no such file.
        after: what will be written.
    """

    name: str
    before: str | None
    after: str


@dataclass
class _FileRecord:
    before: str | None
    written: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class RestorePoint:
    """A restore point as its file says.

    Attributes:
        file: where it is kept.
        what: what changed the captions, in words.
        settings: of the work, to tell whether it is being continued.
        finished: whether the work came to its end.
        done: the images that were dealt with.
        files: name -> text before, and the hashes of all that was written.
    """

    file: Path
    what: str
    settings: Mapping[str, Any]
    finished: bool
    done: frozenset[str]
    files: Mapping[str, _FileRecord]


@dataclass(frozen=True)
class Undone:
    """What undoing did: files put back, and files that someone changed since, which are kept."""

    what: str
    restored: tuple[str, ...]
    kept: tuple[str, ...]


class Recorder:
    """Writes one restore point while captions change."""

    def __init__(self, folder: Path, file: Path, known: Mapping[str, _FileRecord]) -> None:
        self.folder, self.file = folder, file
        self._known = {
            name: _FileRecord(record.before, set(record.written)) for name, record in known.items()
        }

    def before_writing(self, changes: Sequence[Change]) -> None:
        """Record what is about to be written.

        Raises:
            OutputError: when the record cannot be written; then nothing may be changed.
        """
        lines: list[dict[str, Any]] = []
        for change in changes:
            line: dict[str, Any] = {"file": change.name, "after": sha256(change.after)}
            if change.name not in self._known:
                line["before"] = change.before
            self._known.setdefault(change.name, _FileRecord(change.before)).written.add(line["after"])
            lines.append(line)
        self._append(lines)

    def done(self, images: Sequence[str]) -> None:
        """Record images that need not be dealt with again when the work is continued."""
        self._append([{"done": list(images)}] if images else [])

    def finish(self) -> None:
        """Record that the work came to its end."""
        self._append([{"finished": True}])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if lines:
            _append(self.file, lines)


@contextmanager
def recording(
    folder: Path, what: str, settings: Mapping[str, Any], continued: RestorePoint | None = None
) -> Iterator[Recorder]:
    """Give the recorder of a new restore point, or of one that is being continued.

    A point at whose end nothing was changed is removed.

    Args:
        folder: the data set.
        what: what changes the captions, in words.
        settings: JSON values, kept with it.
        continued: an unfinished point of the same work.

    Raises:
        OutputError: when the folder may not be written, or another process is changing its captions.
    """
    with locked(folder):
        if continued is not None:
            _cut_torn_line(continued.file)
            recorder = Recorder(folder, continued.file, continued.files)
        else:
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}.jsonl"
            recorder = Recorder(folder, folder / FOLDER / name, {})
            _append(recorder.file, [{"what": what, "settings": dict(settings)}])
        try:
            yield recorder
        finally:
            if not recorder._known:
                with suppress(OSError):
                    recorder.file.unlink()


def points(folder: Path) -> list[Path]:
    """Return the files of a folder's restore points, the oldest first."""
    place = folder / FOLDER
    if place.is_symlink() or not place.is_dir():
        return []
    return sorted(file for file in place.iterdir() if _NAME.fullmatch(file.name) and not file.is_symlink())


def newest(folder: Path) -> RestorePoint | None:
    """Return the newest restore point of a folder, None where there is none that can be read."""
    files = points(folder)
    with suppress(DatasetError):
        return read_point(files[-1]) if files else None
    return None


def described(file: Path) -> str:
    """Return what a restore point takes back, in words, from the start of its file alone."""
    with suppress(OSError, ValueError, KeyError, TypeError), file.open("rb") as stream:
        return str(parse_json(stream.readline(MAX_WHAT_BYTES))["what"])
    return "a change that cannot be read"


def read_point(file: Path) -> RestorePoint:
    """Return a restore point. A line that a crash cut short is passed over: its file was not written.

    Raises:
        DatasetError: when it cannot be read, or says something else.
    """
    try:
        if file.stat().st_size > MAX_POINT_BYTES:
            raise DatasetError(f"{file}: has more than 1 GiB; delete it if you do not need to undo")
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror or error})") from None
    what, settings, finished = "", {}, False
    done: set[str] = set()
    records: dict[str, _FileRecord] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
            if not isinstance(value, dict):
                raise ValueError("is not a JSON object")
            if "what" in value:
                what, settings = str(value["what"]), dict(value.get("settings") or {})
            elif "file" in value:
                _take(records, value)
            elif "done" in value:
                done.update(str(name) for name in value["done"])
            finished = finished or value.get("finished") is True
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                continue
            raise DatasetError(f"{file} line {number}: is not a line of a restore point ({error})") from None
    return RestorePoint(file, what, settings, finished, frozenset(done), records)


def undo(folder: Path, file: Path | None = None) -> Undone:
    """Put the captions back as they were before the newest restore point, or a given one, and remove it.

    Raises:
        DatasetError: when there is nothing to undo.
        OutputError: when the folder may not be written, or another process is changing its captions.
    """
    with locked(folder):
        if file is None:
            files = points(folder)
            if not files:
                raise DatasetError(f"{folder}: nothing to undo, no command has changed its captions")
            file = files[-1]
        point = read_point(file)
        restored, kept = [], []
        for name, record in point.files.items():
            target = _place(folder, name)
            now = _text_or_none(target) if target is not None else None
            if target is not None and now == record.before and target.exists() == (now is not None):
                continue
            if target is None or now is None or sha256(now) not in record.written:
                kept.append(name)
            elif record.before is None:
                _remove(target)
                restored.append(name)
            else:
                write_bytes(target, record.before.encode("utf-8"))
                restored.append(name)
        _remove(file)
        return Undone(point.what, tuple(restored), tuple(kept))


def text_of(path: Path) -> str | None:
    """Return a file's text exactly (byte order mark and line ends included), None where there is none.

    Raises:
        DatasetError: when it cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from None


def sha256(text: str) -> str:
    """Return the hash by which a file is recognised as what was written."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing a folder's captions meanwhile.

    Raises:
        OutputError: when one does already, or the folder may not be written.
    """
    place = folder / FOLDER
    try:
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise OutputError(f"{place}: is not a folder, but restore points are kept there; move it away")
        place.mkdir(exist_ok=True)
        lock = FileLock(place / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{folder}: another process is changing its captions; wait until it has ended"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from None
    try:
        yield
    finally:
        lock.release()


def _append(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    try:
        with file.open("a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(f"{file}: {write_problem(error)}") from None


def _cut_torn_line(file: Path) -> None:
    """Remove a last line that a crash cut short, so that the next one begins a line of its own."""
    try:
        with file.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)
    except OSError as error:
        raise OutputError(f"{file}: {write_problem(error)}") from None


def _text_or_none(path: Path) -> str | None:
    with suppress(DatasetError):
        return text_of(path)
    return None


def _take(records: dict[str, _FileRecord], value: Mapping[str, Any]) -> None:
    name, before = str(value["file"]), value.get("before")
    if before is not None and not isinstance(before, str):
        raise ValueError("`before` is no text")
    records.setdefault(name, _FileRecord(before)).written.add(str(value["after"]))


def _place(folder: Path, name: str) -> Path | None:
    """Return where a recorded file lies, None unless it is a caption or metadata file inside the folder.

    A data set that someone else packed brings its restore points along, so they are not trusted.
    """
    parts = PurePosixPath(name).parts
    target = folder.joinpath(*parts)
    usual = target.suffix.lower() in CAPTION_ENDINGS or target.name in METADATA_NAMES
    inside = (
        bool(parts)
        and ".." not in parts
        and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder))
    )
    return target if usual and inside and not target.is_symlink() else None


def _remove(file: Path) -> None:
    try:
        file.unlink()
    except OSError as error:
        raise OutputError(f"{file}: {write_problem(error)}") from None
