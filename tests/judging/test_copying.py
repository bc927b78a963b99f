"""Copies of training images are noticed, also changed ones, and other images of the style are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from sdlora.errors import SdloraError
from sdlora.judging.copying import copying, likeness

DATASETS = Path(__file__).parents[2] / "datasets"
Images = list[Image.Image]


def icons(name: str) -> Images:
    files = sorted((DATASETS / name).glob("*.png"))
    assert len(files) >= 40
    return [Image.open(f).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for f in files]


TRUE, TRAINING = icons("ink-icons-holdout"), icons("ink-icons")


def redrawn(image: Image.Image, size: float, right: int, down: int) -> Image.Image:
    side = round(64 * size)
    page = Image.new("RGB", (64, 64), "white")
    corner = (64 - side) // 2
    page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (corner + right, corner + down))
    return page


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "paler": lambda image: image.point(lambda value: 128 + value // 2),
    "mirrored": ImageOps.mirror,
    "moved": lambda image: redrawn(image, 1.0, 2, -2),
    "moved and mirrored": lambda image: redrawn(ImageOps.mirror(image), 1.0, -2, 2),
    "smaller": lambda image: redrawn(image, 0.9, 0, 0),
    "smaller and moved": lambda image: redrawn(image, 0.9, 3, 3),
    "turned": lambda image: image.rotate(90),
    "turned and mirrored": lambda image: ImageOps.mirror(image.rotate(270)),
}
LARGE_CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "three quarters": lambda image: redrawn(image, 0.75, 0, 0),
    "three quarters in a corner": lambda image: redrawn(image, 0.75, 7, -7),
    "four thirds": lambda image: redrawn(image, 4 / 3, 0, 0),
    "cropped": lambda image: image.crop((0, 0, 48, 48)).resize((64, 64), Image.Resampling.LANCZOS),
    "cropped and turned": lambda image: image.crop((8, 8, 56, 56)).resize((64, 64)).rotate(90),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
def test_copies_are_noticed_also_changed_ones(name: str) -> None:
    copies = copying([CHANGES[name](image) for image in TRAINING], TRAINING, TRUE)
    assert copies.generated > 0.95
    assert copies.share == 1


@pytest.mark.parametrize("name", LARGE_CHANGES)
def test_most_copies_are_noticed_when_much_is_gone(name: str) -> None:
    copies = copying([LARGE_CHANGES[name](image) for image in TRAINING[:24]], TRAINING, TRUE)
    assert copies.generated > copies.true + 0.2
    assert copies.share >= (0.35 if "cropped" in name else 0.5)  # before: 0 to 0.04


def test_other_subjects_of_the_style_are_no_copies() -> None:
    copies = copying(TRUE, TRAINING, TRUE)
    assert copies.generated == copies.true < 0.7
    assert copies.share == 0
    # one half of them against the bar that the other half sets: about one in its number passes by chance
    assert copying(TRUE[::2], TRAINING, TRUE[1::2]).share <= 3 / 30


def test_likeness_is_1_for_an_image_with_itself_and_lower_for_any_other() -> None:
    table = likeness(TRUE[:12], TRUE[:12])
    assert table.shape == (12, 12)
    assert np.allclose(table.diagonal(), 1)
    assert (table[~np.eye(12, dtype=bool)] < 0.9).all()


def test_an_even_image_is_like_nothing() -> None:
    white = Image.new("RGB", (64, 64), "white")
    assert likeness([white], TRUE[:3])[0] == pytest.approx(np.zeros(3), abs=1e-9)


def test_sizes_may_differ() -> None:
    large = TRUE[0].resize((256, 256), Image.Resampling.BICUBIC)
    assert likeness([large], TRUE[:2])[0] == pytest.approx(likeness(TRUE[:1], TRUE[:2])[0], abs=0.02)


def test_the_result_is_plain_json_and_an_empty_set_is_refused() -> None:
    assert json.loads(json.dumps(copying(TRUE[:4], TRAINING[:4], TRUE[:4]).to_dict()))["share"] == 0
    with pytest.raises(SdloraError, match="no training images"):
        copying(TRUE, [], TRUE)
