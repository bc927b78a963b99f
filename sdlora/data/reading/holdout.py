"""Images held out of training to measure progress: chosen by content, with near duplicates on one side.

The choice is made once and gives both sides, so that nothing can be in both; it depends on the seed and
on the images' content only, not on their names, their order or the machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import DatasetError
from .items import Dataset, ImageItem
from .likeness import near_duplicates

_NAMES_SHOWN = 5


def divide(
    dataset: Dataset,
    validation: float | Path | None,
    validation_set: Dataset | None,
    seed: int,
    always_trained: Sequence[ImageItem] = (),
) -> tuple[Dataset, Dataset]:
    """Return (training, held out) as ``data.validation`` says: a share, a number, or a folder.

    Args:
        dataset: images to be learned.
        validation: the setting; None holds out none.
        validation_set: the images of ``data.validation`` where it is a folder.
        seed: of the run.
        always_trained: see :func:`split`.

    Raises:
        DatasetError: when no image is left on one of the sides, or as many are to be held out as there are.
    """
    if validation_set is not None:
        return keep_apart(dataset, validation_set, always_trained)
    assert not isinstance(validation, Path)
    total = len(dataset.items)
    if validation and validation >= max(1, total):
        raise DatasetError(
            f"data.validation={validation:g}: there are only {total} images, and some must be left to "
            "train on; hold out fewer, or a share such as data.validation=0.1"
        )
    return split(dataset, validation or 0.0, seed, always_trained)


def split(
    dataset: Dataset, validation: float, seed: int, always_trained: Sequence[ImageItem] = ()
) -> tuple[Dataset, Dataset]:
    """Return (training, held out); ``validation`` is a share below 1 or a number of images, 0 for none.

    Near duplicates stay on one side, so the hold-out does not leak. The choice depends on the seed and on
    the images' content, so adding an image changes little. What nearly equals an image of
    ``always_trained`` (regularisation images) is not held out. At least one image is left to train on;
    if another number is held out than asked for, a note of the training side says so.
    """
    if validation < 0:
        raise DatasetError(f"data.validation={validation}: a share or a number of images cannot be negative")
    total = len(dataset.items)
    asked = max(1, int(validation * total + 0.5)) if 0 < validation < 1 else int(validation)
    held = _choose(dataset.items, always_trained, min(asked, total - 1), seed)
    notes = dataset.notes
    if len(held) != asked:
        notes += (f"{len(held)} of {asked} wanted images are held out; near duplicates stay together",)
    training, kept_out = _parted(dataset, held)
    return replace(training, notes=notes), kept_out


def keep_apart(
    dataset: Dataset, validation: Dataset, always_trained: Sequence[ImageItem] = ()
) -> tuple[Dataset, Dataset]:
    """Return (training, held out) if the images to hold out have their own folder.

    If that folder is inside the training folder, its images are not trained on. A held-out image
    that nearly equals a training image would measure memory, not learning, so it is left out of the
    measurement, and a note of the training side says so.

    Raises:
        DatasetError: when no image is left on one of the sides.
    """
    held_paths = {os.path.realpath(item.path) for item in validation.items}
    inside = {index for index, item in enumerate(dataset.items) if os.path.realpath(item.path) in held_paths}
    training, taken = _parted(dataset, inside)
    notes = list(training.notes)
    if taken.items:
        notes.append(f"{_named(taken.items)} not trained on: data.validation={validation.folder} holds them")
    if not training.items:
        raise DatasetError(
            f"data.validation={validation.folder}: holds every image of {dataset.folder}, so none is left "
            "to train on; give a folder of other images"
        )
    leaks = _like_any([*training.items, *always_trained], validation.items)
    kept, leaked = _parted(validation, leaks)
    if not kept.items:
        raise DatasetError(
            f"data.validation={validation.folder}: each of its images is nearly the same as one that is "
            "trained on; give other images, or a number such as data.validation=0.1"
        )
    if leaked.items:
        notes.append(f"{_named(leaked.items)} not measured: nearly the same as images trained on")
    return replace(training, notes=tuple(notes)), kept


def _choose(
    items: Sequence[ImageItem], always_trained: Sequence[ImageItem], wanted: int, seed: int
) -> set[int]:
    """Return the indices of about ``wanted`` images: only whole groups of near duplicates."""
    if wanted < 1:
        return set()
    total = len(items)
    groups = near_duplicates([*items, *always_trained])
    grouped = {index for group in groups for index in group}
    groups += [(index,) for index in range(total) if index not in grouped]
    groups = [group for group in groups if group[-1] < total]  # ascending: those always trained on are last

    def rank(group: tuple[int, ...]) -> str:
        first = min(items[index].digest for index in group)
        return hashlib.sha256(f"{seed}/{first}".encode()).hexdigest()

    held: set[int] = set()
    for group in sorted(groups, key=rank):
        if len(held) + len(group) <= wanted:
            held.update(group)
    if not held and groups:  # every group is larger than was asked for: a few more are better than none
        smallest = min(groups, key=lambda group: (len(group), rank(group)))
        held.update(smallest if 2 * len(smallest) <= len(items) else ())
    return held


def _parted(dataset: Dataset, away: set[int]) -> tuple[Dataset, Dataset]:
    """Return the dataset without the images of those indices, and a dataset of them."""
    kept = tuple(item for index, item in enumerate(dataset.items) if index not in away)
    taken = tuple(item for index, item in enumerate(dataset.items) if index in away)
    return replace(dataset, items=kept), replace(dataset, items=taken, notes=(), orphans=())


def _like_any(training: Sequence[ImageItem], others: Sequence[ImageItem]) -> set[int]:
    """Return the indices of ``others`` that share a group of near duplicates with a training image."""
    first = len(training)
    alike: set[int] = set()
    for group in near_duplicates([*training, *others]):
        if group[0] < first:  # ascending, so the training images come first
            alike.update(index - first for index in group if index >= first)
    return alike


def _named(items: Sequence[ImageItem]) -> str:
    names = ", ".join(item.name for item in items[:_NAMES_SHOWN])
    more = f" and {len(items) - _NAMES_SHOWN} more" if len(items) > _NAMES_SHOWN else ""
    return f"{names}{more} {'is' if len(items) == 1 else 'are'}"
