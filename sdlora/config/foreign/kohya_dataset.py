"""kohya's dataset TOML (``--dataset_config``): ``[general]``, ``[[datasets]]``, ``[[datasets.subsets]]``.

Where an option stands in several of them the innermost counts (docs/config_README-en.md of sd-scripts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from .kohya_data import captions, images
from .ledger import Ledger, as_number, numbers, shown

_OF_SUBSET = (
    "image_dir",
    "num_repeats",
    "class_tokens",
    "is_reg",
    "alpha_mask",
    "metadata_file",
    "conditioning_data_dir",
)
OPTIONS = (
    "caption_prefix",
    "caption_suffix",
    "shuffle_caption",
    "keep_tokens",
    "flip_aug",
    "color_aug",
    "random_crop",
    "caption_dropout_rate",
    "caption_tag_dropout_rate",
    "enable_wildcard",
    "caption_extension",
    "caption_separator",
    "keep_tokens_separator",
    "secondary_separator",
    "caption_dropout_every_n_epochs",
    "token_warmup_min",
    "token_warmup_step",
    "face_crop_aug_range",
    "cache_info",
    "resize_interpolation",
    "validation_split",
    "validation_seed",
    "custom_attributes",
    "dataset_repeats",
    "train_batch_size",
    "resolution",
    "enable_bucket",
    "bucket_no_upscale",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "prior_loss_weight",
    "cache_latents",
    "cache_latents_to_disk",
    "skip_cache_check",
    "alpha_mask",
)
"""Arguments of the command that a dataset TOML goes before."""


def tables(document: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the general options and the data sets, each with a list ``subsets``.

    Raises:
        ConfigError: when there is no data set in it.
    """
    general, sets = document.get("general", {}), document.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(sets, list) or not sets:
        raise ConfigError(f"{where}: holds no [[datasets]]; give kohya's dataset_config")
    for number, table in enumerate(sets):
        if not isinstance(table, dict) or not isinstance(table.get("subsets", []), list):
            raise ConfigError(f"{where}: datasets[{number}] is no table with [[datasets.subsets]]")
    return general, sets


def given(general: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all options flat, with the names they get in the account: ``subset 1: num_repeats``."""
    flat: dict[str, Any] = dict(general)
    for number, table in enumerate(sets, 1):
        for name, value in table.items():
            if name != "subsets":
                flat[f"dataset {number}: {name}"] = value
        for count, subset in enumerate(table.get("subsets", []), 1):
            for name, value in subset.items():
                flat[f"dataset {number}, subset {count}: {name}"] = value
    return flat


def translate(ledger: Ledger, general: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> None:
    """Translate a dataset TOML: sources, and what all of them share.

    Args:
        ledger: holds :func:`given` of the same tables.
        general: the general options.
        sets: the data sets.
    """
    shared = _shared(ledger, general, sets)
    inner = Ledger(shared, ledger.where)
    captions(inner)
    images(inner)
    inner.finish()
    ledger.values.update(inner.values)
    wanted = {row.setting: row for row in inner.rows}
    for name, row in wanted.items():
        ledger.adopt(row, [place for place in ledger.names() if place == name or place.endswith(f": {name}")])
    _sizes(ledger, general, sets)
    sources = [
        _source(
            ledger, number, count, subset, {**general, **{k: v for k, v in table.items() if k != "subsets"}}
        )
        for number, table in enumerate(sets, 1)
        for count, subset in enumerate(table.get("subsets", []), 1)
    ]
    distinct = list({str(source["folder"]): source for source in sources if source.get("folder")}.values())
    ledger.put_sources(distinct)


def _shared(ledger: Ledger, general: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options that hold for all folders; those that differ are said to have no counterpart."""
    every = [{**general, **table, **subset} for table in sets for subset in table.get("subsets", []) or [{}]]
    names = {name for options in every for name in options} - {
        "subsets",
        *_OF_SUBSET,
        "resolution",
        "batch_size",
    }
    shared: dict[str, Any] = {}
    for name in sorted(names):
        values = [options.get(name) for options in every]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
            continue
        most = max((value for value in values if value is not None), key=values.count)
        shared[name] = most
        odd = [place for place in ledger.names() if place.endswith(f": {name}") and ledger.raw(place) != most]
        ledger.none(odd, f"all folders share it here; {shown(most)} is taken")
    return shared


def _sizes(ledger: Ledger, general: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> None:
    """Translate resolutions and batch sizes; the same folder at two resolutions is a further
    resolution."""
    sides: list[int] = []
    for table in sets:
        lengths = numbers(table.get("resolution", general.get("resolution", [])))
        if lengths:
            sides.append(round((lengths[0] * lengths[-1]) ** 0.5))
    places = [name for name in ledger.names() if name == "resolution" or name.endswith(": resolution")]
    if sides:
        first, rest = sides[0], sorted({side for side in sides if side != sides[0]})
        reason = "" if not rest else "every image is trained at all resolutions it is large enough for"
        for place in places:
            ledger.put(place, "data.resolution", first, reason)
        if rest:
            ledger.put(places, "data.more_resolutions", rest, reason)
    batches = [as_number(table.get("batch_size", general.get("batch_size"))) for table in sets]
    found_batches = [round(size) for size in batches if size]
    places = [name for name in ledger.names() if name == "batch_size" or name.endswith(": batch_size")]
    if found_batches:
        for place in places:
            ledger.put(place, "training.batch_size", max(found_batches), "one batch size for all data sets")


def _source(
    ledger: Ledger, number: int, count: int, subset: Mapping[str, Any], outer: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one folder as a source, and translate its options."""

    def named(name: str) -> str:
        return f"dataset {number}, subset {count}: {name}"

    source: dict[str, Any] = {
        "folder": subset.get("image_dir", ""),
        "recursive": False,
        "kohya_folders": False,
    }
    ledger.tell_source(named("image_dir"), "folder", source["folder"])
    repeats = as_number(subset.get("num_repeats", outer.get("num_repeats", 1))) or 1
    source["repeats"] = max(1, round(repeats))
    for place in (named("num_repeats"), f"dataset {number}: num_repeats", "num_repeats"):
        ledger.tell_source(place, "repeats", source["repeats"])
    if subset.get("class_tokens"):
        source["caption"] = str(subset["class_tokens"])
        ledger.tell_source(named("class_tokens"), "caption", source["caption"])
    if subset.get("is_reg"):
        source["regularisation"] = True
        source["weight"] = as_number(outer.get("prior_loss_weight", 1.0)) or 1.0
        ledger.tell_source(named("is_reg"), "regularisation", True)
    if subset.get("conditioning_data_dir"):
        source["mask_folder"] = subset["conditioning_data_dir"]
        ledger.tell_source(named("conditioning_data_dir"), "mask_folder", source["mask_folder"])
    if subset.get("alpha_mask"):
        ledger.put(named("alpha_mask"), "data.alpha_mask", True)
    ledger.none(
        named("metadata_file"), "sdlora reads metadata.jsonl, metadata.csv and text files beside the images"
    )
    return source
