"""From what the user gives (``mini``, a folder, a file, a hub id) to a loaded base model.

Only safetensors are read. A folder or hub id is a diffusers layout; a single file is an LDM layout, for
which the component configs and the CLIP tokenizer ship with this package: it needs no network at all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.schema import AttentionName, PredictionType
from ..diffusion.prediction import PREDICTIONS
from ..diffusion.process import NoiseProcess
from ..errors import ConfigError, ModelError
from ..tensor_file import CONVERT
from .attention import Attentions, choose_attentions
from .base import BaseModelInfo
from .facts import DenoiserInfo, FamilyInfo
from .hub import from_hub
from .latent_model import LatentModel, Parts, vae_factor
from .ldm import VAE_PREFIX, StoredKey, text_key_map, unet_key_map, vae_key_map
from .recognition import Recognised, read_json, recognise
from .table import FAMILIES
from .weights import TensorSource, fill, weight_files, without_memory

ASSETS = Path(__file__).parent.parent / "assets"
_CODE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
# spellings of published files that mean today's names
_OLD_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
    "text_model.": "",
}


@dataclass(frozen=True)
class LoadOptions:
    """What may be said about a base besides its name; see :func:`load_model`."""

    family: str | None = None
    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool | None = None
    clip_skip: int = 1
    vae: str | None = None
    attention: AttentionName = "auto"
    offload: bool = False


DEFAULT_OPTIONS = LoadOptions()


def load_model(
    source: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    family: str | None = None,
    prediction_type: PredictionType | None = None,
    zero_terminal_snr: bool | None = None,
    clip_skip: int = 1,
    vae: str | None = None,
    attention: AttentionName | Attentions = "auto",
    offload: bool = False,
    denoiser_waits: bool = False,
) -> LatentModel:
    """Load a base model, frozen and in eval mode.

    Args:
        source: ``mini``, a diffusers folder, a ``.safetensors`` checkpoint, or a hub id.
        dtype: number format of denoiser and text encoders; the autoencoder is always float32, since fp16
            overflows in SDXL's and it runs once an image.
        device: where the denoiser works.
        family: overrides what the base's header says of itself; the weights must be of that family.
        prediction_type: overrides what the base says of itself.
        zero_terminal_snr: overrides what the base says of itself; needs v-prediction.
        clip_skip: see :func:`sdlora.families.clip.encode_chunks`.
        vae: another autoencoder: a file, a folder, or a hub id of one.
        attention: see :func:`sdlora.families.attention.choose_attention`, or what it chose already.
        offload: keep in ``device``'s memory only the component that works (for drawing on small cards).
        denoiser_waits: leave the denoiser in main memory until :meth:`LatentModel.prepare`, so that encoding
            the images and captions before training has the device to itself.

    Raises:
        ModelError: if it is not there, not a supported family, damaged, or contradicts itself.
        ConfigError: for a setting that the family has no use for.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"`model.family={family}`: no such family; there are {', '.join(FAMILIES)}")
    path = locate(source)
    recognised = recognise(path)
    recognised.check_family(family)
    kind = FAMILIES[recognised.family]
    _check_clip_skip(clip_skip, kind.info)
    process = _process(recognised, prediction_type, zero_terminal_snr)
    chosen = attention if isinstance(attention, Attentions) else choose_attentions(attention, device, dtype)
    # An offloaded model waits in main memory.
    encoder_device = torch.device("cpu") if offload else device
    waiting = torch.device("cpu") if denoiser_waits and device.type != "meta" else encoder_device
    parts = _loaded_parts(recognised, dtype, encoder_device, waiting, vae)
    if recognised.layout == "file" and process.prediction.name in kind.info.resolutions:
        side = kind.info.resolutions[process.prediction.name]  # the shipped config can name only one
        parts.denoiser.register_to_config(sample_size=side // vae_factor(parts.vae))
    # Measured on 2 AVX-512 cores: channels-last takes 5-10 % off a training step on the CPU. CUDA's
    # group norm forces the other layout, so there it would cost.
    if device.type == "cpu":
        parts.denoiser.to(memory_format=torch.channels_last)
    base = _described(source, path, recognised)
    return kind(base, parts, process, attention=chosen, device=device, clip_skip=clip_skip, offload=offload)


def _described(source: str, path: Path, recognised: Recognised) -> BaseModelInfo:
    kind = FAMILIES[recognised.family]
    return BaseModelInfo(
        source=source,
        title=source if source == "mini" else recognised.title,
        weights=path if path.is_file() else weight_files(path / kind.info.denoiser.component)[0],
        recommended=_recommended(path),
    )


def _check_clip_skip(clip_skip: int, info: FamilyInfo) -> None:
    if clip_skip != 1 and not info.clip_skip:
        raise ConfigError(
            f"`model.clip_skip={clip_skip}`: {info.title} is made for one layer of its text encoder; "
            "leave clip_skip out"
        )


def _loaded_parts(
    recognised: Recognised,
    dtype: torch.dtype,
    encoder_device: torch.device,
    denoiser_device: torch.device,
    vae: str | None,
) -> Parts:
    """Return the components; whatever the libraries say of damaged input becomes one clear error."""
    try:
        with _quiet():
            return load_parts(
                recognised, dtype=dtype, device=encoder_device, denoiser_device=denoiser_device, vae=vae
            )
    except ModelError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{recognised.path}: cannot be loaded as a {FAMILIES[recognised.family].info.title} base "
            f"({reason}); check that the download is complete"
        ) from error


def _check_complete(recognised: Recognised, vae: str | None) -> None:
    missing = [part for part in recognised.missing if part != "vae" or vae is None]
    if missing:
        raise ModelError(
            f"{recognised.path}: has no {' and no '.join(missing)}; use the full checkpoint, not a pruned one"
            + (", or name a VAE as model.vae" if missing == ["vae"] else "")
        )


def load_parts(
    recognised: Recognised,
    *,
    dtype: torch.dtype,
    device: torch.device,
    denoiser_device: torch.device | None = None,
    vae: str | None = None,
    configs: Path | None = None,
) -> Parts:
    """Return the components of a recognised base, each read straight into its format and place.

    Peak memory is the finished weights and the largest tensor.

    Args:
        recognised: what it is.
        dtype: of denoiser and text encoders.
        device: where the weights go.
        denoiser_device: where the denoiser's go, if elsewhere.
        vae: see :func:`load_model`.
        configs: a folder with the configs and tokenizers that a single file leaves out; the family's
            own when None.

    Raises:
        ModelError: for missing or unfit weights.
    """
    info, blueprint = FAMILIES[recognised.family].info, device.type == "meta"
    folder = recognised.path if recognised.layout == "folder" else configs or ASSETS / info.assets
    _check_complete(recognised, vae)
    source = None if recognised.layout == "folder" else TensorSource([] if blueprint else [recognised.path])
    denoiser, default_vae = _new_denoiser(folder, info.denoiser), _new_vae(folder)
    fill(
        denoiser,
        *_denoiser_source(recognised.path / info.denoiser.component, source, denoiser),
        dtype=dtype,
        device=denoiser_device or device,
        what=info.denoiser.title,
    )
    if vae is None:
        fill(
            default_vae,
            *_vae_source(recognised.path, source, default_vae),
            dtype=torch.float32,
            device=device,
            what="VAE",
        )
    encoders, tokenizers = {}, {}
    for encoder_info in info.text_encoders:
        encoder = _new_text_encoder(folder / encoder_info.component, projected=encoder_info.projected)
        names = encoder.state_dict()
        if source is None:
            component = TensorSource(weight_files(recognised.path / encoder_info.component))
            key_map = _folder_key_map(names, component)
        else:
            component, key_map = source, _known_spelling(text_key_map(names, encoder_info), source)
        fill(encoder, key_map, component, dtype=dtype, device=device, what=encoder_info.component)
        encoders[encoder_info.component] = encoder.eval()
        tokenizers[encoder_info.component] = _tokenizer(
            folder / encoder_info.tokenizer, encoder_info.pad_token, shared=source is not None
        )
    other = default_vae if vae is None else _load_vae(vae, default_vae, device)
    return Parts(denoiser.eval(), other.eval(), encoders, tokenizers)


def is_hub_id(source: str) -> bool:
    """Tell whether a source is meant as ``owner/name`` on the hub rather than as a path."""
    path = Path(source).expanduser()
    local = path.exists() or path.is_absolute() or source.startswith((".", "~"))
    return (
        source.count("/") == 1 and not local and path.suffix.lower() not in (".safetensors", *_CODE_SUFFIXES)
    )


def locate(source: str, *, fetch: bool = True) -> Path:
    """Return the folder or file of a base model, fetched from the hub if it is a hub id.

    Args:
        source: see :func:`load_model`.
        fetch: False for looking at nothing but the hub's cache.

    Raises:
        ModelError: if there is none, or it is a kind of file that is not read.
    """
    if source == "mini":
        return ASSETS / "mini"
    path = Path(source).expanduser()
    if path.suffix.lower() in _CODE_SUFFIXES:
        raise ModelError(
            f"{source}: {path.suffix} files can run code when opened and are not read; use the .safetensors "
            f"version of this checkpoint, convert it in your WebUI (Checkpoint Merger), or {CONVERT}"
        )
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise ModelError(f"{source}: not a .safetensors file; give a .safetensors checkpoint or a folder")
        return path
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{source}: no model_index.json inside, so this is not a diffusers model folder; "
                "give the folder that holds model_index.json, or a .safetensors checkpoint"
            )
        return path
    if is_hub_id(source):
        return from_hub(source, fetch=fetch)
    raise ModelError(f"{source}: no such base model; give `mini`, a folder, a .safetensors file or a hub id")


def scheduler_config(recognised: Recognised) -> Mapping[str, Any]:
    """Return the noise schedule's settings: the folder's own, or the family's."""
    folder = (
        recognised.path if recognised.layout == "folder" else ASSETS / FAMILIES[recognised.family].info.assets
    )
    config: Mapping[str, Any] = read_json(folder / "scheduler" / "scheduler_config.json")
    return config


def _process(
    recognised: Recognised,
    prediction_type: PredictionType | None,
    zero_terminal_snr: bool | None,
) -> NoiseProcess:
    prediction = recognised.prediction_type(prediction_type)
    rescaled = recognised.zero_terminal_snr(zero_terminal_snr)
    if rescaled and not PREDICTIONS[prediction].speaks_of_pure_noise:
        raise ModelError(
            f"{recognised.path}: a schedule that ends in pure noise (zero terminal SNR) needs v-prediction, "
            "but this base predicts epsilon; set model.zero_terminal_snr=false, or "
            "model.prediction_type=v_prediction if that is what it does"
        )
    kind = FAMILIES[recognised.family]
    return kind.make_process(scheduler_config(recognised), prediction, ends_in_noise=rescaled)


def _denoiser_source(
    folder: Path, source: TensorSource | None, denoiser: Any
) -> tuple[dict[str, StoredKey], TensorSource]:
    names = denoiser.state_dict()
    if source is not None:  # single files are those of U-Nets
        return unet_key_map(names), source
    source = TensorSource(weight_files(folder))
    return _folder_key_map(names, source), source


def _vae_source(
    path: Path, source: TensorSource | None, vae: Any
) -> tuple[dict[str, StoredKey], TensorSource]:
    names = vae.state_dict()
    if source is not None:
        return vae_key_map(names), source
    source = TensorSource(weight_files(path / "vae"))
    return _folder_key_map(names, source), source


def _load_vae(source: str, default: Any, device: torch.device) -> Any:
    """Return another autoencoder of the family's build from a file, a folder or a hub id."""
    path = Path(source).expanduser()
    vae = default
    if path.is_dir() or not path.exists():
        folder = path if path.is_dir() else from_hub(source, vae=True)
        folder = folder if (folder / "config.json").is_file() else folder / "vae"
        vae = _new_vae(folder.parent, folder)
        tensors = TensorSource(weight_files(folder))
        key_map = _folder_key_map(vae.state_dict(), tensors)
    else:
        tensors = TensorSource([path])
        key_map = _vae_key_map_of_file(path, tensors, vae)
    fill(vae, key_map, tensors, dtype=torch.float32, device=device, what="VAE")
    return vae


def _vae_key_map_of_file(path: Path, source: TensorSource, vae: Any) -> dict[str, StoredKey]:
    """Return the key map of a VAE file: diffusers' names, LDM names, or those inside a checkpoint."""
    names = vae.state_dict()
    keys = set(source.keys)
    if path.suffix.lower() in _CODE_SUFFIXES:
        raise ModelError(f"{path}: {path.suffix} files can run code when opened; use a .safetensors VAE")
    if any(key.startswith(VAE_PREFIX) for key in keys):
        return vae_key_map(names)
    if any(key.startswith("decoder.up.") for key in keys):
        return vae_key_map(names, prefix="")
    if any(key.startswith("decoder.up_blocks.") for key in keys):
        return _folder_key_map(names, source)
    raise ModelError(f"{path}: holds no VAE; give a VAE file, a checkpoint with one, or a diffusers folder")


def _folder_key_map(names: Mapping[str, Any], source: TensorSource) -> dict[str, StoredKey]:
    """Return the key map of a diffusers component, whichever release of the libraries wrote it."""
    keys = set(source.keys)
    key_map = {}
    for name in names:
        spellings = [name, f"text_model.{name}"]
        spellings += [name.replace(new, old) for new, old in _OLD_NAMES.items() if new in name]
        key_map[name] = StoredKey(next((spelling for spelling in spellings if spelling in keys), name))
    return key_map


def _known_spelling(key_map: dict[str, StoredKey], source: TensorSource) -> dict[str, StoredKey]:
    """Some old SD1 files leave ``text_model.`` out."""
    keys = set(source.keys)
    if all(stored_key.key in keys for stored_key in key_map.values()):
        return key_map
    short = {
        name: StoredKey(stored_key.key.replace(".text_model.", "."), stored_key.third)
        for name, stored_key in key_map.items()
    }
    return short if all(stored_key.key in keys for stored_key in short.values()) else key_map


def _new_denoiser(folder: Path, info: DenoiserInfo) -> Any:
    import diffusers

    with without_memory():
        return getattr(diffusers, info.diffusers_class).from_config(
            read_json(folder / info.component / "config.json")
        )


def _new_vae(folder: Path, vae_folder: Path | None = None) -> Any:
    from diffusers import AutoencoderKL

    with without_memory():
        return AutoencoderKL.from_config(read_json((vae_folder or folder / "vae") / "config.json"))


def _new_text_encoder(folder: Path, *, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = read_json(folder / "config.json")
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    with without_memory():
        return kind(CLIPTextConfig.from_dict(config))


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path, pad_token: str, *, shared: bool) -> Any:
    """Return a tokenizer of the folder; all families share one vocabulary, which we ship for single files."""
    from transformers import CLIPTokenizer

    if folder.is_dir():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if not shared:
        raise ModelError(f"{folder}: is missing; check that the download is complete")
    return CLIPTokenizer.from_pretrained(
        ASSETS / "sd1" / "tokenizer", local_files_only=True, pad_token=pad_token
    )


def _recommended(path: Path) -> dict[str, Any]:
    """Return settings the base's author suggests, from ``sdlora.json`` in its folder."""
    file = path / "sdlora.json"
    if not file.is_file():
        return {}
    data = read_json(file).get("recommended", {})
    return data if isinstance(data, dict) else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own progress bars and notices out of ours; real errors are raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    libraries = [transformers_logging, diffusers_logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
