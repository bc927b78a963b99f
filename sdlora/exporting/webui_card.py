"""The files beside an adapter file for WebUI: the preview image and the card with the trigger words.

Forge reads the same files. Source: formats.md 5.2.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.canonical import AdapterFile
from ..errors import OutputError
from ..files import write_bytes, write_json

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo

_MAX_SIDE = 1024
_PREVIEWS = tuple(
    f"{middle}.{ending}" for middle in ("", ".preview") for ending in ("png", "jpg", "jpeg", "webp", "gif")
)


def write_card(adapter: AdapterFile, target: Path, info: FamilyInfo, image: bytes | None) -> list[Path]:
    """Write ``STEM.png`` and ``STEM.json`` beside an adapter file and return them."""
    files = []
    if image is not None:
        files.append(target.with_suffix(".png"))
        write_bytes(files[0], image)
    entries = adapter.info.metadata
    card = {
        "description": entries.get("modelspec.description", ""),
        "sd version": info.header.webui,
        "activation text": ", ".join(adapter.info.trigger_words),
        "preferred weight": _preferred(entries.get("sdlora.preferred_strength")),
        "negative text": "",
        "notes": _notes(entries),
    }
    write_json(target.with_suffix(".json"), card)
    return [*files, target.with_suffix(".json")]


def other_preview(target: Path) -> Path | None:
    """Return an existing preview of the file under another name than ours.

    WebUI takes any one of several, so chance would decide which of two it shows.
    """
    neighbours = (target.with_name(target.stem + ending) for ending in _PREVIEWS if ending != ".png")
    return next((file for file in neighbours if file.is_file()), None)


def card_image(file: Path | None, *, private: bool = False) -> bytes | None:
    """Return an image as PNG of a card's size; a small PNG as it is, with the settings stored in it.

    Args:
        file: of any kind that Pillow reads, or None.
        private: leave out the settings, which hold the prompt and names of files.

    Raises:
        OutputError: when it cannot be read as an image.
    """
    if file is None:
        return None
    from ..data.reading.decoding import ImageFileError, decoded_image, read_image_bytes

    try:
        data = read_image_bytes(file)
        with decoded_image(data, str(file), least_side=_MAX_SIDE) as loaded:
            image = loaded.image
            if loaded.format == "PNG" and max(image.size) <= _MAX_SIDE and not private:
                return data
            small = image.convert("RGB")
            small.info = {}
    except ImageFileError as error:
        raise OutputError(
            f"{file}: is not a usable preview image ({error.what}); give a PNG or JPEG"
        ) from None
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def _notes(entries: Mapping[str, str]) -> str:
    labels = {
        "ss_sd_model_name": "base",
        "ss_steps": "steps",
        "ss_num_train_images": "images",
        "ss_resolution": "resolution",
        "ss_learning_rate": "learning rate",
        "modelspec.license": "licence",
    }
    known = [
        f"{label}: {entries[key]}" for key, label in labels.items() if entries.get(key, "None") != "None"
    ]
    return "Made with sdlora. " + "; ".join(known) if known else "Made with sdlora."


def _preferred(text: str | None) -> float:
    try:
        value = float(text) if text is not None else 0.0
    except ValueError:
        return 0.0
    return value if 0.0 < value < 10.0 else 0.0  # 0 is WebUI's word for "the default"
