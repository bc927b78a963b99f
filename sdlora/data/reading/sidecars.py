"""The JSON file beside an image that says where its subject is: ``{"focus": [x, y]}``.

x goes from 0 (left) to 1 (right), y from 0 (top) to 1 (bottom), in the upright image. JSON files of
other programs, which have no ``focus``, are left alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ...files import parse_json
from .image_files import read_file
from .items import Point
from .problems import Problem, Unusable

SIDECAR_ENDING = ".json"
_MAX_BYTES = 1024 * 1024


def read_focus(path: Path, name: str) -> Point | Problem | None:
    """Return the point of interest a sidecar gives, None where it gives none, or what is wrong with it."""
    try:
        data = read_file(path, name, _MAX_BYTES)
    except Unusable as error:
        return error.problem
    if b'"focus"' not in data:
        return None
    try:
        value: Any = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        return Problem("bad sidecar", name, f"is not valid JSON ({error})", "mend it, or delete it")
    focus = value.get("focus") if isinstance(value, dict) else None
    if focus is None:
        return None
    good = isinstance(focus, list) and len(focus) == 2 and all(_is_share(share) for share in focus)
    if not good:
        what = f"has `focus` {json.dumps(focus)}"
        return Problem("bad sidecar", name, what, "give [x, y], each from 0 (left, top) to 1 (right, bottom)")
    return float(focus[0]), float(focus[1])


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1
