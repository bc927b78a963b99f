"""The record, in a checkpoint's header, of the adapters that were baked into it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.strength import Strength
from ..files import parse_json
from .sources import fingerprints
from .strengths import component_strengths

RECORD = "sdlora.baked"
"""Header entry that lists what was baked in, as JSON."""
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Entries that hold the hash of the data, which changes."""


def baked_records(
    adapters: Sequence[tuple[Path, Strength]], blocks: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Return what was baked in, for the header: by file names and hashes, without the user's folders."""
    prints = fingerprints([path for path, _ in adapters])
    return [
        {**fingerprint, "strength": component_strengths(strength), **({"blocks": dict(b)} if b else {})}
        for fingerprint, (_, strength), b in zip(prints, adapters, blocks, strict=True)
    ]


def entries_after(
    metadata: Mapping[str, str], records: Sequence[Mapping[str, Any]], inverse: bool
) -> dict[str, str]:
    """Return a checkpoint's header entries after baking: all but stale hashes, and what was done."""
    entries = {key: value for key, value in metadata.items() if key not in _STALE}
    baked = baked_adapters(metadata)
    names = [part.strip() for part in entries.get("modelspec.merged_from", "").split(",") if part.strip()]
    for record in records:
        name = Path(record["file"]).stem
        if inverse and record in baked:
            baked.remove(dict(record))
            if name in names:
                names.remove(name)
        else:
            baked.append({**record, **({"inverse": True} if inverse else {})})
            if not inverse:
                names.append(name)
    entries.pop("modelspec.merged_from", None)
    entries.pop(RECORD, None)
    if names:
        entries["modelspec.merged_from"] = ", ".join(names)
    if baked:
        entries[RECORD] = json.dumps(baked, ensure_ascii=False, separators=(",", ":"))
    return entries


def baked_adapters(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the adapters that were baked in, according to a checkpoint's header."""
    try:
        tree = parse_json(metadata.get(RECORD, "[]"), finite=False)
    except ValueError:
        return []
    return [record for record in tree if isinstance(record, dict)] if isinstance(tree, list) else []
