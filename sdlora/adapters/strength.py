"""How strongly an adapter acts, and how that is said on a command line; peft, slow to import, stays out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError

Strength = float | Mapping[str, float]
"""One strength for all components, or one a component (missing ones count as 0)."""


def strength_of(strength: Strength, component: str) -> float:
    """Return the strength that applies to a component."""
    return strength if isinstance(strength, int | float) else float(strength.get(component, 0.0))


_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_SPEC = re.compile(rf"(?P<file>.+?)(?::(?P<first>{_NUMBER}))?(?::(?P<second>{_NUMBER}))?", re.DOTALL)


def parse_adapter(text: str) -> tuple[Path, Strength]:
    """Return file and strength of ``FILE``, ``FILE:STRENGTH`` or ``FILE:U-NET:TEXT ENCODER``.

    The U-Net's strength comes first (in WebUI's ``<lora:...>`` tags it comes last). Without a strength it
    is 1. ``C:\\`` at the start of a Windows path is a part of the file.

    Raises:
        ConfigError: for an empty file name, or something after a colon that is not a number.
    """
    matched = _SPEC.fullmatch(text.strip())
    if matched is None:
        raise ConfigError(f"adapter `{text}`: names no file; give FILE:STRENGTH, e.g. style.safetensors:0.8")
    file, first, second = matched["file"], matched["first"], matched["second"]
    head, colon, tail = file.rpartition(":")
    if colon and not tail.lstrip().startswith(("\\", "/")) and len(head) != 1:
        raise ConfigError(
            f"adapter `{text}`: `{tail}` is not a strength; give FILE:STRENGTH or "
            "FILE:U-NET:TEXT-ENCODER with numbers, e.g. style.safetensors:0.8"
        )
    path = Path(file).expanduser()
    if second is None:
        return path, 1.0 if first is None else float(first)
    text_strength = float(second)
    return path, {"unet": float(first), "text_encoder": text_strength, "text_encoder_2": text_strength}
