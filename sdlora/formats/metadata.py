"""The header of adapter files: ``ss_*`` and ``sshs_*`` for WebUI and kohya, ``modelspec.*``, and our own.

Every value is text, written as kohya writes it (``None``, ``True``; structures as JSON). Our own entries
start with ``sdlora.``. No absolute path and no user's folder structure goes into a file that people
share: folders appear by their last name only. Source: formats.md section 6.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.canonical import AdapterFile, AdapterWeights
from ..adapters.kinds.table import KINDS
from ..config.schema import USUAL_SCHEDULE
from ..diffusion.prediction import PREDICTIONS
from ..number_formats import named
from ..tensor_file import entry_json
from . import folding
from .dataset_entries import dataset_entries, folder_name
from .privacy import without_private

if TYPE_CHECKING:
    from ..config.schema import Config
    from ..families.facts import FamilyInfo

SAI_MODEL_SPEC = "1.0.1"
MAX_THUMBNAIL_BYTES = 64 * 1024
_SGM = "https://github.com/Stability-AI/generative-models"
_NOT_CARRIED = ("sshs_", "lora_adapter_metadata", folding.RECORDED_ALPHAS, "modelspec.hash_sha256")
"""Entries that describe one particular file, so that another file must not inherit them."""
_DROPOUTS = ("rank_dropout", "module_dropout")
_NEVER_NONE = {
    *("tag_frequency", "dataset_dirs", "bucket_info", "training_started_at", "training_finished_at"),
    *("min_bucket_reso", "max_bucket_reso"),
    *("base_model_version", "v2", "output_name"),
}
"""WebUI parses these as tables or numbers without checking, so ``None`` would break its card."""


@dataclass(frozen=True)
class TrainingFacts:
    """What is known about the training of an adapter; everything is optional.

    Attributes:
        family: the base's family.
        name: what prompts call the adapter; file name without suffix.
        base_title: the base for people, e.g. ``Stable Diffusion 1.5``.
        base_digest: SHA-256 (hex) of the base.
        config: the run's final settings.
        optimizer: the optimizer with its settings, as a Python expression.
        warmup_steps: of the learning rate, if the settings do not give it in steps.
        prediction_type: what the U-Net predicts; ``config`` may leave it to the base.
        zero_terminal_snr: whether the noise schedule ended in pure noise.
        native_resolution: px, for a ``config`` that leaves ``data.resolution`` open.
        steps: optimizer steps done.
        epochs: passes over the images done.
        num_images: training images.
        num_batches_per_epoch: micro-batches in one epoch.
        buckets: (height, width) px -> images.
        folder_images: folder -> images, if there are several folders.
        reg_folder_images: folder -> regularisation images.
        folder_repeats: folder -> repeats of its images, where they differ from ``config``.
        tag_frequency: folder name -> tag or caption -> count.
        started_at: seconds since 1970, UTC.
        finished_at: seconds since 1970, UTC.
        final_loss: training loss at the end, smoothed.
        validation_loss: loss on held-out images at the end.
        trigger_words: words that evoke the style.
        preferred_strength: the strength that looks best, if it was measured.
        preview: image for the thumbnail.
        author: who made it.
        sdlora_version: of this program.
        seed: the seed, if there is no ``config``.
    """

    family: FamilyInfo | None = None
    name: str = ""
    base_title: str | None = None
    base_digest: str | None = None
    config: Config | None = None
    optimizer: str | None = None
    warmup_steps: int | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    native_resolution: int | None = None
    steps: int | None = None
    epochs: float | None = None
    num_images: int | None = None
    num_batches_per_epoch: int | None = None
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    folder_images: Mapping[str, int] = field(default_factory=dict)
    reg_folder_images: Mapping[str, int] = field(default_factory=dict)
    folder_repeats: Mapping[str, int] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    started_at: float | None = None
    finished_at: float | None = None
    final_loss: float | None = None
    validation_loss: float | None = None
    trigger_words: tuple[str, ...] = ()
    preferred_strength: float | None = None
    preview: Path | None = None
    author: str | None = None
    sdlora_version: str | None = None
    seed: int | None = None


def build_header(facts: TrainingFacts) -> dict[str, str]:
    """Return all header entries known before the tensors: ``ss_*``, ``modelspec.*``, ``sdlora.*``.

    The network's rank and alpha and the hashes follow from the tensors; writing a file adds them. With
    ``output.private`` there is nothing about folders, captions and files.

    Raises:
        OutputError: when the preview cannot be read as an image.
    """
    entries: dict[str, Any] = _base_entries(facts)
    entries |= _data_entries(facts)
    if facts.config is not None:
        entries |= {"optimizer": facts.optimizer, **_setting_entries(facts.config)}
        if facts.warmup_steps is not None:  # in steps, also where the settings say a share
            entries["lr_warmup_steps"] = facts.warmup_steps
    texts = {
        f"ss_{key}": kohya_text(value)
        for key, value in entries.items()
        if value is not None or key not in _NEVER_NONE
    }
    texts |= {f"modelspec.{key}": value for key, value in _modelspec(facts).items() if value is not None}
    texts |= {f"sdlora.{key}": value for key, value in _own_entries(facts).items() if value is not None}
    return without_private(texts) if facts.config is not None and facts.config.output.private else texts


def kohya_text(value: object) -> str:
    """Return a value as kohya's scripts store it: JSON for structures, ``str`` for the rest."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def for_file(adapter: AdapterFile, info: FamilyInfo, more: Mapping[str, str]) -> dict[str, str]:
    """Return the header of one file: the adapter's entries, those that clients need, and ``more``.

    Without ``ss_base_model_version``, WebUI takes an SDXL adapter for one of SD1 and hides it, and Forge goes
    by ``modelspec.architecture``; so these are set even for an adapter without any entries.
    """
    texts = {key: value for key, value in adapter.info.metadata.items() if not key.startswith(_NOT_CARRIED)}
    texts.pop("format", None)
    if not texts.get("ss_base_model_version", "").startswith(info.header.version):
        texts["ss_base_model_version"] = info.header.version
    texts["ss_v2"] = str(info.header.is_v2)
    texts |= _network_entries(adapter.weights, texts)
    texts["modelspec.architecture"] = _architecture(info, texts["ss_base_model_version"].endswith("_v"))
    texts["modelspec.implementation"] = _implementation(info)
    texts.setdefault("modelspec.sai_model_spec", SAI_MODEL_SPEC)
    if adapter.info.name:
        # a title that was only the old name follows the new one; what somebody wrote stays
        if texts.get("modelspec.title") in (None, "", texts.get("ss_output_name")):
            texts["modelspec.title"] = adapter.info.name
        texts["ss_output_name"] = adapter.info.name
    if adapter.info.trigger_words:
        texts["sdlora.trigger_words"] = json.dumps(list(adapter.info.trigger_words), ensure_ascii=False)
        texts["modelspec.trigger_phrase"] = ", ".join(adapter.info.trigger_words)
    texts["sdlora.family"] = info.name
    return texts | dict(more)


def trigger_words(entries: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words that evoke the style, from our own entry or from ``modelspec.trigger_phrase``."""
    stored = entries.get("sdlora.trigger_words")
    if stored is not None:
        try:
            words = entry_json(stored)
        except ValueError:
            words = None
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return tuple(words)
    phrase = entries.get("modelspec.trigger_phrase", "None")
    return () if phrase == "None" else tuple(word.strip() for word in phrase.split(",") if word.strip())


def thumbnail(file: Path) -> str:
    """Return an image as a JPEG data URL of at most 64 KiB, sides at most 512 px.

    Raises:
        OutputError: when it cannot be read as an image.
    """
    from ..data.reading.decoding import ImageFileError, decoded_image, read_image_bytes
    from ..errors import OutputError

    try:
        with decoded_image(read_image_bytes(file), str(file), least_side=512) as loaded:
            image = loaded.image.convert("RGB")
    except ImageFileError as error:
        raise OutputError(
            f"{file}: is not a usable preview image ({error.what}); give a PNG or JPEG"
        ) from None
    for side, quality in ((512, 85), (512, 70), (384, 70), (256, 70), (256, 50), (128, 50), (64, 40)):
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(url) <= MAX_THUMBNAIL_BYTES:
            break
    return url


def _base_entries(facts: TrainingFacts) -> dict[str, Any]:
    header = facts.family.header if facts.family else None
    version = header.version if header else None
    if header is not None and header.v_version and _prediction(facts) == "v":
        version = header.v_version
    # kohya writes whole numbers and tools expect them; the exact length is in the number of steps
    epochs = None if facts.epochs is None else math.ceil(facts.epochs - 1e-9)
    session = f"{facts.name} {facts.started_at} {facts.base_digest} {facts.seed}".encode()
    return {
        "base_model_version": version,
        "v2": header.is_v2 if header else None,
        "output_name": facts.name or None,
        "sd_model_name": facts.base_title,
        "sd_model_hash": None,
        "new_sd_model_hash": facts.base_digest,
        "vae_name": folder_name(facts.config.model.vae) if facts.config and facts.config.model.vae else None,
        "session_id": int.from_bytes(hashlib.sha256(session).digest()[:4], "big"),
        "training_started_at": facts.started_at,
        "training_finished_at": facts.finished_at,
        "seed": facts.config.training.seed if facts.config else facts.seed,
        "steps": facts.steps,
        "max_train_steps": facts.steps,
        "epoch": epochs,
        "num_epochs": epochs,
        "network_module": "networks.lora",
        "zero_terminal_snr": facts.zero_terminal_snr,
        "lowram": False,
    }


def _data_entries(facts: TrainingFacts) -> dict[str, Any]:
    images = dict(facts.folder_images)
    if not images and facts.num_images is not None:
        only = next(iter(facts.tag_frequency)) if len(facts.tag_frequency) == 1 else "images"
        images = {only: facts.num_images}
    config = facts.config
    entries = dataset_entries(
        images=images,
        reg_images=facts.reg_folder_images,
        tags=facts.tag_frequency,
        buckets=facts.buckets,
        side=_resolution(facts),
        repeats=config.data.repeats if config else 1,
        folder_repeats=facts.folder_repeats,
        batch_size=config.training.batch_size if config else None,
        flip=config.data.flip if config else False,
    )
    return entries | {"num_batches_per_epoch": facts.num_batches_per_epoch}


def _setting_entries(config: Config) -> dict[str, Any]:
    training, optimizer, data = config.training, config.optimizer, config.data
    unet_rate = optimizer.learning_rate
    return {
        "learning_rate": unet_rate,
        "unet_lr": unet_rate,
        "text_encoder_lr": optimizer.text_encoder_learning_rate if config.adapter.text_encoder else None,
        "lr_scheduler": optimizer.schedule or USUAL_SCHEDULE,
        "lr_warmup_steps": optimizer.warmup_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "batch_size_per_device": training.batch_size,
        "total_batch_size": None
        if training.batch_size is None
        else training.batch_size * training.gradient_accumulation,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_checkpointing": training.rung == "blocks",
        "mixed_precision": named(training.precision).kohya if training.precision else None,
        "min_snr_gamma": (training.min_snr_gamma or None) if training.loss_weighting == "min_snr" else None,
        "debiased_estimation": training.loss_weighting == "debiased",
        "ip_noise_gamma": training.input_perturbation or None,
        "multires_noise_iterations": training.multires_noise_iterations or None,
        "multires_noise_discount": training.multires_noise_discount,
        "scale_weight_norms": optimizer.max_update_norm,
        "noise_offset": training.noise_offset or None,
        "clip_skip": config.model.clip_skip if config.model.clip_skip > 1 else None,
        "caption_dropout_rate": data.caption_dropout,
        "caption_tag_dropout_rate": data.tag_dropout,
        "shuffle_caption": data.shuffle_tags,
        "keep_tokens": data.keep_tags,
        "color_aug": data.colour_jitter > 0,
        "random_crop": data.crop == "random",
        "bucket_no_upscale": not data.upscale,
        "prior_loss_weight": data.prior_preservation or None,
        "cache_latents": True,
        "loss_type": training.loss,
        "huber_schedule": training.huber_schedule if training.loss != "l2" else None,
        "huber_c": training.huber_c if training.loss != "l2" else None,
        "full_fp16": False,
        "fp8_base": training.base_format == "fp8",
        "fp8_base_unet": training.base_format == "fp8",  # the text encoders are not
        "max_token_length": None,
        "network_dropout": config.adapter.dropout or None,
        "network_args": {
            key: str(getattr(config.adapter, key)) for key in _DROPOUTS if getattr(config.adapter, key) > 0
        },
        "training_comment": config.output.description or None,
    }


def _modelspec(facts: TrainingFacts) -> dict[str, str | None]:
    config, side = facts.config, _resolution(facts)
    when = facts.finished_at or facts.started_at
    words = ", ".join(facts.trigger_words)
    return {
        "sai_model_spec": SAI_MODEL_SPEC,
        "architecture": _architecture(facts.family, _prediction(facts) == "v") if facts.family else None,
        "implementation": _implementation(facts.family) if facts.family else None,
        "title": facts.name or None,
        "resolution": None if side is None else f"{side}x{side}",
        "date": None if when is None else datetime.fromtimestamp(int(when), UTC).isoformat(),
        "author": facts.author,
        "description": (config.output.description or None) if config else None,
        "license": (config.output.license or None) if config else None,
        "usage_hint": f"put `{words}` into the prompt" if words else None,
        "trigger_phrase": words or None,
        "thumbnail": thumbnail(facts.preview) if facts.preview else None,
        "prediction_type": _prediction(facts),
        "encoder_layer": str(config.model.clip_skip) if config else None,
        "timestep_range": _timestep_range(config),
    }


def _timestep_range(config: Config | None) -> str:
    return f"{config.training.min_timestep},{config.training.max_timestep}" if config else "0,1000"


def _own_entries(facts: TrainingFacts) -> dict[str, str | None]:
    def number(value: float | None) -> str | None:
        return None if value is None else repr(value)

    return {
        "version": facts.sdlora_version,
        "family": facts.family.name if facts.family else None,
        "base_digest": facts.base_digest,
        "config": _shareable(facts.config) if facts.config else None,
        "trigger_words": json.dumps(list(facts.trigger_words), ensure_ascii=False),
        "final_loss": number(facts.final_loss),
        "validation_loss": number(facts.validation_loss),
        "preferred_strength": number(facts.preferred_strength),
    }


def _shareable(config: Config) -> str:
    """Return all settings as JSON, with paths cut to their last name."""
    tree = config.model_dump(mode="json")
    for section in tree:
        for name, value in getattr(config, section):
            if isinstance(value, Path):
                tree[section][name] = folder_name(str(value))
    base = config.model.base
    if base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1 or Path(base).exists():
        tree["model"]["base"] = folder_name(base)
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


_KOHYA_MODULE, _LYCORIS_MODULE = "networks.lora", "lycoris.kohya"


def _network_entries(weights: AdapterWeights, texts: Mapping[str, str]) -> dict[str, str]:
    """Return rank and alpha of the linear layers (3x3 convolutions apart, as kohya does)."""
    ranked = [update for update in weights.updates.values() if update.has_rank]
    linear = [p for p in ranked if p.shape[2:] in ((), (1, 1))]
    spatial = [p for p in ranked if p.shape[2:] not in ((), (1, 1))]
    pairs = linear or spatial
    ranks, alphas = {p.rank for p in pairs}, {p.alpha for p in pairs}
    dimension = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alpha = str(_plain(alphas.pop())) if len(alphas) == 1 else "Dynamic"
    arguments = _kept_arguments(texts.get("ss_network_args", ""))
    kinds = [KINDS[name] for name in weights.kinds()]
    algorithms = [kind.algorithm for kind in kinds if kind.algorithm]
    if algorithms:
        arguments["algo"] = algorithms[0]
    for kind in kinds:
        arguments |= kind.network_args
    if spatial:
        values: dict[str, set[float]] = {
            "conv_dim": {p.rank for p in spatial},
            "conv_alpha": {p.alpha for p in spatial},
        }
        arguments |= {k: str(_plain(v.pop())) if len(v) == 1 else "Dynamic" for k, v in values.items()}
    module = texts.get("ss_network_module", _KOHYA_MODULE)
    if module in (_KOHYA_MODULE, _LYCORIS_MODULE):  # that of the source, whose kind may have been another
        module = _LYCORIS_MODULE if algorithms else _KOHYA_MODULE
    return {
        "ss_network_module": module,
        "ss_network_dim": dimension,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments) if arguments else "None",
    }


def _kept_arguments(text: str) -> dict[str, str]:
    """Return of an adapter's arguments those that its tensors do not tell."""
    try:
        known = entry_json(text)
    except ValueError:
        return {}
    return {key: str(known[key]) for key in _DROPOUTS if key in known} if isinstance(known, dict) else {}


def _implementation(info: FamilyInfo) -> str:
    return _SGM if info.denoiser.webui_names == "ldm" else "diffusers"


def _architecture(info: FamilyInfo, predicts_v: bool) -> str:
    """Return modelspec's word for a family; it has two for SD2, 512 px and 768 px with v-prediction."""
    words = info.header
    return words.v_architecture if predicts_v and words.v_architecture else words.architecture


def _prediction(facts: TrainingFacts) -> str | None:
    kind = facts.prediction_type or (facts.config.model.prediction_type if facts.config else None)
    known = PREDICTIONS.get(kind or "")
    return (known.header_word or None) if known else None


def _resolution(facts: TrainingFacts) -> int | None:
    return (facts.config.data.resolution if facts.config else None) or facts.native_resolution


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
