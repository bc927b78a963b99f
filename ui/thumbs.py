"""Small versions of images, made once and kept on disk among the server's records."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from contextlib import suppress
from pathlib import Path

from sdlora.data.reading.image_files import load_small
from sdlora.errors import OutputError
from sdlora.files import replacing

MAX_THUMB = 1024
MAX_BYTES = 512 * 2**20
"""What is kept on disk; those that were not asked for longest go first."""
_SIDES = (64, 128, 192, 256, 320, 512, 768, MAX_THUMB)
TIDY_EVERY = 2000
"""Thumbnails made between two looks at how much is kept."""
_QUALITY = 82


class Thumbs:
    """The thumbnails of one server. Its methods may be called from any thread."""

    def __init__(self, folder: Path, most_bytes: int = MAX_BYTES) -> None:
        """Keep them in ``folder``, which is made when the first one is."""
        self._folder, self._most = folder, most_bytes
        self._made = 0
        self._lock = threading.Lock()

    def of(self, path: Path, side: int) -> bytes:
        """Return a WebP of an image, its longer side at most the next of a few sizes.

        Args:
            path: of the image, which may be read.
            side: px that are wanted.

        Raises:
            OSError: when there is no such file.
            DatasetError: when it cannot be decoded.
        """
        state = path.stat()
        side = next((known for known in _SIDES if known >= side), MAX_THUMB)
        key = f"{path}|{state.st_mtime_ns}|{state.st_ctime_ns}|{state.st_size}|{side}"
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        file = self._folder / name[:2] / f"{name[2:34]}.webp"
        with suppress(OSError):
            return file.read_bytes()
        buffer = io.BytesIO()
        load_small(path, side).save(buffer, "WEBP", quality=_QUALITY)
        data = buffer.getvalue()
        with suppress(OutputError, OSError), replacing(file) as temporary:  # a full disk only costs time
            temporary.write_bytes(data)
        self._tidy()
        return data

    def _tidy(self) -> None:
        with self._lock:
            self._made += 1
            due = self._made % TIDY_EVERY == 1
        if not due:
            return
        kept = []
        for file in self._folder.glob("*/*.webp"):
            with suppress(OSError):
                state = file.stat()
                kept.append((max(state.st_atime, state.st_mtime), state.st_size, file))
        total = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept, key=lambda entry: entry[0]):
            if total <= self._most:
                break
            with suppress(OSError):
                os.unlink(file)
                total -= size
