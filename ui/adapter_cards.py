"""What an adapter's file and the files beside it say to people: trigger words, strength, base, a preview.

Only the header of the file is read, and no torch is needed. Cards are those of WebUI and Forge: formats.md.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.files import parse_json
from sdlora.run_folder import RunFolder

from .server.allowed_paths import AllowedPaths

MAX_HEADER_BYTES = 32 * 2**20
MAX_CARD_BYTES = 2**20
_MOST_TEXT = 300
_MOST_KEPT = 2000
_PREVIEWS = tuple(
    f"{middle}.{ending}" for middle in ("", ".preview") for ending in ("png", "jpg", "jpeg", "webp")
)


class AdapterCards:
    """The cards of adapters, read once for each version of a file. May be called from any thread."""

    def __init__(self, paths: AllowedPaths) -> None:
        """Start with none."""
        self._paths = paths
        self._known: dict[tuple[Path, int, int], dict[str, Any]] = {}
        self._lock = threading.Lock()

    def of(self, file: Path) -> dict[str, Any]:
        """Return ``{trigger, strength, base, preview, changed}``; empty texts for what is not said.

        Args:
            file: that may be read.
        """
        empty: dict[str, Any] = {"trigger": "", "strength": None, "base": "", "preview": None, "changed": 0}
        with suppress(OSError):
            state = file.stat()
            key = file, state.st_mtime_ns, state.st_size
            with self._lock:
                known = self._known.get(key)
            if known is None:
                known = _said(file)
                with self._lock:
                    while len(self._known) >= _MOST_KEPT:
                        self._known.pop(next(iter(self._known)))
                    self._known[key] = known
            return empty | known | self._preview(file)
        return empty

    def _preview(self, file: Path) -> dict[str, Any]:
        """Return the image beside an adapter; of a run, the newest one it drew."""
        beside = (file.with_name(file.stem + ending) for ending in _PREVIEWS)
        run = RunFolder(file.parent)
        drawn = sorted(run.samples.rglob("*.png"))[-1:] if run.exists() else []
        for image in (*beside, *drawn):
            if image.is_file() and self._paths.reaches(image):
                return {"preview": str(image), "changed": image.stat().st_mtime_ns}
        return {}


def header_of(file: Path) -> Mapping[str, Any]:
    """Return the header of a safetensors file: its tensors by name, and its ``__metadata__``.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is something else.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError("is not a safetensors file")
        text = stream.read(length)
    header = parse_json(text)
    if len(text) < length or not isinstance(header, dict):
        raise ValueError("is not a safetensors file")
    return header


def _said(file: Path) -> dict[str, Any]:
    entries: Mapping[str, Any] = {}
    with suppress(OSError, ValueError, struct.error):
        held = header_of(file).get("__metadata__")
        entries = held if isinstance(held, dict) else {}
    card: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):
        beside = file.with_suffix(".json")
        if beside.stat().st_size <= MAX_CARD_BYTES:
            held = parse_json(beside.read_text(encoding="utf-8-sig"))
            card = held if isinstance(held, dict) else {}
    words = ""
    with suppress(ValueError, TypeError):
        words = ", ".join(str(word) for word in parse_json(entries.get("sdlora.trigger_words") or "[]"))
    trigger = words or _text(entries.get("modelspec.trigger_phrase")) or _text(card.get("activation text"))
    base = next((_text(entries[key]) for key in _BASES if entries.get(key)), "")
    strength = _number(entries.get("sdlora.preferred_strength")) or _number(card.get("preferred weight"))
    return {"trigger": trigger[:_MOST_TEXT], "strength": strength, "base": base[:_MOST_TEXT]}


_BASES = ("sdlora.base", "ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    with suppress(TypeError, ValueError):
        number = float(value)
        return number if -10 <= number <= 10 and number != 0 else None
    return None
