"""What a header may tell if the maker of an adapter wants to keep the training images private.

Only what is listed here is kept: what loaders need, numbers, and what the maker wrote for the public. So
folder names, tags, captions, prompts and file names are dropped, also those in entries of other trainers.
"""

from __future__ import annotations

from collections.abc import Mapping

_KOHYA = (
    # what loaders go by
    *("base_model_version", "v2", "output_name", "network_module", "network_dim", "network_alpha"),
    *("network_args", "network_dropout", "clip_skip", "sd_model_hash", "new_sd_model_hash"),
    # numbers of the training
    *("resolution", "num_train_images", "num_reg_images", "num_batches_per_epoch", "num_epochs", "epoch"),
    *("steps", "max_train_steps", "batch_size_per_device", "total_batch_size", "learning_rate", "unet_lr"),
    *("text_encoder_lr", "optimizer", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "mixed_precision"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "full_fp16", "min_snr_gamma", "noise_offset"),
    *("zero_terminal_snr", "caption_dropout_rate", "loss_type", "seed", "cache_latents", "flip_aug"),
    *("enable_bucket", "bucket_no_upscale", "training_started_at", "training_finished_at"),
    *("caption_tag_dropout_rate", "shuffle_caption", "keep_tokens", "color_aug", "random_crop"),
    *("prior_loss_weight", "huber_schedule", "huber_c", "debiased_estimation", "ip_noise_gamma"),
    *("multires_noise_iterations", "multires_noise_discount", "scale_weight_norms"),
)
_MODELSPEC = (
    *("sai_model_spec", "architecture", "implementation", "title", "resolution", "date", "author"),
    *("description", "license", "usage_hint", "trigger_phrase", "thumbnail", "prediction_type"),
    *("encoder_layer", "timestep_range"),
)
_OWN = (
    *("version", "family", "trigger_words", "preferred_strength", "base_digest", "final_loss"),
    "validation_loss",
)
KEPT = frozenset(
    [f"ss_{key}" for key in _KOHYA]
    + [f"modelspec.{key}" for key in _MODELSPEC]
    + [f"sdlora.{key}" for key in _OWN]
)
"""Header entries that stay in a private file; writing adds hashes and what the file's format needs."""


def without_private(entries: Mapping[str, str]) -> dict[str, str]:
    """Return only the entries that tell nothing about images, captions and files."""
    return {key: value for key, value in entries.items() if key in KEPT}
