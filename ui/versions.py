"""Whether the files of a data set changed, asked often and found out seldom."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sdlora.config.schema import Config

_LEAST_SECONDS = 1.0
_SHARE = 20
"""Looking at all files takes at most this part of the time."""
_MOST_KEPT = 64
_OWN = ".sdlora"
"""Folders of records whose changes change nothing about a data set begin so."""


class Versions:
    """The versions of settings with their folders, kept 20 times as long as it took to find them out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with none."""
        self._clock = clock
        self._known: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def of(self, config: Config) -> str:
        """Return a version that was true a short time ago; see :func:`version_of_settings`."""
        key = config.data.model_dump_json() + str(config.training.seed)
        began = self._clock()
        with self._lock:
            version, until = self._known.get(key, ("", 0.0))
            if version and began < until:
                return version
        version = version_of_settings(config)
        now = self._clock()
        with self._lock:
            while len(self._known) >= _MOST_KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = version, now + max(_LEAST_SECONDS, _SHARE * (now - began))
        return version

    def forget(self) -> None:
        """Look again when asked next: the page itself changed a file."""
        with self._lock:
            self._known.clear()


def version_of_settings(config: Config) -> str:
    """Return a word that changes when the data settings do, or a file that they name."""
    data = config.data
    named = [data.folder, data.mask_folder, *(source.folder for source in data.sources)]
    named += [source.mask_folder for source in data.sources]
    named += [data.validation] if isinstance(data.validation, Path) else []
    told = [data.model_dump_json(), str(config.training.seed)]
    told += [version_of(folder) for folder in named if folder is not None]
    return hashlib.sha256("\n".join(told).encode("utf-8", "replace")).hexdigest()[:20]


def version_of(folder: Path) -> str:
    """Return a word that changes when a file of the folder does, apart from sdlora's own records in it."""
    states: list[str] = []
    waiting = [os.fspath(folder)]
    while waiting:
        place = waiting.pop()
        with suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                with suppress(OSError):  # removed while looking
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith(_OWN):
                            waiting.append(entry.path)
                    elif entry.is_file():
                        state = entry.stat()
                        states.append(f"{entry.path}|{state.st_mtime_ns}|{state.st_size}\n")
    states.sort()
    return hashlib.sha256("".join(states).encode("utf-8", "replace")).hexdigest()[:20]
