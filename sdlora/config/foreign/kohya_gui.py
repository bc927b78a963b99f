"""bmaltais/kohya_ss: the JSON that its LoRA tab saves, put into the names of sd-scripts.

How each field becomes an argument: kohya_gui/lora_gui.py, ``train_model``, commit 45088f0 (July 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .ledger import as_number, is_off

RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "lora_network_weights": "network_weights",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
}
"""Fields that sd-scripts calls otherwise."""
NETWORKS = {
    "standard": "networks.lora",
    "kohya locon": "networks.lora",
    "lora-fa": "networks.lora_fa",
    "kohya dylora": "networks.dylora",
    "kohya loha": "networks.loha",
    "kohya lokr": "networks.lokr",
}
_ALGORITHMS = {
    "locon": "locon",
    "loha": "loha",
    "lokr": "lokr",
    "ia3": "ia3",
    "dylora": "dylora",
    "diag-oft": "diag-oft",
    "boft": "boft",
    "glora": "glora",
    "native fine-tuning": "full",
}
_PARTS = (
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "rank_dropout",
    "module_dropout",
)
_LYCORIS = (
    "use_tucker",
    "use_cp",
    "use_scalar",
    "rank_dropout_scale",
    "train_norm",
    "dora_wd",
    "decompose_both",
    "bypass_mode",
    "factor",
    "constrain",
    "rescaled",
)
OF_THE_PAGE = (
    "LyCORIS_preset",
    "num_processes",
    "num_machines",
    "multi_gpu",
    "gpu_ids",
    "main_process_port",
    "dynamo_mode",
    "dynamo_use_dynamic",
    "dynamo_use_fullgraph",
    "extra_accelerate_launch_args",
    "train_on_input",
    "model_list",
    "unit",
    "no_token_padding",
    "stop_text_encoder_training_pct",
    "factor",
    "conv_dim",
    "conv_alpha",
    "noise_offset_type",
    "use_cp",
    "decompose_both",
    "LoRA_type",
    "num_cpu_threads_per_process",
    "additional_parameters",
    "save_as_bool",
    "headless",
    "print_only",
)
"""Fields of the page that count only with another choice on it, or say how it starts sd-scripts."""


def recognised(document: Any) -> bool:
    """Return whether a JSON document is saved settings of kohya_ss."""
    return isinstance(document, dict) and "LoRA_type" in document and "network_dim" in document


def as_arguments(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that kohya_ss makes of its fields, under the names of sd-scripts.

    Fields that are 0 or empty where sd-scripts takes that for "off" are left at that; the rest keeps its
    name, so that each is accounted for.
    """
    fields = {RENAMED.get(name, name): value for name, value in document.items() if name != "LoRA_type"}
    kind = str(document.get("LoRA_type", "Standard")).lower()
    words = [f"{name}={fields.pop(name)}" for name in _PARTS if not is_off(fields.get(name))]
    if kind.startswith("lycoris/"):
        fields["network_module"] = "lycoris.kohya"
        words.append(f"algo={_ALGORITHMS.get(kind.partition('/')[2], kind)}")
        words += [f"{name}={fields.pop(name)}" for name in _LYCORIS if not is_off(fields.get(name))]
        if not is_off(fields.get("LyCORIS_preset")):
            words.append(f"preset={fields['LyCORIS_preset']}")
    else:
        fields["network_module"] = NETWORKS.get(kind, kind)
    if kind not in ("standard", "lora-fa") and as_number(fields.get("conv_dim")):
        words += [f"conv_dim={fields.pop('conv_dim')}", f"conv_alpha={fields.pop('conv_alpha', 1)}"]
    for name, argument in (("loraplus_lr_ratio",) * 2, ("loraplus_unet_lr_ratio",) * 2):
        if as_number(fields.get(name)):
            words.append(f"{argument}={fields.pop(name)}")
    if words:
        fields["network_args"] = words
    _choices(fields)
    return fields


def _choices(fields: dict[str, Any]) -> None:
    """Turn what the page asks in its own way into arguments."""
    attention = str(fields.pop("xformers", "")).lower()
    if attention in ("xformers", "sdpa"):
        fields[attention] = True
    for rate in ("unet_lr", "text_encoder_lr"):
        if as_number(fields.get(rate)) == 0 and rate == "unet_lr":
            fields.pop(rate)
    if as_number(fields.get("text_encoder_lr")) == 0 and not fields.get("network_train_unet_only"):
        fields["network_train_unet_only"] = True
    if str(fields.get("noise_offset_type", "Original")) == "Multires":
        fields["noise_offset"] = 0
    else:
        fields["multires_noise_iterations"] = 0
    warmup, steps = as_number(fields.get("lr_warmup")), as_number(fields.get("lr_warmup_steps"))
    if warmup and not steps:
        fields["lr_warmup_steps"] = warmup / 100
    fields.pop("lr_warmup", None)
    if as_number(fields.get("max_train_epochs")) == 0 or fields.get("max_train_epochs") == "":
        fields.pop("max_train_epochs")
    epochs, limit = as_number(fields.pop("epoch", None)), as_number(fields.get("max_train_steps"))
    if epochs and not limit and not fields.get("max_train_epochs"):
        fields["max_train_epochs"] = round(epochs)
    for name in (
        "max_train_steps",
        "min_snr_gamma",
        "scale_weight_norms",
        "network_dropout",
        "clip_skip",
        "seed",
        "vae_batch_size",
        "max_timestep",
        "text_encoder_lr",
    ):
        if as_number(fields.get(name)) == 0 or fields.get(name) == "":
            fields[name] = None
