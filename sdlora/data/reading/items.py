"""What reading a folder gives: images with their captions, in an order that depends on names only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .likeness import Likeness
from .problems import Problem
from .sharpness import Detail

CaptionSource = Literal["txt", "caption", "metadata", "folder name", "setting", "file name"]
Trait = Literal["animated", "transparent", "damaged metadata"]
Point = tuple[float, float]
"""(x, y) as shares of width and height, from the top left."""


@dataclass(frozen=True)
class ImageItem:
    """One image of a dataset. Height and width in px, after EXIF rotation."""

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
    lines: tuple[str, ...] = ()
    """The caption's own lines, without trigger word; captions that vary are made from them."""
    trigger_word: str | None = None
    focus: Point | None = None
    """The point that a crop should keep."""
    weight: float = 1.0
    """How much the image counts in the loss."""
    regularisation: bool = False
    """Shows the class in general; never held out, without trigger word."""
    mask: Path | None = None
    """Image file that is white where this image is trained on."""
    mask_digest: str = ""
    """SHA-256 of the mask's bytes."""


@dataclass(frozen=True)
class Dataset:
    """The images of a folder in the order of their names, with notes about what was not used."""

    folder: Path
    items: tuple[ImageItem, ...]
    trigger_word: str | None = None
    notes: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    """Caption files that belong to no image."""

    @property
    def learned(self) -> tuple[ImageItem, ...]:
        """The images that are to be learned: all but the regularisation images."""
        return tuple(item for item in self.items if not item.regularisation)

    @property
    def num_visits(self) -> int:
        """Images seen in one epoch: the sum of the repeats."""
        return sum(item.repeats for item in self.items)


@dataclass(frozen=True)
class Survey:
    """A folder as it is: the images that can be used, and the problems of the others."""

    dataset: Dataset
    problems: tuple[Problem, ...]
    num_images: int
    """Image files found, usable or not."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One visit to an image: its index, the epoch, and its number in that epoch, all counted from 0."""

    index: int
    epoch: int
    repeat: int
