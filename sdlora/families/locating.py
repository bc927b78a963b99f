"""From a base's name (``mini``, a folder, a file, a hub id) to its place on this machine.

Of a hub model only the files that are read are fetched, into the hub's usual cache. Offline mode
(``HF_HUB_OFFLINE=1``) and a missing network fall back to what the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import ModelError
from ..files import ASSETS
from ..tensor_file import CONVERT
from .facts import AUTOENCODER
from .table import FAMILIES, component_names

CODE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that can run code when they are opened; these files are never opened."""
_VARIANTS = (".fp16.", ".bf16.", ".non_ema.")


def locate(source: str, *, fetch: bool = True) -> Path:
    """Return the folder or file of a base model, fetched from the hub if it is a hub id.

    Args:
        source: see :func:`sdlora.families.loading.load_model`.
        fetch: False to look only into the hub's cache.

    Raises:
        ModelError: if it does not exist, or is a kind of file that is not read.
    """
    if source == "mini":
        return ASSETS / "mini"
    path = Path(source).expanduser()
    if path.suffix.lower() in CODE_SUFFIXES:
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


def is_hub_id(source: str) -> bool:
    """Tell whether a source is meant as ``owner/name`` on the hub rather than as a path."""
    path = Path(source).expanduser()
    local = path.exists() or path.is_absolute() or source.startswith((".", "~"))
    return (
        source.count("/") == 1 and not local and path.suffix.lower() not in (".safetensors", *CODE_SUFFIXES)
    )


def from_hub(source: str, *, vae: bool = False, fetch: bool = True) -> Path:
    """Return the folder of a hub model's files.

    Args:
        source: ``owner/name``.
        vae: whether only an autoencoder is wanted; the model may be nothing else.
        fetch: False to look only into the cache.

    Raises:
        ModelError: if neither the hub nor the cache gives it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if constants.HF_HUB_OFFLINE or not fetch:
            return cached(source)
        # not list_repo_files: without a network it tries for half a minute
        names = [file.rfilename for file in HfApi().model_info(source).siblings or ()]
        return Path(snapshot_download(source, allow_patterns=wanted_files(names, vae=vae)))
    except Exception as error:
        try:
            return cached(source)
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


def cached(source: str) -> Path:
    """Return the folder of what the hub's cache holds of a repository, which need not be all of it.

    Raises:
        OSError: if it holds nothing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # hub 2 takes a folder for incomplete that lacks files which were never wanted
        if (folder := getattr(error, "snapshot_path", None)) is None:
            raise
        return Path(folder)


def wanted_files(names: Sequence[str], *, vae: bool = False) -> list[str]:
    """Return the files of a hub model that loading reads; of several precisions only one."""
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
