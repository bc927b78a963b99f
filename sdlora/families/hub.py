"""Fetches a model from the Hugging Face hub into its ordinary cache, taking no more files than are read.

Offline mode (``HF_HUB_OFFLINE=1``) and a missing network fall back to what the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import ModelError
from .facts import AUTOENCODER
from .table import FAMILIES, component_names

_VARIANTS = (".fp16.", ".bf16.", ".non_ema.")


def from_hub(source: str, *, vae: bool = False, fetch: bool = True) -> Path:
    """Return the folder of a hub model's files.

    Args:
        source: ``owner/name``.
        vae: only an autoencoder is wanted, which may be all the model is.
        fetch: False for looking at nothing but the cache.

    Raises:
        ModelError: if neither the hub nor the cache gives it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if constants.HF_HUB_OFFLINE or not fetch:
            return Path(snapshot_download(source, local_files_only=True))
        names = HfApi().list_repo_files(source)
        return Path(snapshot_download(source, allow_patterns=wanted_files(names, vae=vae)))
    except Exception as error:
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except Exception:
            if not fetch:
                raise ModelError(
                    f"{source}: no such file or folder, and not in the cache of the hub; check the "
                    "spelling, or load it once to have it there"
                ) from None
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"{source}: neither a path here nor a model that the hub gives ({reason}); check the "
                "spelling and the network, or give a local folder or .safetensors file"
            ) from error


def wanted_files(names: Sequence[str], *, vae: bool = False) -> list[str]:
    """Return those files of a hub model that loading reads: of several precisions only one."""
    parts = (AUTOENCODER,) if vae else _folders()
    at_top = (
        ("config.json", "diffusion_pytorch_model.safetensors") if vae else ("model_index.json", "sdlora.json")
    )
    chosen = [name for name in names if name in at_top]
    for part in parts:
        part_files = [name for name in names if PurePosixPath(name).parent == PurePosixPath(part)]
        chosen += [name for name in part_files if name.endswith((".json", ".txt")) and ".index." not in name]
        weights = [n for n in part_files if n.endswith(".safetensors") or ".safetensors.index." in n]
        plain = [n for n in weights if not any(mark in n for mark in _VARIANTS)]
        chosen += plain or [n for n in weights if ".non_ema." not in n]
    return chosen


def _folders() -> tuple[str, ...]:
    """Return the folders of a pipeline that any family reads."""
    infos = [family.info for family in FAMILIES.values()]
    tokenizers = dict.fromkeys(encoder.tokenizer for info in infos for encoder in info.text_encoders)
    return (*component_names(), AUTOENCODER, "scheduler", *tokenizers)
