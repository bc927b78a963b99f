"""A data set as the page shows it: pictures, captions, crops and findings; buckets, tags, the hold-out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.data.buckets import make_buckets, place, source_box
from sdlora.data.doctor import Report, examine
from sdlora.data.folder import survey
from sdlora.data.holdout import split
from sdlora.data.items import Dataset, ImageItem
from sdlora.plan import hold_out

PAGE = 60
_MAX_TAGS = 30
_SMALL = 256
_SMALL_MULTIPLE, _MULTIPLE = 16, 64


def size_multiple(resolution: int) -> int:
    """Return what picture sides are multiples of: 64 px, on the mini base 16."""
    return _SMALL_MULTIPLE if resolution < _SMALL else _MULTIPLE


@dataclass(frozen=True)
class _Seen:
    items: tuple[ImageItem, ...]
    report: Report
    held: frozenset[str]


class DataSets:
    """Data sets that were looked at, kept until one of their files changes."""

    def __init__(self) -> None:
        """Start with none."""
        self._seen: dict[tuple[object, ...], _Seen] = {}
        self._lock = threading.Lock()

    def look(
        self, folder: Path, *, trigger: str | None, resolution: int, page: int = 0, only: str = ""
    ) -> dict[str, Any]:
        """Return one page of a data set and what is known about all of it, as JSON values.

        Args:
            folder: the data set.
            trigger: word the captions should hold.
            resolution: px trained at.
            page: of 60 pictures each.
            only: ``findings``, ``held``, ``uncaptioned``, or everything.

        Raises:
            DatasetError: when the folder is missing, is a file, or holds no pictures.
            ConfigError: for a resolution below the size multiple.
        """
        seen = self._look(folder, trigger, resolution)
        by_name: dict[str, list[dict[str, str]]] = {}
        for one in seen.report.findings:
            by_name.setdefault(one.where, []).append(
                {"severity": one.severity, "what": one.what, "fix": one.fix}
            )
        items = [item for item in seen.items if _matches(item, only, by_name, seen.held)]
        cards = [
            _card(item, resolution, by_name.get(item.name, []), item.name in seen.held)
            for item in items[page * PAGE : (page + 1) * PAGE]
        ]
        return _summary(seen, resolution) | {"cards": cards, "matching": len(items), "trigger": trigger}

    def _look(self, folder: Path, trigger: str | None, resolution: int) -> _Seen:
        key = folder, trigger, resolution, _signature(folder)
        with self._lock:
            if key not in self._seen:
                report = examine(
                    folder, trigger_word=trigger, resolution=resolution, multiple=size_multiple(resolution)
                )
                dataset = survey(folder).dataset
                self._seen.clear()
                self._seen[key] = _Seen(dataset.items, report, _held_out(dataset))
            return self._seen[key]


def _held_out(dataset: Dataset) -> frozenset[str]:
    """Return the names of the pictures that training holds out when the user says nothing."""
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
    return only != "uncaptioned" or item.caption_source == "file name"


def _card(item: ImageItem, resolution: int, findings: list[dict[str, str]], held: bool) -> dict[str, Any]:
    placement = place(item.height, item.width, make_buckets(resolution, size_multiple(resolution)))
    left, top, right, bottom = source_box(item.height, item.width, placement)
    return {
        "name": item.name,
        "path": str(item.path),
        "changed": item.path.stat().st_mtime_ns,
        "caption": item.caption,
        "source": item.caption_source,
        "width": item.width,
        "height": item.height,
        "bucket": placement.bucket,
        "crop": [left / item.width, top / item.height, right / item.width, bottom / item.height],
        "held": held,
        "findings": findings,
    }


def _summary(seen: _Seen, resolution: int) -> dict[str, Any]:
    report = seen.report
    tags = Counter(
        tag for item in seen.items for tag in {part.strip() for part in item.caption.split(",")} if tag
    )
    return {
        "num_images": len(seen.items),
        "num_captions": sum(item.caption_source != "file name" for item in seen.items),
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
        "tags": tags.most_common(_MAX_TAGS),
        "num_tags": len(tags),
    }


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    if not folder.is_dir():
        return ()
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            state = file.stat()
            found.append((str(file), state.st_mtime_ns, state.st_size))
    return tuple(found)
