"""A data set as the page shows it: images, captions, crops and findings; buckets, tags, the hold-out."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config.defaults import hold_out
from sdlora.data.check.doctor import ExaminedImage, Report, examine
from sdlora.data.reading.folder import survey
from sdlora.data.reading.holdout import split
from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.data.reading.items import Dataset, ImageItem

PAGE = 60
_MAX_TAGS = 30
_KEPT = 4
_FILES = ("txt", "caption", "metadata")
"""Sources of captions that someone wrote."""
_SMALL = 256
_SMALL_MULTIPLE, _MULTIPLE = 16, 64


def size_multiple(resolution: int) -> int:
    """Return the multiple that image sides must be: 64 px, or 16 px for the mini base."""
    return _SMALL_MULTIPLE if resolution < _SMALL else _MULTIPLE


@dataclass(frozen=True)
class _Seen:
    report: Report
    held: frozenset[str]
    version: str


class DataSets:
    """Data sets that were looked at, kept until one of their files changes."""

    def __init__(self) -> None:
        """Start with none."""
        self._seen: dict[tuple[object, ...], _Seen] = {}
        self._progress: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._looking: dict[Path, threading.Lock] = {}

    def look(
        self, folder: Path, *, trigger: str | None, resolution: int, page: int = 0, only: str = ""
    ) -> dict[str, Any]:
        """Return one page of a data set and what is known about all of it, as JSON values.

        Args:
            folder: the data set.
            trigger: word the captions should hold.
            resolution: training resolution in px.
            page: of 60 images each.
            only: ``findings``, ``held``, ``uncaptioned``, or everything.

        Raises:
            DatasetError: when the folder is missing, is a file, or holds no images.
            ConfigError: for a resolution below the size multiple.
        """
        seen = self._look(folder, trigger, resolution)
        by_name: dict[str, list[dict[str, str]]] = {}
        for finding in seen.report.findings:
            by_name.setdefault(finding.where, []).append(
                {"severity": finding.severity, "kind": finding.kind, "what": finding.what, "fix": finding.fix}
            )
        cards = [
            _unusable(name, findings)
            for name, findings in _left_out(seen, by_name)
            if only in ("", "findings")
        ]
        cards += [
            _card(image, by_name.get(image.item.name, []), image.item.name in seen.held)
            for image in seen.report.images
            if _matches(image.item, only, by_name, seen.held)
        ]
        shown = cards[page * PAGE : (page + 1) * PAGE]
        return _summary(seen, resolution) | {"cards": shown, "matching": len(cards), "trigger": trigger}

    def progress(self, folder: Path) -> tuple[int, int] | None:
        """Return how many of a folder's images were read, and how many there are; None when not reading."""
        return self._progress.get(folder)

    def _look(self, folder: Path, trigger: str | None, resolution: int) -> _Seen:
        with self._lock:
            looking = self._looking.setdefault(folder, threading.Lock())
        with looking:  # a second tab waits for the first one's answer; other folders do not
            version = version_of(folder)
            key = folder, trigger, resolution, version
            if (seen := self._seen.get(key)) is not None:
                return seen

            def emit(done: int, total: int) -> None:
                self._progress[folder] = done, total

            try:
                report = examine(
                    folder,
                    trigger_word=trigger,
                    resolution=resolution,
                    multiple=size_multiple(resolution),
                    progress=emit,
                )
                dataset = survey(folder).dataset
            finally:
                self._progress.pop(folder, None)
            seen = _Seen(report, _held_out(dataset), version)
            with self._lock:
                while len(self._seen) >= _KEPT:
                    self._seen.pop(next(iter(self._seen)))
                self._seen[key] = seen
            return seen


def _held_out(dataset: Dataset) -> frozenset[str]:
    """Return the names of the images that training holds out when the user says nothing."""
    if not dataset.items:
        return frozenset()
    _, held = split(dataset, hold_out(len(dataset.items))[0], 0)
    return frozenset(item.name for item in held.items)


def _matches(
    item: ImageItem, only: str, by_name: Mapping[str, Sequence[object]], held: frozenset[str]
) -> bool:
    if only == "findings":
        return item.name in by_name
    if only == "held":
        return item.name in held
    return only != "uncaptioned" or item.caption_source not in _FILES


def _left_out(
    seen: _Seen, by_name: Mapping[str, list[dict[str, str]]]
) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the images that cannot be used, with what is wrong with them."""
    usable = {image.item.name for image in seen.report.images}
    return [
        (name, findings)
        for name, findings in by_name.items()
        if name not in usable and Path(name).suffix.lower() in IMAGE_ENDINGS
    ]


def _unusable(name: str, findings: list[dict[str, str]]) -> dict[str, Any]:
    return {"name": name, "path": None, "findings": findings, "held": False}


def _card(image: ExaminedImage, findings: list[dict[str, str]], held: bool) -> dict[str, Any]:
    item = image.item
    left, top, right, bottom = image.box
    return {
        "name": item.name,
        "path": str(item.path),
        "changed": item.path.stat().st_mtime_ns if item.path.exists() else 0,
        "caption": "\n".join(item.lines),
        "source": item.caption_source,
        "tokens": image.tokens,
        "width": item.width,
        "height": item.height,
        "bucket": image.placement.bucket,
        "crop": [left / item.width, top / item.height, right / item.width, bottom / item.height],
        "held": held,
        "findings": findings,
    }


def _summary(seen: _Seen, resolution: int) -> dict[str, Any]:
    report = seen.report
    return {
        "version": seen.version,
        "num_images": report.num_images,
        "num_unusable": seen.report.num_unusable,
        "num_captions": sum(image.item.caption_source in _FILES for image in report.images),
        "held_out": len(seen.held),
        "resolution": resolution,
        "counts": {name: report.count(name) for name in ("error", "warning", "note")},
        "findings": [
            {"severity": f.severity, "kind": f.kind, "what": f.what, "where": f.where, "fix": f.fix}
            for f in report.findings
        ],
        "buckets": [
            {"width": bucket.bucket[1], "height": bucket.bucket[0], "count": bucket.num_images}
            for bucket in report.buckets
        ],
        "tags": report.tags[:_MAX_TAGS],
        "more_tags": len(report.tags) > _MAX_TAGS,
    }


def version_of(folder: Path) -> str:
    """Return a word that changes when a file of the folder does."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        with suppress(OSError):  # removed while looking
            if file.is_file():
                state = file.stat()
                digest.update(f"{file}|{state.st_mtime_ns}|{state.st_size}\n".encode("utf-8", "replace"))
    return digest.hexdigest()[:20]
