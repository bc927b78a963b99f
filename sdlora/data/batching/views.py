"""Augmentation views: which part of an image is seen at a visit, mirrored or not, in which colours.

Everything is a function of (seed, epoch, image, repeat). Random crops and colours come either from a
few variants of each image, encoded before training and taken in turn, or encoded again at each visit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageEnhance, ImageOps

from ..reading.items import ImageItem, Point, Visit
from .buckets import Placement, flipped, source_box

Colours = tuple[float, float, float]
"""Factors of brightness, contrast and saturation."""


@dataclass(frozen=True)
class AugmentationView:
    """One augmentation view: a way to show an image.

    Attributes:
        placement: in the image as it is shown, mirrored or not.
        mirror: left and right are exchanged.
        colours: None for the image's own.
    """

    placement: Placement
    mirror: bool = False
    colours: Colours | None = None


@dataclass(frozen=True)
class AugmentationViews:
    """The augmentation views of a dataset's images, by the settings of the same names.

    Attributes:
        placements: of each image, without random parts.
        random_crop: the crop moves.
        colour_jitter: largest relative change of brightness, contrast and saturation.
        variants: random views of each image; 0 for a new one at each visit.
        flip: half of the visits are mirrored.
        seed: fixes all of it.
    """

    placements: tuple[Placement, ...]
    items: tuple[ImageItem, ...]
    random_crop: bool = False
    colour_jitter: float = 0.0
    variants: int = 1
    flip: bool = False
    seed: int = 0

    @property
    def varies(self) -> bool:
        """Whether crops or colours change from visit to visit."""
        return self.random_crop or self.colour_jitter > 0

    @property
    def in_loop(self) -> bool:
        """Whether images must be encoded at each visit."""
        return self.varies and self.variants == 0

    def plain(self, index: int, *, mirror: bool = False) -> AugmentationView:
        """Return the view without random parts."""
        placement = self.placements[index]
        return AugmentationView(flipped(placement) if mirror else placement, mirror)

    def at(self, visit: Visit, seed: int) -> AugmentationView:
        """Return the view at one visit."""
        mirror = self.flip and draw_for(seed, "flip", visit) < 0.5
        if not self.varies:
            return self.plain(visit.index, mirror=mirror)
        item = self.items[visit.index]
        if self.variants == 0:
            draw = random.Random(f"{seed}/look/{visit.epoch}/{visit.index}/{visit.repeat}").random
            return _mirrored(self._drawn(visit.index, draw), mirror)
        start = int(random.Random(f"{seed}/first look/{visit.index}").random() * self.variants)
        visits = visit.epoch * item.repeats + visit.repeat
        return _mirrored(self._variant(visit.index, (start + visits) % self.variants), mirror)

    def to_encode(self, index: int) -> list[AugmentationView]:
        """Return the different views of an image that can be encoded before training."""
        if self.in_loop:
            return []
        ways = (
            [self._variant(index, number) for number in range(self.variants)]
            if self.varies
            else [self.plain(index)]
        )
        mirrors = (False, True) if self.flip else (False,)
        return list(dict.fromkeys(_mirrored(view, mirror) for view in ways for mirror in mirrors))

    def _variant(self, index: int, number: int) -> AugmentationView:
        # by content, so that an image's variants are found again in other datasets
        return self._drawn(
            index, random.Random(f"{self.seed}/look/{self.items[index].digest}/{number}").random
        )

    def _drawn(self, index: int, draw: Callable[[], float]) -> AugmentationView:
        placement = self.placements[index]
        if self.random_crop:
            placement = random_crop(placement, self.items[index].focus, draw)
        colours = None
        if self.colour_jitter > 0:
            brightness, contrast, saturation = (
                round(1 + self.colour_jitter * (2 * draw() - 1), 4) for _ in range(3)
            )
            colours = brightness, contrast, saturation
        return AugmentationView(placement, False, colours)


def draw_for(seed: int, what: str, visit: Visit) -> float:
    """Return a number from 0 to below 1 that only depends on the arguments."""
    return random.Random(f"{seed}/{what}/{visit.epoch}/{visit.index}/{visit.repeat}").random()


def random_crop(placement: Placement, focus: Point | None, draw: Callable[[], float]) -> Placement:
    """Return the placement with its crop anywhere in the image, but so that the focus is inside it."""
    corner = []
    for axis, share in ((0, focus[1] if focus else None), (1, focus[0] if focus else None)):
        kept, whole = placement.bucket[axis], placement.resized[axis]
        least, most = 0, whole - kept
        if share is not None:
            point = int(share * whole)
            least, most = max(least, min(most, point - kept + 1)), min(most, max(least, point))
        corner.append(least + int(draw() * (most - least + 1)))
    return replace(placement, crop=(corner[0], corner[1]))


def shown(image: Image.Image, view: AugmentationView) -> Image.Image:
    """Return an image mirrored, cropped, resized and coloured as the view says, in the size of its bucket."""
    image = _cut(ImageOps.mirror(image) if view.mirror else image, view.placement, Image.Resampling.LANCZOS)
    if view.colours is None:
        return image
    enhancers: Sequence[Callable[[Image.Image], ImageEnhance._Enhance]] = (
        ImageEnhance.Brightness,
        ImageEnhance.Contrast,
        ImageEnhance.Color,
    )
    for enhancer, factor in zip(enhancers, view.colours, strict=True):
        image = enhancer(image).enhance(factor)
    return image


def shown_mask(mask: Image.Image, view: AugmentationView, height: int, width: int) -> Image.Image:
    """Return a mask cropped like its image, reduced to (height, width) by the means of areas."""
    mask = ImageOps.mirror(mask) if view.mirror else mask
    box = source_box(mask.height, mask.width, view.placement)
    return mask.resize((width, height), Image.Resampling.BOX, box=box)


def _cut(image: Image.Image, placement: Placement, method: Image.Resampling) -> Image.Image:
    height, width = placement.bucket
    if placement.resized != (image.height, image.width):
        # only the part that is kept: resizing all of a 20000 x 1 px image first would take gigabytes
        box = source_box(image.height, image.width, placement)
        return image.resize((width, height), method, box=box)
    top, left = placement.crop
    return image.crop((left, top, left + width, top + height))


def _mirrored(view: AugmentationView, mirror: bool) -> AugmentationView:
    return replace(view, placement=flipped(view.placement), mirror=True) if mirror else view
