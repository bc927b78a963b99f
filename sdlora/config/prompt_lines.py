"""Prompts as people keep them: one a line in a file, with kohya's options behind; no torch.

``an icon of a cat --n blurry --w 512 --h 768 --d 42 --l 7.5 --s 28 --ss euler_a``: negative prompt, width and
height in px, seed, guidance ("scale"), steps, sampler; ``--am 0.7`` is the adapters' strength. Lines that are
empty or begin with ``#`` are skipped.
(kohya's sd-scripts, library/train_util.py, ``line_to_prompt_dict``, and gen_img.py; behaviour only.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, shown

MOST_LINES = 1000
"""Prompts of one file."""
MOST_BYTES = 2**20
TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]{0,400})>", re.IGNORECASE)
"""What A1111's WebUI takes for a network that acts, in a prompt."""
_OPTION = re.compile(r"\s--([A-Za-z]+)(?=\s|$)")
_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "k_euler": "Euler",
    "euler_a": "Euler a",
    "k_euler_a": "Euler a",
    "dpmsolver": "DPM++ 2M",
    "dpmsolver++": "DPM++ 2M",
    "heun": "Heun",
}
"""kohya's names of samplers; others are taken as they are."""


@dataclass(frozen=True)
class PromptLine:
    """A prompt, and what it wants otherwise than the others; None where it wants nothing.

    Attributes:
        prompt: what to show.
        negative: what to avoid.
        width: px.
        height: px.
        seed: of the noise.
        guidance: guidance scale.
        steps: denoising steps.
        sampler: its name.
        strength: of the adapter that is being trained, or of those that are drawn with.
    """

    prompt: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None
    sampler: str | None = None
    strength: float | None = None


_FIELDS: dict[str, tuple[str, type]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "l": ("guidance", float),
    "s": ("steps", int),
    "ss": ("sampler", str),
    "am": ("strength", float),
}


def read_line(line: str) -> PromptLine:
    """Return what a line says.

    Raises:
        ConfigError: for an option that does not exist, or a value that it cannot have.
    """
    prompt, *parts = _OPTION.split(line)
    read = PromptLine(prompt.strip())
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        if name.lower() not in _FIELDS:
            raise ConfigError(
                f"`--{shown(name, 40)}`: no option of a prompt; there are "
                f"{', '.join(f'--{known}' for known in _FIELDS)} (negative, width, height, seed, guidance, "
                "steps, sampler, strength)"
            )
        field, kind = _FIELDS[name.lower()]
        read = replace(read, **{field: _value(name, text.strip(), kind)})
    return read


def read_prompt_file(file: Path) -> list[str]:
    """Return the lines of a file of prompts that hold one, each of which can be read.

    Raises:
        ConfigError: when the file cannot be read or holds no prompt, and for a line that says nothing clear,
            with its number.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file}: the prompts cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is no text in UTF-8; save it as UTF-8, one prompt a line") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{file}: is larger than {MOST_BYTES} bytes; divide it")
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            read_line(line)
        except ConfigError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None
        lines.append(line)
    if not 0 < len(lines) <= MOST_LINES:
        raise ConfigError(f"{file}: holds {len(lines)} prompts; give 1 to {MOST_LINES}, one a line")
    return lines


def _value(name: str, text: str, kind: type) -> Any:
    if kind is str:
        return _SAMPLERS.get(text.lower(), text) if name.lower() == "ss" else text
    try:
        if len(text) > 30:
            raise ValueError
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"`--{name} {shown(text, 40)}`: must be {what}") from None
