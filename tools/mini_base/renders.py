"""Turns icon packages into arrays of pixels for training and evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from PIL import Image
from torch import Tensor

from . import icons
from .captions import load_nouns
from .config import ALL_SETS, BASE_SETS, IMAGE_SIZE, VARIANTS, IconSet
from .files import write_bytes

_LARGE = 4
"""Icons are drawn this many times larger and moved before they are reduced."""


@dataclass(frozen=True)
class Placing:
    """Scale and shift of a drawing, the shift as a share of the canvas."""

    scale: float = 1.0
    right: float = 0.0
    down: float = 0.0


@dataclass(frozen=True)
class IconImage:
    """One drawing: which icon of which set."""

    icon_set: IconSet
    name: str


def placings(count: int, seed: int) -> list[Placing]:
    """Returns the drawing as it is, then ``count - 1`` slightly smaller and shifted ones."""
    rng = random.Random(seed)
    chosen = [Placing()]
    while len(chosen) < count:
        scale = rng.uniform(0.88, 1.0)
        # Shift only into the room that the smaller scale has made.
        room = (1.0 - scale) / 2
        chosen.append(Placing(scale, rng.uniform(-room, room), rng.uniform(-room, room)))
    return chosen


def place(large: Image.Image, placing: Placing) -> np.ndarray:
    """Returns a drawing, placed and reduced to the base's size, as bytes (H, W, 3)."""
    side = large.width
    zoom = 1 / placing.scale
    middle = side / 2 * (1 - zoom)
    shifts = middle - placing.right * side * zoom, middle - placing.down * side * zoom
    if placing != Placing():
        large = large.transform(
            large.size,
            Image.Transform.AFFINE,
            (zoom, 0, shifts[0], 0, zoom, shifts[1]),
            Image.Resampling.BICUBIC,
            fillcolor="white",
        )
    return np.asarray(large.reduce(_LARGE), dtype=np.uint8)


def pixels(svg: str) -> np.ndarray:
    """Returns a rendered SVG at the base's size as bytes (H, W, 3)."""
    return place(icons.render(svg, IMAGE_SIZE * _LARGE), Placing())


def to_tensor(images: np.ndarray) -> Tensor:
    """Returns byte images (..., H, W, 3) as floats in [-1, 1], channels first."""
    return torch.from_numpy(images).movedim(-1, -3).float().div(127.5).sub(1.0)


def base_images(cache_dir: Path, sets: Iterable[IconSet] = BASE_SETS) -> list[IconImage]:
    """Lists every noun in every set that draws it."""
    icon_images = []
    for icon_set in sets:
        names = icons.load(icon_set, cache_dir).names()
        icon_images += [IconImage(icon_set, name) for name in load_nouns().phrases if name in names]
    return icon_images


def render_variants(
    icon_images: list[IconImage], cache_dir: Path, count: int = VARIANTS, seed: int = 0
) -> np.ndarray:
    """Renders every image in ``count`` placings: bytes (N, count, H, W, 3)."""
    packages = {key: icons.load(key, cache_dir) for key in {p.icon_set for p in icon_images}}
    rows = []
    for index, icon_image in enumerate(icon_images):
        svg = packages[icon_image.icon_set].svg(icon_image.name)
        large = icons.render(svg, IMAGE_SIZE * _LARGE)
        rows.append([place(large, placing) for placing in placings(count, seed + index)])
    return np.array(rows)


def _render_all(cache_dir: Path, unseen: bool, limit: int | None = None) -> np.ndarray:
    unseen_names = set(load_nouns().vae_unseen)
    images = []
    for icon_set in ALL_SETS:
        package = icons.load(icon_set, cache_dir)
        names = sorted(package.names())
        chosen = [name for name in names if (name in unseen_names) == unseen]
        images += [pixels(package.svg(name)) for name in chosen[:limit]]
    return np.array(images)


def render_seen(cache_dir: Path, limit: int | None = None) -> np.ndarray:
    """Renders what the VAE learns from: every set, ink included, without ``vae_unseen``."""
    return _render_all(cache_dir, unseen=False, limit=limit)


def save_images(images: np.ndarray, path: Path) -> None:
    """Writes byte images, so that they are drawn once for all workers."""
    write_bytes(path, safetensors.numpy.save({"images": images}))


def load_images(path: Path) -> np.ndarray:
    """Undoes ``save_images``."""
    images: np.ndarray = safetensors.numpy.load_file(path)["images"]
    return images


def render_unseen(cache_dir: Path) -> np.ndarray:
    """Renders what the VAE is judged on: the names of ``vae_unseen`` in every set."""
    return _render_all(cache_dir, unseen=True)
