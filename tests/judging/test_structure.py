"""Likeness in drawing: it knows the subject whatever the tones, and is not fooled by tones alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from test_score import BASE, TRUE, Images, changed

from sdlora.judging.structure import pair_likeness, structure_likeness

BASES, TRUES = BASE[:24], TRUE[:24]  # the same subjects in two hands: flat colours, and black strokes


def closer(images: Images, partners: Images) -> float:
    """Return how often an image is more like its partner than like others' partners: chance is 0.5."""
    table = structure_likeness(images, partners)
    ranks = [(table[row, row] > np.delete(table[row], row)).mean() for row in range(len(table))]
    return float(np.mean(ranks))


SAME: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "inverted": ImageOps.invert,
    "white on blue": lambda image: ImageOps.colorize(
        ImageOps.invert(image.convert("L")), "#102060", "#f0e0a0"
    ),
    "other hues": lambda image: Image.merge("RGB", image.split()[::-1]),
    "outlines": lambda image: image.convert("L").filter(ImageFilter.FIND_EDGES),
    "thicker": lambda image: image.filter(ImageFilter.MinFilter(3)),
}


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("hand", ["own", "other"])
def test_a_subject_is_known_in_any_tones(change: str, hand: str) -> None:
    images = changed(BASES if hand == "own" else TRUES, SAME[change])
    assert closer(images, BASES) > 0.93


def test_inverting_changes_nothing_and_blocks_in_another_order_everything() -> None:
    assert pair_likeness(changed(BASES, ImageOps.invert), BASES).min() > 0.9
    other = structure_likeness(BASES, BASES)
    chance = other[~np.eye(len(BASES), dtype=bool)].mean()

    def shuffled(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image)
        blocks = [pixels[y : y + 16, x : x + 16] for y in range(0, 64, 16) for x in range(0, 64, 16)]
        order = np.random.default_rng(0).permutation(16)
        rows = [np.hstack([blocks[k] for k in order[start : start + 4]]) for start in range(0, 16, 4)]
        return Image.fromarray(np.vstack(rows))

    assert pair_likeness(changed(BASES, shuffled), BASES).mean() < chance + 0.05


def test_a_small_move_is_the_same_drawing_and_an_empty_image_is_like_none() -> None:
    moved = changed(
        BASES, lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 3, 0, 1, -2))
    )
    assert pair_likeness(moved, BASES).mean() > 0.8
    assert structure_likeness([Image.new("RGB", (64, 64), "white")], BASES).max() == 0.0


def test_size_does_not_matter() -> None:
    large = changed(BASES, lambda image: image.resize((256, 256), Image.Resampling.NEAREST))
    assert pair_likeness(large, BASES).min() > 0.99
