"""What can be wrong or odd with a folder of images: the rules, each a small function.

Training refuses a folder with an error; a warning makes the result worse; a note is good to know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..batching.buckets import MAX_ASPECT, Placement, upscale
from ..reading.items import Dataset, ImageItem
from ..reading.likeness import near_duplicates
from ..reading.problems import Problem, is_cut_short
from ..reading.sharpness import BLURRED, focus
from ..reading.tokens import CHUNK_TOKENS

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

_MAX_UPSCALE = 1.5
_MAX_CROPPED = 0.25
_STUCK_SHARE = 0.9
_FEW = 5  # images up to which a tag must be in every caption to count as stuck


@dataclass(frozen=True)
class Finding:
    """One finding: its severity and kind, what, where, and how to fix it."""

    severity: Severity
    kind: str
    what: str
    where: str
    fix: str


def about_problems(problems: Sequence[Problem]) -> Iterator[Finding]:
    """Yield the problems for which training refuses the folder."""
    for problem in problems:
        cut_short = is_cut_short(problem)
        kind = "truncated" if cut_short else problem.kind
        fix = "get the whole file again, or delete it" if cut_short else problem.fix
        yield Finding("error", kind, problem.what, problem.where, fix)


def about_sizes(
    items: Sequence[ImageItem], placements: Sequence[Placement], resolution: int
) -> Iterator[Finding]:
    """Yield images that are too small, blurred, too long, or lose much to cropping."""
    larger = "use a larger original, or lower data.resolution"
    for item, placement in zip(items, placements, strict=True):
        size, factor = f"{item.width}x{item.height} px", upscale(item.height, item.width, placement)
        if 2 * min(item.height, item.width) < resolution:
            what = f"{size} is tiny: enlarged {factor:.1f} times for {resolution} px, which trains blur"
            yield Finding("warning", "tiny", what, item.name, larger)
        elif factor > _MAX_UPSCALE:
            what = f"{size} is enlarged {factor:.1f} times for {resolution} px"
            yield Finding("warning", "upscaled", what, item.name, larger)
        sharpness = focus(item.detail, min(placement.resized))
        if sharpness is not None and sharpness < BLURRED:
            what = f"is blurred at the {min(placement.resized)} px it is trained at"
            fix = "use a sharp original; if it was enlarged before, use it at its original size"
            yield Finding("warning", "blurred", what, item.name, fix)
        yield from _about_shape(item, placement, size)


def _about_shape(item: ImageItem, placement: Placement, size: str) -> Iterator[Finding]:
    aspect = max(item.height, item.width) / min(item.height, item.width)
    cut = f"{placement.cropped_share:.0%} of it is cropped away"
    if aspect > MAX_ASPECT:
        what = f"{size} has an extreme aspect ratio of {aspect:.1f}:1: {cut}"
        fix = f"cut it into images of {MAX_ASPECT:.0f}:1 or less"
        yield Finding("warning", "aspect", what, item.name, fix)
    elif placement.cropped_share > _MAX_CROPPED:
        height, width = placement.bucket
        what = f"{cut} ({size} to {width}x{height})"
        yield Finding("warning", "cropped", what, item.name, "crop it yourself to the part that matters")


def about_copies(items: Sequence[ImageItem]) -> Iterator[Finding]:
    """Yield images that occur more than once, exactly or nearly."""
    first_of: dict[str, ImageItem] = {}
    for item in items:
        first = first_of.setdefault(item.digest, item)
        if first is not item:
            fix = "delete one of them, or raise data.repeats if all images should count more"
            what = f"is the same file as {first.name}, so it counts twice"
            if item.caption != first.caption:
                what += "; and their captions differ"
            yield Finding("warning", "duplicate", what, item.name, fix)
    distinct = list(first_of.values())
    for group in near_duplicates(distinct):
        names = ", ".join(distinct[index].name for index in group[1:])
        what = f"looks nearly the same as {names}; they count more, and are held out only together"
        yield Finding("warning", "near duplicate", what, distinct[group[0]].name, "keep the best of them")


def about_captions(dataset: Dataset, tokens: Sequence[int]) -> Iterator[Finding]:
    """Yield captions that are missing, empty, too long, or without the trigger word."""
    trigger = dataset.trigger_word
    for item, count in zip(dataset.items, tokens, strict=True):
        has_words = item.caption != trigger if item.trigger_added else bool(item.caption)
        if item.caption_source == "file name":
            fix = "write what it shows into a .txt file of the same name"
            yield Finding("note", "no caption file", f"is captioned `{item.caption}`", item.name, fix)
        elif not has_words:
            only = f"its caption is only the trigger word `{trigger}`"
            effect = only if trigger else "it trains without a caption"
            fix = "write what it shows, or leave it empty on purpose"
            yield Finding("warning", "empty caption", f"has an empty caption file: {effect}", item.name, fix)
        if count > CHUNK_TOKENS:
            what = f"has a caption of {count} tokens; the text encoder sees {CHUNK_TOKENS} at once"
            fix = "shorten it: the rest is encoded separately, and counts least"
            yield Finding("warning", "long caption", what, item.name, fix)
        if trigger and item.trigger_added and item.caption_source != "file name" and has_words:
            what = f"has a caption without `{trigger}`; it is put in front"
            yield Finding("note", "no trigger word", what, item.name, "write it where it reads best")
    yield from _about_shared_words(dataset)


def _about_shared_words(dataset: Dataset) -> Iterator[Finding]:
    captions = [item.caption for item in dataset.items]
    if len(captions) < 2:
        return
    where = f"all {len(captions)} images"
    if len(set(captions)) == 1:
        what = f"have the same caption, `{captions[0]}`, so it comes to mean everything in them"
        yield Finding("warning", "one caption", what, where, "say in each caption what that image shows")
        return
    least = len(captions) if len(captions) <= _FEW else _STUCK_SHARE * len(captions)
    for tag, count in count_tags(dataset):
        if count >= least:
            what = f"have the tag `{tag}` in the caption, so it acts as a trigger word"
            some = where if count == len(captions) else f"{count} of {len(captions)} images"
            yield Finding("note", "stuck tag", what, some, "delete it, or make it data.trigger_word")


def count_tags(dataset: Dataset) -> list[tuple[str, int]]:
    """Return in how many captions each tag is (parts between commas, without case), the commonest first.

    The trigger word does not count; it is meant to be everywhere.
    """
    trigger = (dataset.trigger_word or "").casefold()
    counts: Counter[str] = Counter()
    for item in dataset.items:
        counts.update({tag.strip().casefold() for tag in item.caption.split(",")} - {"", trigger})
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def about_files(dataset: Dataset) -> Iterator[Finding]:
    """Yield files that are not used, or not as one might expect."""
    for name in dataset.orphans:
        fix = "name it after its image (cup.txt for cup.png), or delete it"
        yield Finding("warning", "orphan caption", "belongs to no image and is not used", name, fix)
    for item in dataset.items:
        if "transparent" in item.traits:
            fix = "set data.background, or give it a background of its own"
            yield Finding("note", "transparent", "is placed on the colour of data.background", item.name, fix)
        if "animated" in item.traits:
            fix = "save the frame you want as PNG"
            yield Finding("note", "animated", "only the first frame is taken", item.name, fix)
    for note in dataset.notes:
        where, _, what = note.partition(": ")
        if not what:
            yield Finding("note", "remark", note, str(dataset.folder), "nothing, if that is intended")
        elif "animated" not in what:
            yield Finding("note", "remark", what, where, "nothing, if that is intended")
