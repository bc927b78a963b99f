"""What of a written file must stay: tensors and pixels as hashes, words as they stand.

Words are kept and not hashed, so that a comparison can say which value changed, and can follow a renaming.
What differs from run to run by nature is left out: times, speeds, and the folders a run happened to lie in.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

# keys of times, speeds, and of digests and sizes of files that hold times, whose digits are more or fewer
# (the tensors and words of such files are looked at one by one)
_FLEETING = re.compile(
    r"time|date|digests|used|modified|modelspec\.date|ss_session_id|sshs_legacy_hash|num_bytes|"
    r".*(seconds|per_second|wait_share|_at|_age)(_.*)?"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FREE_MEMORY = re.compile(r"[\d.,]+ [KMG]iB free|about [\d.,]+ s\b")
_LONG = 2000  # characters of one text from which on it is hashed


def digest(data: bytes) -> str:
    """Return the start of the SHA-256 of some bytes: 64 bits are enough to see a change."""
    return hashlib.sha256(data).hexdigest()[:16]


def settled(value: Any, places: Mapping[str, str]) -> Any:
    """Return a JSON value without times and speeds; ``places`` are folders (path -> what stands for it)."""
    if isinstance(value, dict):
        return {
            _text(key, places): settled(item, places)
            for key, item in value.items()
            if not _is_fleeting(key, item)
        }
    if isinstance(value, list):
        return [settled(item, places) for item in value]
    if not isinstance(value, str):
        return value
    if value[:1] in ("{", "["):  # headers hold JSON as text
        try:
            return settled(json.loads(value), places)
        except json.JSONDecodeError:
            pass
    text = _text(value, places)
    return text if len(text) < _LONG else digest(text.encode())


def _is_fleeting(key: str, value: Any) -> bool:
    if key == "from_file":  # a path in settings, but in a checkpoint's state the digest of a file with times
        return isinstance(value, str) and _DIGEST.fullmatch(value) is not None
    return _FLEETING.fullmatch(key) is not None


def artefact(file: Path, places: Mapping[str, str]) -> Any:
    """Return what must stay of one file, as a JSON value."""
    ending = file.suffix.lower()
    if ending == ".safetensors":
        return _tensors(file, places)
    if ending in (".png", ".jpg", ".jpeg", ".webp"):
        return _pixels(file, places)
    if ending not in (".json", ".jsonl", ".toml", ".txt", ".html", ".md", ".csv"):
        return digest(file.read_bytes())
    text = file.read_text(encoding="utf-8")
    if ending == ".json":
        return settled(json.loads(text), places)
    if ending == ".jsonl":
        return [settled(json.loads(line), places) for line in text.splitlines()]
    if ending == ".toml":
        return settled(tomllib.loads(text), places)
    return settled(text.splitlines(), places)


def artefacts(folder: Path, places: Mapping[str, str]) -> dict[str, Any]:
    """Return what must stay of every file below a folder, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): artefact(file, places) for file in files}


def _tensors(file: Path, places: Mapping[str, str]) -> dict[str, Any]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    values = memoryview(data)[8 + length :]
    words = header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = "x".join(map(str, entry["shape"]))
        tensors[name] = f"{entry['dtype']} {shape} {digest(bytes(values[begin:end]))}"
    return {"header": settled(words, places), "tensors": tensors}


def _pixels(file: Path, places: Mapping[str, str]) -> dict[str, Any]:
    with Image.open(file) as image:
        texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
        return {
            "size": f"{image.mode} {image.width}x{image.height}",
            "pixels": digest(image.tobytes()),
            "text": settled(texts, places),
        }


def _text(text: str, places: Mapping[str, str]) -> str:
    for place, name in places.items():
        text = text.replace(place, name)
    return _FREE_MEMORY.sub("*", text)
