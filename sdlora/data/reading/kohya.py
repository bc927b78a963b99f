"""Folders named ``N_words``, as kohya's trainer has them: repeats and class words in the name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .problems import Problem

_NAME = re.compile(r"(\d+)_(.+)", re.DOTALL)
_MOST_REPEATS = 1000  # beyond it a number is a year or a counter


@dataclass(frozen=True)
class KohyaFolder:
    """What a folder's name says."""

    repeats: int
    words: str


def parse_name(name: str) -> KohyaFolder | None:
    """Return the repeats and words of a name such as ``10_sks cat``, or None for another kind of name."""
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match[1]) <= _MOST_REPEATS:
        return None
    return KohyaFolder(int(match[1]), " ".join(match[2].replace("_", " ").split()))


def kohya_folders(images: Iterable[str], asked: bool | None) -> Mapping[str, KohyaFolder]:
    """Return the ``N_words`` folders that images lie in, by their names.

    Args:
        images: names with forward slashes from the folder.
        asked: whether folders are to be read this way; None: those with such names are, the others not.
    """
    if asked is False:
        return {}
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    parsed = {top: parse_name(top) for top in sorted(tops)}
    return {top: folder for top, folder in parsed.items() if folder is not None}


def outside(images: Iterable[str], folders: Mapping[str, KohyaFolder]) -> list[Problem]:
    """Return the images that lie in none of the ``N_words`` folders, where these were asked for."""
    fix = "move it into one (`10_words`), or leave out data.kohya_folders"
    return [
        Problem("name clash", name, "lies in no folder named `N_words`", fix)
        for name in images
        if name.partition("/")[0] not in folders or "/" not in name
    ]


def notes(
    root: Path, folders: Mapping[str, KohyaFolder], asked: bool | None, images: Iterable[str]
) -> list[str]:
    """Return notes that say how the folders are read, and what lies beside them."""
    root_folder = parse_name(root.name) if asked is None and not folders else None
    if root_folder is not None:
        return [
            f"{root.name}: is named as kohya's folders are, but given itself it counts once; give the folder "
            f"above it, or set data.repeats={root_folder.repeats}"
        ]
    lines = [
        f"{name}/: its images count {folder.repeats} times, `{folder.words}` is their caption where they "
        "have none"
        for name, folder in folders.items()
    ]
    beside = [name for name in images if "/" not in name or name.partition("/")[0] not in folders]
    if folders and beside and asked is None:
        lines.append(
            f"{beside[0]}: is the first of {len(beside)} image(s) in no folder named `N_words`, which count "
            "once; set data.kohya_folders=false if the numbers in the names mean nothing"
        )
    return lines
