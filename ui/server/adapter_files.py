"""An adapter file dropped onto the page, kept among the exported ones; nothing is overwritten."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError
from sdlora.files import as_file_name, replacing

from ..adapter_cards import header_of
from .allowed_paths import AllowedPaths, PathRefused

MAX_ADAPTER_BYTES = 2 * 2**30


def keep_adapter(paths: AllowedPaths, uploaded: Path, folder: Path) -> Path:
    """Copy an uploaded adapter into a folder under its own name, or the next free one, and return it.

    Args:
        paths: of the server; only where nobody else can reach it.
        uploaded: the file as the browser sent it.
        folder: where adapters are kept.

    Raises:
        PathRefused: where others can reach the server.
        ConfigError: for a file that is no adapter.
    """
    if not paths.local:
        raise PathRefused("adapters are added on the machine itself only: others can reach this server")
    name = as_file_name(uploaded.name, "adapter.safetensors")
    if uploaded.suffix.lower() != ".safetensors":
        raise ConfigError(f"{name}: only .safetensors files are adapters that can be read safely")
    if uploaded.stat().st_size > MAX_ADAPTER_BYTES:
        raise ConfigError(f"{name}: has more than 2 GiB; put it into a folder named with --allow")
    try:
        header = header_of(uploaded)
    except (OSError, ValueError, struct.error):
        raise ConfigError(f"{name}: is damaged, or not a safetensors file; copy it again") from None
    if not any(_is_part(key) for key in header):
        raise ConfigError(f"{name}: holds no LoRA or other adapter; a checkpoint is chosen as the base model")
    target, number = paths.writable(folder / name), 1
    while target.exists():
        number += 1
        target = paths.writable(folder / f"{Path(name).stem}-{number}.safetensors")
    with replacing(target) as temporary:
        shutil.copyfile(uploaded, temporary)
    return target


def _is_part(key: Any) -> bool:
    """Tell whether a tensor's name is that of a part of an adapter, in any spelling: formats.md."""
    marks, name = ("lora", "lokr", "hada_", "oft_", "dora_scale", "ia3"), str(key).lower()
    ends = (".diff", ".diff_b")
    return key != "__metadata__" and (any(mark in name for mark in marks) or name.endswith(ends))
