"""Adapters from the hub: ``OWNER/NAME``, or ``OWNER/NAME/FILE.safetensors`` where there are several.

They come through the hub's usual cache. Offline mode (``HF_HUB_OFFLINE=1``) and a missing network fall back
to what the cache holds. Only safetensors and the ``adapter_config.json`` beside one are fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import AdapterFileError, shown
from ..families.locating import cached, is_hub_id

_CONFIG = "adapter_config.json"
_USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""diffusers' and PEFT's own names."""


def locate_adapter(source: Path) -> tuple[Path, str | None]:
    """Return an adapter's file or folder on this machine, and its name if it came from the hub.

    Args:
        source: a path, or an id on the hub.

    Raises:
        AdapterFileError: for an id that neither the hub nor the cache gives, or without a clear adapter.
    """
    owner, name, *inside = text.split("/", 2) if "/" in (text := source.as_posix()) else ("", text)
    if source.exists() or not owner or not is_hub_id(f"{owner}/{name}"):
        return source, None
    repo, wanted = f"{owner}/{name}", inside[0] if inside else None
    if wanted is not None and not wanted.endswith(".safetensors"):
        return source, None
    if wanted is None and source.suffix == ".safetensors":
        return source, None
    try:
        file = _from_hub(repo, wanted)
    except AdapterFileError:
        raise
    except Exception as error:
        raise AdapterFileError(
            f"{repo}: neither a path here nor an adapter that the hub gives ({hub_reason(error)})"
        ) from error
    whole = file.name == _USUAL[1] and (file.parent / _CONFIG).is_file()
    return (file.parent if whole else file), (name if wanted is None else file.stem)


def hub_reason(error: Exception) -> str:
    """Return in one line what the hub said, or why it could not be asked."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: ask for access on its page, then run: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the spelling, or run: hf auth login"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no token is stored here: run: hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the token may not do this, or there is none: run hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache does not hold it"
    if type(error).__module__.startswith(("httpx", "httpcore")) or isinstance(error, OSError):
        return f"{constants.ENDPOINT} cannot be reached: check the network"
    text = str(error).strip()
    return shown(text.splitlines()[0], 200) if text else type(error).__name__


def _from_hub(repo: str, wanted: str | None) -> Path:
    """Return an adapter's file in the cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError
        name = _chosen(repo, [file.rfilename for file in HfApi().model_info(repo).siblings or ()], wanted)
        beside = str(PurePosixPath(name).parent / _CONFIG)
        folder = Path(snapshot_download(repo, allow_patterns=[name, beside]))
    except AdapterFileError:
        raise
    except Exception as error:
        try:
            folder = cached(repo)
        except Exception:
            raise error from None
        there = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.safetensors"))]
        name = _chosen(repo, there, wanted)
    return folder / name


def _chosen(repo: str, names: Sequence[str], wanted: str | None) -> str:
    """Return the name of the adapter's file among those of a repository."""
    files = [name for name in names if name.endswith(".safetensors")]
    if wanted is not None and wanted in files:
        return wanted
    at_top = [name for name in files if "/" not in name]
    usual = [name for name in _USUAL if name in at_top]
    if wanted is None and (usual or len(at_top) == 1):
        return (usual or at_top)[0]
    if "model_index.json" in names:
        raise AdapterFileError(f"{repo}: holds a base model, not an adapter; give it with --base")
    listed = ", ".join(shown(name, 60) for name in files[:10])
    raise AdapterFileError(
        f"{repo}: holds no {wanted}; there are {listed or 'no .safetensors files'}"
        if wanted
        else f"{repo}: holds {len(files)} .safetensors files; name one: {repo}/FILE ({listed or 'none'})"
    )
