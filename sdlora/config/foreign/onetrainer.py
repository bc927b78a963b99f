"""Nerogar/OneTrainer: its training configuration, with the concepts and samples it names (JSON).

Names and defaults: TrainConfig.py, ConceptConfig.py, SampleConfig.py of modules/util/config, commit 23df383
(August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ...errors import ConfigError
from .ledger import Ledger, numbers, shown
from .onetrainer_concepts import translate_concepts
from .shared import base_format, optimizer, precision, schedule

_MODELS = ("STABLE_DIFFUSION_1", "STABLE_DIFFUSION_2", "STABLE_DIFFUSION_XL")
_OTHER_PARTS = (
    "prior.",
    "transformer.",
    "unconditional_transformer.",
    "quantization.",
    "text_encoder_3",
    "text_encoder_4",
    "effnet_encoder.",
    "decoder.",
    "decoder_text_encoder.",
    "decoder_vqgan.",
)
_OF_THE_PROGRAM = (
    "cloud.",
    "secrets.",
    "tensorboard",
    "debug",
    "workspace_dir",
    "cache_dir",
    "huggingface_cache_dir",
    "offline_mode",
    "optimizer_defaults",
    "__version",
    "multi_gpu",
    "device_indexes",
    "gradient_reduce_precision",
    "fused_gradient_reduce",
    "async_gradient_reduce",
    "async_offloading",
    "dataloader_threads",
    "temp_device",
    "enable_autocast_cache",
    "only_cache",
    "latent_caching",
    "clear_cache_before_training",
    "compile",
    "frames",
    "include_train_config",
    "embedding.",
    "sample_image_format",
    "sample_video_format",
    "sample_audio_format",
    "samples_to_tensorboard",
    "non_ema_sampling",
    "prevent_overwrites",
    "bundle_additional_embeddings",
    "fallback_train_dtype",
    "text_encoder_sequence_length",
    "text_encoder_2_sequence_length",
    "concept_file_name",
    "sample_definition_file_name",
    "embedding_weight_dtype",
    "oft_",
    "validate_after",
    "backup_before_save",
    "save_skip_first",
    "sample_skip_first",
    "continue_last_backup",
    "output_model_format",
    "force_epsilon_prediction",
    "timestep_shift",
    "dynamic_timestep_shifting",
    "vb_loss_strength",
    "loss_weight_strength",
    "huber_delta",
    "noising_bias",
    "ema_decay",
    "ema_update_step_interval",
    "learning_rate_cycles",
    "layer_filter_preset",
    "text_encoder.weight_dtype",
    "unet.weight_dtype",
    "vae.weight_dtype",
    "unmasked_probability",
    "normalize_masked_area_loss",
    "rolling_backup",
    "unet.",
    "text_encoder.",
    "text_encoder_2.",
    "vae.",
    "custom_learning_rate",
    "scheduler_params",
    "lora_weight_dtype",
    "lora_decompose_norm_epsilon",
    "mse_strength",
    "learning_rate_scaler",
    "loss_scaler",
)
"""Settings that say how OneTrainer works, not what is learned, or that count only with another one."""


def recognised(document: Any) -> bool:
    """Return whether a JSON document is a training configuration of OneTrainer."""
    return isinstance(document, dict) and "training_method" in document and "model_type" in document


def is_concepts(document: Any) -> bool:
    """Return whether a JSON document is OneTrainer's list of concepts."""
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(concept, dict) and "path" in concept and "text" in concept for concept in document)
    )


def refuse_others(document: Mapping[str, Any], where: str) -> None:
    """Refuse what sdlora cannot train.

    Raises:
        ConfigError: for another model than Stable Diffusion, or another method than a LoRA.
    """
    model, method = str(document.get("model_type", _MODELS[0])), str(document.get("training_method", "LORA"))
    if not model.startswith(_MODELS):
        raise ConfigError(f"{where}: `model_type={shown(model)}`: sdlora trains Stable Diffusion 1, 2 and XL")
    if method != "LORA":
        raise ConfigError(
            f"{where}: `training_method={shown(method)}`: sdlora trains LoRA; choose LORA in OneTrainer"
        )


def translate(
    ledger: Ledger, concepts: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Translate a training configuration.

    Args:
        ledger: the configuration flat (``unet.learning_rate``), and of each concept ``concept 1: path``.
        concepts: the concepts, which become sources.
        samples: the samples, which become the previews' prompts.
    """
    _base(ledger)
    translate_concepts(ledger, concepts)
    _images(ledger)
    _adapter(ledger)
    _optimizer(ledger)
    _length(ledger)
    _objective(ledger)
    _samples(ledger, samples)
    _output(ledger)
    for name in ledger.names():
        if name.startswith(_OTHER_PARTS):
            ledger.default(name, "of other model families")
        elif name.startswith(_OF_THE_PROGRAM) and not ledger.is_told(name):
            ledger.default(name, "no effect on the result here; sdlora decides by itself")


def _base(ledger: Ledger) -> None:
    if ledger.has("base_model_name"):
        ledger.put("base_model_name", "model.base", ledger.text("base_model_name"))
    else:
        ledger.implied(
            "base_model_name",
            "model.base",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "its default there",
        )
    ledger.default(
        ("model_type", "training_method"), "the family is read from the base; a LoRA is trained anyway"
    )
    if ledger.has("vae.model_name"):
        ledger.put("vae.model_name", "model.vae", ledger.text("vae.model_name"))
    if ledger.truth("force_v_prediction"):
        ledger.put("force_v_prediction", "model.prediction_type", "v_prediction", "said in words")
    if ledger.truth("rescale_noise_scheduler_to_zero_terminal_snr"):
        ledger.put("rescale_noise_scheduler_to_zero_terminal_snr", "model.zero_terminal_snr", True)
    skip = ledger.whole("text_encoder_layer_skip", 0) or 0
    if skip:
        ledger.put("text_encoder_layer_skip", "model.clip_skip", skip + 1, "counted from 1 here")
    ledger.none("text_encoder_2_layer_skip", "SDXL takes the last but one layer, as it was trained")


def _images(ledger: Ledger) -> None:
    sides = [round(side) for side in numbers(ledger.raw("resolution", "512"))]
    if sides:
        if ledger.has("resolution"):
            ledger.put("resolution", "data.resolution", sides[0])
        ledger.implied("resolution", "data.resolution", sides[0], "its default there")
        if len(sides) > 1 and "x" not in ledger.text("resolution"):
            ledger.put("resolution", "data.more_resolutions", sides[1:], "every image at all of them")
    buckets = ledger.truth("aspect_ratio_bucketing", True)
    if ledger.has("aspect_ratio_bucketing"):
        ledger.put("aspect_ratio_bucketing", "data.buckets", buckets)
    if ledger.truth("masked_training"):
        ledger.note(
            "masked training: OneTrainer's masks are NAME-masklabel.png beside the images; sdlora reads "
            "a folder of "
            "masks of the same names (data.mask_folder) or transparency (data.alpha_mask)"
        )
        ledger.none("masked_training", "name the folder of masks in data.mask_folder")
        ledger.none("unmasked_weight", "with masks: data.unmasked_weight")
    else:
        ledger.default(
            ("masked_training", "unmasked_weight", "masked_prior_preservation_weight"), "no masks, as here"
        )
    ledger.implied("validation", "data.validation", 0, "off by default there")
    if ledger.has("validation"):
        value = None if ledger.truth("validation") else 0
        ledger.default("validation", "images are held out anyway") if value is None else ledger.put(
            "validation", "data.validation", 0, "none are held out"
        )


def _adapter(ledger: Ledger) -> None:
    kind = ledger.text("peft_type", "LORA")
    kinds = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
    ours = kinds.get(kind)
    if ours == "lora" and ledger.truth("lora_decompose"):
        names = [name for name in ("peft_type", "lora_decompose") if ledger.has(name)]
        ledger.put(names, "adapter.kind", "dora", "a LoRA with learned sizes")
    elif ours is None:
        ledger.put("peft_type", "adapter.kind", "lora", f"sdlora does not train {kind}: a plain LoRA")
    elif ledger.has("peft_type"):
        ledger.put("peft_type", "adapter.kind", ours)
    ledger.none(
        ("lora_decompose", "lora_decompose_output_axis"),
        "sdlora's DoRA takes the norm over a row's inputs, as published",
    )
    rank = ledger.whole("lora_rank")
    ledger.put("lora_rank", "adapter.rank", rank) if rank else ledger.implied(
        "lora_rank", "adapter.rank", 16, "its default there"
    )
    if ledger.number("lora_alpha"):
        ledger.put("lora_alpha", "adapter.alpha", ledger.number("lora_alpha"))
    ledger.implied("lora_alpha", "adapter.alpha", 1.0, "its default there")
    if ours == "lokr":
        factor = ledger.whole("lokr_decompose_factor", -1) or -1
        if factor >= 2:
            ledger.put("lokr_decompose_factor", "adapter.lokr_factor", factor)
    ledger.default(
        [name for name in ledger.names() if name.startswith("lokr_")],
        "of LoKr, or decided by adapter.lokr_factor",
    )
    if ledger.has("lora_model_name"):
        ledger.put("lora_model_name", "adapter.from_file", ledger.text("lora_model_name"))
    pattern = ledger.text("layer_filter")
    if not pattern:
        ledger.implied("layer_filter", "adapter.targets", "all", "every layer of the U-Net by default there")
    else:
        attention = all("attn" in word or "attention" in word for word in pattern.split(","))
        reason = f"the nearest set of layers to `{shown(pattern)}`"
        ledger.put("layer_filter", "adapter.targets", "linear" if attention else "all", reason)
    ledger.default("layer_filter_regex", "set by adapter.targets")
    if ledger.number("dropout_probability", 0.0):
        ledger.put("dropout_probability", "adapter.dropout", ledger.number("dropout_probability"))
    for part in ("text_encoder", "text_encoder_2"):
        if ledger.has(f"{part}.train") and (part == "text_encoder" or "XL" in ledger.text("model_type")):
            ledger.put(f"{part}.train", f"adapter.{part}", ledger.truth(f"{part}.train"))
    ledger.none("additional_embeddings", "sdlora trains no embeddings beside a LoRA")
    ledger.none(
        ("text_encoder.stop_training_after", "unet.stop_training_after"), "every part is trained to the end"
    )


def _optimizer(ledger: Ledger) -> None:
    optimizer(ledger, "optimizer.optimizer")
    ours = ledger.values.get("optimizer.name", "adamw")
    betas = (ledger.number("optimizer.beta1"), ledger.number("optimizer.beta2"))
    if None not in betas and ours in ("adamw", "adamw8bit"):
        ledger.put(("optimizer.beta1", "optimizer.beta2"), "optimizer.betas", betas, "both together")
    elif ours == "adamw":
        ledger.implied("optimizer.betas", "optimizer.betas", (0.9, 0.999), "its default there")
    for theirs, key in (
        ("weight_decay", "weight_decay"),
        ("eps", "epsilon"),
        ("d_coef", "d_coef"),
        ("d0", "d0"),
    ):
        value = ledger.number(f"optimizer.{theirs}")
        if (
            value is not None
            and ledger.allows(f"optimizer.{key}", value)
            and (theirs not in ("d_coef", "d0") or ours == "prodigy")
        ):
            ledger.put(f"optimizer.{theirs}", f"optimizer.{key}", value)
    for name in ledger.names():
        if name.startswith("optimizer.") and not ledger.is_told(name):
            ledger.default(name, f"as sdlora's {ours} has it, or of another optimizer")
    rate = ledger.number("unet.learning_rate") or ledger.number("learning_rate", 3e-6)
    if ledger.has("unet.learning_rate"):
        ledger.put("unet.learning_rate", "optimizer.learning_rate", rate)
        ledger.default("learning_rate", "unet.learning_rate takes precedence")
    elif ledger.has("learning_rate"):
        ledger.put("learning_rate", "optimizer.learning_rate", rate)
    ledger.implied("learning_rate", "optimizer.learning_rate", 3e-6, "its default there")
    if ledger.truth("text_encoder.train"):
        key = "optimizer.text_encoder_learning_rate"
        if ledger.has("text_encoder.learning_rate"):
            ledger.put("text_encoder.learning_rate", key, ledger.number("text_encoder.learning_rate"))
        else:
            ledger.implied("text_encoder.learning_rate", key, rate, "learning_rate counts for it, too")
    schedule(ledger, "learning_rate_scheduler")
    warmup = ledger.number("learning_rate_warmup_steps", 200.0) or 0.0
    if 0 < warmup <= 1:
        ledger.put("learning_rate_warmup_steps", "optimizer.warmup_share", warmup, "a share of the run")
    elif ledger.has("learning_rate_warmup_steps"):
        ledger.put("learning_rate_warmup_steps", "optimizer.warmup_steps", round(warmup))
    ledger.implied("learning_rate_warmup_steps", "optimizer.warmup_steps", 200, "its default there")
    if ledger.number("learning_rate_min_factor", 0.0):
        ledger.put(
            "learning_rate_min_factor", "optimizer.schedule_floor", ledger.number("learning_rate_min_factor")
        )
    if ledger.text("learning_rate_scaler", "NONE") != "NONE":
        ledger.none("learning_rate_scaler", "write the rate that is used: it is not scaled by the batch here")
    norm = ledger.number("clip_grad_norm")
    if norm is not None:
        ledger.put("clip_grad_norm", "optimizer.max_grad_norm", norm)


def _length(ledger: Ledger) -> None:
    epochs = ledger.whole("epochs")
    ledger.put("epochs", "training.epochs", epochs) if epochs else ledger.implied(
        "epochs", "training.epochs", 100, "its default there"
    )
    for theirs, key in (
        ("batch_size", "training.batch_size"),
        ("gradient_accumulation_steps", "training.gradient_accumulation"),
    ):
        value = ledger.whole(theirs)
        if value:
            ledger.put(theirs, key, value)
    ledger.implied("batch_size", "training.batch_size", 1, "its default there")
    precision(ledger, "train_dtype", "training.precision")
    kept = ledger.text("unet.weight_dtype")
    if kept.startswith(("FLOAT_8", "INT_8", "INT_W8", "FLOAT_W8", "NFLOAT_4")):
        base_format(ledger, ["unet.weight_dtype"], kept)
    device = ledger.text("train_device")
    if device and ledger.allows("training.device", device):
        ledger.put("train_device", "training.device", device)
    attention = {"SDP": "sdpa", "XFORMERS": "xformers"}.get(ledger.text("attention_mechanism"))
    if attention:
        ledger.put("attention_mechanism", "training.attention", attention)
    ledger.default("attention_mechanism", "chosen by itself")
    if ledger.truth("unet.gradient_checkpointing") or ledger.text("gradient_checkpointing").upper() == "ON":
        ledger.put("unet.gradient_checkpointing", "training.recompute", "blocks")
    ledger.none("force_circular_padding", "sdlora draws no tiles")


def _objective(ledger: Ledger) -> None:
    weight = ledger.text("loss_weight_fn", "CONSTANT")
    if weight == "MIN_SNR_GAMMA":
        names = [name for name in ("loss_weight_fn", "loss_weight_strength") if ledger.has(name)]
        ledger.put(
            names, "training.min_snr_gamma", ledger.number("loss_weight_strength", 5.0), "its strength"
        )
    else:
        if weight != "DEBIASED_ESTIMATION":
            ledger.implied("loss_weight_fn (min-SNR)", "training.min_snr_gamma", 0.0, "another weight there")
        if weight == "DEBIASED_ESTIMATION":
            ledger.put("loss_weight_fn", "training.loss_weighting", "debiased", "the same weight")
        elif weight == "CONSTANT":
            ledger.default("loss_weight_fn", "all timesteps weigh alike")
        else:
            ledger.none("loss_weight_fn", "sdlora weighs by min-SNR, or all alike")
    if ledger.number("huber_strength", 0.0) and not ledger.number("mse_strength", 1.0):
        ledger.put("huber_strength", "training.loss", "huber", "the only loss that is on")
    ledger.none(("huber_strength", "mae_strength", "log_cosh_strength"), "losses are not mixed here")
    if ledger.number("offset_noise_weight", 0.0):
        ledger.put("offset_noise_weight", "training.noise_offset", ledger.number("offset_noise_weight"))
    if ledger.number("perturbation_noise_weight", 0.0):
        key = "training.input_perturbation"
        ledger.put("perturbation_noise_weight", key, ledger.number("perturbation_noise_weight"))
    low, high = ledger.number("min_noising_strength", 0.0) or 0.0, ledger.number("max_noising_strength", 1.0)
    if (low, high) != (0.0, 1.0) and high is not None:
        for end, strength in (("min", low), ("max", high)):
            if ledger.has(f"{end}_noising_strength"):
                key, thousandths = f"training.{end}_timestep", round(strength * 1000)
                ledger.put(f"{end}_noising_strength", key, thousandths, "in thousandths")
    else:
        ledger.default(("min_noising_strength", "max_noising_strength"), "all timesteps are drawn anyway")
    distribution = ledger.text("timestep_distribution", "UNIFORM")
    if distribution == "UNIFORM":
        ledger.default("timestep_distribution", "timesteps are drawn evenly anyway")
    else:
        ours = {"LOGIT_NORMAL": "logit_normal", "SIGMOID": "logit_normal"}.get(
            distribution, distribution.lower()
        )
        ledger.put("timestep_distribution", "training.timestep_distribution", ours)
    ledger.implied(
        "caption dropout", "data.caption_dropout", 0.0, "OneTrainer has none unless a concept drops captions"
    )
    if ledger.text("ema", "OFF") != "OFF":
        ledger.put("ema", "training.average", "ema", "an average of the weights")
    ledger.none("generalized_offset_noise", "sdlora adds a constant per channel")


def _samples(ledger: Ledger, samples: Sequence[Mapping[str, Any]]) -> None:
    active = [sample for sample in samples if isinstance(sample, dict) and sample.get("enabled", True)]
    prompts = [str(sample.get("prompt", "")) for sample in active]
    if prompts:
        ledger.values["sample.prompts"] = prompts
        first = active[0]
        for number, sample in enumerate(samples, 1):
            ledger.tell_as(f"sample {number}: prompt", "sample.prompts", shown(sample.get("prompt", "")))
        for theirs, key in (
            ("negative_prompt", "sample.negative_prompt"),
            ("diffusion_steps", "sample.steps"),
            ("cfg_scale", "sample.guidance"),
            ("seed", "sample.seed"),
        ):
            name = f"sample 1: {theirs}"
            if ledger.has(name) and samples[0] is first:
                ledger.put(name, key, first[theirs])
        for name in ledger.names():
            if name.startswith("sample ") and not ledger.is_told(name):
                ledger.default(name, "all previews share the first sample's; their size is that of training")
    if ledger.text("sample_after_unit") == "STEP":
        ledger.put("sample_after", "sample.every", ledger.whole("sample_after"))
        ledger.default("sample_after_unit", "previews are counted in steps")
    else:
        ledger.none("sample_after", "given in steps here: sample.every")
        ledger.default("sample_after_unit", "previews are counted in steps")


def _output(ledger: Ledger) -> None:
    place = ledger.text("output_model_destination")
    if place:
        path = PureWindowsPath(place) if "\\" in place else PurePosixPath(place)
        ledger.put(
            "output_model_destination",
            "output.name",
            path.stem,
            "the file's name; runs have folders of their own",
        )
    precision(ledger, "output_dtype", "output.dtype")
    for theirs, unit, key in (("backup_after", "backup_after_unit", "training.checkpoint_every"),):
        if ledger.text(unit) == "STEP" and ledger.whole(theirs):
            ledger.put(theirs, key, ledger.whole(theirs))
        else:
            ledger.none(theirs, "given in steps here: training.checkpoint_every")
        ledger.default(unit, "checkpoints are counted in steps")
    if ledger.truth("rolling_backup") and ledger.whole("rolling_backup_count"):
        ledger.put("rolling_backup_count", "training.keep_checkpoints", ledger.whole("rolling_backup_count"))
    ledger.none(
        ("save_every", "save_filename_prefix"), "every checkpoint can be exported: `sdlora export RUN`"
    )
    ledger.default("save_every_unit", "checkpoints are counted in steps")
