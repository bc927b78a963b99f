"""ostris/ai-toolkit: a job's data sets, which become sources (see :mod:`.ai_toolkit`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from .ledger import OWN_WAY, Ledger, as_number, numbers, shown


def translate_datasets(ledger: Ledger, datasets: Sequence[Mapping[str, Any]]) -> None:
    sources, sides = [], list[int]()
    for number, dataset in enumerate(datasets, 1):
        if not isinstance(dataset, dict):
            continue
        sources.append(_source(ledger, number, dataset))
        lengths = [round(side) for side in numbers(dataset.get("resolution", 512))]
        if not lengths:
            given = shown(dataset["resolution"])
            raise ConfigError(f"{ledger.where}: `resolution={given}` is no number; mend it there")
        sides += [side for side in lengths if side not in sides]
        name = f"dataset {number}: resolution"
        if ledger.has(name):
            ledger.put(
                name,
                "data.resolution",
                sides[0],
                "the first; the others are data.more_resolutions" if len(lengths) > 1 else "",
            )
        else:
            ledger.implied(name, "data.resolution", sides[0], "its default there")
    if len(sides) > 1:
        ledger.values["data.more_resolutions"] = sides[1:]
    ledger.put_sources(sources)
    _alike(ledger, datasets)


def _source(ledger: Ledger, number: int, dataset: Mapping[str, Any]) -> dict[str, Any]:
    def named(name: str) -> str:
        return f"dataset {number}: {name}"

    folder = str(dataset.get("folder_path") or dataset.get("dataset_path") or "")
    source: dict[str, Any] = {"folder": folder, "kohya_folders": False}
    for name in ("folder_path", "dataset_path"):
        ledger.tell_source(named(name), "folder", folder)
    repeats = round(as_number(dataset.get("num_repeats", 1)) or 1)
    source["repeats"] = max(1, repeats)
    ledger.tell_source(named("num_repeats"), "repeats", source["repeats"])
    for theirs, part in (
        ("trigger_word", "trigger_word"),
        ("default_caption", "caption"),
        ("mask_path", "mask_folder"),
    ):
        if dataset.get(theirs):
            source[part] = str(dataset[theirs])
            ledger.tell_source(named(theirs), part, source[part])
    weight = as_number(dataset.get("loss_multiplier", 1.0))
    if weight and weight != 1.0:
        source["weight"] = weight
        ledger.tell_source(named("loss_multiplier"), "weight", weight)
    if dataset.get("is_reg"):
        source["regularisation"] = True
        source.pop("trigger_word", None)
        ledger.tell_source(named("is_reg"), "regularisation", True)
    extension = str(dataset.get("caption_ext", "txt")).lstrip(".")
    if extension in ("txt", "caption", "json"):
        ledger.default(named("caption_ext"), "read anyway")
    ledger.none(named("caption_ext"), "captions are read from .txt and .caption files")
    return source


def _alike(ledger: Ledger, datasets: Sequence[Mapping[str, Any]]) -> None:
    """Translate how the data sets treat images and captions, which is the same for all here: that
    of the first one is used."""
    for number, dataset in enumerate(datasets, 1):
        for theirs, key, value in (
            ("caption_dropout_rate", "data.caption_dropout", as_number(dataset.get("caption_dropout_rate"))),
            ("token_dropout_rate", "data.tag_dropout", as_number(dataset.get("token_dropout_rate")) or None),
            ("shuffle_tokens", "data.shuffle_tags", True if dataset.get("shuffle_tokens") else None),
            ("keep_tokens", "data.keep_tags", round(as_number(dataset.get("keep_tokens")) or 0) or None),
            ("flip_x", "data.flip", True if dataset.get("flip_x") else None),
            ("random_crop", "data.crop", "random" if dataset.get("random_crop") else None),
            ("alpha_mask", "data.alpha_mask", True if dataset.get("alpha_mask") else None),
            (
                "buckets",
                "data.buckets",
                dataset.get("buckets") if isinstance(dataset.get("buckets"), bool) else None,
            ),
        ):
            name = f"dataset {number}: {theirs}"
            if not ledger.has(name):
                continue
            if value is None or (
                theirs == "keep_tokens"
                and not (dataset.get("shuffle_tokens") or dataset.get("token_dropout_rate"))
            ):
                ledger.default(name, "switched off, or no effect")
            elif ledger.values.get(key, value) == value:
                ledger.put(name, key, value)
            else:
                ledger.none(name, "all folders share it here; the first data set's counts")
        for name in (
            "cache_latents",
            "cache_latents_to_disk",
            "cache_text_embeddings",
            "num_workers",
            "prefetch_factor",
            "type",
            "bucket_tolerance",
            "caption_type",
            "num_frames",
            "fast_image_size",
            "square_crop",
        ):
            ledger.default(f"dataset {number}: {name}", OWN_WAY)
    if all(
        not ledger.has(f"dataset {number}: caption_dropout_rate") for number in range(1, len(datasets) + 1)
    ):
        ledger.implied("caption_dropout_rate", "data.caption_dropout", 0.0, "its default there")
    ledger.implied("images held out", "data.validation", 0, "the trainer holds none out")
