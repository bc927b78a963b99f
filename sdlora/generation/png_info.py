"""The settings inside a PNG: the ``parameters`` text that A1111's WebUI writes and reads.

``prompt``, then a line ``Negative prompt: ...`` if there is one, then a line of ``Name: value`` pairs;
values with a comma, colon or line break are JSON strings (WebUI, modules/infotext_utils.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SdloraError
from ..files import replacing
from ..version import version

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..adapters.strength import Strength
    from ..families.base import BaseModelInfo
    from .render import GenerateRequest

_KEY = "parameters"
_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LEAST_PAIRS = 3  # WebUI takes a last line with fewer pairs for a part of the prompt


def parameters_text(
    request: GenerateRequest, base: BaseModelInfo | None = None, hashes: Mapping[str, str] | None = None
) -> str:
    """Return a request as WebUI's text.

    The prompt stands as it was rendered: sdlora gives brackets no weight, WebUI does.

    Args:
        request: what was rendered; adapters become ``<lora:NAME:STRENGTH>``, or
            ``<lora:NAME:TEXT ENCODER:U-NET>`` where the two strengths differ.
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
    """Return an adapter as WebUI's users write it in a prompt."""
    if isinstance(strength, int | float):
        return f"<lora:{name}:{strength:g}>"
    unet, text = strength.get("unet", 0.0), strength.get("text_encoder", 0.0)
    return f"<lora:{name}:{unet:g}>" if unet == text else f"<lora:{name}:{text:g}:{unet:g}>"


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
    from ..image_file import opened_image

    with opened_image(file) as loaded:
        text = loaded.image.info.get(_KEY)
    if not isinstance(text, str):
        raise SdloraError(f"{file}: holds no `{_KEY}` text; give a PNG that sdlora or WebUI wrote")
    return parse_parameters(text)


def parse_parameters(text: str) -> dict[str, str]:
    """Return WebUI's text as a dict, parsed as WebUI parses it."""
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < _LEAST_PAIRS:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).strip().removeprefix(_NEGATIVE).strip()
    values = {"Prompt": "\n".join(lines[:start]).strip(), "Negative prompt": negative}
    return values | {name: _unquoted(value.strip()) for name, value in pairs}


def _lora_hashes(strengths: Mapping[str, Strength], hashes: Mapping[str, str]) -> str | None:
    known = [f"{name}: {hashes[name][:12]}" for name in strengths if hashes.get(name)]
    return ", ".join(known) or None


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value
