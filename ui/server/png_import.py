"""The settings stored in an image, in the form's terms."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import get_args

from sdlora.adapters.strength import pair_of
from sdlora.config.schema import SamplerName
from sdlora.errors import ConfigError
from sdlora.generation.lora_tags import read_tag, split_tags


@dataclass(frozen=True)
class ImportedSettings:
    """The settings stored in an image; None where it has no usable value.

    Attributes:
        adapters: name, strength of the U-Net, strength of the text encoder.
    """

    prompt: str
    negative: str
    seed: int | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    sampler: str | None
    model: str | None
    adapters: tuple[tuple[str, float, float], ...]


def from_parameters(values: Mapping[str, str]) -> ImportedSettings:
    """Return the settings that :func:`sdlora.generation.png_info.read_parameters` found in an image."""
    prompt, tags = split_tags(values.get("Prompt", ""))
    adapters = []
    for text in tags:
        with suppress(ConfigError):
            tag = read_tag(text)
            adapters.append((tag.name, *pair_of(tag.strength)))
    width, _, height = values.get("Size", "").partition("x")
    return ImportedSettings(
        prompt=prompt.strip(),
        negative=values.get("Negative prompt", ""),
        seed=_whole(values.get("Seed")),
        width=_whole(width),
        height=_whole(height),
        steps=_whole(values.get("Steps")),
        guidance=_number(values.get("CFG scale")),
        sampler=_sampler(values.get("Sampler", ""), values.get("Schedule type", "")),
        model=values.get("Model"),
        adapters=tuple(adapters),
    )


def _sampler(name: str, schedule: str) -> str | None:
    known = get_args(SamplerName)
    if name == "Euler" and schedule in ("Simple", "SGM Uniform"):
        return "Euler trailing"
    return next((candidate for candidate in (f"{name} {schedule}", name) if candidate in known), None)


def _whole(text: str | None) -> int | None:
    with suppress(TypeError, ValueError):
        return int(text or "")
    return None


def _number(text: str | None) -> float | None:
    with suppress(TypeError, ValueError):
        return float(text or "")
    return None
