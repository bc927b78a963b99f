"""Image folder -> :class:`Dataset`: which files count, each image's size and caption, and all problems.

Every image is read and decoded once in full, because a truncated file has a perfect header. The order
of the items depends on names only, never on the file system. Nothing is left out silently: what is not
used is a problem or a note. No torch: ``sdlora check`` must answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import DatasetError
from . import kohya
from .cache_folder import index_file
from .captions import Caption, CaptionRules, caption_of, has_word, with_trigger, words_of
from .image_files import load_pixels
from .items import CaptionSource, Dataset, ImageItem, Point, Survey
from .listing import FoundFile, Listing, clashes, list_files, no_images, sort_key
from .masks import with_masks
from .measure import Measured, Progress, measure_all
from .metadata_files import name_key, read_focus, read_metadata
from .problems import Problem, listed

__all__ = [
    "CaptionSource",
    "Dataset",
    "ImageItem",
    "Problem",
    "Progress",
    "Reading",
    "Survey",
    "has_word",
    "load_pixels",
    "scan",
    "survey",
    "with_trigger",
    "words_of",
]


@dataclass(frozen=True)
class Reading:
    """How a folder is read, beyond the common case.

    Attributes:
        kohya_folders: whether folders inside are named ``N_words``; None: those named so are read so.
        metadata_caption: column of a metadata file with the caption; the first known one when None.
        captions_from_files: whether captions come from files, too; if not, only from file names.
        fallback_caption: caption of images without one of their own.
        weight: of these images in the loss.
        regularisation: whether they show the class in general.
        mask_folder: folder with masks of the same names.
        follow_links: also read what links lead to outside the folder.
    """

    kohya_folders: bool | None = None
    metadata_caption: str | None = None
    captions_from_files: bool = True
    fallback_caption: str | None = None
    weight: float = 1.0
    regularisation: bool = False
    mask_folder: Path | None = None
    follow_links: bool = False


def scan(
    folder: Path,
    *,
    recursive: bool = True,
    trigger_word: str | None = None,
    repeats: int = 1,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Return the images of a folder with their captions, every one of them decoded in full.

    Raises:
        DatasetError: when the folder is missing, is a file or holds no images, or when any image or
            caption cannot be used; lists all of them (up to 20 lines).
    """
    survey_result = survey(
        folder,
        recursive=recursive,
        trigger_word=trigger_word,
        repeats=repeats,
        reading=reading,
        progress=progress,
    )
    if survey_result.problems:
        raise DatasetError(listed(survey_result.problems, folder))
    return survey_result.dataset


def survey(
    folder: Path,
    *,
    recursive: bool = True,
    trigger_word: str | None = None,
    repeats: int = 1,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Return the usable images and the problems of the rest: :func:`scan` without an error for these.

    Raises:
        DatasetError: when the folder is missing, is a file, or holds no images.
    """
    folder, reading = Path(folder), reading or Reading()
    if repeats < 1:
        raise DatasetError(f"{folder}: repeats={repeats} would never show an image; give 1 or more")
    trigger_word = (trigger_word or "").strip() or None
    apart = [reading.mask_folder] if reading.mask_folder else []
    listing = list_files(folder, recursive, apart, follow_links=reading.follow_links)
    if not listing.images and not listing.problems:
        raise DatasetError(no_images(folder, listing, recursive))
    words = _Words(folder, listing, trigger_word, reading)
    problems = listing.problems + clashes(listing) + words.problems
    measurements = measure_all(listing.images, progress, index_file())
    items: list[ImageItem] = []
    for file, measured in zip(listing.images, measurements, strict=True):
        caption, focus = words.caption(file), words.focus(file)
        problems += [part for part in (measured, caption, focus) if isinstance(part, Problem)]
        if isinstance(measured, Problem) or isinstance(caption, Problem) or isinstance(focus, Problem):
            continue
        times = repeats * words.repeats(file)
        item = _item(file, measured, caption, times, trigger_word)
        items.append(replace(item, focus=focus, weight=reading.weight, regularisation=reading.regularisation))
    notes = [*listing.notes, *words.notes]
    notes += [
        f"{item.name}: is animated; its first frame is taken" for item in items if "animated" in item.traits
    ]
    notes += [
        f"{item.name}: has damaged metadata, which is left out; its pixels are whole"
        for item in items
        if "damaged metadata" in item.traits
    ]
    if reading.mask_folder is not None:
        items, more, unmasked = with_masks(items, reading.mask_folder, follow_links=reading.follow_links)
        problems, notes = problems + more, notes + unmasked
    dataset = Dataset(folder, tuple(items), trigger_word, tuple(notes), tuple(listing.orphans()))
    problems.sort(key=lambda problem: sort_key(problem.where))
    return Survey(dataset, tuple(problems), len(listing.images))


class _Words:
    """What the files beside a folder's images, and their names, say about them."""

    def __init__(self, root: Path, listing: Listing, trigger_word: str | None, reading: Reading) -> None:
        names = [file.name for file in listing.images]
        self._listing = listing
        self._folders = kohya.kohya_folders(names, reading.kohya_folders)
        files = listing.metadata_files() if reading.captions_from_files else []
        self._metadata = read_metadata(files, names, reading.metadata_caption)
        self._rules = CaptionRules(
            reading.captions_from_files, reading.fallback_caption, trigger_word is not None
        )
        self.notes = [*kohya.notes(root, self._folders, reading.kohya_folders, names), *self._metadata.notes]
        self.problems = list(self._metadata.problems)
        if reading.kohya_folders:
            self.problems += kohya.outside(names, self._folders)

    def _folder(self, file: FoundFile) -> kohya.KohyaFolder | None:
        return self._folders.get(file.name.partition("/")[0])

    def repeats(self, file: FoundFile) -> int:
        """Return how often the image is visited in an epoch."""
        folder = self._folder(file)
        return folder.repeats if folder else 1

    def caption(self, file: FoundFile) -> Caption | Problem:
        """Return the caption of the image, or what is wrong with it."""
        folder = self._folder(file)
        metadata = self._metadata.captions.get(name_key(file.name))
        files = self._listing.captions_of(file)
        return caption_of(file.name, files, metadata, folder.words if folder else None, self._rules)

    def focus(self, file: FoundFile) -> Point | Problem | None:
        """Return where in the image its subject is."""
        sidecar = self._listing.sidecars.get(file.key)
        return read_focus(sidecar.path, sidecar.name) if sidecar else None


def _item(
    file: FoundFile, measured: Measured, caption: Caption, repeats: int, trigger_word: str | None
) -> ImageItem:
    text = " ".join(caption.lines)
    full = with_trigger(text, trigger_word)
    return ImageItem(
        file.path,
        full,
        measured.height,
        measured.width,
        repeats,
        measured.digest,
        file.name,
        caption.source,
        full != text,
        measured.traits,
        measured.likeness,
        measured.detail,
        caption.lines,
        trigger_word,
    )
