"""What files and folders are as base models, by their headers and configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.errors import SdloraError
from sdlora.families.recognition import recognise
from sdlora.families.table import FAMILIES

from ..worker import Emit


def recognise_bases(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Return path -> title of the family, or None for what is no base that can be trained.

    Args:
        arguments: ``paths``.
        emit: takes the progress, and each answer as a part as soon as it is known.
    """
    paths, known = [str(path) for path in arguments["paths"]], dict[str, str | None]()
    for number, path in enumerate(paths):
        emit.progress(number, len(paths), "looking at the models")
        try:
            known[path] = FAMILIES[recognise(Path(path)).family].info.title
        except (SdloraError, OSError, ValueError):
            known[path] = None
        emit.part({path: known[path]})
    return known
