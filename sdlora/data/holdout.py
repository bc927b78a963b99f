"""The hold-out: which pictures measure progress instead of being trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from ..errors import DatasetError
from .items import Dataset, ImageItem
from .likeness import near_duplicates


def split(dataset: Dataset, validation: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return (training, held out): a share of the pictures below 1, or a number of them; 0 holds out none.

    Near duplicates stay on one side, so the hold-out does not leak. The choice depends on the seed and on
    the pictures' content, so adding a picture changes little. At least one picture is left to train on; if
    fewer can be held out than asked for, a note of the training side says so.
    """
    if validation < 0:
        raise DatasetError(
            f"data.validation={validation}: a share or a number of pictures cannot be negative"
        )
    total = len(dataset.items)
    asked = max(1, int(validation * total + 0.5)) if 0 < validation < 1 else int(validation)
    held = _hold_out(dataset.items, min(asked, total - 1), seed)
    notes = dataset.notes
    if len(held) != asked:
        notes += (f"{len(held)} of {asked} wanted pictures are held out; near duplicates stay together",)
    training = tuple(item for index, item in enumerate(dataset.items) if index not in held)
    kept_out = tuple(item for index, item in enumerate(dataset.items) if index in held)
    return replace(dataset, items=training, notes=notes), replace(
        dataset, items=kept_out, notes=(), orphans=()
    )


def _hold_out(items: Sequence[ImageItem], wanted: int, seed: int) -> set[int]:
    if wanted < 1:
        return set()
    groups = near_duplicates(items)
    grouped = {index for group in groups for index in group}
    groups += [(index,) for index in range(len(items)) if index not in grouped]

    def rank(group: tuple[int, ...]) -> str:
        first = min(items[index].digest for index in group)
        return hashlib.sha256(f"{seed}/{first}".encode()).hexdigest()

    held: set[int] = set()
    for group in sorted(groups, key=rank):
        if len(held) + len(group) <= wanted:
            held.update(group)
    if not held:  # every group is larger than what was asked for: rather a few more than none
        smallest = min(groups, key=lambda group: (len(group), rank(group)))
        held.update(smallest if 2 * len(smallest) <= len(items) else ())
    return held
