"""``<lora:NAME:0.8>`` in prompts, as A1111's WebUI reads it: an adapter at a strength, and no words.

With two numbers the first is the text encoder's and the second the U-Net's (WebUI,
extensions-builtin/Lora/extra_networks_lora.py), as in the texts that :mod:`.png_info` writes; ``te=`` and
``unet=`` name them. Without a number the strength is 1. ``<lyco:...>`` is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..adapters.strength import Strength, by_role
from ..config.prompt_lines import TAG
from ..errors import ConfigError, shown
from ..families.facts import WEBUI_STRENGTHS


@dataclass(frozen=True)
class LoraTag:
    """An adapter that a prompt names, and the strength it acts at."""

    name: str
    strength: Strength


def split_tags(prompt: str) -> tuple[str, list[str]]:
    """Return a prompt without its tags and the blanks in front of them, and the tags as they are written."""
    plain, tags, end = [], [], 0
    for match in TAG.finditer(prompt):
        plain.append(prompt[end : match.start()].rstrip())
        tags.append(match.group())
        end = match.end()
    return ("".join([*plain, prompt[end:]]).strip() if tags else prompt), tags


def read_tag(text: str) -> LoraTag:
    """Return what one tag says.

    Raises:
        ConfigError: for one without a name, with something that is no number, or of another kind of network.
    """
    match = TAG.fullmatch(text)
    if match is None or match[1].lower() == "hypernet":
        raise ConfigError(
            f"`{shown(text, 60)}`: only adapters are loaded; write <lora:NAME:0.8>, or leave it out"
        )
    name, *rest = (item.strip() for item in match[2].split(":"))
    numbers: list[float] = []
    named: dict[str, float] = {}
    for item in rest:
        key, equals, number = item.rpartition("=")
        value = _number(number)
        if value is None or (equals and key not in WEBUI_STRENGTHS) or len(numbers) == 2:
            name = ""
        elif equals:
            named[WEBUI_STRENGTHS[key]] = value
        else:
            numbers.append(value)
    if not name:
        raise ConfigError(
            f"`{shown(text, 60)}`: write <lora:NAME:0.8>, or <lora:NAME:0.6:0.8> with the text encoder's "
            "strength before the U-Net's"
        )
    text_encoder = named.get("text encoders", numbers[0] if numbers else 1.0)
    denoiser = named.get("denoiser", numbers[1] if len(numbers) > 1 else text_encoder)
    return LoraTag(name, denoiser if denoiser == text_encoder else by_role(denoiser, text_encoder))


def take_tags(prompt: str) -> tuple[str, dict[str, Strength]]:
    """Return a prompt without its tags, and the strength of each adapter that they name.

    Raises:
        ConfigError: for a tag that says nothing clear, or an adapter that is named twice.
    """
    plain, texts = split_tags(prompt)
    strengths: dict[str, Strength] = {}
    for text in texts:
        tag = read_tag(text)
        if tag.name in strengths:
            raise ConfigError(
                f"`{shown(text, 60)}`: the prompt names this adapter twice; leave one of them out"
            )
        strengths[tag.name] = tag.strength
    return plain, strengths


def refuse_tags(prompt: str) -> None:
    """Raise ConfigError for a prompt in which tags would become words."""
    if tags := split_tags(prompt)[1]:
        raise ConfigError(
            f"`{shown(tags[0], 60)}`: no adapter acts from here: write it into the prompt, not into the "
            "negative one (in Python, take it out with sdlora.generation.lora_tags.take_tags)"
        )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
