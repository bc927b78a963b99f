"""bghira/SimpleTuner: ``config.json`` and the data backends it names (``multidatabackend.json``).

Names and defaults: documentation/OPTIONS.md, DATALOADER.md, config/*.example, commit bc8e6ab (August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from .ledger import OWN_WAY, Ledger, as_number, key_values, numbers, shown
from .shared import base_format, optimizer, optimizer_arguments, precision, schedule
from .simpletuner_backends import translate_backends

_FAMILIES = ("sd1x", "sd2x", "sdxl")


def recognised(document: Any) -> bool:
    """Return whether a JSON document is SimpleTuner's ``config.json``."""
    return isinstance(document, dict) and any(name in document for name in ("model_family", "--model_family"))


def is_backends(document: Any) -> bool:
    """Return whether a JSON document is a list of SimpleTuner's data backends."""
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(backend, dict) and "id" in backend for backend in document)
    )


def given(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options by their plain names.

    Raises:
        ConfigError: for another model than Stable Diffusion, or another method than a LoRA.
    """
    options = {name.lstrip("-"): value for name, value in document.items()}
    family, method = str(options.get("model_family", "sdxl")), str(options.get("model_type", "lora"))
    if family not in _FAMILIES:
        raise ConfigError(
            f"{where}: `model_family={shown(family)}`: sdlora trains Stable Diffusion 1, 2 and XL"
        )
    if method != "lora":
        raise ConfigError(f"{where}: `model_type={shown(method)}`: sdlora trains LoRA; set it to lora")
    return options


def translate(
    ledger: Ledger, backends: Sequence[Mapping[str, Any]], lycoris: Mapping[str, Any] | None = None
) -> None:
    """Translate SimpleTuner's options.

    Args:
        ledger: the options, and of each backend ``backend NAME: repeats``.
        backends: the data backends; those of images become sources.
        lycoris: what the file of ``lycoris_config`` holds, where it could be read.
    """
    _base(ledger)
    translate_backends(ledger, backends)
    _adapter(ledger, lycoris)
    _optimizer(ledger)
    _length(ledger)
    _objective(ledger)
    _validation(ledger)
    _output(ledger)


def _base(ledger: Ledger) -> None:
    if ledger.has("pretrained_model_name_or_path"):
        ledger.put(
            "pretrained_model_name_or_path", "model.base", ledger.text("pretrained_model_name_or_path")
        )
    else:
        ledger.note("no base model is given: add --base to `sdlora train`")
    if ledger.has("pretrained_vae_model_name_or_path"):
        ledger.put(
            "pretrained_vae_model_name_or_path", "model.vae", ledger.text("pretrained_vae_model_name_or_path")
        )
    if ledger.has("prediction_type"):
        ledger.put("prediction_type", "model.prediction_type", ledger.text("prediction_type"))
    if ledger.truth("rescale_betas_zero_snr"):
        ledger.put("rescale_betas_zero_snr", "model.zero_terminal_snr", True)
    ledger.default(
        ("model_family", "model_type", "model_flavour"),
        "the family is read from the base; a LoRA is trained anyway",
    )
    kept = ledger.text("base_model_precision", "no_change")
    if any(mark in kept for mark in ("8", "4", "2")):
        base_format(ledger, ["base_model_precision"], kept)
    ledger.default(
        ("base_model_precision", "base_model_default_dtype", "quantize_via"), "the base stays as it is"
    )


def _adapter(ledger: Ledger, lycoris: Mapping[str, Any] | None) -> None:
    kind = "dora" if ledger.truth("use_dora") else "lora"
    if ledger.text("lora_type", "standard") == "lycoris":
        _lycoris(ledger, lycoris)
    else:
        if ledger.truth("use_dora"):
            ledger.put("use_dora", "adapter.kind", kind, "a LoRA with learned sizes")
        rank = ledger.whole("lora_rank")
        ledger.put("lora_rank", "adapter.rank", rank) if rank else ledger.implied(
            "lora_rank", "adapter.rank", 16, "its default there"
        )
        alpha = ledger.number("lora_alpha")
        if alpha:
            ledger.put("lora_alpha", "adapter.alpha", alpha)
        else:
            ledger.implied("lora_alpha", "adapter.alpha", float(rank or 16), "equal to the rank there")
        start = ledger.text("lora_init_type", "default")
        if start != "default":
            ledger.put("lora_init_type", "adapter.init", start)
        ledger.implied(
            "layers of the adapter", "adapter.targets", "attention", "to_q, to_k, to_v, to_out there"
        )
    ledger.default("lora_init_type", "as here")
    if ledger.number("lora_dropout", 0.0):
        ledger.put("lora_dropout", "adapter.dropout", ledger.number("lora_dropout"))
    if ledger.truth("train_text_encoder"):
        ledger.put("train_text_encoder", "adapter.text_encoder", True)
    if ledger.has("init_lora"):
        ledger.put("init_lora", "adapter.from_file", ledger.text("init_lora"))
    ledger.default("lora_type", "set by adapter.kind")


def _lycoris(ledger: Ledger, config: Mapping[str, Any] | None) -> None:
    if config is None:
        ledger.none("lycoris_config", "that file cannot be read from here: give it beside the configuration")
        ledger.default(("lora_rank", "lora_alpha"), "no effect with lycoris")
        return
    algorithm = str(config.get("algo", "lora")).lower()
    ours = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "dora": "dora"}.get(algorithm)
    full = ledger.inner("lycoris_config", "algo", algorithm)
    ledger.put(
        full,
        "adapter.kind",
        ours or "lora",
        "" if ours else f"sdlora does not train {algorithm}: a plain LoRA",
    )
    for theirs, key in (
        ("linear_dim", "adapter.rank"),
        ("linear_alpha", "adapter.alpha"),
        ("factor", "adapter.lokr_factor"),
    ):
        value = as_number(config.get(theirs))
        if not value or value < 1 or (theirs == "factor" and ours != "lokr"):
            continue
        full = ledger.inner("lycoris_config", theirs, config[theirs])
        if theirs == "linear_dim" and ours == "lokr" and value > 1024:
            ledger.put(
                full,
                "adapter.rank",
                1024,
                "as full as a LoKr can be; so large a rank means the full factor there",
            )
        else:
            ledger.put(full, key, value if theirs == "linear_alpha" else round(value))
    for name in config:
        if name not in ("algo", "linear_dim", "linear_alpha", "factor"):
            full = ledger.inner("lycoris_config", name, config[name])
            if name in ("bypass_mode", "multiplier"):
                ledger.default(full, OWN_WAY)
            ledger.none(full, "layers are chosen by adapter.targets and adapter.block_ranks")
    ledger.default(("lora_rank", "lora_alpha", "lycoris_config"), "the file of lycoris_config says it")


def _optimizer(ledger: Ledger) -> None:
    optimizer(ledger, "optimizer")
    ours = str(ledger.values.get("optimizer.name", "adamw"))
    optimizer_arguments(
        ledger, key_values(ledger.text("optimizer_config").replace(",", " ")), "optimizer_config", ours
    )
    rate = ledger.number("learning_rate")
    if rate is not None:
        ledger.put("learning_rate", "optimizer.learning_rate", rate)
    ledger.implied("learning_rate", "optimizer.learning_rate", 4e-7, "its default there")
    if ledger.truth("train_text_encoder") and ledger.has("text_encoder_lr"):
        ledger.put(
            "text_encoder_lr", "optimizer.text_encoder_learning_rate", ledger.number("text_encoder_lr")
        )
    betas = (ledger.number("adam_beta1"), ledger.number("adam_beta2"))
    if None not in betas and ours == "adamw":
        ledger.put(("adam_beta1", "adam_beta2"), "optimizer.betas", betas, "both together")
    elif ours == "adamw":
        ledger.implied("adam_beta1, adam_beta2", "optimizer.betas", (0.9, 0.999), "their defaults there")
    for theirs, key in (
        ("adam_weight_decay", "optimizer.weight_decay"),
        ("adam_epsilon", "optimizer.epsilon"),
        ("max_grad_norm", "optimizer.max_grad_norm"),
    ):
        if ledger.has(theirs):
            ledger.put(theirs, key, ledger.number(theirs))
    schedule(ledger, "lr_scheduler", "sine" if not ledger.has("lr_scheduler") else "constant")
    warmup = ledger.whole("lr_warmup_steps")
    if warmup is not None:
        ledger.put("lr_warmup_steps", "optimizer.warmup_steps", warmup)
    if ledger.values.get("optimizer.schedule") == "polynomial" and ledger.has("lr_power"):
        ledger.put("lr_power", "optimizer.schedule_power", ledger.number("lr_power"))
    ledger.default(("lr_num_cycles", "lr_power", "lr_end"), "no effect with this schedule")
    ledger.none("lr_scale", "write the rate that is used: it is not scaled by the batch here")


def _length(ledger: Ledger) -> None:
    steps, epochs = ledger.whole("max_train_steps", 0), ledger.whole("num_train_epochs", 0)
    if steps:
        ledger.put("max_train_steps", "training.steps", steps)
        ledger.default("num_train_epochs", "max_train_steps takes precedence")
    elif epochs:
        ledger.put("num_train_epochs", "training.epochs", epochs)
        ledger.default("max_train_steps", "0 leaves the length to num_train_epochs")
    for theirs, key in (
        ("train_batch_size", "training.batch_size"),
        ("gradient_accumulation_steps", "training.gradient_accumulation"),
    ):
        if ledger.whole(theirs):
            ledger.put(theirs, key, ledger.whole(theirs))
    precision(ledger, "mixed_precision", "training.precision")
    if ledger.has("seed"):
        ledger.put("seed", "training.seed", ledger.whole("seed"))
    if ledger.has("gradient_checkpointing"):
        ledger.put(
            "gradient_checkpointing",
            "training.recompute",
            "blocks" if ledger.truth("gradient_checkpointing") else "nothing",
        )
    if ledger.text("attention_mechanism") == "xformers":
        ledger.put("attention_mechanism", "training.attention", "xformers")
    ledger.default("attention_mechanism", "chosen by itself")
    ledger.default("resume_from_checkpoint", "runs are resumed with `sdlora train --resume`")


def _objective(ledger: Ledger) -> None:
    gamma = ledger.number("snr_gamma")
    if gamma:
        ledger.put("snr_gamma", "training.min_snr_gamma", gamma)
    else:
        ledger.default("snr_gamma", "no weight by signal to noise")
        ledger.implied("snr_gamma", "training.min_snr_gamma", 0.0, "off by default there")
        ledger.values.setdefault("training.min_snr_gamma", 0.0)
    loss = ledger.text("loss_type", "l2")
    if loss != "l2":
        ledger.put("loss_type", "training.loss", loss)
        for theirs, key in (("huber_schedule", "training.huber_schedule"), ("huber_c", "training.huber_c")):
            if ledger.has(theirs):
                ledger.put(theirs, key, ledger.number(theirs) if theirs == "huber_c" else ledger.text(theirs))
    ledger.default(("loss_type", "huber_schedule", "huber_c"), "the squared error is used anyway")
    if ledger.truth("offset_noise") and ledger.number("noise_offset", 0.1):
        names = [name for name in ("offset_noise", "noise_offset") if ledger.has(name)]
        ledger.put(names, "training.noise_offset", ledger.number("noise_offset", 0.1), "both together")
    ledger.default(("noise_offset", "noise_offset_probability"), "no effect without offset_noise")
    if ledger.number("input_perturbation", 0.0):
        ledger.put("input_perturbation", "training.input_perturbation", ledger.number("input_perturbation"))
    if ledger.truth("use_ema"):
        ledger.put("use_ema", "training.average", "ema", "an average of the weights")
    ledger.default(
        ("ema_decay", "ema_device", "ema_cpu_only", "ema_update_interval", "ema_validation"),
        "no average is kept, or as here",
    )
    if ledger.truth("use_soft_min_snr"):
        ledger.put("use_soft_min_snr", "training.soft_min_snr", True)


def _validation(ledger: Ledger) -> None:
    """Translate SimpleTuner's validation, which draws images, into previews."""
    if ledger.has("validation_prompt"):
        ledger.put(
            "validation_prompt",
            "sample.prompts",
            [ledger.text("validation_prompt")],
            "validation draws previews there",
        )
    every = next(
        (name for name in ("validation_step_interval", "validation_steps") if ledger.whole(name)), None
    )
    if every:
        ledger.put(every, "sample.every", ledger.whole(every))
    if ledger.has("validation_guidance"):
        ledger.put("validation_guidance", "sample.guidance", ledger.number("validation_guidance"))
    if ledger.has("validation_negative_prompt"):
        ledger.put(
            "validation_negative_prompt", "sample.negative_prompt", ledger.text("validation_negative_prompt")
        )
    for theirs, key in (
        ("validation_num_inference_steps", "sample.steps"),
        ("validation_seed", "sample.seed"),
    ):
        if ledger.has(theirs):
            ledger.put(theirs, key, ledger.whole(theirs))
    sides = numbers(ledger.text("validation_resolution")) if ledger.has("validation_resolution") else []
    ledger.default(
        "validation_resolution", "previews have the size of training" if sides else "as in training"
    )
    ledger.none("validation_prompt_library", "write the prompts in sample.prompts")
    ledger.none("user_prompt_library", "write its prompts in sample.prompts")
    ledger.default(
        (
            "validation_guidance_rescale",
            "validation_torch_compile",
            "disable_benchmark",
            "validation_guidance",
            "validation_steps",
            "validation_step_interval",
            "evaluation_type",
            "validation_disable_unconditional",
        ),
        "no effect, or set by the previews' settings",
    )


def _output(ledger: Ledger) -> None:
    if ledger.has("output_dir"):
        ledger.put("output_dir", "output.folder", ledger.text("output_dir"))
    every = next(
        (name for name in ("checkpoint_step_interval", "checkpointing_steps") if ledger.whole(name)), None
    )
    if every:
        ledger.put(every, "training.checkpoint_every", ledger.whole(every))
    if ledger.whole("checkpoints_total_limit"):
        ledger.put(
            "checkpoints_total_limit", "training.keep_checkpoints", ledger.whole("checkpoints_total_limit")
        )
    if ledger.has("modelspec_comment"):
        ledger.put("modelspec_comment", "output.description", ledger.text("modelspec_comment"))
    ledger.none(("push_to_hub", "push_checkpoints_to_hub", "hub_model_id"), "publish the finished file apart")
    tracker = ledger.text("report_to").lower()
    if tracker not in ("", "none") and ledger.allows("training.tracker", tracker):
        ledger.put("report_to", "training.tracker", tracker)
    ledger.none(
        ("report_to", "tracker_project_name", "tracker_run_name", "logging_dir"),
        "the run folder holds events.jsonl and loss.png",
    )
