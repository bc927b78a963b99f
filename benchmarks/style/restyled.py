"""Styles made of ink icons by known image operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Change = Callable[["Image"], "Image"]


def styles() -> dict[str, Change]:
    """Return style -> what makes it of an ink icon."""
    from PIL import Image as Pil
    from PIL import ImageFilter, ImageOps

    def toned(dark: str, light: str) -> Change:
        return lambda image: ImageOps.colorize(image.convert("L"), dark, light)

    def dotted(image: Image) -> Image:
        grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(1)), dtype=float) / 255
        y, x = np.mgrid[: grey.shape[0], : grey.shape[1]]
        screen = 0.5 + 0.25 * (np.cos(x * np.pi / 2) + np.cos(y * np.pi / 2))
        return Pil.fromarray(np.where(grey > screen * 0.98, 255, 30).astype(np.uint8)).convert("RGB")

    def hatched(image: Image) -> Image:
        grey = np.asarray(image.convert("L"), dtype=float)
        y, x = np.mgrid[: grey.shape[0], : grey.shape[1]]
        return Pil.fromarray(np.where((grey < 128) & ((x + y) % 4 < 2), 20, 250).astype(np.uint8)).convert(
            "RGB"
        )

    def outlined(image: Image) -> Image:
        return ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB")

    return {
        "ink": lambda image: image,
        "night": toned("#e8e0c8", "#101830"),
        "blueprint": toned("#dfeaff", "#1f4fa0"),
        "rose": toned("#b03060", "#ffe9f0"),
        "sepia": toned("#5b3a1e", "#f3e4c4"),
        "dots": dotted,
        "hatching": hatched,
        "outlines": outlined,
        "soft": lambda image: toned("#7a9e7e", "#fffaf0")(image.filter(ImageFilter.GaussianBlur(1.2))),
    }


def at_side(image: Image, change: Change, side: int = 64) -> Image:
    """Return a change of a drawing as it is at ``side`` px, four times as large: lines stay crisp."""
    from PIL import Image as Pil

    small = image.convert("RGB").resize((side, side), Pil.Resampling.LANCZOS)
    return change(small).convert("RGB").resize((4 * side, 4 * side), Pil.Resampling.NEAREST)
