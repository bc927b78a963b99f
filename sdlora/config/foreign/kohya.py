"""kohya-ss/sd-scripts: the arguments of ``train_network.py`` and ``sdxl_train_network.py``.

Names and defaults: library/train_util.py, train_network.py, networks/lora.py, library/config_util.py and
docs/config_README-en.md of sd-scripts, commit 48d368f (February 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from .kohya_data import captions, folders, images
from .ledger import OWN_WAY, Ledger, is_off, key_values, numbers
from .shared import base_format, optimizer, precision, prompt_lines, sampler, schedule

OTHER_MODELS = ("flux", "sd3", "lumina", "hunyuan", "anima", "chroma")


def translate(ledger: Ledger, datasets: Sequence[Mapping[str, Any]] = (), prompts: str | None = None) -> None:
    """Translate settings of ``train_network.py``.

    Args:
        ledger: the settings by their long names, ``network_dim``.
        datasets: tables of a dataset TOML, as :func:`sdlora.config.foreign.kohya_dataset.translate` reads it.
        prompts: text of the file that ``sample_prompts`` names, where it could be read.
    """
    _base(ledger)
    if not datasets:
        folders(ledger)
        captions(ledger)
        images(ledger)
    _adapter(ledger)
    _optimizer(ledger)
    _length(ledger)
    _objective(ledger)
    _previews(ledger, prompts)
    _validation(ledger)
    _output(ledger)
    _without_effect(ledger)


def _base(ledger: Ledger) -> None:
    if ledger.has("pretrained_model_name_or_path"):
        ledger.put(
            "pretrained_model_name_or_path", "model.base", ledger.text("pretrained_model_name_or_path")
        )
    else:
        ledger.note("no base model is given: add --base to `sdlora train`")
    if ledger.has("vae"):
        ledger.put("vae", "model.vae", ledger.text("vae"))
    if ledger.truth("v_parameterization"):
        ledger.put("v_parameterization", "model.prediction_type", "v_prediction")
    if ledger.truth("zero_terminal_snr"):
        ledger.put("zero_terminal_snr", "model.zero_terminal_snr", True)
    skip = ledger.whole("clip_skip")
    if skip is not None and skip <= 1:
        ledger.default("clip_skip", "the last layer is used anyway")
    elif skip is not None:
        ledger.put("clip_skip", "model.clip_skip", skip)
    ledger.default(("v2", "sdxl"), "the family is read from the base")


def _adapter(ledger: Ledger) -> None:
    arguments = key_values(ledger.raw("network_args"))
    module = ledger.text("network_module", "networks.lora")
    algorithm = arguments.get("algo", "lora").lower()
    kinds = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "dora": "dora"}
    plain = module.rpartition(".")[2]
    kind = kinds.get(algorithm if plain == "kohya" else plain)
    dora = not is_off(arguments.get("dora_wd", "false")) and kind == "lora"
    if kind is None:
        named = algorithm if plain == "kohya" else module
        ledger.put("network_module", "adapter.kind", "lora", f"sdlora does not train {named}: a plain LoRA")
        kind = "lora"
    elif dora:
        ledger.put("network_module", "adapter.kind", "dora", "its network_args say dora_wd")
    elif kind == "lora":
        ledger.default("network_module", "a LoRA is trained anyway")
    else:
        ledger.put("network_module", "adapter.kind", kind)
    _targets(ledger, module, arguments)
    rank = ledger.whole("network_dim")
    if rank is not None:
        ledger.put("network_dim", "adapter.rank", rank)
    ledger.implied("network_dim", "adapter.rank", 4, "its default there")
    alpha = ledger.number("network_alpha")
    if alpha:
        reason = "the same: the scale alpha / rank is that of sd-scripts, so the rates keep their meaning"
        ledger.put("network_alpha", "adapter.alpha", alpha, reason)
    elif alpha is not None:
        ledger.put("network_alpha", "adapter.alpha", float(rank or 4), "0 stands for the rank there")
    ledger.implied("network_alpha", "adapter.alpha", 1.0, "its default there")
    if ledger.number("network_dropout", 0.0):
        ledger.put("network_dropout", "adapter.dropout", ledger.number("network_dropout"))
    if ledger.has("network_weights"):
        ledger.put("network_weights", "adapter.from_file", ledger.text("network_weights"))
        ledger.default("dim_from_weights", "ranks are taken from the file")
    _text_encoder(ledger)
    _network_arguments(ledger, arguments, kind)
    if ledger.number("scale_weight_norms", 0.0):
        limit = ledger.number("scale_weight_norms")
        ledger.put("scale_weight_norms", "optimizer.max_update_norm", limit)
    ledger.none(("base_weights", "base_weights_multiplier"), "bake them into the base first: `sdlora bake`")


def _targets(ledger: Ledger, module: str, arguments: Mapping[str, str]) -> None:
    convolutions = "conv_dim" in arguments or "lycoris" in module
    preset = arguments.get("preset", "full")
    if convolutions and preset in ("full", ""):
        reason = "linear layers and convolutions, which have the same rank and alpha here"
        ledger.implied("layers of the network", "adapter.targets", "all", reason)
    else:
        reason = "the linear layers of the transformer blocks, as networks.lora adapts"
        ledger.implied("layers of the network", "adapter.targets", "linear", reason)


def _text_encoder(ledger: Ledger) -> None:
    rates = numbers(ledger.raw("text_encoder_lr", []))
    only_unet = ledger.truth("network_train_unet_only") or (bool(rates) and not any(rates))
    if only_unet:
        ledger.default(("network_train_unet_only", "text_encoder_lr"), "only the U-Net is adapted anyway")
    else:
        ledger.implied(
            "network_train_unet_only", "adapter.text_encoder", True, "it trains text encoders by default"
        )
    ledger.none("network_train_text_encoder_only", "sdlora always adapts the U-Net")
    shared = ledger.number("learning_rate", 2e-6)
    if ledger.has("unet_lr"):
        ledger.put("unet_lr", "optimizer.learning_rate", ledger.number("unet_lr"))
        ledger.default("learning_rate", "unet_lr takes precedence")
    elif ledger.has("learning_rate"):
        ledger.put("learning_rate", "optimizer.learning_rate", shared)
    ledger.implied("learning_rate", "optimizer.learning_rate", 2e-6, "its default there")
    if only_unet:
        return
    if rates:
        key = "optimizer.text_encoder_learning_rate"
        ledger.put("text_encoder_lr", key, rates[0])
        if len(rates) > 1 and rates[1] != rates[0]:
            key = "optimizer.text_encoder_2_learning_rate"
            ledger.put("text_encoder_lr", key, rates[1], "its second number")
    else:
        key = "optimizer.text_encoder_learning_rate"
        ledger.implied("text_encoder_lr", key, shared, "learning_rate counts for text encoders, too")


def _network_arguments(ledger: Ledger, arguments: Mapping[str, str], kind: str) -> None:
    for name, value in arguments.items():
        full, amounts = ledger.inner("network_args", name, value), numbers(value)
        if name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio") and amounts:
            ledger.put(full, "optimizer.lora_plus_ratio", amounts[0])
        elif name == "factor" and kind == "lokr" and amounts and amounts[0] >= 2:
            ledger.put(full, "adapter.lokr_factor", round(amounts[0]))
        elif name == "factor":
            ledger.default(full, "chosen near the square root of the sides anyway")
        elif name in ("algo", "dora_wd", "preset"):
            ledger.default(full, "set by adapter.kind and adapter.targets")
        elif name == "conv_dim" and ledger.text("network_dim", "4") == value:
            ledger.default(full, "convolutions have the same rank anyway")
        elif name in ("conv_dim", "conv_alpha"):
            ledger.none(full, "convolutions have the rank and alpha of the linear layers")
        elif name in ("rank_dropout", "module_dropout") and amounts and amounts[0] > 0:
            ledger.put(full, f"adapter.{name}", amounts[0])
        elif name == "bypass_mode":
            ledger.default(full, "no effect on the result")
        elif name in ("block_dims", "block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight"):
            ledger.none(full, "written by name here: adapter.block_ranks, optimizer.block_rates")
        else:
            ledger.none(full, "sdlora's adapters have no such part")


def _optimizer(ledger: Ledger) -> None:
    for name, ours in (("use_8bit_adam", "adamw8bit"), ("use_lion_optimizer", "lion")):
        if ledger.truth(name) and not ledger.has("optimizer_type"):
            ledger.put(name, "optimizer.name", ours, "the same")
    optimizer(ledger, "optimizer_type", ledger.raw("optimizer_args"), "optimizer_args")
    if ledger.text("optimizer_type", "adamw").lower() in ("adamw", "adamw8bit") and "betas" not in key_values(
        ledger.raw("optimizer_args")
    ):
        ledger.implied("betas of the optimizer", "optimizer.betas", (0.9, 0.999), "its default there")
    schedule(ledger, "lr_scheduler")
    warmup = ledger.number("lr_warmup_steps", 0.0) or 0.0
    if 0 < warmup < 1:
        steps = ledger.whole("max_train_steps")
        if ledger.allows("optimizer.warmup_share", warmup):
            ledger.put("lr_warmup_steps", "optimizer.warmup_share", warmup, "a share of the run")
        elif steps:
            ledger.put(
                "lr_warmup_steps", "optimizer.warmup_steps", round(warmup * steps), f"of {steps} steps"
            )
        else:
            ledger.none("lr_warmup_steps", "a share of the run; give optimizer.warmup_steps")
    elif warmup:
        ledger.put("lr_warmup_steps", "optimizer.warmup_steps", round(warmup))
    ledger.implied("lr_warmup_steps", "optimizer.warmup_steps", 0, "its default there")
    norm = ledger.number("max_grad_norm")
    if norm is not None:
        ledger.put("max_grad_norm", "optimizer.max_grad_norm", norm)
    cycles = ledger.whole("lr_scheduler_num_cycles")
    if cycles and ledger.values.get("optimizer.schedule") == "cosine_with_restarts":
        ledger.put("lr_scheduler_num_cycles", "optimizer.schedule_cycles", cycles)
    else:
        ledger.default("lr_scheduler_num_cycles", "no effect with this schedule")
    power = ledger.number("lr_scheduler_power")
    if power is not None and ledger.values.get("optimizer.schedule") == "polynomial":
        ledger.put("lr_scheduler_power", "optimizer.schedule_power", power)
    else:
        ledger.default("lr_scheduler_power", "no effect with this schedule")
    if ledger.has("lr_scheduler_min_lr_ratio"):
        ratio = ledger.number("lr_scheduler_min_lr_ratio")
        ledger.put("lr_scheduler_min_lr_ratio", "optimizer.schedule_floor", ratio)
    ledger.default("fused_backward_pass", OWN_WAY)


def _length(ledger: Ledger) -> None:
    epochs = ledger.whole("max_train_epochs")
    if epochs:
        ledger.put("max_train_epochs", "training.epochs", epochs)
        ledger.default("max_train_steps", "max_train_epochs takes precedence")
    elif ledger.has("max_train_steps"):
        ledger.put("max_train_steps", "training.steps", ledger.whole("max_train_steps"))
    else:
        ledger.implied("max_train_steps", "training.steps", 1600, "its default there")
    batch = ledger.whole("train_batch_size")
    if "training.batch_size" in ledger.values:
        ledger.default("train_batch_size", "the data set's own takes precedence")
    elif batch:
        ledger.put("train_batch_size", "training.batch_size", batch)
    else:
        ledger.implied("train_batch_size", "training.batch_size", 1, "its default there")
    accumulation = ledger.whole("gradient_accumulation_steps")
    if accumulation:
        key = "training.gradient_accumulation"
        ledger.put("gradient_accumulation_steps", key, accumulation)
    precision(ledger, "mixed_precision", "training.precision")
    ledger.default(
        ("full_fp16", "full_bf16"), "the adapter's own values stay fp32, everything else is in that format"
    )
    if ledger.has("seed"):
        ledger.put("seed", "training.seed", ledger.whole("seed"))
    if ledger.truth("gradient_checkpointing"):
        ledger.put("gradient_checkpointing", "training.recompute", "blocks")
    for name in ("xformers", "sdpa"):
        if ledger.truth(name):
            ledger.put(name, "training.attention", name)
    if fp8 := [name for name in ("fp8_base", "fp8_base_unet") if ledger.truth(name)]:
        base_format(ledger, fp8, "fp8")
    ledger.default(("fp8_base", "fp8_base_unet"), "the base stays whole")
    ledger.none("blocks_to_swap", "sdlora keeps the U-Net on the card; training.recompute saves memory")
    ledger.none(
        ("resume", "resume_from_huggingface"), "states of sd-scripts cannot be resumed; adapter.from_file can"
    )
    ledger.none(
        ("initial_epoch", "initial_step", "skip_until_initial_step"), "sdlora resumes exactly by itself"
    )


def _objective(ledger: Ledger) -> None:
    gamma = ledger.number("min_snr_gamma")
    if ledger.truth("debiased_estimation_loss"):
        ledger.put("debiased_estimation_loss", "training.loss_weighting", "debiased")
        ledger.none("min_snr_gamma", "timesteps have one weight here, and the debiased one is taken")
    else:
        if gamma is not None:
            ledger.put("min_snr_gamma", "training.min_snr_gamma", gamma)
        ledger.implied("min_snr_gamma", "training.min_snr_gamma", 0.0, "off by default there")
    if ledger.number("noise_offset", 0.0):
        ledger.put("noise_offset", "training.noise_offset", ledger.number("noise_offset"))
    if ledger.text("loss_type", "l2").lower() in ("l2", "mse"):
        ledger.default(
            ("loss_type", "huber_schedule", "huber_c", "huber_scale"), "the squared error is used anyway"
        )
    else:
        ledger.put("loss_type", "training.loss", ledger.text("loss_type").lower())
        if ledger.has("huber_schedule"):
            ledger.put("huber_schedule", "training.huber_schedule", ledger.text("huber_schedule"))
        if ledger.has("huber_c"):
            ledger.put("huber_c", "training.huber_c", ledger.number("huber_c"))
    lowest, highest = ledger.whole("min_timestep", 0), ledger.whole("max_timestep", 1000)
    if (lowest, highest) != (0, 1000):
        ledger.put("min_timestep", "training.min_timestep", lowest)
        ledger.put("max_timestep", "training.max_timestep", highest)
    else:
        ledger.default(("min_timestep", "max_timestep"), "all timesteps are drawn anyway")
    if ledger.number("ip_noise_gamma", 0.0):
        key = "training.input_perturbation"
        ledger.put("ip_noise_gamma", key, ledger.number("ip_noise_gamma"))
    if ledger.whole("multires_noise_iterations", 0):
        levels = ledger.whole("multires_noise_iterations", 0)
        ledger.put("multires_noise_iterations", "training.multires_noise_iterations", levels)
        if discount := ledger.number("multires_noise_discount", 0.0):
            ledger.put("multires_noise_discount", "training.multires_noise_discount", discount)
    ledger.default("multires_noise_discount", "no effect without multires noise")
    lacking = ("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "adaptive_noise_scale")
    ledger.none(
        (*lacking, "noise_offset_random_strength", "ip_noise_gamma_random_strength"),
        "sdlora has no such loss",
    )


def _previews(ledger: Ledger, prompts: str | None) -> None:
    wanted = ledger.has("sample_prompts")
    if wanted and prompts is not None:
        lines, refused = prompt_lines(prompts)
        ledger.put("sample_prompts", "sample.prompts", lines, "the lines of that file with their options")
        if any(" --" in line for line in lines):
            ledger.values["sample.prompt_options"] = True
        for option in refused:
            label = f"line {option.line}: --{option.name}"
            ledger.none(ledger.inner("sample_prompts", label, option.value), option.reason)
    elif wanted:
        ledger.none(
            "sample_prompts", "that file cannot be read from here: name its prompts in sample.prompts"
        )
    if ledger.whole("sample_every_n_steps", 0):
        ledger.put("sample_every_n_steps", "sample.every", ledger.whole("sample_every_n_steps"))
    ledger.none("sample_every_n_epochs", "given in steps here: sample.every")
    ledger.default("sample_at_first", "a preview is always made before the first step")
    sampler(ledger, "sample_sampler")


def _validation(ledger: Ledger) -> None:
    share = ledger.number("validation_split", 0.0) or 0.0
    if share or not ledger.has("validation_split"):
        reason = "held out by groups of near duplicates" if share else "none by default there"
        ledger.put("validation_split", "data.validation", share, reason)
    every = ledger.whole("validate_every_n_steps", 0)
    if share and every:
        ledger.put("validate_every_n_steps", "training.validate_every", every)
    ledger.none("validate_every_n_epochs", "given in steps here: training.validate_every")
    ledger.none(
        ("validation_seed", "max_validation_steps"), "the same images and noise are measured each time"
    )


def _output(ledger: Ledger) -> None:
    folder, name = ledger.text("output_dir"), ledger.text("output_name")
    if name:
        ledger.put("output_name", "output.name", name)
    if folder:
        path = PureWindowsPath(folder) if "\\" in folder else PurePosixPath(folder)
        run = str(path / (name or "lora"))
        ledger.put("output_dir", "output.folder", run, "a folder of its own for each run")
    if ledger.has("save_precision"):
        precision(ledger, "save_precision", "output.dtype")
    else:
        ledger.implied("save_precision", "output.dtype", "fp32", "the adapter's own format by default there")
    if ledger.text("save_model_as", "safetensors") == "safetensors":
        ledger.default("save_model_as", "a .safetensors file is written anyway")
    else:
        ledger.none("save_model_as", "only .safetensors is written: other formats can hold code")
    every = ledger.whole("save_every_n_steps", 0)
    if every:
        ledger.put("save_every_n_steps", "training.checkpoint_every", every, "resumable checkpoints")
        last = ledger.whole("save_last_n_steps", 0)
        if last:
            kept = max(1, last // every)
            ledger.put("save_last_n_steps", "training.keep_checkpoints", kept, f"{last} steps back")
    ledger.none(
        ("save_every_n_epochs", "save_last_n_epochs", "save_n_epoch_ratio", "save_last_n_steps"),
        "checkpoints are given in steps here: training.checkpoint_every, training.keep_checkpoints",
    )
    states = ("save_state", "save_state_on_train_end", "save_last_n_epochs_state", "save_last_n_steps_state")
    ledger.default(states, "every checkpoint can be resumed from")
    if ledger.has("training_comment"):
        ledger.put("training_comment", "output.description", ledger.text("training_comment"))
    if ledger.has("metadata_description"):
        ledger.put("metadata_description", "output.description", ledger.text("metadata_description"))
    if ledger.has("metadata_license"):
        ledger.put("metadata_license", "output.license", ledger.text("metadata_license"))
    if ledger.truth("no_metadata"):
        ledger.put(
            "no_metadata", "output.private", True, "captions and names stay out; what loading needs is kept"
        )


def _without_effect(ledger: Ledger) -> None:
    ledger.default(
        (
            "max_data_loader_n_workers",
            "persistent_data_loader_workers",
            "vae_batch_size",
            "lowram",
            "highvram",
            "no_half_vae",
            "mem_eff_attn",
            "text_encoder_batch_size",
            "disable_mmap_load_safetensors",
            "ddp_timeout",
            "ddp_gradient_as_bucket_view",
            "ddp_static_graph",
            "tokenizer_cache_dir",
            "torch_compile",
            "dynamo_backend",
            "cpu_offload_checkpointing",
            "num_cpu_threads_per_process",
            "debug_dataset",
            "output_config",
        ),
        OWN_WAY,
    )
    ledger.default(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), "sdlora always does")
    ledger.default("max_token_length", "captions of any length are encoded in parts of 75 tokens")
    ledger.default("use_safetensors", "a .safetensors file is written anyway")
    tracker = ledger.text("log_with").lower()
    if tracker and ledger.allows("training.tracker", tracker):
        ledger.put("log_with", "training.tracker", tracker)
    ledger.none(
        (
            "logging_dir",
            "log_with",
            "log_prefix",
            "log_tracker_name",
            "wandb_run_name",
            "log_tracker_config",
            "wandb_api_key",
            "log_config",
        ),
        "the run folder holds events.jsonl and loss.png",
    )
