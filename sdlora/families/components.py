"""The components of a base, each read straight into its number format and onto its device.

A folder is in diffusers' layout; a single file is in the LDM layout, for which the component configs and the
CLIP tokenizer ship with this package.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..files import ASSETS
from .base_files import component_config, read_json
from .facts import DenoiserInfo
from .latent_model import Parts
from .ldm import VAE_PREFIX, StoredKey, text_key_map, unet_key_map, vae_key_map
from .locating import CODE_SUFFIXES, from_hub
from .quantised import Quantising
from .recognition import Recognised
from .table import FAMILIES
from .weights import TensorSource, fill, weight_files, without_memory

# old spellings in published files -> today's names
_OLD_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
    "text_model.": "",
}


def load_parts(
    recognised: Recognised,
    *,
    dtype: torch.dtype,
    device: torch.device,
    vae: str | None = None,
    configs: Path | None = None,
    quantising: Quantising | None = None,
) -> Parts:
    """Return the components of a recognised base, each read straight into its format and onto its device.

    Peak memory is the finished weights and the largest tensor.

    Args:
        recognised: the base.
        dtype: of denoiser and text encoders.
        device: where the weights go.
        vae: another autoencoder: a file, a folder, or a hub id of one.
        configs: a folder with the configs and tokenizers that a single file leaves out; the family's
            own when None.
        quantising: how the denoiser's large weights are kept, None for whole.

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
        device=device,
        what=info.denoiser.title,
        quantising=quantising,
    )
    if vae is None:
        fill(
            default_vae,
            *_vae_source(recognised.path, source, default_vae),
            dtype=torch.float32,
            device=device,
            what="VAE",
        )
    encoders, tokenizers = _text_parts(recognised, folder, source, dtype=dtype, device=device)
    other = default_vae if vae is None else _load_vae(vae, default_vae, device)
    return Parts(denoiser.eval(), other.eval(), encoders, tokenizers)


def _text_parts(
    recognised: Recognised,
    folder: Path,
    source: TensorSource | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the text encoders and their tokenizers by component."""
    encoders, tokenizers = {}, {}
    for encoder_info in FAMILIES[recognised.family].info.text_encoders:
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
    return encoders, tokenizers


def scheduler_config(recognised: Recognised) -> Mapping[str, Any]:
    """Return the noise schedule's settings: the folder's own, or the family's."""
    folder = (
        recognised.path if recognised.layout == "folder" else ASSETS / FAMILIES[recognised.family].info.assets
    )
    config: Mapping[str, Any] = read_json(folder / "scheduler" / "scheduler_config.json")
    return config


def _check_complete(recognised: Recognised, vae: str | None) -> None:
    missing = [part for part in recognised.missing if part != "vae" or vae is None]
    if missing:
        raise ModelError(
            f"{recognised.path}: has no {' and no '.join(missing)}; use the full checkpoint, not a pruned one"
            + (", or name a VAE as model.vae" if missing == ["vae"] else "")
        )


def _denoiser_source(
    folder: Path, source: TensorSource | None, denoiser: Any
) -> tuple[dict[str, StoredKey], TensorSource]:
    names = denoiser.state_dict()
    if source is not None:  # only families with a U-Net have single files
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
    """Return another autoencoder of the family's architecture from a file, a folder or a hub id."""
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
    if path.suffix.lower() in CODE_SUFFIXES:
        raise ModelError(f"{path}: {path.suffix} files can run code when opened; use a .safetensors VAE")
    if any(key.startswith(VAE_PREFIX) for key in keys):
        return vae_key_map(names)
    if any(key.startswith("decoder.up.") for key in keys):
        return vae_key_map(names, prefix="")
    if any(key.startswith("decoder.up_blocks.") for key in keys):
        return _folder_key_map(names, source)
    raise ModelError(f"{path}: holds no VAE; give a VAE file, a checkpoint with one, or a diffusers folder")


def _folder_key_map(names: Mapping[str, Any], source: TensorSource) -> dict[str, StoredKey]:
    """Return the key map of a diffusers component, whichever release of diffusers wrote it."""
    keys = set(source.keys)
    key_map = {}
    for name in names:
        spellings = [name, f"text_model.{name}"]
        spellings += [name.replace(new, old) for new, old in _OLD_NAMES.items() if new in name]
        key_map[name] = StoredKey(next((spelling for spelling in spellings if spelling in keys), name))
    return key_map


def _known_spelling(key_map: dict[str, StoredKey], source: TensorSource) -> dict[str, StoredKey]:
    """Return the key map without ``text_model.``, which some old SD1 files leave out."""
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
        return getattr(diffusers, info.diffusers_class).from_config(component_config(folder / info.component))


def _new_vae(folder: Path, vae_folder: Path | None = None) -> Any:
    from diffusers import AutoencoderKL

    with without_memory():
        return AutoencoderKL.from_config(component_config(vae_folder or folder / "vae"))


def _new_text_encoder(folder: Path, *, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = component_config(folder)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    with without_memory():
        return kind(CLIPTextConfig.from_dict(config))


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path, pad_token: str, *, shared: bool) -> Any:
    """Return a tokenizer from the folder; all families share one vocabulary, shipped for single files."""
    from transformers import CLIPTokenizer

    if folder.is_dir():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if not shared:
        raise ModelError(f"{folder}: is missing; check that the download is complete")
    return CLIPTokenizer.from_pretrained(
        ASSETS / "sd1" / "tokenizer", local_files_only=True, pad_token=pad_token
    )
