"""A data set as the page shows it: images, captions, crops and findings; buckets, tags, the hold-out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config.schema import Config
from sdlora.data.captioning.wording import tag_key, tags_of
from sdlora.data.check.doctor import ExaminedImage, Report
from sdlora.data.check.examination import examine_data
from sdlora.data.check.findings import Finding
from sdlora.data.reading.captions import CAPTION_ENDINGS
from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.data.reading.items import ImageItem
from sdlora.data.reading.likeness import near_duplicates

from .versions import Versions, version_of, version_of_settings
from .words import page_words

__all__ = ["DataSets", "for_folder", "size_multiple", "version_of", "version_of_settings"]

PAGE = 60
_MAX_TAGS = 30
_KEPT = 4
_SHOWN_OF_A_KIND = 3
_MOST_GROUPS = 200
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
    by_name: Mapping[str, Sequence[Finding]]


class DataSets:
    """Data sets that were looked at, kept until one of their files changes."""

    def __init__(self) -> None:
        """Start with none."""
        self.versions = Versions()
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
        known: str = "",
        at: str = "",
    ) -> dict[str, Any]:
        """Return one page of a data set and what is known about all of it, as JSON values.

        Args:
            folder: the data set.
            trigger: word the captions should hold.
            resolution: training resolution in px.
            settings: of the run that is to learn it; all automatic when None.
            page: of 60 images each.
            only: ``findings``, ``held``, ``uncaptioned``, ``tag:`` and a tag, or everything.
            known: the version that is shown: its pages are given without looking at all files again, with the
                captions as they are now.
            at: an image whose page is wanted, whatever ``page`` says.

        Raises:
            DatasetError: when the folder is missing, is a file, or holds no images.
            ConfigError: for a resolution below the size multiple.
        """
        config = for_folder(folder, trigger, settings)
        seen = self._seen.get((folder, resolution, known)) or self._look(folder, config, resolution)
        by_name = seen.by_name
        left_out = [
            (name, findings)
            for name, findings in _left_out(seen, by_name)
            if (only in ("", "findings") or (only == "uncaptioned" and _kinds(findings) == {"no caption"}))
            and not (known and _kinds(findings) == {"no caption"} and not (folder / name).exists())
        ]
        images = [image for image in seen.report.images if _matches(image.item, only, by_name, seen.held)]
        order = [*(name for name, _ in left_out), *(image.item.name for image in images)] if at else []
        page = order.index(at) // PAGE if at in order else page
        start, end = page * PAGE, (page + 1) * PAGE
        cards = [
            _unusable(seen, name, [_finding(finding) for finding in held])
            for name, held in left_out[start:end]
        ]
        after = len(left_out)
        cards += [
            _card(
                seen,
                image,
                [_finding(finding) for finding in by_name.get(image.item.name, [])],
                fresh=bool(known),
            )
            for image in images[max(0, start - after) : max(0, end - after)]
            if image.item.path.exists() or not known
        ]
        matching = after + len(images)
        shown = {"cards": cards, "matching": matching, "page": page, "trigger": trigger}
        return _summary(seen, resolution) | shown

    def names(
        self,
        folder: Path,
        *,
        trigger: str | None,
        resolution: int,
        only: str,
        settings: Config | None,
        known: str,
    ) -> list[str]:
        """Return the names of all images of a kind that can be edited, see :meth:`look`."""
        config = for_folder(folder, trigger, settings)
        seen = self._seen.get((folder, resolution, known)) or self._look(folder, config, resolution)
        named = [
            _name_in(seen.folder, image.item.path)
            for image in seen.report.images
            if _matches(image.item, only, seen.by_name, seen.held)
        ]
        named += [
            name
            for name, findings in _left_out(seen, seen.by_name)
            if only in ("", "findings", "uncaptioned") and _kinds(findings) == {"no caption"}
        ]
        return [name for name in named if name is not None]

    def duplicates(
        self, folder: Path, *, trigger: str | None, resolution: int, settings: Config | None
    ) -> dict[str, Any]:
        """Return groups of images that are the same or nearly so, the largest image of each first."""
        seen = self._look(folder, for_folder(folder, trigger, settings), resolution)
        images = seen.report.images
        groups = near_duplicates([image.item for image in images])
        shown = []
        for group in groups[:_MOST_GROUPS]:
            members = [_card(seen, images[index], [], fresh=False) for index in group]
            digests = {images[index].item.digest for index in group}
            for member, index in zip(members, group, strict=True):
                path = images[index].item.path
                member["bytes"] = path.stat().st_size if path.exists() else 0
            members.sort(key=lambda card: (-card["width"] * card["height"], -card["bytes"], card["name"]))
            shown.append({"same": len(digests) == 1, "images": members})
        return {"groups": shown, "more": len(groups) - len(shown)}

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
            by_name: dict[str, list[Finding]] = {}
            for finding in report.findings:
                by_name.setdefault(finding.where, []).append(finding)
            seen = _Seen(folder, report, held, version, by_name)
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
    if only.startswith("tag:"):
        wanted = tag_key(only.removeprefix("tag:"))
        return any(tag_key(tag) == wanted for line in item.lines for tag in tags_of(line))
    return only != "uncaptioned" or item.caption_source not in _FILES


def _left_out(seen: _Seen, by_name: Mapping[str, Sequence[Finding]]) -> list[tuple[str, Sequence[Finding]]]:
    """Return the images that cannot be used, with what is wrong with them."""
    usable = {image.item.name for image in seen.report.images}
    return [
        (name, findings)
        for name, findings in by_name.items()
        if name not in usable and Path(name).suffix.lower() in IMAGE_ENDINGS
    ]


def _kinds(findings: Sequence[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


def _unusable(seen: _Seen, name: str, findings: list[dict[str, str]]) -> dict[str, Any]:
    """Return the card of an image that cannot be used; where it can be shown, it is.

    Where all that lacks is a caption, there is room to type one.
    """
    card: dict[str, Any] = {"name": name, "path": None, "edit": None, "findings": findings, "held": False}
    kinds, path = {finding["kind"] for finding in findings}, seen.folder / name
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


def _card(
    seen: _Seen, image: ExaminedImage, findings: list[dict[str, str]], *, fresh: bool
) -> dict[str, Any]:
    """Return an image's card; ``fresh`` has its caption read again, if it is in a file of its own."""
    item = image.item
    left, top, right, bottom = image.box
    card = {
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
        "held": item.name in seen.held,
        "focus": item.focus,
        "masked": image.masked,
        "findings": findings,
    }
    if fresh and item.caption_source != "metadata" and (lines := _caption_now(item.path)) is not None:
        card |= {
            "caption": lines,
            "source": "txt" if item.caption_source not in _FILES else item.caption_source,
        }
    return card


def _caption_now(image: Path) -> str | None:
    """Return the caption file beside an image, None where there is none or it cannot be read."""
    for ending in sorted(CAPTION_ENDINGS):
        for file in (image.with_suffix(ending), image.with_name(image.name + ending)):
            try:
                text = file.read_text(encoding="utf-8-sig")
            except (OSError, ValueError):
                continue
            return "\n".join(line.strip() for line in text.splitlines() if line.strip())
    return None


def _grouped(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return the findings by kind: how many there are, and the first of each."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    return [
        {
            "severity": severity,
            "kind": kind,
            "count": len(members),
            "fix": page_words(members[0].fix),
            "first": [{**_finding(member), "where": member.where} for member in members[:_SHOWN_OF_A_KIND]],
        }
        for (severity, kind), members in groups.items()
    ]


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
        "findings": _grouped(report.findings),
        "buckets": [
            {"width": bucket.bucket[1], "height": bucket.bucket[0], "count": bucket.num_images}
            for bucket in report.buckets
        ],
        "tags": report.tags[:_MAX_TAGS],
        "more_tags": len(report.tags) > _MAX_TAGS,
    }
