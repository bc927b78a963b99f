"""The settings of the data side: which pictures are trained on, with which words, cut how.

Part of :mod:`sdlora.config`, where all settings meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .section import Positive, PositiveFloat, Probability, Section

Resolution = Annotated[int, Field(ge=32, le=4096)]
CaptionFrom = Literal["files", "file name"]


class SourceConfig(Section):
    """One `[[data.sources]]` table: a folder with its own repeats, captions and weight."""

    folder: Path
    """The folder of pictures."""
    repeats: Positive | None = None
    """How often each picture is seen in one epoch; as `data.repeats` when left open, and for
    regularisation pictures as often as it takes to match the training pictures."""
    recursive: bool | None = None
    """Also take pictures from folders inside it; as `data.recursive` when left open."""
    kohya_folders: bool | None = None
    """Folders inside are named `N_words` as kohya's trainer has them; as `data.kohya_folders` when left
    open."""
    trigger_word: str | None = None
    """Trigger word of this folder; as `data.trigger_word` when left open, `""` for none.
    Regularisation pictures never get one."""
    caption: str | None = None
    """Caption of pictures that have none of their own, instead of the words of their file name."""
    weight: PositiveFloat = 1.0
    """Weight of these pictures in the loss."""
    regularisation: bool = False
    """These pictures show the class in general: they are never held out, and get no trigger word."""


def _amount_or_folder(value: float | Path) -> float | Path:
    if not isinstance(value, Path) and not 0 <= value < math.inf:
        raise ValueError("should be 0 or more, or a folder")
    return value


class DataConfig(Section):
    """Which pictures are trained on, and how they are prepared."""

    folder: Path | None = None
    """The folder of pictures, with captions as .txt or .caption files beside them."""
    sources: tuple[SourceConfig, ...] = ()
    """Further folders, each with its own repeats, captions and weight (`[[data.sources]]` tables)."""
    recursive: bool = True
    """Also take pictures from folders inside the folder."""
    kohya_folders: bool | None = None
    """Folders inside are named `N_words`, as kohya's trainer has them: their pictures count N times, and
    the words are the caption where there is none. When left open: yes if all of them are named so."""
    metadata_caption: str | None = None
    """Column of metadata.jsonl or metadata.csv that holds the caption; the first of `text`, `caption`,
    `prompt`, `description` when left open."""
    caption_from: CaptionFrom = "files"
    """Captions come from `files` beside the pictures (or else the file name), or always from the
    `file name`."""
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
    if data.caption_from == "file name" and data.metadata_caption is not None:
        yield '`data.metadata_caption` has no effect with `data.caption_from="file name"`'
    yield from _about_sources(data)


def _about_sources(data: DataConfig) -> Iterator[str]:
    if data.sources and data.folder is None and all(source.regularisation for source in data.sources):
        yield "`data.sources` holds only regularisation pictures: add pictures to be learned"
    for number, source in enumerate(data.sources):
        where = f"data.sources[{number}] ({source.folder})"
        if source.regularisation and source.trigger_word:
            yield f"`{where}.trigger_word` has no effect: regularisation pictures get none"
