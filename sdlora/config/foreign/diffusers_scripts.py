"""diffusers' example scripts: ``train_text_to_image_lora(_sdxl).py`` and ``train_dreambooth_lora(_sdxl).py``.

Names and defaults: examples/text_to_image and examples/dreambooth of diffusers, commit 58eb52c (August 2026).
"""

from __future__ import annotations

from .ledger import OWN_WAY, Ledger
from .shared import precision, schedule

_BATCH = {"train_text_to_image_lora": 16, "train_text_to_image_lora_sdxl": 16}
_RATE = {"train_dreambooth_lora": 5e-4}


def translate(ledger: Ledger, script: str) -> None:
    """Translate arguments of one of the scripts.

    Args:
        ledger: the arguments by their long names.
        script: the script's name without ``.py``; defaults differ.
    """
    dreambooth, xl = "dreambooth" in script, script.endswith("sdxl")
    _base(ledger)
    _data(ledger, dreambooth, xl)
    _adapter(ledger, dreambooth)
    _optimizer(ledger, script, dreambooth and xl)
    _length(ledger, script, dreambooth)
    _previews(ledger)
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
    ledger.none("revision", "download that revision first and give its folder as model.base")
    ledger.default("variant", "weights are converted to training.precision as they are read")
    ledger.default("tokenizer_name", "the base's own is used")


def _data(ledger: Ledger, dreambooth: bool, xl: bool) -> None:
    for name in ("train_data_dir", "instance_data_dir"):
        if ledger.has(name):
            ledger.put(name, "data.folder", ledger.text(name))
    ledger.none(
        ("dataset_name", "dataset_config_name"),
        "sdlora reads folders: save the data set as one (`imagefolder`)",
    )
    if ledger.has("instance_prompt"):
        prompt = ledger.text("instance_prompt")
        ledger.put(
            "instance_prompt",
            "data.trigger_word",
            prompt,
            "put in front of captions, the caption where there is none",
        )
    if ledger.has("class_data_dir") and ledger.truth("with_prior_preservation"):
        weight = ledger.number("prior_loss_weight", 1.0)
        source = {"folder": ledger.text("class_data_dir"), "regularisation": True, "weight": weight}
        if ledger.has("class_prompt"):
            source["caption"] = ledger.text("class_prompt")
        names = [
            n
            for n in ("class_data_dir", "class_prompt", "prior_loss_weight", "with_prior_preservation")
            if ledger.has(n)
        ]
        ledger.put(names, "data.sources", [source], "a source of regularisation images")
    ledger.none(
        ("num_class_images", "sample_batch_size", "prior_generation_precision"),
        "regularisation images are not drawn by training; `sdlora generate` draws them",
    )
    if ledger.has("caption_column") and ledger.text("caption_column") != "text":
        ledger.put("caption_column", "data.metadata_caption", ledger.text("caption_column"))
    ledger.default(("image_column", "caption_column"), "found by itself")
    side = ledger.whole("resolution")
    if side:
        ledger.put("resolution", "data.resolution", side)
    ledger.implied("resolution", "data.resolution", 1024 if xl else 512, "its default there")
    ledger.implied("images cut to squares", "data.buckets", False, "the script has no aspect ratio buckets")
    if ledger.truth("center_crop"):
        ledger.default("center_crop", "the centre is kept anyway")
    else:
        ledger.implied("center_crop", "data.crop", "random", "squares are cut at random by default there")
    if ledger.truth("random_flip"):
        ledger.put("random_flip", "data.flip", True)
    if ledger.whole("repeats", 1) != 1:
        ledger.put("repeats", "data.repeats", ledger.whole("repeats"))
    ledger.none("max_train_samples", "move the images that are not wanted out of the folder")
    ledger.implied("caption dropout", "data.caption_dropout", 0.0, "the script has none")
    ledger.implied("images held out", "data.validation", 0, "the script holds none out")
    ledger.default("image_interpolation_mode", "images are shrunk with an area filter, enlarged with Lanczos")
    ledger.default(("cache_dir", "dataloader_num_workers", "pre_compute_text_embeddings"), OWN_WAY)
    ledger.none(
        ("text_encoder_use_attention_mask", "validation_images", "class_labels_conditioning"),
        "of DeepFloyd IF",
    )
    ledger.default("tokenizer_max_length", "captions of any length are encoded in parts of 75 tokens")


def _adapter(ledger: Ledger, dreambooth: bool) -> None:
    ledger.implied(
        "layers of the adapter", "adapter.targets", "attention", "to_q, to_k, to_v, to_out as in the script"
    )
    rank = ledger.whole("rank")
    if rank:
        ledger.put("rank", "adapter.rank", rank)
    ledger.implied("rank", "adapter.rank", 4, "its default there")
    ledger.implied("lora_alpha", "adapter.alpha", float(rank or 4), "the script sets alpha to the rank")
    ledger.implied("init_lora_weights", "adapter.init", "gaussian", "as in the script")
    if ledger.truth("use_dora"):
        ledger.put("use_dora", "adapter.kind", "dora")
    if ledger.number("lora_dropout", 0.0):
        ledger.put("lora_dropout", "adapter.dropout", ledger.number("lora_dropout"))
    if ledger.truth("train_text_encoder"):
        ledger.put("train_text_encoder", "adapter.text_encoder", True)


def _optimizer(ledger: Ledger, script: str, separate: bool) -> None:
    rate = ledger.number("learning_rate", _RATE.get(script, 1e-4)) or 1e-4
    if ledger.truth("scale_lr"):
        scale = (ledger.whole("train_batch_size", _batch(script)) or 1) * (
            ledger.whole("gradient_accumulation_steps", 1) or 1
        )
        ledger.put(
            ("learning_rate", "scale_lr"),
            "optimizer.learning_rate",
            rate * scale,
            f"times {scale} images a step",
        )
    elif ledger.has("learning_rate"):
        ledger.put("learning_rate", "optimizer.learning_rate", rate)
    else:
        ledger.implied("learning_rate", "optimizer.learning_rate", rate, "its default there")
    if ledger.truth("train_text_encoder"):
        second = ledger.number("text_encoder_lr", 5e-6 if separate else rate)
        key = "optimizer.text_encoder_learning_rate"
        if ledger.has("text_encoder_lr"):
            ledger.put("text_encoder_lr", key, second)
        ledger.implied("text_encoder_lr", key, second, "its default there")
    _optimizer_settings(ledger, separate)
    schedule(ledger, "lr_scheduler")
    _warmup(ledger)
    gamma = ledger.number("snr_gamma")
    if gamma is not None:
        ledger.put("snr_gamma", "training.min_snr_gamma", gamma)
    ledger.implied("snr_gamma", "training.min_snr_gamma", 0.0, "off by default there")
    if ledger.number("noise_offset", 0.0):
        ledger.put("noise_offset", "training.noise_offset", ledger.number("noise_offset"))
    ledger.none(("do_edm_style_training", "debug_loss"), "sdlora has no such training")


def _optimizer_settings(ledger: Ledger, separate: bool) -> None:
    name = ledger.text("optimizer", "adamw").lower()
    if ledger.truth("use_8bit_adam"):
        ledger.put("use_8bit_adam", "optimizer.name", "adamw8bit")
    elif name != "adamw":
        ledger.put("optimizer", "optimizer.name", name)
    ledger.default("optimizer", "AdamW is used anyway")
    betas = (ledger.number("adam_beta1", 0.9), ledger.number("adam_beta2", 0.999))
    names = [n for n in ("adam_beta1", "adam_beta2") if ledger.has(n)]
    if names:
        ledger.put(names, "optimizer.betas", betas, "both together")
    else:
        ledger.implied("adam_beta1, adam_beta2", "optimizer.betas", betas, "their defaults there")
    for theirs, ours, default in (
        ("adam_weight_decay", "optimizer.weight_decay", 1e-4 if separate else 1e-2),
        ("adam_epsilon", "optimizer.epsilon", 1e-8),
        ("max_grad_norm", "optimizer.max_grad_norm", 1.0),
    ):
        if ledger.has(theirs):
            ledger.put(theirs, ours, ledger.number(theirs))
        elif theirs == "adam_weight_decay" and separate:
            ledger.implied(theirs, ours, default, "its default there")
    ledger.none("adam_weight_decay_text_encoder", "one weight decay for all parts")
    ledger.none(
        ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
        "as sdlora's Prodigy has it",
    )


def _warmup(ledger: Ledger) -> None:
    warmup = ledger.whole("lr_warmup_steps")
    if ledger.text("lr_scheduler", "constant") == "constant":
        ledger.default("lr_warmup_steps", "the script's constant schedule has no warm-up")
        ledger.implied("warm-up", "optimizer.warmup_steps", 0, "the script's constant schedule has none")
    elif warmup is not None:
        ledger.put("lr_warmup_steps", "optimizer.warmup_steps", warmup)
    else:
        ledger.implied("lr_warmup_steps", "optimizer.warmup_steps", 500, "its default there")
    ledger.default(("lr_num_cycles", "lr_power"), "no effect with this schedule")


def _batch(script: str) -> int:
    return _BATCH.get(script, 4)


def _length(ledger: Ledger, script: str, dreambooth: bool) -> None:
    steps, epochs = ledger.whole("max_train_steps"), ledger.whole("num_train_epochs")
    if steps:
        ledger.put("max_train_steps", "training.steps", steps)
        ledger.default("num_train_epochs", "max_train_steps takes precedence")
    elif epochs:
        ledger.put("num_train_epochs", "training.epochs", epochs)
    else:
        ledger.implied("num_train_epochs", "training.epochs", 1 if dreambooth else 100, "its default there")
    batch = ledger.whole("train_batch_size")
    if batch:
        ledger.put("train_batch_size", "training.batch_size", batch)
    ledger.implied("train_batch_size", "training.batch_size", _batch(script), "its default there")
    if ledger.has("gradient_accumulation_steps"):
        key = "training.gradient_accumulation"
        ledger.put("gradient_accumulation_steps", key, ledger.whole("gradient_accumulation_steps"))
    precision(ledger, "mixed_precision", "training.precision")
    ledger.implied("mixed_precision", "training.precision", "fp32", "accelerate's default")
    if ledger.has("seed"):
        ledger.put("seed", "training.seed", ledger.whole("seed"))
    if ledger.truth("gradient_checkpointing"):
        ledger.put("gradient_checkpointing", "training.recompute", "blocks")
    if ledger.truth("enable_xformers_memory_efficient_attention"):
        ledger.put("enable_xformers_memory_efficient_attention", "training.attention", "xformers")
    ledger.none("enable_npu_flash_attention", "sdlora runs on CPU, CUDA and MPS")
    ledger.default(("allow_tf32", "local_rank", "num_processes", "num_machines", "multi_gpu"), OWN_WAY)


def _previews(ledger: Ledger) -> None:
    if ledger.has("validation_prompt"):
        ledger.put("validation_prompt", "sample.prompts", [ledger.text("validation_prompt")])
    ledger.none("num_validation_images", "one preview a prompt; name a prompt twice for two")
    ledger.none("validation_epochs", "given in steps here: sample.every")


def _output(ledger: Ledger) -> None:
    if ledger.has("output_dir"):
        ledger.put("output_dir", "output.folder", ledger.text("output_dir"))
    every = ledger.whole("checkpointing_steps")
    if every:
        ledger.put("checkpointing_steps", "training.checkpoint_every", every)
    if ledger.whole("checkpoints_total_limit"):
        ledger.put(
            "checkpoints_total_limit", "training.keep_checkpoints", ledger.whole("checkpoints_total_limit")
        )
    ledger.default("output_kohya_format", "the file is written for WebUIs anyway")
    ledger.none("resume_from_checkpoint", "states of the script cannot be resumed; adapter.from_file can")
    ledger.none(("push_to_hub", "hub_token", "hub_model_id"), "publish the finished file apart")
    if ledger.text("report_to") and ledger.allows("training.tracker", ledger.text("report_to")):
        ledger.put("report_to", "training.tracker", ledger.text("report_to"))
    ledger.none(("logging_dir", "report_to"), "the run folder holds events.jsonl and loss.png")
