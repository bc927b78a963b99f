"""The settings of the data side: which pictures are trained on, with which words, cut how.

Part of :mod:`sdlora.config`, where all settings meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from .section import Positive, Probability, Section

Resolution = Annotated[int, Field(ge=32, le=4096)]


def _amount_or_folder(value: float | Path) -> float | Path:
    if not isinstance(value, Path) and not 0 <= value < math.inf:
        raise ValueError("should be 0 or more, or a folder")
    return value


class DataConfig(Section):
    """Which pictures are trained on, and how they are prepared."""

    folder: Path | None = None
    """The folder of pictures, with captions as .txt or .caption files beside them."""
    recursive: bool = True
    """Also take pictures from folders inside the folder."""
    trigger_word: str | None = None
    """Word that calls the style; put in front of captions that lack it, and the caption's start
    where there is no caption file."""
    caption_dropout: Probability = 0.05
    """Share of visits that train on the empty caption, which guidance needs."""
    resolution: Resolution | None = None
    """Side in px of a square of the area trained at; the base's own resolution when left open."""
    repeats: Positive = 1
    """How often each picture is seen in one epoch."""
    buckets: bool = True
    """Keep each picture's aspect ratio by grouping pictures into buckets; off: crop to squares."""
    flip: bool = False
    """Also train on mirror images (half of the visits). Not for faces, text or other asymmetric
    subjects."""
    validation: Annotated[float | Path, AfterValidator(_amount_or_folder)] | None = None
    """Pictures held out to measure progress: a share below 1, a number of pictures, or a folder of
    their own; 0 for none. Near duplicates are never on both sides."""
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] = "#ffffff"
    """Colour put behind transparent pictures."""
    cache_folder: Path | None = None
    """Where encoded pictures and captions are kept; the user's cache folder when left open."""


def data_contradictions(data: DataConfig) -> Iterator[str]:
    """Yield what cannot be meant together, or would silently have no effect."""
    held_out = data.validation or 0
    if not isinstance(held_out, Path) and held_out >= 1 and held_out != int(held_out):
        yield "`data.validation` from 1 up is a number of pictures and must be whole"
