"""Image folder -> :class:`Dataset`: which files count, what each picture shows and says, what is wrong.

Every picture is read and decoded once in full, because a truncated file has a perfect header. The order
of the items depends on names only, never on the file system. Nothing is left out silently: what is not
taken is a problem or a note. No torch: ``sdlora check`` must answer at once.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DatasetError
from .cache_folder import index_file
from .captions import Caption, caption_of, has_word, with_trigger, words_of
from .items import CaptionSource, Dataset, ImageItem, Survey
from .listing import FoundFile, clashes, list_files, no_pictures, sort_key
from .measure import Measured, Progress, measure_all
from .picture_files import load_pixels
from .problems import Problem, listed

__all__ = [
    "CaptionSource",
    "Dataset",
    "ImageItem",
    "Problem",
    "Progress",
    "Survey",
    "has_word",
    "load_pixels",
    "scan",
    "survey",
    "with_trigger",
    "words_of",
]


def scan(
    folder: Path,
    *,
    recursive: bool = True,
    trigger_word: str | None = None,
    repeats: int = 1,
    progress: Progress | None = None,
) -> Dataset:
    """Return the pictures of a folder with their captions, every one of them decoded in full.

    Raises:
        DatasetError: when the folder is missing, is a file or holds no pictures, or when any picture or
            caption cannot be used; lists all of them (up to 20 lines).
    """
    found = survey(folder, recursive=recursive, trigger_word=trigger_word, repeats=repeats, progress=progress)
    if found.problems:
        raise DatasetError(listed(found.problems, folder))
    return found.dataset


def survey(
    folder: Path,
    *,
    recursive: bool = True,
    trigger_word: str | None = None,
    repeats: int = 1,
    progress: Progress | None = None,
) -> Survey:
    """Return the usable pictures and the problems of the rest, as :func:`scan` without stopping at them.

    Raises:
        DatasetError: when the folder is missing, is a file, or holds no pictures.
    """
    folder = Path(folder)
    if repeats < 1:
        raise DatasetError(f"{folder}: repeats={repeats} would never show a picture; give 1 or more")
    trigger_word = (trigger_word or "").strip() or None
    listing = list_files(folder, recursive)
    if not listing.pictures and not listing.problems:
        raise DatasetError(no_pictures(folder, listing, recursive))
    problems = listing.problems + clashes(listing)
    found = measure_all(listing.pictures, progress, index_file())
    items: list[ImageItem] = []
    for file, measured in zip(listing.pictures, found, strict=True):
        caption = caption_of(file.name, file.path.stem, listing.captions_of(file), trigger_word)
        problems += [part for part in (measured, caption) if isinstance(part, Problem)]
        if not isinstance(measured, Problem) and not isinstance(caption, Problem):
            items.append(_item(file, measured, caption, repeats))
    notes = listing.notes + [
        f"{item.name}: is animated; its first frame is taken" for item in items if "animated" in item.traits
    ]
    dataset = Dataset(folder, tuple(items), trigger_word, tuple(notes), tuple(listing.orphans()))
    problems.sort(key=lambda problem: sort_key(problem.where))
    return Survey(dataset, tuple(problems), len(listing.pictures))


def _item(file: FoundFile, measured: Measured, caption: Caption, repeats: int) -> ImageItem:
    return ImageItem(
        file.path,
        caption.text,
        measured.height,
        measured.width,
        repeats,
        measured.digest,
        file.name,
        caption.source,
        caption.trigger_added,
        measured.traits,
        measured.likeness,
        measured.detail,
    )
