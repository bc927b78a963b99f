"""Which programs compute which kinds of adapter, and what the others do with them (formats.md 1.1 and 3)."""

from __future__ import annotations

from collections.abc import Iterable

from ..adapters.canonical import AdapterWeights, WrappedUpdate
from ..adapters.kinds.table import KINDS


def kind_reasons(client: str, weights: AdapterWeights, format: str = "webui") -> list[str]:
    """Return why a client that finds an adapter's keys does not compute it; nothing for plain LoRA.

    Args:
        client: which.
        weights: the adapter.
        format: in whose parts it is spelled, ``webui`` or ``diffusers``.
    """
    reasons = [reason for kind, count in weights.kinds().items() for reason in _unread(client, kind, count)]
    inside = [
        update.direction.kind for update in weights.updates.values() if isinstance(update, WrappedUpdate)
    ]
    reasons += [
        reason for kind in sorted(set(inside)) for reason in _unread(client, kind, inside.count(kind))
    ]
    return list(dict.fromkeys(reasons + quirks(client, format, weights)))


def quirks(client: str, format: str, weights: AdapterWeights) -> list[str]:
    """Return what a client that reads a format's keys computes differently."""
    reasons = []
    for name, kind in KINDS.items():
        if updates := [update for update in weights.updates.values() if update.kind == name]:
            reasons += kind.quirks(client, format, updates)
    return reasons


def is_refused(client: str, kinds: Iterable[str]) -> bool:
    """Tell whether there is a kind of layers that a client does not compute at all."""
    return any(client not in KINDS[kind].clients for kind in kinds)


def _unread(client: str, name: str, count: int) -> list[str]:
    kind = KINDS[name]
    if client in kind.clients:
        return []
    if client == "diffusers":
        return [f"refuses the whole file for its {kind.title} layers; convert it to a plain LoRA"]
    return [f"does not read {kind.title} ({count} layers) and {kind.others_do}; convert it to a plain LoRA"]
