"""Leaving out by name what a format has no place for: only when it is asked for, and always told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..adapters.canonical import AdapterFile, AdapterWeights
from ..adapters.kinds.table import KINDS
from ..errors import AdapterFileError, ConfigError
from .adapter_files import embedding_names
from .foreign import listing
from .kinds import drop_word

OTHERS = ("bias", "norm", "embedding")
"""Beside the names of kinds: differences of biases; norms with their biases; embeddings, both those that come
with the adapter and what changes the text encoder's own."""


def words() -> tuple[str, ...]:
    """Return all words that ``--drop`` takes."""
    return (*KINDS, *OTHERS)


def holds(adapter: AdapterFile, word: str) -> bool:
    """Tell whether an adapter has anything that a word would leave out."""
    if word == "embedding" and adapter.embeddings:
        return True
    return any(drop_word(key, update) == word for key, update in adapter.weights.updates.items())


def without(path: Path, adapter: AdapterFile, drop: Sequence[str]) -> tuple[AdapterFile, tuple[str, ...]]:
    """Return an adapter without some kinds of layers, and what was left out, for people.

    Keys that hold no weight go no further in any case and are told, too.

    Args:
        path: its file, for messages.
        adapter: as it was read.
        drop: of :func:`words`.

    Raises:
        ConfigError: for a word that is none, or that leaves nothing out.
        AdapterFileError: when nothing is left.
    """
    notes = stray_notes(path, adapter)
    for word in dict.fromkeys(drop):
        if word not in words():
            raise ConfigError(f"--drop {word}: is no kind of layers; give one of {', '.join(words())}")
        gone = {key: u for key, u in adapter.weights.all_items() if drop_word(key, u) == word}
        names = [f"{key.component}.{key.path}" for key in gone]
        if word == "embedding":
            names += embedding_names(adapter.embeddings)
            adapter = replace(adapter, embeddings={})
        if not names:
            raise ConfigError(f"--drop {word}: {path} has nothing of that kind; leave it out")
        kept = {key: update for key, update in adapter.weights.updates.items() if key not in gone}
        adapter = replace(adapter, weights=AdapterWeights(kept))
        notes.append(f"left out for --drop {word}: {listing(names)}")
    if not adapter.weights.updates:
        raise AdapterFileError(f"{path}: nothing is left of it without {', '.join(drop)}")
    return adapter, tuple(notes)


def untouched(path: Path, adapter: AdapterFile) -> list[str]:
    """Return what of a file changes no weight of a model, for people."""
    notes = stray_notes(path, adapter)
    if adapter.embeddings:
        names = ", ".join(f"`{name}`" for name in embedding_names(adapter.embeddings))
        notes.append(
            f"{path.name}: the embedding {names} is no change of the model's weights and has no effect here; "
            "WebUI reads it from the adapter's file"
        )
    return notes


def stray_notes(path: Path, adapter: AdapterFile) -> list[str]:
    """Return what is said of keys that hold no weight."""
    if not adapter.info.stray:
        return []
    return [f"{path.name}: {listing(adapter.info.stray)} hold no weights and were left out"]
