"""What is wrong or odd with a folder of pictures, before any time is spent on training it.

An error is what training refuses; a warning is what makes the result worse; a note is good to know.
Reads a folder once, changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .buckets import MAX_ASPECT, BucketCount, Placement, count_buckets, make_buckets, place, upscale
from .folder import Dataset, ImageItem, Progress, survey
from .likeness import near_duplicates

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

MAX_TOKENS = 75
_MAX_UPSCALE = 1.5
_MAX_CROPPED = 0.25
_LINES_PER_GROUP = 8
_BAR_WIDTH = 30


@dataclass(frozen=True)
class Finding:
    """One thing found: how bad, of which kind, what, where, and how to fix it."""

    severity: Severity
    kind: str
    what: str
    where: str
    fix: str


@dataclass(frozen=True)
class CaptionStats:
    """Where the captions come from, and how long they are (in estimated CLIP tokens)."""

    from_files: int
    from_names: int
    trigger_added: int
    mean_tokens: float
    max_tokens: int


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

    @property
    def harmful(self) -> bool:
        """Whether training would be refused: there is an error."""
        return any(finding.severity == "error" for finding in self.findings)

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


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
    sizes = make_buckets(resolution, multiple)
    found = survey(folder, recursive=recursive, trigger_word=trigger_word, progress=progress)
    dataset = found.dataset
    placements = [place(item.height, item.width, sizes) for item in dataset.items]
    findings = [Finding("error", p.kind, p.what, p.where, p.fix) for p in found.problems]
    findings += _about_sizes(dataset.items, placements, resolution)
    findings += _about_copies(dataset.items)
    findings += _about_captions(dataset)
    findings += _about_files(dataset)
    buckets = count_buckets(placements, [item.repeats for item in dataset.items])
    batches, short = _batches(buckets, batch_size)
    return Report(
        folder=Path(folder),
        recursive=recursive,
        trigger_word=dataset.trigger_word,
        resolution=resolution,
        num_images=len(dataset.items),
        num_unusable=found.num_pictures - len(dataset.items),
        buckets=tuple(buckets),
        num_batches=batches,
        num_short_batches=short,
        captions=_caption_stats(dataset.items),
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
    )


def report_to_dict(report: Report) -> dict[str, Any]:
    """Return the report as plain values for JSON, with its verdict."""
    values = asdict(report) | {"folder": str(report.folder), "harmful": report.harmful}
    return values | {"counts": {severity: report.count(severity) for severity in SEVERITIES}}


def estimated_tokens(caption: str) -> int:
    """Return about how many CLIP tokens a caption has, without loading the tokenizer.

    A common word is one token, a long one two or more, a digit and a run of punctuation one each; the
    truth is usually within a fifth.
    """
    tokens = 0
    for piece in re.findall(r"'[a-z]+|[^\W\d_]+|\d|[^\w\s]+|_+", caption, re.IGNORECASE):
        tokens += 1 + (len(piece) - 1) // 9 if piece.isascii() else len(piece)
    return tokens


# --- what to look for -------------------------------------------------------------------------------


def _about_sizes(
    items: Sequence[ImageItem], placements: Sequence[Placement], resolution: int
) -> Iterator[Finding]:
    larger = "use a larger original, or lower data.resolution"
    for item, placement in zip(items, placements, strict=True):
        size, factor = f"{item.width}x{item.height} px", upscale(item.height, item.width, placement)
        if 2 * min(item.height, item.width) < resolution:
            what = f"{size} is tiny: enlarged {factor:.1f} times for {resolution} px, which trains blur"
            yield Finding("warning", "tiny", what, item.name, larger)
        elif factor > _MAX_UPSCALE:
            what = f"{size} is enlarged {factor:.1f} times for {resolution} px"
            yield Finding("warning", "upscaled", what, item.name, larger)
        aspect = max(item.height, item.width) / min(item.height, item.width)
        cut = f"{placement.cropped_share:.0%} of it is cropped away"
        if aspect > MAX_ASPECT:
            what = f"{size} has an extreme aspect ratio of {aspect:.1f}:1: {cut}"
            yield Finding(
                "warning", "aspect", what, item.name, f"cut it into pictures of {MAX_ASPECT:.0f}:1 or less"
            )
        elif placement.cropped_share > _MAX_CROPPED:
            height, width = placement.bucket
            what = f"{cut} ({size} to {width}x{height})"
            yield Finding("warning", "cropped", what, item.name, "crop it yourself to the part that matters")


def _about_copies(items: Sequence[ImageItem]) -> Iterator[Finding]:
    first_of: dict[str, ImageItem] = {}
    for item in items:
        first = first_of.setdefault(item.digest, item)
        if first is not item:
            fix = "delete one of them, or raise data.repeats if all pictures should count more"
            what = f"is the same file as {first.name}, so it counts twice"
            yield Finding("warning", "duplicate", what, item.name, fix)
    distinct = list(first_of.values())
    for group in near_duplicates(distinct):
        names = ", ".join(distinct[index].name for index in group[1:])
        what = f"looks nearly the same as {names}; they count more, and are held out only together"
        yield Finding("warning", "near duplicate", what, distinct[group[0]].name, "keep the best of them")


def _about_captions(dataset: Dataset) -> Iterator[Finding]:
    trigger = dataset.trigger_word
    for item in dataset.items:
        own = item.caption != trigger if item.trigger_added else bool(item.caption)
        if item.caption_source == "file name":
            fix = "write what it shows into a .txt file of the same name"
            yield Finding("note", "no caption file", f"is captioned `{item.caption}`", item.name, fix)
        elif not own:
            effect = (
                f"the caption is the trigger word `{trigger}` alone" if trigger else "it trains without words"
            )
            fix = "write what it shows, or leave it so on purpose"
            yield Finding("warning", "empty caption", f"has an empty caption file: {effect}", item.name, fix)
        tokens = estimated_tokens(item.caption)
        if tokens > MAX_TOKENS:
            what = f"has a caption of about {tokens} tokens (estimated), {MAX_TOKENS} are one chunk"
            fix = "shorten it, the words at the end count least"
            yield Finding("warning", "long caption", what, item.name, fix)
        if trigger and item.trigger_added and item.caption_source != "file name" and own:
            what = f"has a caption without `{trigger}`; it is put in front"
            yield Finding("note", "no trigger word", what, item.name, "write it where it reads best")
    yield from _about_shared_words(dataset)


def _about_shared_words(dataset: Dataset) -> Iterator[Finding]:
    captions = [item.caption for item in dataset.items]
    if len(captions) < 2:
        return
    where = f"all {len(captions)} pictures"
    if len(set(captions)) == 1:
        what = f"have one caption, `{captions[0]}`, so everything in them becomes part of it"
        yield Finding("warning", "one caption", what, where, "say in each caption what that picture shows")
        return
    trigger = (dataset.trigger_word or "").casefold()
    tags = [{tag.strip().casefold() for tag in caption.split(",")} - {"", trigger} for caption in captions]
    for tag in sorted(set.intersection(*tags)):
        what = f"have the tag `{tag}` in the caption, so it acts as a trigger word"
        yield Finding("note", "stuck tag", what, where, "delete it, or make it data.trigger_word")


def _about_files(dataset: Dataset) -> Iterator[Finding]:
    for name in dataset.orphans:
        fix = "name it after its picture (cup.txt for cup.png), or delete it"
        yield Finding("warning", "orphan caption", "belongs to no picture and is not used", name, fix)
    for item in dataset.items:
        if "transparent" in item.traits:
            fix = "set data.background, or give it a background of its own"
            yield Finding("note", "transparent", "is laid on the colour of data.background", item.name, fix)
        if "animated" in item.traits:
            fix = "save the frame you want as PNG"
            yield Finding("note", "animated", "only the first frame is taken", item.name, fix)
    for note in dataset.notes:
        where, _, what = note.partition(": ")
        if not what:
            yield Finding("note", "left out", note, str(dataset.folder), "nothing, if that is meant")
        elif "animated" not in what:
            yield Finding("note", "left out", what, where, "nothing, if that is meant")


def _batches(buckets: Iterable[BucketCount], batch_size: int | None) -> tuple[int | None, int | None]:
    if batch_size is None:
        return None, None
    visits = [bucket.num_visits for bucket in buckets]
    return sum(-(-count // batch_size) for count in visits), sum(count % batch_size > 0 for count in visits)


def _caption_stats(items: Sequence[ImageItem]) -> CaptionStats:
    tokens = [estimated_tokens(item.caption) for item in items]
    return CaptionStats(
        from_files=sum(item.caption_source != "file name" for item in items),
        from_names=sum(item.caption_source == "file name" for item in items),
        trigger_added=sum(item.trigger_added for item in items),
        mean_tokens=round(sum(tokens) / len(tokens), 1) if tokens else 0.0,
        max_tokens=max(tokens, default=0),
    )


# --- how it is shown --------------------------------------------------------------------------------


def render_report(report: Report) -> str:
    """Return the report as text for a terminal: counts, bucket chart, findings with how to fix them."""
    lines = [*_render_summary(report), "", *_render_buckets(report)]
    for severity in SEVERITIES:
        lines += _render_findings(report, severity)
    return "\n".join([*lines, "", _verdict(report)])


def _render_summary(report: Report) -> Iterator[str]:
    captions = report.captions
    unusable = f", {report.num_unusable} unusable" if report.num_unusable else ""
    yield f"{report.folder}"
    yield f"  pictures   {report.num_images}{unusable}"
    yield f"  captions   {captions.from_files} from files, {captions.from_names} from file names"
    if report.trigger_word:
        yield f"  trigger    {report.trigger_word} (put in front of {captions.trigger_added})"
    yield f"  tokens     {captions.mean_tokens} on average, {captions.max_tokens} at most (estimated)"
    if report.num_batches is not None:
        yield f"  batches    {report.num_batches} per epoch, {report.num_short_batches} of them short"


def _render_buckets(report: Report) -> Iterator[str]:
    yield f"buckets at {report.resolution} px (width x height)"
    most = max((bucket.num_images for bucket in report.buckets), default=1)
    for bucket in report.buckets:
        height, width = bucket.bucket
        bar = "#" * max(1, round(_BAR_WIDTH * bucket.num_images / most))
        yield f"  {f'{width}x{height}':>10} {bar:<{_BAR_WIDTH}} {bucket.num_images}"


def _render_findings(report: Report, severity: Severity) -> Iterator[str]:
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.severity == severity:
            groups.setdefault(finding.kind, []).append(finding)
    if not groups:
        return
    yield from ("", f"{severity.upper()}S ({report.count(severity)})")
    for kind, members in groups.items():
        yield f"  {kind} ({len(members)})"
        fixes = Counter(finding.fix for finding in members)
        for finding in members[:_LINES_PER_GROUP]:
            own = f"; {finding.fix}" if len(fixes) > 1 else ""
            yield f"    {finding.where}: {finding.what}{own}"
        if len(members) > _LINES_PER_GROUP:
            yield f"    and {len(members) - _LINES_PER_GROUP} more (all with --json)"
        if len(fixes) == 1:
            yield f"    -> {members[0].fix}"


def _verdict(report: Report) -> str:
    if report.harmful:
        return "Not ready: mend the errors first."
    if report.count("warning"):
        return "Can be trained; the warnings make the result worse."
    return "Ready to train."
