"""Captions edited in the browser: written at once beside their pictures, every change can be undone."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from sdlora.data.captions import CAPTION_ENDINGS
from sdlora.data.folder import survey, with_trigger
from sdlora.data.picture_files import PICTURE_ENDINGS
from sdlora.errors import DatasetError
from sdlora.files import write_text

from .places import Places

MAX_CAPTION = 16_000
_MAX_UNDO = 200


class CaptionBook:
    """The captions of folders, with one undo history a folder that survives the server."""

    def __init__(self, places: Places) -> None:
        """Keep the histories among the server's records."""
        self._places = places
        self._lock = threading.Lock()

    def set(self, folder: Path, texts: Mapping[str, str]) -> int:
        """Write captions; return how many changed.

        Args:
            folder: the data set.
            texts: picture, by its path below the folder -> caption.

        Raises:
            PlaceRefused: when a picture's real place is not in the folder.
            DatasetError: when there is no such picture, or a caption is too long.
        """
        with self._lock:
            change: dict[str, tuple[str | None, str | None]] = {}
            for name, text in texts.items():
                if len(text) > MAX_CAPTION:
                    raise DatasetError(f"{name}: has {len(text)} characters; shorten it to {MAX_CAPTION}")
                file = self._file(folder, name)
                before = file.read_text(encoding="utf-8-sig") if file.is_file() else None
                after = " ".join(text.split())
                if (before or "").strip() != after or before is None:
                    change[str(file.relative_to(folder))] = before, after
            for name, (_, written) in change.items():
                write_text(folder / name, f"{written}\n")
            if change:
                self._remember(folder, change)
            return len(change)

    def replace(self, folder: Path, find: str, put: str, *, match_case: bool = True) -> int:
        """Replace a text in all captions; return how many captions changed.

        Raises:
            DatasetError: when there is nothing to find, or the folder cannot be read.
        """
        if not find:
            raise DatasetError("find: type the text to look for")
        pattern = re.compile(re.escape(find), 0 if match_case else re.IGNORECASE)
        return self._change_all(folder, lambda text: pattern.sub(lambda _: put, text))

    def add_trigger(self, folder: Path, word: str) -> int:
        """Put the trigger word in front of every caption that lacks it; return how many changed.

        Raises:
            DatasetError: without a word, or when the folder cannot be read.
        """
        word = word.strip()
        if not word:
            raise DatasetError("trigger word: type the word that calls the style")
        return self._change_all(folder, lambda text: with_trigger(text, word))

    def undo(self, folder: Path) -> int:
        """Take back the newest change; a caption that was changed since by someone else is kept.

        Raises:
            DatasetError: when there is nothing to undo.
        """
        with self._lock:
            history = self._history(folder)
            if not history:
                raise DatasetError("nothing to undo in this folder")
            undone = 0
            for name, (before, after) in history.pop().items():
                file = self._places.writable(folder / name)
                now = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else None
                if now != after:
                    continue
                if before is None:
                    file.unlink()
                else:
                    write_text(file, before)
                undone += 1
            self._save(folder, history)
            return undone

    def changes(self, folder: Path) -> int:
        """Return how many changes could be undone."""
        return len(self._history(folder))

    def _change_all(self, folder: Path, change: Callable[[str], str]) -> int:
        items = survey(folder).dataset.items
        wanted = {item.name: new for item in items if (new := change(item.caption)) != item.caption}
        return self.set(folder, wanted) if wanted else 0

    def _file(self, folder: Path, name: str) -> Path:
        """Return the caption file of a picture, there or not yet."""
        picture = self._places.writable(folder / name)
        if not picture.is_relative_to(folder) or picture.suffix.lower() not in PICTURE_ENDINGS:
            raise DatasetError(f"{name}: is no picture of this folder")
        if not picture.is_file():
            raise DatasetError(f"{name}: there is no such picture (any more); open the folder again")
        for other in sorted(picture.parent.iterdir()):
            same = other.stem.casefold() == picture.stem.casefold()
            if same and other.suffix.lower() in CAPTION_ENDINGS:
                return self._places.writable(other)
        return picture.with_suffix(".txt")

    def _record(self, folder: Path) -> Path:
        key = hashlib.sha256(str(folder).encode()).hexdigest()[:20]
        return self._places.state / "captions" / f"{key}.json"

    def _history(self, folder: Path) -> list[dict[str, tuple[str | None, str | None]]]:
        with suppress(OSError, ValueError):
            history = json.loads(self._record(folder).read_text(encoding="utf-8"))
            return history if isinstance(history, list) else []
        return []

    def _remember(self, folder: Path, change: dict[str, tuple[str | None, str | None]]) -> None:
        self._save(folder, [*self._history(folder), change][-_MAX_UNDO:])

    def _save(self, folder: Path, history: list[dict[str, tuple[str | None, str | None]]]) -> None:
        write_text(self._record(folder), json.dumps(history, ensure_ascii=False))
