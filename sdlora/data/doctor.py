"""The doctor: everything known about a folder of pictures before any time is spent on training it.

Reads a folder once and changes nothing. :mod:`sdlora.data.findings` holds what it looks for,
:mod:`sdlora.data.report_text` and :mod:`sdlora.data.report_page` how it is shown, and
:mod:`sdlora.data.repair` what can be mended in a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from .buckets import BucketCount, Placement, count_buckets, source_box, upscale
from .findings import (
    SEVERITIES,
    Finding,
    Severity,
    about_captions,
    about_copies,
    about_files,
    about_problems,
    about_sizes,
    count_tags,
)
from .folder import Progress, survey
from .items import ImageItem, Survey
from .placing import Placer, placer
from .tokens import count_tokens

_MOST_TAGS = 50


@dataclass(frozen=True)
class CaptionStats:
    """Where the captions come from, and how long they are in CLIP tokens."""

    from_files: int
    from_names: int
    trigger_added: int
    mean_tokens: float
    max_tokens: int


@dataclass(frozen=True)
class ExaminedPicture:
    """One usable picture: what it is, which part of it is trained on, and how long its caption is."""

    item: ImageItem
    placement: Placement
    tokens: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part that is kept, as (left, top, right, bottom) in px of the upright picture."""
        return source_box(self.item.height, self.item.width, self.placement)

    def to_dict(self) -> dict[str, Any]:
        """Return its geometry as plain values; boxes in px of the upright picture."""
        item, placement = self.item, self.placement
        return {
            "name": item.name,
            "width": item.width,
            "height": item.height,
            "bucket": placement.bucket,
            "resized": placement.resized,
            "crop": placement.crop,
            "box": [round(side, 2) for side in self.box],
            "cropped_share": round(placement.cropped_share, 4),
            "upscale": round(upscale(item.height, item.width, placement), 4),
            "repeats": item.repeats,
            "caption": item.caption,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Report:
    """All that is known about a folder after looking at every file in it."""

    folder: Path
    recursive: bool
    trigger_word: str | None
    resolution: int
    num_images: int
    num_unusable: int
    """Pictures left out because of an error in them or in their caption."""
    buckets: tuple[BucketCount, ...]
    num_batches: int | None
    """Micro-batches per epoch for the given batch size."""
    num_short_batches: int | None
    captions: CaptionStats
    findings: tuple[Finding, ...]
    tags: tuple[tuple[str, int], ...] = ()
    """(tag, captions it is in), the commonest first."""
    pictures: tuple[ExaminedPicture, ...] = field(default=(), repr=False)

    @property
    def harmful(self) -> bool:
        """Whether training would be refused: there is an error."""
        return any(finding.severity == "error" for finding in self.findings)

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def verdict(self) -> str:
        """Return what it comes to, in one sentence."""
        if self.harmful:
            return "Not ready: mend the errors first."
        if self.count("warning"):
            return "Can be trained; the warnings make the result worse."
        return "Ready to train."


def examine(
    folder: Path,
    *,
    recursive: bool = True,
    trigger_word: str | None = None,
    resolution: int = 512,
    multiple: int = 64,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Return everything found in a folder, worst first; every picture is decoded.

    Raises:
        DatasetError: when the folder is missing, is a file, or holds no pictures.
        ConfigError: when the resolution is smaller than the size multiple.
    """
    placed = placer(resolution, multiple)  # refuses before anything is read
    found = survey(folder, recursive=recursive, trigger_word=trigger_word, progress=progress)
    return diagnose(found, placed, resolution=resolution, recursive=recursive, batch_size=batch_size)


def diagnose(
    found: Survey, placed: Placer, *, resolution: int, recursive: bool = True, batch_size: int | None = None
) -> Report:
    """Return the report about pictures that were read, placed as training would place them."""
    dataset = found.dataset
    placements = [placed(item) for item in dataset.items]
    tokens = count_tokens([item.caption for item in dataset.items])
    findings = chain(
        about_problems(found.problems),
        about_sizes(dataset.items, placements, resolution),
        about_copies(dataset.items),
        about_captions(dataset, tokens),
        about_files(dataset),
    )
    buckets = count_buckets(placements, [item.repeats for item in dataset.items])
    batches, short = _batches(buckets, batch_size)
    return Report(
        folder=dataset.folder,
        recursive=recursive,
        trigger_word=dataset.trigger_word,
        resolution=resolution,
        num_images=len(dataset.items),
        num_unusable=found.num_pictures - len(dataset.items),
        buckets=tuple(buckets),
        num_batches=batches,
        num_short_batches=short,
        captions=_caption_stats(dataset.items, tokens),
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
        tags=tuple(count_tags(dataset)[:_MOST_TAGS]),
        pictures=tuple(_examined(dataset.items, placements, tokens)),
    )


def report_to_dict(report: Report) -> dict[str, Any]:
    """Return the report as plain values for JSON, with its verdict."""
    return {
        "folder": str(report.folder),
        "recursive": report.recursive,
        "trigger_word": report.trigger_word,
        "resolution": report.resolution,
        "num_images": report.num_images,
        "num_unusable": report.num_unusable,
        "buckets": [asdict(bucket) for bucket in report.buckets],
        "num_batches": report.num_batches,
        "num_short_batches": report.num_short_batches,
        "captions": asdict(report.captions),
        "findings": [asdict(finding) for finding in report.findings],
        "tags": report.tags,
        "pictures": [picture.to_dict() for picture in report.pictures],
        "harmful": report.harmful,
        "verdict": report.verdict(),
        "counts": {severity: report.count(severity) for severity in SEVERITIES},
    }


def _examined(
    items: Sequence[ImageItem], placements: Sequence[Placement], tokens: Sequence[int]
) -> Iterator[ExaminedPicture]:
    for item, placement, count in zip(items, placements, tokens, strict=True):
        yield ExaminedPicture(item, placement, count)


def _batches(buckets: Iterable[BucketCount], batch_size: int | None) -> tuple[int | None, int | None]:
    if batch_size is None:
        return None, None
    visits = [bucket.num_visits for bucket in buckets]
    return sum(-(-count // batch_size) for count in visits), sum(count % batch_size > 0 for count in visits)


def _caption_stats(items: Sequence[ImageItem], tokens: Sequence[int]) -> CaptionStats:
    return CaptionStats(
        from_files=sum(item.caption_source != "file name" for item in items),
        from_names=sum(item.caption_source == "file name" for item in items),
        trigger_added=sum(item.trigger_added for item in items),
        mean_tokens=round(sum(tokens) / len(tokens), 1) if tokens else 0.0,
        max_tokens=max(tokens, default=0),
    )
