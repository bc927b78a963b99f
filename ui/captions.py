"""Captions edited in the browser: written beside their images at once; every change can be undone."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.data.captioning import restore
from sdlora.data.reading.captions import CAPTION_ENDINGS
from sdlora.data.reading.folder import survey, with_trigger
from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.data.reading.listing import FoundFile, Listing, list_files
from sdlora.data.reading.metadata_files import name_key, read_metadata
from sdlora.errors import DatasetError
from sdlora.files import parse_json, write_text

from . import image_bin
from .server.allowed_paths import AllowedPaths

MAX_CAPTION = 16_000
MAX_UNDO = 200
_POINT = "\0restore point"
"""In the place of a file's name: a change made by `sdlora caption` or `sdlora tags`, here or in a shell."""
_BIN = "\0bin point"
"""In the place of a file's name: a change of images, see :mod:`sdlora_ui.image_bin`."""


def tidy(text: str) -> str:
    """Return a caption without blank lines and needless spaces; its lines stay separate."""
    return "\n".join(line for part in text.splitlines() if (line := " ".join(part.split())))


def _text_of(file: Path, name: str) -> str | None:
    """Return what a caption file holds, None where there is none.

    Raises:
        DatasetError: when it is not UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8-sig") if file.is_file() else None
    except UnicodeDecodeError:
        raise DatasetError(f"{name}: its caption file is not UTF-8 text; save it as UTF-8") from None


def _tidy_text(file: Path) -> str | None:
    with suppress(DatasetError):
        text = _text_of(file, file.name)
        return None if text is None else tidy(text)
    return "\0"  # not what was written: someone else's


def _is_history(value: Any) -> bool:
    """Tell whether a record is a list of changes: name -> text before and after, None for no file."""
    changes = value if isinstance(value, list) else [None]
    return all(
        isinstance(change, dict)
        and all(
            isinstance(texts, list)
            and len(texts) == 2
            and all(text is None or isinstance(text, str) for text in texts)
            for texts in change.values()
        )
        for change in changes
    )


def _in_metadata(listing: Listing) -> set[str]:
    """Return the images whose captions a metadata file holds: an additional text file would be an error."""
    if not listing.metadata:
        return set()
    names = [file.name for file in listing.images]
    captions = read_metadata(listing.metadata_files(), names, None).captions
    return {name for name, (lines, _) in captions.items() if lines}


def _signature(folder: Path, listing: Listing) -> list[tuple[int, int]]:
    """Return what changes when a file of the folder, or of one inside, comes or goes, or metadata changes."""
    signs = []
    for path in (
        folder,
        *(folder / name for name in listing.folders),
        *(file.path for file in listing.metadata),
    ):
        with suppress(OSError):
            state = path.stat()
            signs.append((state.st_mtime_ns, state.st_size))
    return signs


class CaptionBook:
    """The captions of folders, with one undo history for each folder, which survives the server."""

    def __init__(self, paths: AllowedPaths) -> None:
        """Keep the histories among the server's records."""
        self._paths = paths
        self._lock = threading.Lock()
        self._typing: dict[Path, str] = {}
        self._listings: dict[Path, tuple[object, Listing, Collection[str]]] = {}

    def set(self, folder: Path, texts: Mapping[str, str], *, typing: str = "") -> int:
        """Write captions; return how many changed.

        Args:
            folder: the data set.
            texts: image, by its path below the folder -> caption, its lines kept.
            typing: successive saves with the same word are one change to undo: the page saves while its
                user types.

        Raises:
            PathRefused: when an image's real place is not in the folder.
            DatasetError: when there is no such image, or a caption is too long.
        """
        with self._lock:
            change: dict[str, tuple[str | None, str | None]] = {}
            listing, elsewhere = self._files(folder)
            for name, text in texts.items():
                if len(text) > MAX_CAPTION:
                    raise DatasetError(f"{name}: has {len(text)} characters; shorten it to {MAX_CAPTION}")
                file = self._file(folder, name, listing, elsewhere)
                before = _text_of(file, name)
                after = tidy(text)
                if before is None or tidy(before) != after:
                    change[str(file.relative_to(folder))] = before, after
            for name, (_, written) in change.items():
                write_text(folder / name, f"{written}\n")
            self._listings.clear()
            if all(before is not None for before, _ in change.values()):  # no file is new
                self._listings[folder] = _signature(folder, listing), listing, elsewhere
            if change:
                going_on = bool(typing) and self._typing.get(folder) == typing
                self._remember(folder, change, going_on=going_on)
                self._typing[folder] = typing
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
        return self._change_all(
            folder, lambda text: "\n".join(with_trigger(line, word) for line in text.split("\n")), word
        )

    def undo(self, folder: Path) -> int:
        """Take back the newest change; a caption that was changed since by someone else is kept.

        Raises:
            DatasetError: when there is nothing to undo.
        """
        with self._lock:
            history = self._history(folder)
            if not history:
                raise DatasetError("nothing to undo in this folder")
            self._typing.pop(folder, None)
            undone = 0
            change = history.pop()
            if _POINT in change:
                name = change[_POINT][1] or ""
                point = next(file for file in restore.points(folder) if file.name == name)
                undone = len(restore.undo(folder, point).restored)
                change = {}
            if _BIN in change:
                undone, change = image_bin.undo(folder, change[_BIN][1] or "")[0], {}
            for name, (before, after) in change.items():
                file = self._paths.writable(folder / name)
                if file.suffix.lower() not in CAPTION_ENDINGS or _tidy_text(file) != after:
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

    def listed(self, folder: Path) -> list[dict[str, Any]]:
        """Return the changes that can be undone, the newest first: what each was, how many files it wrote."""
        listed: list[dict[str, Any]] = []
        for change in reversed(self._history(folder)):
            if _POINT in change:
                file = folder / restore.FOLDER / (change[_POINT][1] or "")
                listed.append({"what": restore.described(file), "files": None})
            elif _BIN in change:
                what, count = image_bin.described(folder, change[_BIN][1] or "")
                listed.append({"what": what, "files": count})
            else:
                listed.append({"what": "captions edited", "files": len(change)})
        return listed

    def noted(self, folder: Path) -> int:
        """Take new restore points into the history, in their order; return how many changes it has."""
        with self._lock:
            history = self._history(folder)
            self._typing.pop(folder, None)
            self._save(folder, history[-MAX_UNDO:])
            return len(history)

    def _change_all(self, folder: Path, change: Callable[[str], str], word: str | None = None) -> int:
        """Change all captions; with a trigger word, images without a caption count as having an empty one."""
        wanted = {}
        for item in survey(folder, trigger_word=word).dataset.items:
            lines = "\n".join(item.lines)
            if item.caption_source != "metadata" and (new := change(lines)) != lines:
                wanted[item.name] = new
        return self.set(folder, wanted) if wanted else 0

    def _files(self, folder: Path) -> tuple[Listing, Collection[str]]:
        """Return a folder's files, and the images captioned in metadata; kept while none comes or goes."""
        kept = self._listings.get(folder)
        if kept is not None and kept[0] == _signature(folder, kept[1]):
            return kept[1], kept[2]
        listing = list_files(folder, recursive=True)
        return listing, _in_metadata(listing)

    def _file(self, folder: Path, name: str, listing: Listing, elsewhere: Collection[str]) -> Path:
        """Return the caption file of an image, whether it exists or not."""
        image = self._paths.writable(folder / name)
        if not image.is_relative_to(folder) or image.suffix.lower() not in IMAGE_ENDINGS:
            raise DatasetError(f"{name}: is not an image of this folder")
        if not image.is_file():
            raise DatasetError(f"{name}: there is no such image (any more); open the folder again")
        if name_key(name) in elsewhere:
            raise DatasetError(f"{name}: has its caption in a metadata file of the folder; edit it there")
        for path, _ in listing.captions_of(FoundFile(image, name)):
            return self._paths.writable(path)
        return image.with_suffix(".txt")

    def _record(self, folder: Path) -> Path:
        key = hashlib.sha256(str(folder).encode()).hexdigest()[:20]
        return self._paths.state / "captions" / f"{key}.json"

    def _history(self, folder: Path) -> list[dict[str, tuple[str | None, str | None]]]:
        """Return the changes that can be undone, restore points of the folder among them."""
        history: list[dict[str, tuple[str | None, str | None]]] = []
        with suppress(OSError, ValueError):
            kept = parse_json(self._record(folder).read_text(encoding="utf-8"))
            history = kept if _is_history(kept) else []
        for kind, there in (
            (_POINT, [file.name for file in restore.points(folder)]),
            (_BIN, image_bin.points(folder)),
        ):
            history = [change for change in history if kind not in change or change[kind][1] in there]
            listed = {change[kind][1] for change in history if kind in change}
            history += [{kind: (None, name)} for name in there if name not in listed]
        return history

    def _remember(
        self, folder: Path, change: dict[str, tuple[str | None, str | None]], *, going_on: bool
    ) -> None:
        history = self._history(folder)
        if going_on and history and history[-1].keys() == change.keys():
            older = history.pop()
            change = {name: (older[name][0], after) for name, (_, after) in change.items()}
        self._save(folder, [*history, change][-MAX_UNDO:])

    def _save(self, folder: Path, history: list[dict[str, tuple[str | None, str | None]]]) -> None:
        write_text(self._record(folder), json.dumps(history, ensure_ascii=False))
