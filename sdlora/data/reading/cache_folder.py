"""Where encodings and the index of images are kept, what it holds, and how it is pruned.

Needs no torch. An entry's time of modification is the time of its last use, so that pruning removes first
what no run has needed for long. Removing entries is always safe: a run that misses one encodes it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import OutputError

EntryKind = Literal["images", "captions", "leftovers"]

_ABANDONED_SECONDS = 3600.0  # a temporary file this old belongs to a run that was killed
_KINDS: tuple[EntryKind, ...] = ("images", "captions")


@dataclass(frozen=True)
class CacheEntry:
    """One file of the cache: its size in bytes and when it was last used (seconds since 1970)."""

    path: Path
    kind: EntryKind
    bytes: int
    used: float


def default_cache_folder() -> Path:
    """Return where encodings are kept: $SDLORA_CACHE_FOLDER, or the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("SDLORA_CACHE_FOLDER")
    return Path(chosen) if chosen else user_cache_path("sdlora", appauthor=False) / "encoded"


def index_file(folder: Path | None = None) -> Path:
    """Return the index of images of a cache folder."""
    return (folder or default_cache_folder()) / "pictures.sqlite"


def refuse_links_away(folder: Path) -> None:
    """Refuse a cache folder whose links lead away; the folder itself may be one, to wherever it is to be.

    Without that a run would write into folders of others, and pruning would remove what lies there.

    Raises:
        OutputError: for a link that leads nowhere, and for one in the folder that leads out of it.
    """
    inside, real = tuple(_places_in(folder)), os.path.realpath(folder)
    for place in (folder, *folder.absolute().parents, *inside):
        if place.is_symlink() and not place.exists():
            raise OutputError(
                f"{place}: is a link that leads nowhere: what it names is missing, or links lead in a "
                "circle; mend or remove it, or choose another folder as data.cache_folder"
            )
    for place in inside:
        if place.is_symlink() and not Path(os.path.realpath(place)).is_relative_to(real):
            raise OutputError(
                f"{place}: is a link that leads out of the cache folder, and nothing is kept or removed "
                "there; remove it, or set data.cache_folder to the folder that is meant"
            )


def _places_in(folder: Path) -> Iterator[Path]:
    """Yield what a run may write to or go through in a cache, but for the entries."""
    yield index_file(folder)
    for kind in _KINDS:
        yield folder / kind
        with suppress(OSError), os.scandir(folder / kind) as inside:
            yield from (Path(entry.path) for entry in inside)


def list_entries(folder: Path) -> list[CacheEntry]:
    """Return all entries of a cache, the longest unused first; ``leftovers`` are unfinished files."""
    return sorted(_entries(folder), key=lambda entry: (entry.used, entry.path))


def choose_entries(
    entries: Sequence[CacheEntry],
    *,
    older_than_days: float | None = None,
    max_bytes: int | None = None,
    now: float | None = None,
) -> list[CacheEntry]:
    """Return what pruning would remove: abandoned leftovers, and what a limit asks for.

    Args:
        entries: as :func:`list_entries` gives them.
        older_than_days: remove what was not used for that many days.
        max_bytes: remove the longest unused until the rest is no larger than this.
        now: seconds since 1970; the present time when left out.

    Without a limit everything is chosen, except for files that a run may be writing right now.
    """
    now = time.time() if now is None else now
    finished = [entry for entry in entries if entry.kind != "leftovers"]
    chosen = [e for e in entries if e.kind == "leftovers" and now - e.used > _ABANDONED_SECONDS]
    if older_than_days is None and max_bytes is None:
        return chosen + finished
    total = sum(entry.bytes for entry in finished)
    for entry in finished:
        too_old = older_than_days is not None and now - entry.used > older_than_days * 86_400
        if too_old or (max_bytes is not None and total > max_bytes):
            chosen.append(entry)
            total -= entry.bytes
    return chosen


def remove_entries(entries: Sequence[CacheEntry]) -> int:
    """Delete entries, except those that another process removed or holds open; return the bytes freed."""
    freed = 0
    for entry in entries:
        with suppress(OSError):
            entry.path.unlink()
            freed += entry.bytes
        with suppress(OSError):  # not empty yet
            entry.path.parent.rmdir()
    return freed


def mark_used(file: Path) -> None:
    """Note that an entry was used now, for :func:`list_entries`."""
    with suppress(OSError):  # a cache without write permission can still be read
        os.utime(file)


def _entries(folder: Path) -> Iterator[CacheEntry]:
    for kind in _KINDS:
        if (folder / kind).is_symlink():
            continue  # not made by a run, and what it leads to is not ours to remove
        for path in (folder / kind).glob("*/*.safetensors"):
            if path.is_symlink() or path.parent.is_symlink():
                continue  # likewise
            with suppress(OSError):  # removed meanwhile
                status = path.stat()
                # unfinished files have hidden names, see sdlora.files.replacing
                entry_kind: EntryKind = "leftovers" if path.name.startswith(".") else kind
                yield CacheEntry(path, entry_kind, status.st_size, status.st_mtime)
