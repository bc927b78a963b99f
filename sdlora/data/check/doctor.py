"""The doctor: everything known about a folder of images before any time is spent on training.

Reads a folder once and changes nothing. :mod:`sdlora.data.check.findings` holds what it looks for,
:mod:`sdlora.data.check.report_text` and :mod:`sdlora.data.check.report_page` how it is shown, and
:mod:`sdlora.data.check.repair` what can be repaired in a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ..batching.buckets import (
    BucketCount,
    Placement,
    Placer,
    count_buckets,
    further,
    placer,
    source_box,
    upscale,
)
from ..reading.folder import Progress, Reading, survey
from ..reading.items import ImageItem, Survey
from ..reading.tokens import count_tokens
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

_MOST_TAGS = 50


@dataclass(frozen=True)
class CaptionStats:
    """Where the captions come from, and how long they are in CLIP tokens."""

    from_files: int
    """Caption and metadata files."""
    from_names: int
    """Names of the images' files."""
    trigger_added: int
    mean_tokens: float
    max_tokens: int
    from_folders: int = 0
    """Names of kohya's folders, and captions that the settings give a folder."""


Role = Literal["trained", "regularisation", "held out", "not used"]
"""What an image is for; ``not used`` are those too similar to a training image to measure progress."""
TRAINED: tuple[Role, ...] = ("trained", "regularisation")


@dataclass(frozen=True)
class Treatment:
    """How training will treat the images.

    Attributes:
        placed: gives each image its bucket and crop.
        resolution: side in px of a square with the area trained at.
        further: further resolutions, each with its own ``placed``.
        words: gives an image's caption without random changes.
        roles: by name, of images that are not simply trained on.
        base: title of the base that is trained; empty where none was given.
        alpha_mask: whether transparent parts are masked out.
        crops_move: whether each visit crops another part of an image.
    """

    placed: Placer
    resolution: int
    further: tuple[tuple[int, Placer], ...] = ()
    words: Callable[[ImageItem], str] = attrgetter("caption")
    roles: Mapping[str, Role] = field(default_factory=dict)
    base: str = ""
    alpha_mask: bool = False
    crops_move: bool = False

    def role(self, item: ImageItem) -> Role:
        """Return an image's role."""
        return self.roles.get(item.name, "regularisation" if item.regularisation else "trained")


@dataclass(frozen=True)
class ExaminedImage:
    """One usable image: its file, the part of it that is trained on, and its caption."""

    item: ImageItem
    placement: Placement
    tokens: int
    caption: str
    role: Role = "trained"
    further: tuple[Placement, ...] = ()
    """Its placements at further resolutions."""
    masked: bool = False
    """Whether a mask blocks a part of it."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part that is kept, as (left, top, right, bottom) in px of the upright image."""
        return source_box(self.item.height, self.item.width, self.placement)

    def to_dict(self) -> dict[str, Any]:
        """Return its geometry as plain values; boxes in px of the upright image."""
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
            "caption": self.caption,
            "tokens": self.tokens,
            "role": self.role,
            "further_buckets": [further.bucket for further in self.further],
            "focus": item.focus,
            "mask": str(item.mask) if item.mask else None,
        }


@dataclass(frozen=True)
class Report:
    """Everything known about a folder after reading every file in it."""

    folder: Path
    recursive: bool
    trigger_word: str | None
    resolution: int
    num_images: int
    num_unusable: int
    """Images left out because of an error in them or in their caption."""
    buckets: tuple[BucketCount, ...]
    num_batches: int | None
    """Micro-batches per epoch for the given batch size."""
    num_short_batches: int | None
    captions: CaptionStats
    findings: tuple[Finding, ...]
    tags: tuple[tuple[str, int], ...] = ()
    """(tag, number of captions that have it), the commonest first."""
    base: str = ""
    """Title of the base that is trained; empty where none was given."""
    more_resolutions: tuple[int, ...] = ()
    num_held_out: int = 0
    crops_move: bool = False
    """Whether each visit crops another part of an image, not always the middle."""
    images: tuple[ExaminedImage, ...] = field(default=(), repr=False)

    @property
    def num_visits(self) -> int:
        """Visits to images in an epoch, at all resolutions."""
        return sum(bucket.num_visits for bucket in self.buckets)

    @property
    def num_trained(self) -> int:
        """Images that are trained on."""
        return sum(image.role in TRAINED for image in self.images)

    @property
    def harmful(self) -> bool:
        """Whether training would be refused: there is an error."""
        return any(finding.severity == "error" for finding in self.findings)

    def caption_sources(self) -> str:
        """Return in words where the captions come from."""
        captions = self.captions
        folders = f"{captions.from_folders} from folders, " if captions.from_folders else ""
        return f"{captions.from_files} from files, {folders}{captions.from_names} from file names"

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def verdict(self) -> str:
        """Return the conclusion in one sentence."""
        if self.harmful:
            return "Not ready: correct the errors first."
        if self.count("warning"):
            return "Ready to train, but what the warnings name makes the result worse."
        return "Ready to train."


def examine(
    folder: Path,
    *,
    recursive: bool = True,
    follow_links: bool = False,
    trigger_word: str | None = None,
    resolution: int = 512,
    multiple: int = 64,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Return everything found in a folder, worst first; every image is decoded.

    Raises:
        DatasetError: when the folder is missing, is a file, or holds no images.
        ConfigError: when the resolution is smaller than the size multiple.
    """
    placed = placer(resolution, multiple)  # refuses before anything is read
    survey_result = survey(
        folder,
        recursive=recursive,
        trigger_word=trigger_word,
        reading=Reading(follow_links=follow_links),
        progress=progress,
    )
    return diagnose(survey_result, Treatment(placed, resolution), recursive=recursive, batch_size=batch_size)


def diagnose(
    survey_result: Survey, treatment: Treatment, *, recursive: bool = True, batch_size: int | None = None
) -> Report:
    """Return the report about images that were read, treated as in training."""
    dataset = survey_result.dataset
    captions = [treatment.words(item) for item in dataset.items]
    tokens = count_tokens(captions)
    images = tuple(
        _examined(item, treatment, caption, count)
        for item, caption, count in zip(dataset.items, captions, tokens, strict=True)
    )
    findings = chain(
        about_problems(survey_result.problems),
        about_sizes(dataset.items, [image.placement for image in images], treatment.resolution),
        about_copies(dataset.items),
        about_captions(dataset, tokens),
        about_files(dataset),
    )
    buckets = _trained_buckets(images)
    batches, short = _batches(buckets, batch_size)
    return Report(
        folder=dataset.folder,
        recursive=recursive,
        trigger_word=dataset.trigger_word,
        resolution=treatment.resolution,
        num_images=len(dataset.items),
        num_unusable=survey_result.num_images - len(dataset.items),
        buckets=tuple(buckets),
        num_batches=batches,
        num_short_batches=short,
        captions=_caption_stats(dataset.items, tokens),
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
        tags=tuple(count_tags(dataset)[:_MOST_TAGS]),
        images=images,
        base=treatment.base,
        more_resolutions=tuple(resolution for resolution, _ in treatment.further),
        num_held_out=sum(image.role == "held out" for image in images),
        crops_move=treatment.crops_move,
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
        "num_held_out": report.num_held_out,
        "base": report.base or None,
        "more_resolutions": report.more_resolutions,
        "crops_move": report.crops_move,
        "num_visits": report.num_visits,
        "buckets": [asdict(bucket) for bucket in report.buckets],
        "num_batches": report.num_batches,
        "num_short_batches": report.num_short_batches,
        "captions": asdict(report.captions),
        "findings": [asdict(finding) for finding in report.findings],
        "tags": report.tags,
        "images": [image.to_dict() for image in report.images],
        "harmful": report.harmful,
        "verdict": report.verdict(),
        "counts": {severity: report.count(severity) for severity in SEVERITIES},
    }


def _examined(item: ImageItem, treatment: Treatment, caption: str, tokens: int) -> ExaminedImage:
    placement, role = treatment.placed(item), treatment.role(item)
    others = [placed for _, placed in treatment.further]
    more = tuple(further(item, placement, others)) if role in TRAINED else ()
    masked = item.mask is not None or (treatment.alpha_mask and "transparent" in item.traits)
    return ExaminedImage(item, placement, tokens, caption, role, more, masked)


def _trained_buckets(images: Sequence[ExaminedImage]) -> list[BucketCount]:
    """Return what each bucket gets in an epoch, over all resolutions."""
    trained = [image for image in images if image.role in TRAINED]
    placed = [(place, image.item.repeats) for image in trained for place in (image.placement, *image.further)]
    return count_buckets([place for place, _ in placed], [repeats for _, repeats in placed])


def _batches(buckets: Iterable[BucketCount], batch_size: int | None) -> tuple[int | None, int | None]:
    if batch_size is None:
        return None, None
    visits = [bucket.num_visits for bucket in buckets]
    return sum(-(-count // batch_size) for count in visits), sum(count % batch_size > 0 for count in visits)


def _caption_stats(items: Sequence[ImageItem], tokens: Sequence[int]) -> CaptionStats:
    return CaptionStats(
        from_files=sum(item.caption_source in ("txt", "caption", "metadata") for item in items),
        from_names=sum(item.caption_source == "file name" for item in items),
        trigger_added=sum(item.trigger_added for item in items),
        mean_tokens=round(sum(tokens) / len(tokens), 1) if tokens else 0.0,
        max_tokens=max(tokens, default=0),
        from_folders=sum(item.caption_source in ("folder name", "setting") for item in items),
    )
