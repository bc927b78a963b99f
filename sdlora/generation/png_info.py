"""The settings inside a PNG: the ``parameters`` text that A1111's WebUI writes and reads.

``prompt``, then a line ``Negative prompt: ...`` if there is one, then a line of ``Name: value`` pairs;
values with a comma, colon or line break are JSON strings (WebUI, modules/infotext_utils.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.strength import Strength, pair_of
from ..errors import SdloraError
from ..files import parse_json, replacing
from ..machine import version

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..families.base import BaseModelInfo
    from .render import GenerateRequest

_KEY = "parameters"
_NEGATIVE = "Negative prompt:"
_NAME_PART = re.compile(r"[\w \-/]")
MAX_TEXT = 1_000_000
"""Longest ``parameters`` text that is read, in characters; those that WebUI writes have a few thousand."""
_LEAST_PAIRS = 3  # WebUI takes a last line with fewer pairs as part of the prompt


def parameters_text(
    request: GenerateRequest, base: BaseModelInfo | None = None, hashes: Mapping[str, str] | None = None
) -> str:
    """Return a request as WebUI's text.

    The prompt is written as it was rendered: brackets weight words here as they do in WebUI.

    Args:
        request: what was rendered; adapters become ``<lora:NAME:STRENGTH>``, or
            ``<lora:NAME:TEXT ENCODER:U-NET>`` if the two strengths differ.
        base: the base model, for its name and hash.
        hashes: adapter name -> SHA-256 (hex) of the file's tensors, as WebUI computes it.
    """
    from ..diffusion.samplers import find_sampler

    sampler = find_sampler(request.sampler)
    tags = [lora_tag(name, strength) for name, strength in request.strengths.items()]
    values: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": sampler.webui_name,
        "Schedule type": sampler.webui_schedule,
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": base.digest[:10] if base else None,
        "Model": base.title if base else None,
        "Lora hashes": _lora_hashes(request.strengths, hashes or {}),
        "Version": f"sdlora {version()}",
    }
    pairs = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None)
    negative = f"\n{_NEGATIVE} {request.negative_prompt}" if request.negative_prompt else ""
    return f"{' '.join([request.prompt, *tags]).strip()}{negative}\n{pairs}"


def lora_tag(name: str, strength: Strength) -> str:
    """Return an adapter as users of WebUI write it in a prompt."""
    denoiser, text = pair_of(strength)
    return f"<lora:{name}:{denoiser:g}>" if denoiser == text else f"<lora:{name}:{text:g}:{denoiser:g}>"


def save_png(image: Image, file: Path, text: str) -> None:
    """Write a PNG with ``text`` as its ``parameters``, atomically (tEXt, or iTXt beyond Latin-1).

    Raises:
        OutputError: when the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_KEY, text)
    with replacing(file) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_parameters(file: Path) -> dict[str, str]:
    """Return the settings inside a PNG: ``Prompt``, ``Negative prompt``, and the pairs by their names.

    Raises:
        SdloraError: if it is not a readable PNG, or holds no such text.
    """
    from ..data.reading.decoding import opened_image

    with opened_image(file) as loaded:
        text = loaded.image.info.get(_KEY)
    if not isinstance(text, str):
        raise SdloraError(f"{file}: holds no `{_KEY}` text; give a PNG that sdlora or WebUI wrote")
    return parse_parameters(text)


def parse_parameters(text: str) -> dict[str, str]:
    """Return WebUI's text as a dict, parsed as WebUI parses it, in time proportional to its length.

    Raises:
        SdloraError: when it has more than a million characters.
    """
    if len(text) > MAX_TEXT:
        raise SdloraError(
            f"the image's `{_KEY}` text has {len(text)} characters; at most {MAX_TEXT} are read"
        )
    *lines, last = text.strip().split("\n")
    pairs = list(_pairs(last))
    if len(pairs) < _LEAST_PAIRS:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).strip().removeprefix(_NEGATIVE).strip()
    values = {"Prompt": "\n".join(lines[:start]).strip(), "Negative prompt": negative}
    return values | {name: _unquoted(value.strip()) for name, value in pairs}


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Yield the ``Name: value`` pairs of a line.

    They are the matches of the expression that WebUI searches with (``_RE_PARAM`` in the test), which takes
    quadratic time: 13 s for 20 kB of spaces.
    """
    start = 0
    while (colon := line.find(":", start)) >= 0:
        name = _name_before(line, start, colon)
        if name is None:
            start = colon + 1
            continue
        begin = colon + 1
        while begin < len(line) and line[begin].isspace():
            begin += 1
        end = _end_of_quoted(line, begin)
        if end is None:
            comma = line.find(",", begin)
            end = len(line) if comma < 0 else comma
        yield name, line[begin:end]
        start = end + 1


def _name_before(line: str, start: int, colon: int) -> str | None:
    """Return the name that ends at a colon: two or more letters, digits, spaces, ``-`` or ``/``."""
    first = colon
    while first > start and _NAME_PART.match(line, first - 1):
        first -= 1
    while first < colon and not (line[first].isalnum() or line[first] == "_"):
        first += 1
    return line[first:colon] if colon - first >= 2 else None


def _end_of_quoted(line: str, begin: int) -> int | None:
    """Return the end of a quoted text that begins here and ends before a comma or line end; else None."""
    if not line.startswith('"', begin):
        return None
    at = begin + 1
    while at < len(line) and line[at] != '"':
        at += 2 if line[at] == "\\" else 1
    filled = begin + 1 < at < len(line) and (at + 1 == len(line) or line[at + 1] == ",")
    return at + 1 if filled else None


def _lora_hashes(strengths: Mapping[str, Strength], hashes: Mapping[str, str]) -> str | None:
    known = [f"{name}: {hashes[name][:12]}" for name in strengths if hashes.get(name)]
    return ", ".join(known) or None


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(parse_json(value))
    except ValueError:
        return value
