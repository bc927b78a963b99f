"""A data set as the page shows it: images, captions, crops and findings; buckets, tags, the hold-out."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config.schema import Config
from sdlora.data.check.doctor import ExaminedImage, Report
from sdlora.data.check.examination import examine_data
from sdlora.data.check.findings import Finding
from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.data.reading.items import ImageItem

from .words import page_words

PAGE = 60
_MAX_TAGS = 30
_KEPT = 4
_FILES = ("txt", "caption", "metadata")
"""Sources of captions that someone wrote."""
_NOT_SHOWN = ("unreadable", "undecodable", "truncated")
"""Kinds of findings about images that cannot be shown; all others can be."""
_SMALL = 256
_SMALL_MULTIPLE, _MULTIPLE = 16, 64


def size_multiple(resolution: int) -> int:
    """Return the multiple that image sides must be: 64 px, or 16 px for the mini base."""
    return _SMALL_MULTIPLE if resolution < _SMALL else _MULTIPLE


@dataclass(frozen=True)
class _Seen:
    folder: Path
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
        self,
        folder: Path,
        *,
        trigger: str | None,
        resolution: int,
        page: int = 0,
        only: str = "",
        settings: Config | None = None,
    ) -> dict[str, Any]:
        """Return one page of a data set and what is known about all of it, as JSON values.

        Args:
            folder: the data set.
            trigger: word the captions should hold.
            resolution: training resolution in px.
            settings: of the run that is to learn it; all automatic when None.
            page: of 60 images each.
            only: ``findings``, ``held``, ``uncaptioned``, or everything.

        Raises:
            DatasetError: when the folder is missing, is a file, or holds no images.
            ConfigError: for a resolution below the size multiple.
        """
        config = for_folder(folder, trigger, settings)
        seen = self._look(folder, config, resolution)
        by_name: dict[str, list[dict[str, str]]] = {}
        for finding in seen.report.findings:
            by_name.setdefault(finding.where, []).append(_finding(finding))
        cards = [
            _unusable(seen, name, findings)
            for name, findings in _left_out(seen, by_name)
            if only in ("", "findings") or (only == "uncaptioned" and _kinds(findings) == {"no caption"})
        ]
        cards += [
            _card(seen, image, by_name.get(image.item.name, []), image.item.name in seen.held)
            for image in seen.report.images
            if _matches(image.item, only, by_name, seen.held)
        ]
        shown = cards[page * PAGE : (page + 1) * PAGE]
        return _summary(seen, resolution) | {"cards": shown, "matching": len(cards), "trigger": trigger}

    def progress(self, folder: Path) -> tuple[int, int] | None:
        """Return how many of a folder's images were read, and how many there are; None when not reading."""
        return self._progress.get(folder)

    def _look(self, folder: Path, config: Config, resolution: int) -> _Seen:
        with self._lock:
            looking = self._looking.setdefault(folder, threading.Lock())
        with looking:  # a second tab waits for the first one's answer; other folders do not
            version = version_of_settings(config)
            key = folder, resolution, version
            if (seen := self._seen.get(key)) is not None:
                return seen

            def emit(done: int, total: int) -> None:
                self._progress[folder] = done, total

            try:
                report = examine_data(
                    config, resolution=resolution, multiple=size_multiple(resolution), progress=emit
                )
            finally:
                self._progress.pop(folder, None)
            held = frozenset(image.item.name for image in report.images if image.role == "held out")
            seen = _Seen(folder, report, held, version)
            with self._lock:
                while len(self._seen) >= _KEPT:
                    self._seen.pop(next(iter(self._seen)))
                self._seen[key] = seen
            return seen


def for_folder(folder: Path, trigger: str | None, settings: Config | None) -> Config:
    """Return the settings of a run on a folder with this trigger word."""
    return (settings or Config()).with_values({"data.folder": folder, "data.trigger_word": trigger})


def _finding(finding: Finding) -> dict[str, str]:
    return {
        "severity": finding.severity,
        "kind": finding.kind,
        "what": page_words(finding.what),
        "fix": page_words(finding.fix),
    }


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


def _kinds(findings: Sequence[Mapping[str, str]]) -> set[str]:
    return {finding["kind"] for finding in findings}


def _unusable(seen: _Seen, name: str, findings: list[dict[str, str]]) -> dict[str, Any]:
    """Return the card of an image that cannot be used; where it can be shown, it is.

    Where all that lacks is a caption, there is room to type one.
    """
    card: dict[str, Any] = {"name": name, "path": None, "edit": None, "findings": findings, "held": False}
    kinds, path = _kinds(findings), seen.folder / name
    if not kinds.isdisjoint(_NOT_SHOWN) or not path.is_file():
        return card
    only_a_caption = kinds == {"no caption"}
    return card | {
        "path": str(path),
        "changed": path.stat().st_mtime_ns,
        "caption": "",
        "source": "none",
        "edit": _name_in(seen.folder, path) if only_a_caption else None,
    }


def _name_in(folder: Path, path: Path) -> str | None:
    """Return an image's name from the folder on the page, None where it lies in another one."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


def _card(seen: _Seen, image: ExaminedImage, findings: list[dict[str, str]], held: bool) -> dict[str, Any]:
    item = image.item
    left, top, right, bottom = image.box
    return {
        "name": item.name,
        "edit": _name_in(seen.folder, item.path),
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
        "findings": [{**_finding(finding), "where": finding.where} for finding in report.findings],
        "buckets": [
            {"width": bucket.bucket[1], "height": bucket.bucket[0], "count": bucket.num_images}
            for bucket in report.buckets
        ],
        "tags": report.tags[:_MAX_TAGS],
        "more_tags": len(report.tags) > _MAX_TAGS,
    }


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
    """Return a word that changes when a file of the folder does."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        with suppress(OSError):  # removed while looking
            if file.is_file():
                state = file.stat()
                digest.update(f"{file}|{state.st_mtime_ns}|{state.st_size}\n".encode("utf-8", "replace"))
    return digest.hexdigest()[:20]
