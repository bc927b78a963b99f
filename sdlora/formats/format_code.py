"""What the module of a file format provides: writing, reading, recognising it by keys, who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.canonical import AdapterFile, AdapterWeights, ModuleKey, Update
from ..tensor_file import Header, Load
from .clients import Facts
from .keys import FileKeys, Groups

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo


def same_file(path: Path) -> list[Path]:
    """Return the file itself."""
    return [path]


def nothing_there(target: Path) -> None:
    """Leave it to the writer to replace what is there."""


@dataclass(frozen=True)
class ReadBack:
    """Another program that loads a written file as part of the proof.

    Attributes:
        program: its name; if it is one of the clients, it is used only if it reads the file fully.
        load: (path, outline of the adapter, family) -> the adapter as that program understands it.
    """

    program: str
    load: Callable[[Path, AdapterWeights, FamilyInfo], AdapterWeights]


@dataclass(frozen=True)
class FormatCode:
    """One file format's code.

    Attributes:
        write: (adapter, target, dtype, family) -> the files written; None for formats that are only read.
        claims: number of a file's keys that are spelled as in this format; the format with most keys wins.
        group: (header, its keys) -> the key of every part of every module; raises an AdapterFileError that
            lists keys which belong to no module.
        read: (header, groups, loader of tensors) -> modules and their updates, sorted, one at a time.
        reasons: (client, facts) -> why that client does not load such a file fully.
        files: the adapter's tensor files in a folder or at a path; none if it is not of this format.
        make_room: removes an adapter that is to be replaced; raises an OutputError if more would be lost.
        read_back: another program to prove a written file with.
        holds_embeddings: whether textual-inversion embeddings may lie in its files, under WebUI's names.
    """

    write: Callable[[AdapterFile, Path, torch.dtype, FamilyInfo], list[Path]] | None
    claims: Callable[[FileKeys], int]
    group: Callable[[Header, FileKeys], Groups]
    read: Callable[[Header, Groups, Load], Iterator[tuple[ModuleKey, Update]]]
    reasons: Callable[[str, Facts], list[str]]
    files: Callable[[Path], list[Path]] = same_file
    make_room: Callable[[Path], None] = nothing_there
    read_back: ReadBack | None = None
    holds_embeddings: bool = False


def spelled(spelling: str) -> Callable[[FileKeys], int]:
    """Return a function that counts the keys of one spelling."""
    return lambda keys: keys.spellings.get(spelling, 0)


def grouped(header: Header, keys: FileKeys) -> Mapping[ModuleKey, Mapping[str, str]]:
    """Return the key of every part of every module, in any spelling or mixture of spellings."""
    return keys.groups
