"""ostris/ai-toolkit: a job's YAML (or JSON), ``config.process[0]`` of type ``sd_trainer``.

Names and defaults: toolkit/config_modules.py, extensions_built_in/sd_trainer, commit 27a03a9 (August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from .ai_toolkit_datasets import translate_datasets
from .ledger import OWN_WAY, Ledger, is_off, shown
from .shared import base_format, optimizer, optimizer_arguments, precision, sampler, schedule
from .texts import flattened

_ARCHITECTURES = ("", "sd1", "sd15", "sd2", "sdxl", "ssd", "vega")
_OTHERS = ("is_flux", "is_v3", "is_pixart", "is_pixart_sigma", "is_auraflow", "is_lumina2")


def recognised(document: Any) -> bool:
    """Return whether a document is a job of ai-toolkit."""
    return (
        isinstance(document, dict)
        and isinstance(document.get("config"), dict)
        and "process" in document["config"]
    )


def process_of(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the job's first process.

    Raises:
        ConfigError: when there is none, or it trains what sdlora does not.
    """
    processes = document["config"].get("process")
    first = processes[0] if isinstance(processes, list) and processes else None
    if not isinstance(first, dict):
        raise ConfigError(f"{where}: `config.process` holds no process; give a job of ai-toolkit")
    named = first.get("model")
    model: dict[str, Any] = named if isinstance(named, dict) else {}
    architecture = str(model.get("arch", "") or "").lower()
    other = next((name for name in _OTHERS if model.get(name)), None)
    if other or architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{where}: `model.{other or 'arch'}={shown(model.get(other or 'arch'))}`: sdlora trains Stable "
            "Diffusion 1, 2 and XL"
        )
    return first


def given(document: Mapping[str, Any], process: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job's settings flat; of each data set ``dataset 1: folder_path``."""
    flat = flattened({name: value for name, value in process.items() if name != "datasets"})
    flat["name"] = document["config"].get("name")
    for name in ("job", "meta"):
        if name in document:
            flat[name] = document[name]
    for number, dataset in enumerate(process.get("datasets") or [], 1):
        for name, value in (dataset if isinstance(dataset, dict) else {}).items():
            flat[f"dataset {number}: {name}"] = value
    return flat


def translate(ledger: Ledger, datasets: Sequence[Mapping[str, Any]]) -> None:
    """Translate a job.

    Args:
        ledger: its settings as :func:`given` returns them.
        datasets: its data sets, which become sources.
    """
    _base(ledger)
    translate_datasets(ledger, datasets)
    _adapter(ledger)
    _optimizer(ledger)
    _length(ledger)
    _objective(ledger)
    _samples(ledger)
    _output(ledger)


def _base(ledger: Ledger) -> None:
    if ledger.has("model.name_or_path"):
        ledger.put("model.name_or_path", "model.base", ledger.text("model.name_or_path"))
    else:
        ledger.note("no base model is given: add --base to `sdlora train`")
    if ledger.has("model.vae_path"):
        ledger.put("model.vae_path", "model.vae", ledger.text("model.vae_path"))
    if ledger.truth("model.is_v_pred"):
        ledger.put("model.is_v_pred", "model.prediction_type", "v_prediction", "said in words")
    ledger.default(
        ("model.is_v2", "model.is_xl", "model.arch", "model.is_ssd", "model.is_vega"),
        "the family is read from the base",
    )
    if ledger.truth("model.quantize"):
        names = [name for name in ("model.quantize", "model.qtype") if ledger.has(name)]
        base_format(ledger, names, ledger.text("model.qtype", "qfloat8"))
    ledger.default(("model.quantize", "model.qtype"), "the base stays whole")
    ledger.none(("model.quantize_te", "model.qtype_te"), "text encoders stay whole")
    ledger.none("model.low_vram", "the memory is planned")
    if ledger.has("trigger_word"):
        ledger.put("trigger_word", "data.trigger_word", ledger.text("trigger_word"))


def _adapter(ledger: Ledger) -> None:
    kind = ledger.text("network.type", "lora").lower()
    ours = {"lora": "lora", "locon": "lora", "dora": "dora", "lokr": "lokr", "loha": "loha"}.get(kind)
    if ours is None:
        ledger.put("network.type", "adapter.kind", "lora", f"sdlora does not train {kind}: a plain LoRA")
    elif ledger.has("network.type"):
        ledger.put("network.type", "adapter.kind", ours)
    rank = ledger.whole("network.rank") or ledger.whole("network.linear")
    for name in ("network.rank", "network.linear"):
        if ledger.has(name) and rank:
            ledger.put(name, "adapter.rank", rank)
    if not rank:
        ledger.implied("network.linear", "adapter.rank", 4, "its default there")
    alpha = ledger.number("network.linear_alpha") or ledger.number("network.alpha")
    for name in ("network.linear_alpha", "network.alpha"):
        if ledger.has(name) and alpha:
            ledger.put(name, "adapter.alpha", alpha)
    if not alpha:
        ledger.implied("network.linear_alpha", "adapter.alpha", 1.0, "its default there")
    convolutions = ledger.whole("network.conv")
    if convolutions:
        reason = "convolutions have the rank and alpha of the linear layers"
        names = [name for name in ("network.conv", "network.conv_alpha") if ledger.has(name)]
        ledger.put(names, "adapter.targets", "all", reason)
    else:
        ledger.implied(
            "layers of the network",
            "adapter.targets",
            "linear",
            "the linear layers of the transformer blocks",
        )
    if ledger.number("network.dropout", 0.0):
        ledger.put("network.dropout", "adapter.dropout", ledger.number("network.dropout"))
    factor = ledger.whole("network.lokr_factor", -1) or -1
    if ours == "lokr" and factor >= 2:
        ledger.put("network.lokr_factor", "adapter.lokr_factor", factor)
    ledger.default(
        ("network.lokr_factor", "network.lokr_full_rank", "network.transformer_only"),
        "of other kinds, or chosen by itself",
    )
    if ledger.has("network.pretrained_lora_path"):
        ledger.put(
            "network.pretrained_lora_path", "adapter.from_file", ledger.text("network.pretrained_lora_path")
        )
    ledger.none(
        ("network.network_kwargs.only_if_contains", "network.network_kwargs.ignore_if_contains"),
        "layers are chosen by adapter.targets and adapter.block_ranks",
    )
    if ledger.truth("train.train_text_encoder"):
        ledger.put("train.train_text_encoder", "adapter.text_encoder", True)
    if ledger.has("train.train_unet") and not ledger.truth("train.train_unet"):
        ledger.none("train.train_unet", "sdlora always adapts the U-Net")
        if is_off(ledger.raw("train.train_unet")):
            ledger.note("`train.train_unet=false` is not possible: sdlora always adapts the U-Net")
    ledger.default("train.train_unet", "the U-Net is adapted anyway")


def _optimizer(ledger: Ledger) -> None:
    optimizer(ledger, "train.optimizer")
    ours = str(ledger.values.get("optimizer.name", "adamw"))
    label = "train.optimizer_params."
    arguments = {
        name.removeprefix(label): ledger.raw(name) for name in ledger.names() if name.startswith(label)
    }
    optimizer_arguments(ledger, arguments, label, ours)
    if ours in ("adamw", "adamw8bit") and "betas" not in arguments:
        ledger.implied("train.optimizer_params.betas", "optimizer.betas", (0.9, 0.999), "its default there")
    rate = ledger.number("train.unet_lr") or ledger.number("train.lr", 1e-6)
    for name in ("train.unet_lr", "train.lr"):
        if ledger.has(name) and ledger.number(name) == rate:
            ledger.put(name, "optimizer.learning_rate", rate)
    ledger.default("train.lr", "unet_lr takes precedence")
    if not ledger.has("train.unet_lr"):
        ledger.implied("train.lr", "optimizer.learning_rate", 1e-6, "its default there")
    if ledger.truth("train.train_text_encoder"):
        second = ledger.number("train.text_encoder_lr", rate)
        key = "optimizer.text_encoder_learning_rate"
        if ledger.has("train.text_encoder_lr"):
            ledger.put("train.text_encoder_lr", key, second)
        ledger.implied("train.text_encoder_lr", key, second, "lr counts for it, too")
    schedule(ledger, "train.lr_scheduler")
    ledger.implied("warm-up", "optimizer.warmup_steps", 0, "none by default there")
    warmup = ledger.whole("train.lr_scheduler_params.num_warmup_steps") or ledger.whole(
        "train.lr_scheduler_params.warmup_steps"
    )
    for name in ("train.lr_scheduler_params.num_warmup_steps", "train.lr_scheduler_params.warmup_steps"):
        if ledger.has(name) and warmup:
            ledger.put(name, "optimizer.warmup_steps", warmup)
    norm = ledger.number("train.max_grad_norm")
    if norm is not None:
        ledger.put("train.max_grad_norm", "optimizer.max_grad_norm", norm)


def _length(ledger: Ledger) -> None:
    steps = ledger.whole("train.steps")
    if steps:
        ledger.put("train.steps", "training.steps", steps)
    ledger.implied("train.steps", "training.steps", 1000, "its default there")
    batch = ledger.whole("train.batch_size")
    if batch:
        ledger.put("train.batch_size", "training.batch_size", batch)
    ledger.implied("train.batch_size", "training.batch_size", 1, "its default there")
    for name in ("train.gradient_accumulation_steps", "train.gradient_accumulation"):
        if ledger.whole(name):
            ledger.put(name, "training.gradient_accumulation", ledger.whole(name))
    precision(ledger, "train.dtype", "training.precision")
    recompute = "blocks" if ledger.truth("train.gradient_checkpointing", True) else "nothing"
    if ledger.has("train.gradient_checkpointing"):
        ledger.put("train.gradient_checkpointing", "training.recompute", recompute)
    device = (
        ledger.text("device").removesuffix(":0")
        if ledger.text("device") == "cuda:0"
        else ledger.text("device")
    )
    if device and ledger.allows("training.device", device):
        ledger.put("device", "training.device", device)
    for name, ours in (("train.xformers", "xformers"), ("train.sdp", "sdpa")):
        if ledger.truth(name):
            ledger.put(name, "training.attention", ours, "said in words")
    ledger.none("train.start_step", "sdlora resumes exactly by itself: --resume")
    ledger.default(
        (
            "model.dtype",
            "train.unload_text_encoder",
            "train.cache_text_embeddings",
            "train.disable_sampling",
            "train.attention_backend",
            "performance_log_every",
            "log_dir",
            "sqlite_db_path",
            "type",
        ),
        OWN_WAY,
    )


def _objective(ledger: Ledger) -> None:
    for name in ("train.min_snr_gamma", "train.snr_gamma"):
        if ledger.number(name):
            ledger.put(name, "training.min_snr_gamma", ledger.number(name))
    if "training.min_snr_gamma" not in ledger.values:
        ledger.implied("train.min_snr_gamma", "training.min_snr_gamma", 0.0, "off by default there")
    if ledger.number("train.noise_offset", 0.0):
        ledger.put("train.noise_offset", "training.noise_offset", ledger.number("train.noise_offset"))
    loss = ledger.text("train.loss_type", "mse").lower()
    if loss in ("mse", "l2"):
        ledger.default("train.loss_type", "the squared error is used anyway")
    else:
        ledger.put("train.loss_type", "training.loss", {"mae": "l1"}.get(loss, loss))
    if ledger.text("train.content_or_style", "balanced") != "balanced":
        late = "high_noise" if ledger.text("train.content_or_style") == "content" else "low_noise"
        ledger.put(
            "train.content_or_style", "training.timestep_distribution", late, "timesteps are drawn to one end"
        )
    ledger.default("train.content_or_style", "timesteps are drawn evenly")
    low, high = ledger.whole("train.min_denoising_steps", 0), ledger.whole("train.max_denoising_steps", 999)
    names = ("train.min_denoising_steps", "train.max_denoising_steps")
    if low == 0 and high in (999, 1000):
        ledger.default(names, "all timesteps are drawn anyway")
    else:
        for end, number in (("min", low or 0), ("max", min((high or 999) + 1, 1000))):
            if ledger.has(f"train.{end}_denoising_steps"):
                ledger.put(f"train.{end}_denoising_steps", f"training.{end}_timestep", number)
    ledger.default(
        ("train.noise_scheduler", "train.timestep_type", "train.linear_timesteps"),
        "the base's own noise schedule",
    )
    if ledger.truth("train.ema_config.use_ema"):
        averaged = [n for n in ("train.ema_config.use_ema", "train.ema_config.ema_decay") if ledger.has(n)]
        ledger.put(averaged, "training.average", "ema", "an average of the weights")
    ledger.default("train.ema_config.ema_decay", "no average of the weights is kept")


def _samples(ledger: Ledger) -> None:
    prompts = ledger.raw("sample.prompts", [])
    listed = ledger.raw("sample.samples", [])
    name = "sample.prompts"
    if not prompts and isinstance(listed, list):
        prompts, name = (
            [str(item.get("prompt", "")) for item in listed if isinstance(item, dict)],
            "sample.samples",
        )
    if isinstance(prompts, list) and prompts:
        trigger = ledger.text("trigger_word")
        put_in = [str(prompt).replace("[trigger]", trigger) for prompt in prompts]
        ledger.put(
            name, "sample.prompts", put_in, "with the trigger word put in" if put_in != prompts else ""
        )
    if ledger.whole("sample.sample_every", 0):
        ledger.put("sample.sample_every", "sample.every", ledger.whole("sample.sample_every"))
    if ledger.has("sample.guidance_scale"):
        ledger.put("sample.guidance_scale", "sample.guidance", ledger.number("sample.guidance_scale"))
    for theirs, key in (("sample_steps", "sample.steps"), ("seed", "sample.seed")):
        if ledger.has(f"sample.{theirs}"):
            ledger.put(f"sample.{theirs}", key, ledger.whole(f"sample.{theirs}"))
    if ledger.text("sample.neg"):
        ledger.put("sample.neg", "sample.negative_prompt", ledger.text("sample.neg"))
    if ledger.text("sample.sampler", "ddpm") != "ddpm":
        sampler(ledger, "sample.sampler")
    ledger.default("sample.sampler", "drawn with sdlora's default sampler")
    ledger.default(
        (
            "sample.width",
            "sample.height",
            "sample.walk_seed",
            "sample.network_multiplier",
            "sample.sample_start_step",
            "sample.sample_every",
            "sample.guidance_scale",
            "sample.format",
            "train.skip_first_sample",
            "train.force_first_sample",
            "sample.num_frames",
            "sample.fps",
        ),
        "previews have the size of training, the adapter at strength 1, one seed a prompt",
    )


def _output(ledger: Ledger) -> None:
    if ledger.has("name"):
        ledger.put("name", "output.name", ledger.text("name"))
    if ledger.has("training_folder"):
        folder = f"{ledger.text('training_folder').rstrip('/')}/{ledger.text('name', 'lora')}"
        ledger.put("training_folder", "output.folder", folder, "a folder of its own for each run")
    precision(ledger, "save.dtype", "output.dtype")
    if ledger.whole("save.save_every"):
        ledger.put("save.save_every", "training.checkpoint_every", ledger.whole("save.save_every"))
    if ledger.whole("save.max_step_saves_to_keep"):
        ledger.put(
            "save.max_step_saves_to_keep",
            "training.keep_checkpoints",
            ledger.whole("save.max_step_saves_to_keep"),
        )
    ledger.none(("save.push_to_hub", "save.hf_repo_id", "save.hf_private"), "publish the finished file apart")
    ledger.none(
        ("logging.use_wandb", "logging.project_name", "logging.run_name"),
        "the run folder holds events.jsonl and loss.png",
    )
    ledger.default(
        ("save.save_format", "logging.log_every", "logging.verbose", "logging.use_ui_logger"), OWN_WAY
    )
    ledger.default(("job", "meta"), "of ai-toolkit's jobs")
