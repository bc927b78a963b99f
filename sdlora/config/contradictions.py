"""Which settings contradict each other, or would silently have no effect; looks at the whole tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
from .adapter import PART_KEYS
from .data import DataConfig
from .kinds import KIND_RULES
from .schema import USUAL_SCHEDULE, Config, OptimizerConfig, SampleConfig, TrainingConfig
from .section import OnlyFor, Section


def contradictions(config: Config) -> list[str]:
    """Return one line for each contradiction, and for each setting that would silently have no effect."""
    problems: list[str] = []
    if config.training.steps is not None and config.training.epochs is not None:
        problems.append("`training.steps` and `training.epochs` both fix the length: give one of them")
    for part, keys in PART_KEYS.items():
        if not config.adapter.adapts(part):
            problems += [
                f"`{key}` has no effect without `{keys.switch}=true`"
                for key in keys[1:]
                if config.get(key) is not None
            ]
    if config.model.zero_terminal_snr and config.model.prediction_type == "epsilon":
        problems.append("`model.zero_terminal_snr=true` needs `model.prediction_type=v_prediction`")
    problems += [*_about_adapter(config), *_about_optimizer(config.optimizer)]
    problems += [*_about_objective(config.training), *_about_limits(config)]
    problems += _about_offloading(config)
    if config.sample.prompts == ():
        for name in ("every", "guidance"):
            if getattr(config.sample, name) is not None:
                problems.append(f"`sample.{name}` has no effect with `sample.prompts=[]`")
    problems += _about_prompts(config.sample)
    if "wandb" not in config.output.trackers:
        for name in ("tracker_project", "wandb_mode"):
            if getattr(config.output, name) != type(config.output).model_fields[name].default:
                problems.append(f'`output.{name}` has no effect without `output.trackers=["wandb"]`')
    if config.data.validation == 0 and config.training.validate_every is not None:
        problems.append("`training.validate_every` has no effect with `data.validation=0`")
    problems += _about_data(config.data)
    if config.adapter.adapts_text and config.data.encode_captions is not None:
        problems.append("`data.encode_captions` has no effect with `adapter.text_encoder=true`")
    if (steps := config.training.steps) is not None:
        problem = warmup_problem(config.optimizer, steps, f"`training.steps={steps}`")
        problems += [problem] if problem else []
    return problems


def _about_prompts(sample: SampleConfig) -> Iterator[str]:
    """Return what contradicts the prompts of previews."""
    if sample.prompt_file is not None and sample.prompt_options is False:
        yield "`sample.prompt_options=false` contradicts `sample.prompt_file`, whose lines have options"
    elif sample.prompt_file is not None and sample.prompts is not None and not sample.prompt_options:
        yield "`sample.prompts` and `sample.prompt_file` both say what previews show: give one of them"
    try:
        list(sample.lines)
    except ConfigError as error:
        yield f"`sample.prompts`: {error}"


def warmup_problem(settings: OptimizerConfig, steps: int, length: str) -> str | None:
    """Return what is wrong with the warm-up of a run, if anything is.

    Args:
        settings: of the optimizer; a warm-up that is still open is valid.
        steps: optimizer steps of the run.
        length: the run's length in words.
    """
    if settings.warmup_steps is None and settings.warmup_share is None:
        return None
    key = "warmup_share" if settings.warmup_steps is None else "warmup_steps"
    given, warmup = f"`optimizer.{key}={getattr(settings, key):g}`", settings.warmup(steps)
    if warmup >= steps:
        return f"{given} must be below {length}, or the full learning rate is never reached"
    if settings.schedule == "inverse_sqrt" and warmup == 0:
        return (
            "`optimizer.schedule=inverse_sqrt` falls in proportion to the length of the warm-up, but "
            f"{given} gives no step of {length}; give more, or choose another schedule"
        )
    return None


def _about_adapter(config: Config) -> list[str]:
    """Return what contradicts the adapter's kind, start or scaling."""
    return [*_by_kind(config), *_by_start(config)]


def _by_kind(config: Config) -> Iterator[str]:
    adapter = config.adapter
    rules = KIND_RULES[adapter.kind]
    if not rules.low_rank:
        if adapter.dropout > 0:
            yield f"`adapter.dropout` works on low-rank factors' input, which {adapter.kind} does not have"
        if config.optimizer.lora_plus_ratio != 1.0:
            yield f"`optimizer.lora_plus_ratio` needs up and down factors, which {adapter.kind} does not have"
        if adapter.init != "default":
            yield f"`adapter.init={adapter.init}` starts low-rank factors, which {adapter.kind} does not have"
    if rules.no_subtracted_start and adapter.init in ("pissa", "olora"):
        yield f"`adapter.init={adapter.init}` {rules.no_subtracted_start}"
    for kind, other in KIND_RULES.items():
        for name in other.only_for:
            if kind != adapter.kind and getattr(adapter, name) is not None:
                yield f"`adapter.{name}` has no effect without `adapter.kind={kind}`"
    if adapter.scaling == "rslora":
        if rules.no_rslora:
            yield f"`adapter.scaling=rslora` {rules.no_rslora}"
        elif adapter.alpha is None:
            yield "`adapter.scaling=rslora` has no effect without `adapter.alpha`: the scale is then 1"


def _by_start(config: Config) -> Iterator[str]:
    adapter = config.adapter
    if adapter.from_file is None:
        return
    if adapter.init != "default":
        yield f"`adapter.init={adapter.init}` and `adapter.from_file` both fix the start: give one of them"
    if adapter.block_ranks:
        yield "`adapter.block_ranks` has no effect with `adapter.from_file`, whose ranks are kept"
    if adapter.scaling != "standard":
        yield "`adapter.scaling` has no effect with `adapter.from_file`, whose alphas are kept"
    if adapter.lokr_factor is not None:
        yield "`adapter.lokr_factor` has no effect with `adapter.from_file`, whose factors are kept"


def _about_optimizer(settings: OptimizerConfig) -> Iterator[str]:
    """Yield what the optimizer, its schedule and its limits do not go together with."""
    yield from _foreign("optimizer", settings)
    if settings.name == "adamw_schedulefree" and settings.schedule not in (None, "constant"):
        yield (
            f"`optimizer.schedule={settings.schedule}` works against `optimizer.name=adamw_schedulefree`, "
            "whose average takes a schedule's place; leave optimizer.schedule out, or set it to constant"
        )
    if settings.schedule == "constant" and settings.schedule_floor > 0:
        yield "`optimizer.schedule_floor` has no effect with `optimizer.schedule=constant`, which never falls"
    if settings.warmup_steps is not None and settings.warmup_share is not None:
        yield "`optimizer.warmup_steps` and `optimizer.warmup_share` both fix the warm-up: give one of them"


def _foreign(section: str, settings: Section) -> Iterator[str]:
    """Yield the settings of a section that the choice beside them has no use for."""
    for name, field in type(settings).model_fields.items():
        for mark in field.metadata:
            foreign = isinstance(mark, OnlyFor) and getattr(settings, mark.of) not in mark.names
            if foreign and getattr(settings, name) != field.default:  # a saved run names all of them
                chosen = getattr(settings, mark.of) or USUAL_SCHEDULE
                yield f"`{section}.{name}` has no effect with `{section}.{mark.of}={chosen}`"


def _about_objective(settings: TrainingConfig) -> Iterator[str]:
    """Yield what loss, weights, timesteps and noise do not go together with."""
    yield from _foreign("training", settings)
    if settings.loss_weighting == "soft_min_snr" and settings.min_snr_gamma == 0:
        yield "`training.loss_weighting=soft_min_snr` has no effect with `training.min_snr_gamma=0`"
    if settings.recompute_blocks is not None and settings.rung == "nothing":
        yield "`training.recompute_blocks` has no effect without `training.recompute`, which names a rung"
    if settings.min_timestep >= settings.max_timestep:
        yield (
            f"`training.min_timestep={settings.min_timestep}` must be below "
            f"`training.max_timestep={settings.max_timestep}`, or no timestep is left"
        )
    if settings.multires_noise_iterations > 0 and settings.noise_offset > 0:
        yield (
            "`training.noise_offset` and `training.multires_noise_iterations` both change the noise at large "
            "scale: use one of them"
        )
    if settings.multires_noise_iterations == 0 and settings.multires_noise_discount != 0.3:
        yield "`training.multires_noise_discount` has no effect with `training.multires_noise_iterations=0`"


def _about_offloading(config: Config) -> Iterator[str]:
    """Yield what blocks whose weights lie in main memory do not go together with."""
    if not config.training.offload_blocks:
        return
    given = f"`training.offload_blocks={config.training.offload_blocks}`"
    if config.adapter.kind != "lora":
        kind = f"`adapter.kind={config.adapter.kind}`"
        yield f"{given} needs a plain LoRA: {kind} computes with the base's weights itself"
    if "joint" in config.training.fast:
        yield f"{given} cannot be with the fast path `joint`, which lays weights of several blocks together"


def _about_limits(config: Config) -> Iterator[str]:
    """Yield where dropout of ranks, the limit of updates and the end of text encoders cannot work."""
    adapter, optimizer = config.adapter, config.optimizer
    for key in ("rank_dropout", "module_dropout"):
        if getattr(adapter, key) > 0 and adapter.kind != "lora":
            yield f"`adapter.{key}` works between the two factors of a plain LoRA, which {adapter.kind} lacks"
        if getattr(adapter, key) > 0 and adapter.init in ("pissa", "olora"):
            yield f"`adapter.{key}` would leave out what `adapter.init={adapter.init}` subtracts again"
    if optimizer.max_update_norm is not None:
        given = f"`optimizer.max_update_norm={optimizer.max_update_norm:g}`"
        if adapter.kind != "lora":
            yield f"{given} scales the two factors of a plain LoRA, which {adapter.kind} does not have"
        if adapter.init in ("pissa", "olora"):
            yield f"{given} cannot be with `adapter.init={adapter.init}`, which starts from large factors"
        if optimizer.name == "adamw_schedulefree":
            yield f"{given} cannot be with `optimizer.name=adamw_schedulefree`, which keeps values of its own"
    if optimizer.name == "adamw_schedulefree" and config.training.average != "none":
        yield (
            f"`training.average={config.training.average}` cannot be with "
            "`optimizer.name=adamw_schedulefree`, whose weights are an average already"
        )
    if optimizer.text_encoder_until < 1 and not adapter.adapts_text:
        yield "`optimizer.text_encoder_until` has no effect without `adapter.text_encoder=true`"


def _about_data(data: DataConfig) -> Iterator[str]:
    """Yield one line for each contradiction, and for each setting that would silently have no effect."""
    held_out = data.validation or 0
    if not isinstance(held_out, Path) and held_out >= 1 and held_out != int(held_out):
        yield "`data.validation` from 1 up is a number of images and must be whole"
    yield from _about_captions(data)
    yield from _about_images(data)
    yield from _about_sources(data)


def _about_captions(data: DataConfig) -> Iterator[str]:
    moves = data.shuffle_tags or data.tag_dropout > 0
    for key in ("keep_tags", "tag_separator"):
        if not moves and _chosen(data, key):
            yield f"`data.{key}` has no effect without `data.shuffle_tags=true` or `data.tag_dropout`"
    if data.encode_captions is not None and not data.varies_captions:
        yield (
            "`data.encode_captions` has no effect: the captions do not vary (see `data.shuffle_tags`, "
            "`data.tag_dropout`, `data.wildcards`, `data.caption_lines`)"
        )
    if data.caption_from == "file name":
        for key in ("metadata_caption", "caption_lines"):
            if _chosen(data, key):
                yield f'`data.{key}` has no effect with `data.caption_from="file name"`'


def _about_images(data: DataConfig) -> Iterator[str]:
    if _chosen(data, "variants") and not data.varies_images:
        yield "`data.variants` has no effect without `data.crop=random` or `data.colour_jitter`"
    folders = [source.mask_folder for source in data.sources]
    masked = data.alpha_mask or data.mask_folder is not None or any(folders)
    if data.alpha_mask and (data.mask_folder is not None or any(folders)):
        yield "`data.alpha_mask` and `data.mask_folder` both give the mask: choose one of them"
    if data.mask_folder is not None and data.folder is None:
        yield "`data.mask_folder` belongs to `data.folder`; give each source a `mask_folder` of its own"
    if data.unmasked_weight and not masked:
        yield "`data.unmasked_weight` has no effect without `data.alpha_mask=true` or `data.mask_folder`"
    if data.resolution is not None and data.resolution in data.more_resolutions:
        yield f"`data.more_resolutions` repeats `data.resolution={data.resolution}`"
    if len(set(data.more_resolutions)) != len(data.more_resolutions):
        yield "`data.more_resolutions` names a resolution twice"


def _about_sources(data: DataConfig) -> Iterator[str]:
    if data.sources and data.folder is None and all(source.regularisation for source in data.sources):
        yield "`data.sources` holds only regularisation images: add images to be learned"
    for number, source in enumerate(data.sources):
        where = f"data.sources[{number}] ({source.folder})"
        if source.regularisation and source.trigger_word:
            yield f"`{where}.trigger_word` has no effect: regularisation images get none"


def _chosen(data: DataConfig, key: str) -> bool:
    """Return whether a setting differs from its default (a saved run names all of them)."""
    return bool(getattr(data, key) != DataConfig.model_fields[key].default)
