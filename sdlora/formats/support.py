"""How each client reads an adapter file, by the file's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..adapters.canonical import AdapterWeights
from .base_shapes import BaseShapes
from .clients import BY_KEY, BY_NAME, CLIENTS, Facts, Support, by_name_reasons, hint
from .keys import FileKeys
from .table import FORMATS


def client_support(
    format: str,
    family: str | None,
    weights: AdapterWeights,
    keys: Iterable[str] | FileKeys,
    entries: Mapping[str, str] | None = None,
    base: BaseShapes | None = None,
) -> tuple[Support, ...]:
    """Return how each client reads a file.

    Args:
        format: the file's format, a key of :data:`sdlora.formats.table.FORMATS`.
        family: ``sd1``, ``sd2``, ``sdxl`` or None.
        weights: the adapter in it, with the alphas that the file itself holds; values are not looked at.
        keys: the file's keys, whose spelling decides for some clients.
        entries: the header's text entries; what follows from them is left out where they are not given.
        base: the shapes of the base's layers, where they are known better than by the family.
    """
    file_keys = keys if isinstance(keys, FileKeys) else FileKeys(keys)
    facts = Facts(format, family, weights, file_keys, entries, base)
    reasons_of = FORMATS[format].code().reasons
    mixed = list(file_keys.spellings)
    supports = []
    for client in CLIENTS:
        reasons = reasons_of(client, facts)
        if len(mixed) > 1 and client == BY_NAME:
            reasons = by_name_reasons(client, facts)
        elif len(mixed) > 1 and client not in BY_KEY:
            reasons = [
                f"reads part of it at most: its keys mix the {' and '.join(mixed)} spellings; export it again"
            ]
        supports.append(Support(client, not reasons, tuple(reasons), hint(client, facts)))
    return tuple(supports)
