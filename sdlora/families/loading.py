"""From what the user gives (``mini``, a folder, a file, a hub id) to a loaded base model.

Only safetensors are read. A folder or hub id is a diffusers layout; a single file is an LDM layout, for
which the component configs and the CLIP tokenizer ship with this package: it needs no network at all.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config.schema import AttentionName, BaseFormat, ModelConfig
from ..diffusion.prediction import PREDICTIONS
from ..diffusion.process import NoiseProcess
from ..errors import ConfigError, ModelError, shown
from ..files import ASSETS
from .attention import Attentions, choose_attentions
from .base import BaseModelInfo
from .base_files import read_json
from .components import load_parts, scheduler_config
from .facts import FamilyInfo
from .latent_model import LatentModel, Parts, vae_factor
from .layout import set_layout, usual_layout
from .locating import locate
from .quantised import Quantising
from .recognition import Evidence, Recognised, recognise
from .table import FAMILIES
from .weights import weight_files


def load_model(
    base: ModelConfig | str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: AttentionName | Attentions = "auto",
    offload: bool = False,
    denoiser_waits: bool = False,
    base_format: BaseFormat = "full",
) -> LatentModel:
    """Load a base model, frozen and in eval mode.

    Args:
        base: the settings of a base, or only its name: ``mini``, a folder, a file or a hub id.
        dtype: number format of denoiser and text encoders; the autoencoder is always float32, since fp16
            overflows in SDXL's and it runs once per image.
        device: where the denoiser works.
        attention: see :func:`sdlora.families.attention.choose_attention`, or what it chose already.
        offload: keep only the component that is working in ``device``'s memory (to draw on small cards).
        denoiser_waits: leave everything in main memory until :meth:`LatentModel.prepare`; encoders come to
            the device to work, one after the other, so that encoding the captions and then the images before
            training takes as little as can be.
        base_format: how the denoiser's weights are kept; quantised ones cannot be changed.

    Raises:
        ModelError: if it is missing, damaged, of no supported family, or contradicts itself.
        ConfigError: for a setting that has no effect with the family.
    """
    settings = base if isinstance(base, ModelConfig) else ModelConfig(base=base)
    path = locate(settings.base)
    recognised = recognise(path)
    family = FAMILIES[_family(settings, recognised)]
    _check_clip_skip(settings, family.info)
    process = _process(settings, recognised)
    chosen = attention if isinstance(attention, Attentions) else choose_attentions(attention, device, dtype)
    waits = denoiser_waits and device.type not in ("meta", "cpu")  # which are main memory, or none at all
    # an offloaded component stays in main memory until it is used
    place = torch.device("cpu") if offload or waits else device
    quantising = None if base_format == "full" else Quantising(base_format, device)
    parts = _loaded_parts(recognised, dtype, place, settings.vae, quantising)
    _check_layers(settings.clip_skip, parts)
    if recognised.layout == "file" and process.prediction.name in family.info.resolutions:
        side = family.info.resolutions[process.prediction.name]  # the shipped config can name only one
        parts.denoiser.register_to_config(sample_size=side // vae_factor(parts.vae))
    set_layout(parts.denoiser, usual_layout(device, dtype))
    described = _described(settings.base, path, recognised)
    return family(
        *(described, parts, process),
        settings=settings,
        attention=chosen,
        device=device,
        offload=offload,
        encoders_wait=waits,
    )


def family_blueprint(
    name: str, *, dtype: torch.dtype, attention: Attentions, base_format: BaseFormat = "full"
) -> LatentModel:
    """Return a family's own base on the meta device, for which no file is needed.

    Args:
        name: of the family, e.g. ``sdxl``.
        dtype: number format of denoiser and text encoders.
        attention: how it is computed.
        base_format: how the denoiser's weights are kept.
    """
    family, meta = FAMILIES[name], torch.device("meta")
    info = family.info
    sides = info.resolutions  # of the family's bases the one for the largest images
    prediction = max(sides, key=lambda kind: sides[kind]) if sides else info.predictions[0]
    stated = (Evidence("the family", prediction),)
    base = Recognised(ASSETS / info.assets, "file", name, (), info.title, stated)
    process = _process(ModelConfig(base=name), base)
    quantising = None if base_format == "full" else Quantising(base_format, meta)
    parts = _loaded_parts(base, dtype, meta, None, quantising)
    if process.prediction.name in info.resolutions:
        side = info.resolutions[process.prediction.name]
        parts.denoiser.register_to_config(sample_size=side // vae_factor(parts.vae))
    described = BaseModelInfo(source=name, title=info.title, weights=base.path)
    settings = ModelConfig(base=name)
    return family(described, parts, process, settings=settings, attention=attention, device=meta)


def _family(settings: ModelConfig, recognised: Recognised) -> str:
    """Return the name of the base's family."""
    name = settings.family
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"`model.family={name}`: no such family; there are {', '.join(FAMILIES)}")
    recognised.check_family(name)
    return recognised.family


def _described(source: str, path: Path, recognised: Recognised) -> BaseModelInfo:
    kind = FAMILIES[recognised.family]
    return BaseModelInfo(
        source=source,
        title=source if source == "mini" else recognised.title,
        weights=path if path.is_file() else weight_files(path / kind.info.denoiser.component)[0],
        recommended=_recommended(path),
    )


def _check_clip_skip(settings: ModelConfig, info: FamilyInfo) -> None:
    if settings.clip_skip != 1 and not info.clip_skip:
        raise ConfigError(
            f"`model.clip_skip={settings.clip_skip}`: {info.title} is made for one layer of its text "
            "encoder; leave clip_skip out"
        )


def _check_layers(clip_skip: int, parts: Parts) -> None:
    """Refuse to skip more layers than a text encoder has.

    Raises:
        ConfigError: naming how many there are.
    """
    layers = min((encoder.config.num_hidden_layers for encoder in parts.text_encoders.values()), default=1)
    if clip_skip > layers:
        raise ConfigError(
            f"`model.clip_skip={clip_skip}`: the base's text encoder has {layers} layers; give 1 to {layers}"
        )


def _loaded_parts(
    recognised: Recognised,
    dtype: torch.dtype,
    device: torch.device,
    vae: str | None,
    quantising: Quantising | None,
) -> Parts:
    """Return the components; whatever the libraries raise for damaged input becomes one clear error."""
    try:
        with _quiet():
            return load_parts(recognised, dtype=dtype, device=device, vae=vae, quantising=quantising)
    except ModelError:
        raise
    except Exception as error:
        message = str(error).strip() or type(error).__name__
        reason = shown(message.splitlines()[0], 300)
        raise ModelError(
            f"{recognised.path}: cannot be loaded as a {FAMILIES[recognised.family].info.title} base "
            f"({reason}); check that the download is complete"
        ) from error


def _process(settings: ModelConfig, recognised: Recognised) -> NoiseProcess:
    prediction = recognised.prediction_type(settings.prediction_type)
    rescaled = recognised.zero_terminal_snr(settings.zero_terminal_snr)
    if rescaled and not PREDICTIONS[prediction].speaks_of_pure_noise:
        raise ModelError(
            f"{recognised.path}: a schedule that ends in pure noise (zero terminal SNR) needs v-prediction, "
            "but this base predicts epsilon; set model.zero_terminal_snr=false, or "
            "model.prediction_type=v_prediction if that is what it does"
        )
    kind = FAMILIES[recognised.family]
    schedule = scheduler_config(recognised)
    try:
        return kind.make_process(schedule, prediction, ends_in_noise=rescaled)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"{recognised.path}: its scheduler/scheduler_config.json cannot be used "
            f"({type(error).__name__}: {shown(error)}); download it again"
        ) from None


def _recommended(path: Path) -> dict[str, Any]:
    """Return the settings that the base's author suggests, from ``sdlora.json`` in its folder."""
    file = path / "sdlora.json"
    if not file.is_file():
        return {}
    data = read_json(file).get("recommended", {})
    return data if isinstance(data, dict) else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and warnings; errors are still raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    libraries = [transformers_logging, diffusers_logging]
    visible = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in visible:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in visible:
            library.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
