"""How strongly an adapter acts, and how that is given on a command line; without peft, slow to import."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError, shown
from ..families.facts import is_text_encoder

Strength = float | Mapping[str, float]
"""One strength for all components, or one for each by its name or role (missing ones count as 0)."""

DENOISER, TEXT_ENCODERS = "denoiser", "text_encoders"
"""The roles, for strengths given before it is known which family they are for."""


def by_role(denoiser: float, text_encoders: float) -> Strength:
    """Return one strength for the denoiser of any family, and one for all text encoders."""
    return {DENOISER: denoiser, TEXT_ENCODERS: text_encoders}


def strength_of(strength: Strength, component: str) -> float:
    """Return the strength that applies to a component."""
    if isinstance(strength, int | float):
        return strength
    role = TEXT_ENCODERS if is_text_encoder(component) else DENOISER
    return float(strength.get(component, strength.get(role, 0.0)))


def pair_of(strength: Strength) -> tuple[float, float]:
    """Return the strengths of the denoiser, whatever its name, and of the (first) text encoder."""
    if isinstance(strength, int | float):
        return strength, strength
    named = [name for name in strength if not is_text_encoder(name)]  # components and roles alike
    denoiser = strength[named[0]] if named else 0.0
    return float(denoiser), strength_of(strength, "text_encoder")


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
    if matched is None or text.strip().startswith(":"):  # an unset variable before the strength
        raise ConfigError(
            f"adapter `{shown(text)}`: names no file; give FILE:STRENGTH, e.g. style.safetensors:0.8"
        )
    file, first, second = matched["file"], matched["first"], matched["second"]
    head, colon, tail = file.rpartition(":")
    if colon and not tail.lstrip().startswith(("\\", "/")) and len(head) != 1:
        raise ConfigError(
            f"adapter `{shown(text)}`: `{shown(tail)}` is not a strength; give FILE:STRENGTH or "
            "FILE:U-NET:TEXT-ENCODER with numbers, e.g. style.safetensors:0.8"
        )
    if not all(math.isfinite(float(number)) for number in (first, second) if number is not None):
        raise ConfigError(f"adapter `{shown(text)}`: its strength is beyond all numbers; give one like 0.8")
    try:
        path = Path(file).expanduser()
    except RuntimeError:
        raise ConfigError(f"adapter `{shown(text)}`: there is no such user; write the path out") from None
    if second is None:
        return path, 1.0 if first is None else float(first)
    return path, by_role(float(first), float(second))
