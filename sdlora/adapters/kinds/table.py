"""All kinds of adapters; a new one is a line here. The table is read at each use and never copied."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from ..canonical import Update
from .dora import DORA
from .full import FULL
from .glora import GLORA
from .ia3 import IA3_KIND
from .kind import AdapterKind, FilePart
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA
from .oft import BOFT_KIND, OFT_KIND
from .tucker import TUCKER

KINDS: dict[str, AdapterKind[Any]] = {
    "lora": LORA,
    "tucker": TUCKER,
    "dora": DORA,
    "loha": LOHA,
    "lokr": LOKR,
    "full": FULL,
    "glora": GLORA,
    "ia3": IA3_KIND,
    "oft": OFT_KIND,
    "boft": BOFT_KIND,
}


def kind_of(update: Update) -> AdapterKind[Any]:
    """Return the record of an update's kind."""
    return KINDS[update.kind]


def title_of(update: Update) -> str:
    """Return the name of an update's kind, for users."""
    return KINDS[update.kind].title


def titles(names: Mapping[str, object]) -> str:
    """Return the names of some kinds for users, joined for a message."""
    return " and ".join(KINDS[name].title for name in names)


def file_parts() -> dict[str, FilePart]:
    """Return the parts of all kinds by the names that readers have for them."""
    return _parts(tuple(KINDS.values()))[0]


def part_at_end(key: str) -> tuple[str, FilePart] | None:
    """Return the module's name in a key of a file, and the part that the rest names; None if none."""
    parts, pattern = _parts(tuple(KINDS.values()))
    match = pattern.search(key)
    if match is None or match.lastgroup is None:
        return None
    return key[: match.start()], parts[match.lastgroup]


@functools.lru_cache(maxsize=4)
def _parts(kinds: tuple[AdapterKind[Any], ...]) -> tuple[dict[str, FilePart], re.Pattern[str]]:
    """Return the parts of some kinds, and one expression with a named group for each of them."""
    parts = {part.name: part for kind in kinds for part in kind.parts}
    alone = {name: part for name, part in parts.items() if not part.beside}
    return parts, re.compile("|".join(f"(?P<{name}>{part.spelling})" for name, part in alone.items()))


def parts_beside() -> list[FilePart]:
    """Return the parts that say something only beside another key of their module."""
    return [part for part in file_parts().values() if part.beside]
