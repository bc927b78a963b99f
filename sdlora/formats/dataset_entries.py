"""Header entries about the training images, as kohya's scripts write them and WebUI's card reads them.

They are written twice: flat, as for a single folder, and as ``ss_datasets``, which is read by tools that show
several data sets (kohya sd-scripts, ``train_network.py``). Folders appear with their last name only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

Value = TypeVar("Value")


def folder_name(name: str) -> str:
    """Return the last part of a folder's path, with slashes or backslashes."""
    return PureWindowsPath(name).name if "\\" in name else (PurePosixPath(name).name or "images")


def by_folder_name(folders: Mapping[str, Value]) -> dict[str, Value]:
    """Return the mapping by the folders' last names; equal names get a number, as kohya gives them."""
    by_name: dict[str, Value] = {}
    for path, value in folders.items():
        name = folder_name(path)
        number = 2
        while name in by_name:
            name, number = f"{folder_name(path)} ({number})", number + 1
        by_name[name] = value
    return by_name


def dataset_entries(
    *,
    images: Mapping[str, int],
    reg_images: Mapping[str, int],
    tags: Mapping[str, Mapping[str, int]],
    buckets: Mapping[tuple[int, int], int],
    side: int | None,
    repeats: int,
    folder_repeats: Mapping[str, int],
    batch_size: int | None,
    flip: bool,
) -> dict[str, Any]:
    """Return the ``ss_*`` entries (without the prefix) about folders, tags and buckets.

    Args:
        images: folder -> training images.
        reg_images: folder -> regularisation images.
        tags: folder -> tag or caption -> count.
        buckets: (height, width) px -> images.
        side: px of a square with the area trained at.
        repeats: of each image in an epoch.
        folder_repeats: folder -> repeats, where they differ from ``repeats``.
        batch_size: images a step and process.
        flip: whether mirror images are trained on, too.
    """
    times = by_folder_name({path: folder_repeats.get(path, repeats) for path in images})
    reg_times = by_folder_name({path: folder_repeats.get(path, 1) for path in reg_images})
    images, reg_images, tags = by_folder_name(images), by_folder_name(reg_images), by_folder_name(tags)
    bucket_info = {
        "buckets": {
            str(index): {"resolution": [width, height], "count": count}
            for index, ((height, width), count) in enumerate(sorted(buckets.items()))
        }
    }
    sides = [length for size in buckets for length in size]
    num_images = sum(count * times[name] for name, count in images.items())
    num_reg = sum(count * reg_times[name] for name, count in reg_images.items())
    entries: dict[str, Any] = {
        "num_train_images": num_images if images else None,
        "num_reg_images": num_reg,
        "resolution": None if side is None else f"({side}, {side})",
        "enable_bucket": bool(buckets),
        "min_bucket_reso": min(sides, default=None),
        "max_bucket_reso": max(sides, default=None),
        "bucket_info": bucket_info if buckets else None,
        "dataset_dirs": {n: {"n_repeats": times[n], "img_count": c} for n, c in images.items()} or None,
        "reg_dataset_dirs": {n: {"n_repeats": reg_times[n], "img_count": c} for n, c in reg_images.items()},
        "tag_frequency": {name: dict(counts) for name, counts in tags.items()} or None,
        "flip_aug": flip,
    }
    if images:
        subsets = [_subset(name, count, times[name], flip, False) for name, count in images.items()]
        subsets += [_subset(name, count, reg_times[name], flip, True) for name, count in reg_images.items()]
        entries["datasets"] = [_dataset(entries, subsets, side, batch_size)]
    return entries


def _dataset(
    entries: Mapping[str, Any], subsets: Sequence[Mapping[str, Any]], side: int | None, batch_size: int | None
) -> dict[str, Any]:
    """Return the one data set of ``ss_datasets``, from the flat entries."""
    shared = ("num_train_images", "num_reg_images", "enable_bucket", "min_bucket_reso", "max_bucket_reso")
    return {
        "is_dreambooth": True,
        "batch_size_per_device": batch_size,
        **{name: entries[name] for name in shared[:2]},
        "resolution": None if side is None else [side, side],
        **{name: entries[name] for name in shared[2:]},
        "tag_frequency": entries["tag_frequency"] or {},
        "bucket_info": entries["bucket_info"],
        "subsets": list(subsets),
    }


def _subset(name: str, count: int, repeats: int, flip: bool, is_reg: bool) -> dict[str, Any]:
    """Return one folder of ``ss_datasets``."""
    return {
        "img_count": count,
        "num_repeats": repeats,
        "flip_aug": flip,
        "image_dir": name,
        "class_tokens": None,
        "is_reg": is_reg,
    }
