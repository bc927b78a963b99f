"""Editing the header of an adapter file; the tensors stay the same, byte for byte.

Entries that follow from the tensors or the family cannot be set, and values that break clients are refused,
as WebUI parses some entries without checking them (formats.md 5.1). Hashes are updated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import ConfigError, shown
from ..families.facts import FamilyInfo
from ..families.table import FAMILIES, family_info
from ..files import parse_json, replacing
from ..tensor_file import MAX_ENTRY_CHARS, MAX_HEADER_BYTES, Header, header_bytes
from . import folding, hashes, metadata
from .folding import CONFIG_ENTRY

_KEY = re.compile(r"^[A-Za-z][\w.\-]{0,127}$", re.ASCII)
_FROM_TENSORS = "follows from the tensors and is written with them"
_FIXED: tuple[tuple[str, str], ...] = (
    ("sshs_", _FROM_TENSORS),
    ("modelspec.hash_sha256", _FROM_TENSORS),
    ("ss_network_dim", _FROM_TENSORS),
    ("ss_network_alpha", _FROM_TENSORS),
    ("ss_network_args", _FROM_TENSORS),
    ("ss_network_module", _FROM_TENSORS),
    (folding.RECORDED_ALPHAS, _FROM_TENSORS),
    (CONFIG_ENTRY, _FROM_TENSORS),
    ("format", "tells programs how the tensors are stored"),
    ("sdlora.config", "records the settings of the training"),
    ("modelspec.sai_model_spec", "is the version of the specification that the entries follow"),
)
_HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
_NEEDED = ("ss_base_model_version", "ss_v2", "modelspec.architecture")
"""Without these, WebUI and Forge take the file for one of another family and hide it."""
_TABLES = ("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info")


@dataclass(frozen=True)
class Edit:
    """What an edit of one file did.

    Attributes:
        path: the file.
        before: entries that were changed or removed, as they were.
        after: entries that were set, as they are now.
    """

    path: Path
    before: Mapping[str, str]
    after: Mapping[str, str]


def edit_header(
    header: Header, values: Mapping[str, str], removed: Sequence[str], family: str | None
) -> Edit:
    """Set and remove header entries of one file, atomically; tensors and their order stay.

    Args:
        header: of the file, as it is now.
        values: entry -> new value; for ``modelspec.thumbnail`` it may be the path of an image.
        removed: entries to take out.
        family: name of the family if the layers tell it, else None.

    Raises:
        ConfigError: naming every entry that may not be changed, is unknown, or has a broken value.
        OutputError: when the file cannot be written, or a thumbnail's image cannot be read.
    """
    values = dict(values)
    problems = [problem for key in (*values, *removed) if (problem := _fixed(key))]
    problems += [
        f"`{shown(key)}` is both set and removed; give one of them" for key in values if key in removed
    ]
    problems += [
        f"`{shown(key)}` is not in {header.path}, so it cannot be removed"
        for key in removed
        if key not in header.metadata
    ]
    problems += [f"`{key}` tells programs the family; set it instead" for key in removed if key in _NEEDED]
    if not problems:
        problems = [problem for key, text in values.items() if (problem := _broken(key, text, family))]
    if not problems:
        problems = _contradiction(values, dict(header.metadata) | values)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n{listed}")
    values |= _following(values, header.metadata)
    entries = {key: text for key, text in header.metadata.items() if key not in removed} | values
    _rewrite(header, entries)
    touched = [*values, *removed]
    before = {key: header.metadata[key] for key in touched if key in header.metadata}
    return Edit(header.path, before, values)


def _fixed(key: str) -> str | None:
    if not _KEY.match(key):
        return f"`{shown(key)}` is not a name for an entry; use letters, digits, dots, dashes and underscores"
    reason = next(
        (why for start, why in _FIXED if key == start or (start[-1] == "_" and key.startswith(start))), None
    )
    return f"`{key}` {reason}, so it cannot be changed" if reason else None


def _following(values: dict[str, str], entries: Mapping[str, str]) -> dict[str, str]:
    """Return further entries that must agree with the changed ones, and the thumbnail of an image."""
    more: dict[str, str] = {}
    image = values.get("modelspec.thumbnail")
    if image is not None and not image.startswith("data:"):
        more["modelspec.thumbnail"] = metadata.thumbnail(Path(image))
    if "sdlora.trigger_words" in values:
        words = parse_json(values["sdlora.trigger_words"])
        more.setdefault("modelspec.trigger_phrase", ", ".join(words))
    elif "modelspec.trigger_phrase" in values and "sdlora.trigger_words" in entries:
        words = metadata.trigger_words({"modelspec.trigger_phrase": values["modelspec.trigger_phrase"]})
        more["sdlora.trigger_words"] = json.dumps(list(words), ensure_ascii=False)
    return more


def _rewrite(header: Header, entries: dict[str, str]) -> None:
    """Write the new header and the tensors to a file beside this one, then replace this one."""
    stored = {
        key: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for key, spec in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end))
    }
    hashes = {key: prefix for key, prefix in _HASHES.items() if key in entries}
    with replacing(header.path) as temporary:
        with header.path.open("rb") as source, temporary.open("wb") as target:
            if "sshs_legacy_hash" in entries:
                entries["sshs_legacy_hash"] = _legacy_hash(header, stored, entries, source)
            # placeholders of the final length: the header is written again when the hashes are known
            entries |= {key: prefix + "0" * 64 for key, prefix in hashes.items()}
            start = header_bytes(stored, entries)
            if len(start) - 8 > MAX_HEADER_BYTES:
                raise ConfigError(
                    f"{header.path}: its header would take {len(start)} bytes, more than the "
                    f"{MAX_HEADER_BYTES} that readers allow; set shorter values"
                )
            target.write(start)
            digest = hashlib.sha256()
            source.seek(header.data_offset)
            while block := source.read(2**20):
                digest.update(block)
                target.write(block)
            entries |= {key: prefix + digest.hexdigest() for key, prefix in hashes.items()}
            target.seek(0)
            target.write(header_bytes(stored, entries))
            target.flush()
            os.fsync(target.fileno())
        shutil.copymode(header.path, temporary)


def _legacy_hash(
    header: Header, stored: Mapping[str, Tensor], entries: Mapping[str, str], source: BinaryIO
) -> str:
    def data(key: str) -> bytes:
        spec = header.tensors[key]
        source.seek(header.data_offset + spec.start)
        return source.read(spec.end - spec.start)

    return hashes.legacy_hash(stored, entries, data)


def _broken(key: str, text: str, family: str | None) -> str | None:
    """Return what is wrong with a value, or None."""
    if len(text) > MAX_ENTRY_CHARS:
        return f"`{key}`: is longer than the {MAX_ENTRY_CHARS} characters that readers take; shorten it"
    if any(ord(c) < 32 and c not in "\n\t" for c in text) or any(0xD800 <= ord(c) < 0xE000 for c in text):
        return f"`{key}`: holds control characters; give plain text"
    if text.startswith("{") and _json(text) is None:
        return f"`{key}`: starts with a brace but is not JSON, which WebUI would try to read; correct it"
    rule = _RULES.get(key)
    if rule is not None and (wanted := rule(text)) is not None:
        return f"`{key}={shown(text, 60)}`: {wanted}"
    family_of_text = _families_by_text(key)
    if family_of_text and text not in family_of_text:
        return f"`{key}={shown(text, 60)}`: must be one of {', '.join(family_of_text)}"
    if family_of_text and family is not None and family_of_text[text].name != family:
        return f"`{key}={text}`: the layers are those of {family}; give its own value"
    if key == "ss_v2" and family is not None and text != (wanted := str(family_info(family).header.is_v2)):
        return f"`{key}={text}`: the layers are those of {family}; give {wanted}"
    return None


def _families_by_text(key: str) -> dict[str, FamilyInfo]:
    """Return the family for each value of an entry; nothing for entries that do not tell it."""
    infos = [family.info for family in FAMILIES.values()]
    if key == "ss_base_model_version":
        return {word: info for info in infos for word in info.header.versions}
    if key == "modelspec.architecture":
        return {word: info for info in infos for word in info.header.architectures}
    return {}


def _contradiction(values: Mapping[str, str], entries: Mapping[str, str]) -> list[str]:
    """Return a problem if the entries that tell programs the family disagree."""
    stated = [table[entries[key]] for key in _NEEDED if entries.get(key) in (table := _families_by_text(key))]
    touched = [key for key in _NEEDED if key in values]
    differ = len({info.name for info in stated}) > 1 or any(
        info.header.is_v2 != (entries["ss_v2"] == "True") for info in stated if "ss_v2" in entries
    )
    if not touched or not differ:
        return []
    entries_shown = ", ".join(f"`{key}={shown(entries[key], 40)}`" for key in _NEEDED if key in entries)
    return [f"`{touched[0]}`: the header would contradict itself ({entries_shown}); set them together"]


def _json(text: str) -> object:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _table(text: str) -> str | None:
    tree = _json(text)
    valid = isinstance(tree, dict) and all(isinstance(value, dict) for value in tree.values())
    return None if valid else "must be a JSON object of objects, which WebUI's card walks through"


def _tags(text: str) -> str | None:
    tree = _json(text)
    counts = (
        [n for tags in tree.values() if isinstance(tags, dict) for n in tags.values()]
        if isinstance(tree, dict)
        else []
    )
    return _table(text) or (
        None if all(type(n) is int for n in counts) else "its counts must be whole numbers"
    )


def _list(text: str) -> str | None:
    return None if isinstance(_json(text), list) else "must be a JSON list"


def _words(text: str) -> str | None:
    words = _json(text)
    valid = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return None if valid else 'must be a JSON list of words, e.g. ["inkstyle"]'


def _number(text: str) -> str | None:
    try:
        return None if math.isfinite(float(text)) else "must be a finite number"
    except ValueError:
        return "must be a number"


def _strength(text: str) -> str | None:
    return _number(text) or (None if 0 < float(text) < 10 else "must be between 0 and 10")


def _choice(*values: str) -> Callable[[str], str | None]:
    return lambda text: None if text in values else f"must be one of {', '.join(values)}"


def _date(text: str) -> str | None:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return "must be a date like 2026-01-31 or 2026-01-31T12:00:00+00:00"
    return None


def _pattern(pattern: str, wanted: str) -> Callable[[str], str | None]:
    compiled = re.compile(pattern)
    return lambda text: None if compiled.fullmatch(text) else wanted


def _alias(text: str) -> str | None:
    if text.lower() in ("none", "addams"):
        return "is a name that WebUI cannot use; choose another"
    if not text or len(text) > 100 or re.search(r'[\\/:*?"<>|\n\t]', text):
        return 'must be a short name without \\ / : * ? " < > |, as prompts call the adapter by it'
    return None


def _image(text: str) -> str | None:
    if text.startswith("data:"):
        valid = re.match(r"^data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+$", text)
        return None if valid else "must be a data URL of an image, or the path of one"
    return None if Path(text).is_file() else "no such image; give the path of a PNG or JPEG, or a data URL"


_RULES: dict[str, Callable[[str], str | None]] = {
    **dict.fromkeys(_TABLES, _table),
    "ss_tag_frequency": _tags,
    "ss_datasets": _list,
    "ss_v2": _choice("True", "False"),
    "ss_training_started_at": _number,
    "ss_training_finished_at": _number,
    "ss_output_name": _alias,
    "sdlora.trigger_words": _words,
    "sdlora.preferred_strength": _strength,
    "sdlora.family": lambda text: _choice(*FAMILIES)(text),
    "modelspec.date": _date,
    "modelspec.resolution": _pattern(r"\d{1,5}x\d{1,5}", "must be WIDTHxHEIGHT in px, e.g. 512x512"),
    "modelspec.prediction_type": _choice("epsilon", "v"),
    "modelspec.encoder_layer": _pattern(r"\d{1,2}", "must be a whole number"),
    "modelspec.timestep_range": _pattern(r"\d{1,4},\d{1,4}", "must be two numbers like 0,1000"),
    "modelspec.thumbnail": _image,
    "modelspec.title": lambda text: None if text.strip() else "must not be empty",
}
