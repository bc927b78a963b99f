"""Facts about image files from earlier runs, so that a second run need not read the files again.

A file is recognised by its path, size, times of modification and change, and inode. An entry is kept
only if the file had not been changed for a while before it was read: a file system may give the same time to
two versions written shortly after each other. So a changed file is never trusted, and a lost or damaged
index costs only time.
"""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

REST_SECONDS = 2.5  # FAT stores times in steps of 2 s, the coarsest in use
WAIT_SECONDS = 10.0  # for another process to finish writing
_BATCH = 500  # entries written at once: a killed run keeps the rest
_TABLE = (
    "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, state TEXT NOT NULL, version TEXT NOT NULL, "
    "facts TEXT NOT NULL) WITHOUT ROWID"
)


def state_of(status: os.stat_result) -> str:
    """Return a file's properties; while they are unchanged, its content counts as unchanged."""
    # ctime changes with every write and cannot be set back, unlike mtime (cp -p, rsync -t)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


class ImageIndex:
    """Facts about files on disk, as JSON texts; safe to share between processes.

    If the index file itself cannot be used (damage, locks, no permission, full disk), there is one warning,
    and the caller reads the images as if there were no index.

    Args:
        file: the index, created if it is missing; None for an index that remembers nothing.
        version: of the facts; entries of other versions are not used.
        clock: gives the seconds since 1970.
    """

    def __init__(self, file: Path | None, version: str, clock: Callable[[], float] = time.time) -> None:
        self._file, self._version, self._clock = file, version, clock
        self._pending: list[tuple[str, str, str, str]] = []
        self._connection = _connect(file) if file else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._connection:
            self._connection.close()

    def get(self, path: Path, status: os.stat_result) -> str | None:
        """Return the facts about a file as it is now, or None."""
        if self._connection is None:
            return None
        query = "SELECT facts FROM files WHERE path = ? AND state = ? AND version = ?"
        try:
            row = self._connection.execute(query, (_key(path), state_of(status), self._version)).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return str(row[0]) if row else None

    def put(self, path: Path, status: os.stat_result, facts: str) -> None:
        """Remember facts about a file unless it changed just before it was read; ``status`` is of then."""
        touched = max(status.st_mtime, status.st_ctime)
        if self._connection is None or self._clock() - touched < REST_SECONDS:
            return
        self._pending.append((_key(path), state_of(status), self._version, facts))
        if len(self._pending) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._connection and self._pending:
            try:
                with self._connection:
                    self._connection.executemany("REPLACE INTO files VALUES (?, ?, ?, ?)", self._pending)
            except sqlite3.Error as error:
                self._give_up(error)
        self._pending.clear()

    def _give_up(self, error: sqlite3.Error) -> None:
        warnings.warn(f"{self._file}: the index of images is not used ({error})", stacklevel=3)
        if self._connection:
            self._connection.close()
        self._connection = None


def forget_missing(file: Path) -> int:
    """Drop the entries of files that no longer exist; return how many there were."""
    connection = _connect(file) if file.is_symlink() or file.is_file() else None
    if connection is None:
        return 0
    gone: list[tuple[str]] = []
    with suppress(sqlite3.Error), connection:  # busy: another time
        paths: Iterable[tuple[str]] = connection.execute("SELECT path FROM files").fetchall()
        gone = [(path,) for (path,) in paths if not os.path.exists(path)]
        connection.executemany("DELETE FROM files WHERE path = ?", gone)
    connection.close()
    return len(gone)


def _key(path: Path) -> str:
    return os.path.realpath(path)


def _connect(file: Path) -> sqlite3.Connection | None:
    """Open the index; a damaged one is deleted, as everything in it can be measured again."""
    if file.is_symlink():  # what it leads to is not ours to change
        warnings.warn(f"{file}: the index of images is not used (it is a link)", stacklevel=3)
        return None
    for attempt in (1, 2):
        connection = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(file, timeout=WAIT_SECONDS)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(_TABLE)
            connection.execute("SELECT path, state, version, facts FROM files LIMIT 1").fetchone()
            return connection
        except (sqlite3.Error, OSError) as error:
            if connection:
                connection.close()
            if attempt == 1 and isinstance(error, sqlite3.DatabaseError) and not _is_busy(error):
                with suppress(OSError):
                    file.unlink()
                continue
            warnings.warn(f"{file}: the index of images is not used ({error})", stacklevel=3)
            return None
    return None


def _is_busy(error: sqlite3.Error) -> bool:
    return isinstance(error, sqlite3.OperationalError)
