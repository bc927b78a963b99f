"""Pillow images -> tensors: the seven transforms and the enum that diffusers' LoRA script asks for.

Each does what torchvision 0.2x does for a Pillow image, by the same calls (``Image.resize``, one copy
through numpy, in-place arithmetic on the result), so it takes the same time. Random choices are drawn
from torch's global generator, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class InterpolationMode(Enum):
    """How an image is resampled; the values are torchvision's."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


_PILLOW = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.NEAREST_EXACT: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
    InterpolationMode.BOX: Image.Resampling.BOX,
    InterpolationMode.HAMMING: Image.Resampling.HAMMING,
    InterpolationMode.LANCZOS: Image.Resampling.LANCZOS,
}


class Compose:
    """Apply one transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    """Apply a function."""

    def __init__(self, lambd: Callable[[Any], Any]) -> None:
        self.lambd = lambd

    def __call__(self, image: Any) -> Any:
        return self.lambd(image)


class Resize:
    """Bring the shorter side to ``size`` px, keeping the aspect ratio."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.resample = size, _PILLOW[interpolation]

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        longer = int(self.size * max(width, height) / min(width, height))
        wanted = (self.size, longer) if width <= height else (longer, self.size)
        return image if wanted == image.size else image.resize(wanted, self.resample)


class CenterCrop:
    """Cut out the middle square of ``size`` px."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left = round((image.width - self.size) / 2)
        top = round((image.height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop:
    """Cut out a square of ``size`` px anywhere."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size == (self.size, self.size):
            return image
        top = int(torch.randint(0, image.height - self.size + 1, (1,)))
        left = int(torch.randint(0, image.width - self.size + 1, (1,)))
        return image.crop((left, top, left + self.size, top + self.size))


class RandomHorizontalFlip:
    """Mirror every second image, by chance ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if float(torch.rand(1)) < self.p else image


class ToTensor:
    """Turn an RGB image into (3, H, W) float32 in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """Subtract ``mean`` and divide by ``std``, per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.clone().sub_(self.mean).div_(self.std)
