"""bghira/SimpleTuner: its data backends; those of images become sources (see :mod:`.simpletuner`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .ledger import OWN_WAY, Ledger, as_number, shown


def translate_backends(ledger: Ledger, backends: Sequence[Mapping[str, Any]]) -> None:
    sources, sides = [], list[int]()
    for backend in backends:
        name = str(backend.get("id"))
        if (
            str(backend.get("dataset_type", "image")) != "image"
            or backend.get("disabled")
            or backend.get("disable")
        ):
            for setting in ledger.names():
                if setting.startswith(f"backend {name}: "):
                    ledger.default(setting, "not of images, or switched off: encodings are cached by content")
            continue
        if str(backend.get("type", "local")) != "local":
            ledger.note(
                f"backend `{shown(name)}` is of type {shown(backend.get('type'))}: copy its images to a "
                f"folder"
            )
            continue
        sources.append(_source(ledger, name, backend))
        side = _side(backend, ledger)
        if side and side not in sides:
            sides.append(side)
    ledger.put_sources(sources, ", or import the data backends, too")
    _resolution(ledger, sides)
    rate = ledger.number("caption_dropout_probability")
    if rate is not None:
        ledger.put("caption_dropout_probability", "data.caption_dropout", rate)
    ledger.implied("images held out", "data.validation", 0, "none are held out unless a backend says so")
    ledger.default(
        (
            "data_backend_config",
            "data_backend_sampling",
            "aspect_bucket_rounding",
            "minimum_image_size",
            "disable_bucket_pruning",
            "vae_batch_size",
            "write_batch_size",
            "tokenizer_max_length",
            "override_dataset_config",
            "vae_cache_scan_behaviour",
            "dataloader_prefetch",
            "compress_disk_cache",
            "preserve_data_backend_cache",
            "skip_file_discovery",
            "allow_dataset_oversubscription",
        ),
        OWN_WAY,
    )


def _resolution(ledger: Ledger, sides: list[int]) -> None:
    general = _side(
        {"resolution": ledger.raw("resolution", 1024), "resolution_type": ledger.raw("resolution_type")},
        ledger,
    )
    if sides:
        ledger.values["data.resolution"], rest = sides[0], sides[1:]
        if rest:
            ledger.values["data.more_resolutions"] = rest
        ledger.default("resolution", "the data backends say their own")
    elif general:
        ledger.put("resolution", "data.resolution", general, "the side of a square of that area")
        ledger.implied("resolution", "data.resolution", general, "its default there")
    ledger.default("resolution_type", "set by data.resolution: the side of a square of the area trained at")


def _side(table: Mapping[str, Any], ledger: Ledger) -> int | None:
    """Return a resolution in px; ``area`` says megapixels."""
    length = as_number(table.get("resolution"))
    if not length:
        return None
    kind = str(table.get("resolution_type") or ledger.text("resolution_type") or "pixel_area")
    megapixels = kind == "area" and length < 32
    return round((length * 1e6) ** 0.5 / 64) * 64 if megapixels else round(length)


def _source(ledger: Ledger, name: str, backend: Mapping[str, Any]) -> dict[str, Any]:
    def named(setting: str) -> str:
        return f"backend {name}: {setting}"

    source: dict[str, Any] = {"folder": str(backend.get("instance_data_dir", "")), "kohya_folders": False}
    ledger.tell_source(named("instance_data_dir"), "folder", source["folder"])
    source["repeats"] = 1 + max(0, round(as_number(backend.get("repeats", 0)) or 0))
    ledger.tell_source(named("repeats"), "repeats", source["repeats"])  # 0 means once there
    if backend.get("is_regularisation_data") or backend.get("is_regularization_data"):
        source["regularisation"] = True
        ledger.values["data.prior_preservation"] = 1.0
        for spelled in ("is_regularisation_data", "is_regularization_data"):
            ledger.tell_source(named(spelled), "regularisation", True)
    _captions(ledger, name, backend, source)
    if backend.get("crop") is True and str(backend.get("crop_style", "random")).startswith("random"):
        ledger.put(named("crop_style"), "data.crop", "random")
    if backend.get("crop") is True and str(backend.get("crop_aspect", "square")) == "square":
        ledger.put(named("crop_aspect"), "data.buckets", False, "images are cut to squares")
    shuffle = backend.get("caption_shuffle")
    if isinstance(shuffle, dict) and shuffle.get("enable"):
        ledger.put(named("caption_shuffle"), "data.shuffle_tags", True, "shuffled again at each visit")
        ledger.values["data.keep_tags"] = round(as_number(shuffle.get("position_start", 0)) or 0)
    ledger.default(
        [named(setting) for setting in ("resolution", "resolution_type")],
        "set by data.resolution and data.more_resolutions",
    )
    ledger.default(
        [
            named(s)
            for s in (
                "id",
                "type",
                "dataset_type",
                "cache_dir_vae",
                "cache_dir",
                "vae_cache_clear_each_epoch",
                "text_embeds",
                "skip_file_discovery",
                "preserve_data_backend_cache",
                "metadata_backend",
                "minimum_image_size",
                "maximum_image_size",
                "target_downsample_size",
                "crop",
                "crop_style",
                "crop_aspect",
                "instance_prompt",
                "only_instance_prompt",
                "prepend_instance_prompt",
                "hash_filenames",
                "default",
                "probability",
                "disable_validation",
            )
        ],
        OWN_WAY,
    )
    return source


def _captions(ledger: Ledger, name: str, backend: Mapping[str, Any], source: dict[str, Any]) -> None:
    """Say where a backend's captions come from, and put them into its source."""

    def named(setting: str) -> str:
        return f"backend {name}: {setting}"

    strategy, prompt = (
        str(backend.get("caption_strategy", "filename")),
        str(backend.get("instance_prompt", "") or ""),
    )
    if strategy == "filename":
        ledger.put(named("caption_strategy"), "data.caption_from", "file name", "captions are the file names")
    elif strategy == "instanceprompt" or backend.get("only_instance_prompt"):
        source["caption"] = prompt
        ledger.tell_source(named("instance_prompt"), "caption", prompt)
        ledger.none(
            named("caption_strategy"), "text files beside the images take precedence here; remove them"
        )
    elif strategy == "textfile":
        ledger.default(named("caption_strategy"), "text files are read anyway")
        ledger.implied(
            "captions of several lines", "data.caption_lines", "one", "each line is a caption there"
        )
    else:
        ledger.none(named("caption_strategy"), "sdlora reads text files, metadata.jsonl and metadata.csv")
    if backend.get("prepend_instance_prompt") and prompt:
        source["trigger_word"] = prompt
        ledger.tell_source(named("instance_prompt"), "trigger_word", prompt)
        ledger.tell_source(named("prepend_instance_prompt"), "trigger_word", prompt)
