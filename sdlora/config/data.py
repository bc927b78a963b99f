"""Settings of the data: which images are trained on, with which captions, cropped how.

Part of :mod:`sdlora.config.schema`, where all settings meet.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .section import GivenPath, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Probability, Section

RESOLUTIONS = (32, 4096)
"""Smallest and largest in pixels."""
Resolution = Annotated[int, Field(ge=RESOLUTIONS[0], le=RESOLUTIONS[1])]
Crop = Literal["centre", "random"]
CaptionFrom = Literal["files", "file name"]
CaptionLines = Literal["joined", "one"]
EncodeWhen = Literal["before", "in loop"]


class SourceConfig(Section):
    """One `[[data.sources]]` table: a folder with its own repeats, captions and weight."""

    folder: GivenPath
    """The folder of images."""
    repeats: Positive | None = None
    """How often each image is seen in one epoch; as `data.repeats` when left open, and for
    regularisation images as often as it takes to match the training images."""
    recursive: bool | None = None
    """Also take images from folders inside it; as `data.recursive` when left open."""
    kohya_folders: bool | None = None
    """Folders inside are named `N_words`, as kohya's trainer has them; as `data.kohya_folders` when left
    open."""
    trigger_word: str | None = None
    """Trigger word of this folder; as `data.trigger_word` when left open, `""` for none.
    Regularisation images never get one."""
    caption: str | None = None
    """Caption of images without one of their own, instead of the words of their file name."""
    weight: PositiveFloat = 1.0
    """Weight of these images in the loss."""
    regularisation: bool = False
    """These images show the class in general: they are never held out, and get no trigger word."""
    mask_folder: GivenPath | None = None
    """Folder of masks of the same names: white is trained, black is not."""


def _amount_or_folder(value: float | Path) -> float | Path:
    if not isinstance(value, Path) and not 0 <= value < math.inf:
        raise ValueError("should be 0 or more, or a folder")
    return value


class DataConfig(Section):
    """Which images are trained on, and how they are prepared."""

    folder: GivenPath | None = None
    """The folder of images, with captions as .txt or .caption files beside them."""
    sources: tuple[SourceConfig, ...] = ()
    """Further folders, each with its own repeats, captions and weight (`[[data.sources]]` tables)."""
    recursive: bool = True
    """Also take images from folders inside the folder."""
    follow_links: bool = False
    """Also read images, captions, masks and folders that links lead to outside the folder. Off, such a link
    is an error that names it."""
    kohya_folders: bool | None = None
    """Folders inside are named `N_words`, as kohya's trainer has them: their images count N times, and
    the words are the caption where there is none. When left open: yes if all of them are named so."""
    metadata_caption: str | None = None
    """Column of metadata.jsonl or metadata.csv that holds the caption; the first of `text`, `caption`,
    `prompt`, `description` when left open."""
    caption_from: CaptionFrom = "files"
    """Captions come from `files` beside the images (or else the file name), or always from the
    `file name`."""
    caption_lines: CaptionLines = "joined"
    """Captions of several lines: `joined` into one, or `one` line a visit, in turn."""
    trigger_word: str | None = None
    """Word that calls the style; put in front of captions that lack it, and the caption's start
    where there is no caption file."""
    caption_prefix: str = ""
    """Put before every caption (after the trigger word)."""
    caption_suffix: str = ""
    """Put after every caption."""
    shuffle_tags: bool = False
    """Shuffle the tags of a caption at each visit."""
    keep_tags: NonNegative = 0
    """This many tags at the start stay in front; a `|||` in a caption decides it for that caption: what is
    before the first and after the second stays in its place."""
    tag_separator: Annotated[str, Field(min_length=1)] = ","
    """The text between the tags of a caption."""
    tag_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the tags left out at each visit; kept ones and the trigger word are not."""
    wildcards: bool = False
    """`{a|b}` in a caption means one of these at each visit; `{{` and `}}` are plain braces."""
    emphasis: bool = False
    """`(word:1.2)`, `(word)` and `[word]` in captions weight words as in prompts. Off, the brackets are
    ordinary characters, as in tags like `miku (vocaloid)`."""
    caption_dropout: Probability = 0.05
    """Share of visits that train on the empty caption, which guidance needs."""
    encode_captions: EncodeWhen | None = None
    """Captions that vary are encoded `before` training, each variant once, or `in loop`; when left open,
    the variants of the run are counted, and encoded before training if there are few."""
    resolution: Resolution | None = None
    """Side in px of a square with the area trained at; the base's own resolution when left open."""
    more_resolutions: tuple[Resolution, ...] = ()
    """Each image is also trained at these resolutions, as far as it is large enough for them."""
    repeats: Positive = 1
    """How often each image is seen in one epoch (and at each resolution)."""
    buckets: bool = True
    """Keep each image's aspect ratio by grouping images into buckets; off: crop to squares."""
    upscale: bool = True
    """Enlarge images that are smaller than the resolution; off: train them at their own size."""
    top_up: bool = False
    """Fill micro-batches that would be short with further visits, so that all have the same size."""
    crop: Crop = "centre"
    """Which part of an image is kept: the `centre` (or the point `focus` of a sidecar JSON file), or a
    `random` one at each visit that holds the focus, if there is one."""
    colour_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Change brightness, contrast and saturation by up to this share, differently at each visit."""
    variants: NonNegative = 4
    """How many random crops and colours of each image are encoded beforehand and taken in turn; 0
    encodes a new one at each visit, which runs the image encoder in the loop."""
    flip: bool = False
    """Also train on mirror images (half of the visits). Not for faces, text or other asymmetric
    subjects."""
    alpha_mask: bool = False
    """Train only on what is not transparent."""
    mask_folder: GivenPath | None = None
    """Folder of masks of the same names: white is trained, black is not, grey in between."""
    unmasked_weight: Probability = 0.0
    """Weight of the loss where a mask is black."""
    prior_preservation: NonNegativeFloat = 0.0
    """Weight of a loss that keeps the adapter near what the base predicts by itself: on the regularisation
    images, or on the empty caption if there are none."""
    validation: Annotated[float | GivenPath, AfterValidator(_amount_or_folder)] | None = None
    """Images held out to measure progress: a share below 1, a number of images, or a folder of
    their own; 0 for none. Near duplicates are never on both sides."""
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] = "#ffffff"
    """Colour put behind transparent images."""
    cache_folder: GivenPath | None = None
    """Where encoded images and captions are kept; the user's cache folder when left open."""

    @property
    def has_regularisation(self) -> bool:
        """Whether any source holds regularisation images."""
        return any(source.regularisation for source in self.sources)

    @property
    def varies_images(self) -> bool:
        """Whether an image looks different from visit to visit, apart from being mirrored."""
        return self.crop == "random" or self.colour_jitter > 0

    @property
    def varies_captions(self) -> bool:
        """Whether a caption differs from visit to visit, apart from being dropped as a whole."""
        one_line = self.caption_lines == "one"
        return self.shuffle_tags or self.tag_dropout > 0 or self.wildcards or one_line
