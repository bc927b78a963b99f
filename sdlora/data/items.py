"""What a folder yields: pictures with their captions, in an order that depends on names only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .likeness import Likeness
from .problems import Problem
from .sharpness import Detail

CaptionSource = Literal["txt", "caption", "file name"]
Trait = Literal["animated", "transparent"]


@dataclass(frozen=True)
class ImageItem:
    """One picture of a dataset. Height and width in px, after EXIF rotation."""

    path: Path
    caption: str
    height: int
    width: int
    repeats: int
    digest: str
    """SHA-256 of the file's bytes, as hex digits."""
    name: str
    """Path from the dataset's folder with forward slashes, for messages."""
    caption_source: CaptionSource = "txt"
    trigger_added: bool = False
    """The trigger word was put in front, because the caption lacked it."""
    traits: tuple[Trait, ...] = ()
    likeness: Likeness | None = field(default=None, repr=False)
    detail: Detail = field(default=(), repr=False)


@dataclass(frozen=True)
class Dataset:
    """The pictures of a folder in the order of their names, with remarks about what was not taken."""

    folder: Path
    items: tuple[ImageItem, ...]
    trigger_word: str | None = None
    notes: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    """Caption files that belong to no picture."""

    @property
    def num_visits(self) -> int:
        """Pictures seen in one epoch: the sum of the repeats."""
        return sum(item.repeats for item in self.items)


@dataclass(frozen=True)
class Survey:
    """A folder as it is: the pictures that can be used, and the problems of the others."""

    dataset: Dataset
    problems: tuple[Problem, ...]
    num_pictures: int
    """Picture files found, usable or not."""
