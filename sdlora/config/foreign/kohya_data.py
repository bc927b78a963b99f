"""kohya-ss/sd-scripts: its arguments for folders, captions and images (see :mod:`.kohya`)."""

from __future__ import annotations

from .ledger import Ledger, numbers


def folders(ledger: Ledger) -> None:
    if ledger.has("train_data_dir"):
        ledger.put("train_data_dir", "data.folder", ledger.text("train_data_dir"))
        ledger.implied("folders named N_words", "data.kohya_folders", True, "train_data_dir holds them")
    elif not ledger.has("dataset_config"):
        ledger.note("no folder of images is given: name it in `sdlora train FOLDER --config ...`")
    repeats = ledger.whole("dataset_repeats")
    if repeats is not None:
        ledger.put("dataset_repeats", "data.repeats", repeats)
    if ledger.has("reg_data_dir"):
        weight = ledger.number("prior_loss_weight", 1.0)
        source = {
            "folder": ledger.text("reg_data_dir"),
            "regularisation": True,
            "kohya_folders": True,
            "weight": weight,
        }
        names = ["reg_data_dir", *(["prior_loss_weight"] if ledger.has("prior_loss_weight") else [])]
        ledger.put(names, "data.sources", [source], "a source of regularisation images with this weight")
    else:
        ledger.default("prior_loss_weight", "without regularisation images it has no effect")
    ledger.none("in_json", "sdlora reads metadata.jsonl, metadata.csv and text files beside the images")


def captions(ledger: Ledger) -> None:
    """Translate the settings of captions (of a command, or of a dataset TOML's general part)."""
    extension = ledger.text("caption_extension") or ledger.text("caption_extention")
    for name in ("caption_extension", "caption_extention"):
        if extension.lstrip(".") in ("txt", "caption", "cap"):
            ledger.default(name, ".txt and .caption are read anyway")
        else:
            ledger.none(name, "captions are read from .txt and .caption files")
    shuffle, dropped = ledger.truth("shuffle_caption"), ledger.number("caption_tag_dropout_rate", 0.0)
    moves = shuffle or bool(dropped)
    if shuffle:
        ledger.put("shuffle_caption", "data.shuffle_tags", True)
    if dropped:
        ledger.put("caption_tag_dropout_rate", "data.tag_dropout", dropped)
    if ledger.whole("keep_tokens", 0) and moves:
        ledger.put("keep_tokens", "data.keep_tags", ledger.whole("keep_tokens"))
    else:
        ledger.default("keep_tokens", "no effect without shuffling or dropping tags")
    if ledger.text("caption_separator", ",") != "," and moves:
        ledger.put("caption_separator", "data.tag_separator", ledger.text("caption_separator"))
    else:
        ledger.default("caption_separator", "tags are parted by commas anyway")
    if ledger.text("keep_tokens_separator") == "|||":
        ledger.default("keep_tokens_separator", "`|||` is understood anyway")
    else:
        ledger.none("keep_tokens_separator", "only `|||` is understood; replace it in the captions")
    if ledger.truth("enable_wildcard"):
        ledger.put("enable_wildcard", "data.wildcards", True)
        ledger.implied(
            "captions of several lines", "data.caption_lines", "one", "wildcards take one line there"
        )
    if ledger.truth("weighted_captions"):
        ledger.put("weighted_captions", "data.emphasis", True)
    for theirs, ours in (
        ("caption_prefix", "data.caption_prefix"),
        ("caption_suffix", "data.caption_suffix"),
    ):
        if ledger.has(theirs):
            ledger.put(theirs, ours, ledger.text(theirs))
    rate = ledger.number("caption_dropout_rate")
    if rate is not None:
        ledger.put("caption_dropout_rate", "data.caption_dropout", rate)
    ledger.implied("caption_dropout_rate", "data.caption_dropout", 0.0, "its default there")
    ledger.none(
        ("caption_dropout_every_n_epochs", "secondary_separator", "token_warmup_step"),
        "sdlora has no such change",
    )
    ledger.default("token_warmup_min", "no effect without token_warmup_step")


def images(ledger: Ledger) -> None:
    """Translate the settings of images."""
    sides = numbers(ledger.raw("resolution", []))
    if sides:
        side = round((sides[0] * sides[-1]) ** 0.5) if len(sides) > 1 else round(sides[0])
        if len(sides) == 1 or sides[0] == sides[1]:
            ledger.put("resolution", "data.resolution", side)
        else:
            ledger.put("resolution", "data.resolution", side, "the side of a square of that area")
    if ledger.truth("enable_bucket"):
        ledger.put("enable_bucket", "data.buckets", True)
    else:
        ledger.put("enable_bucket", "data.buckets", False, "off by default there")
    if ledger.truth("bucket_no_upscale"):
        ledger.put("bucket_no_upscale", "data.upscale", False, "said the other way round")
    if ledger.truth("random_crop"):
        ledger.put("random_crop", "data.crop", "random")
    if ledger.truth("flip_aug"):
        ledger.put("flip_aug", "data.flip", True)
    if ledger.truth("color_aug"):
        reason = "brightness, contrast and saturation change instead of hue and gamma"
        ledger.put("color_aug", "data.colour_jitter", 0.1, reason)
    if ledger.truth("alpha_mask"):
        ledger.put("alpha_mask", "data.alpha_mask", True)
    if ledger.truth("masked_loss") and ledger.has("conditioning_data_dir"):
        folder = ledger.text("conditioning_data_dir")
        ledger.put(
            ("masked_loss", "conditioning_data_dir"), "data.mask_folder", folder, "masks of the same names"
        )
    elif ledger.truth("masked_loss") and ledger.truth("alpha_mask"):
        ledger.default("masked_loss", "data.alpha_mask does it")
    else:
        ledger.none(("masked_loss", "conditioning_data_dir"), "masks are a folder: data.mask_folder")
    ledger.none("face_crop_aug_range", "crops are fixed by the bucket; a focus may stand in a sidecar file")
    bounds = "buckets follow the resolution: any aspect of the same area, sides in the base's own steps"
    ledger.default(("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"), bounds)
    ledger.default("resize_interpolation", "images are shrunk with an area filter, enlarged with Lanczos")
    cached = ("cache_latents", "cache_latents_to_disk", "cache_info", "skip_cache_check")
    ledger.default(cached, "sdlora always does, keyed by content")
