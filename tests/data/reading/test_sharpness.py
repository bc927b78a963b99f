"""Blur is told from the image at the size it is trained at, whatever it shows."""

from __future__ import annotations

import random

import pytest
from drawings import drawing
from PIL import Image, ImageDraw, ImageFilter

from sdlora.data.reading.sharpness import BLURRED, detail_of, focus


def discs(seed: int, side: int = 512) -> Image.Image:
    """Return an image of overlapping discs of all sizes, whose edges are spread as in photographs."""
    draw = random.Random(seed).random
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    for _ in range(400):
        radius, x, y = 6 * draw() ** -0.7, draw() * side, draw() * side
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=int(256 * draw()))
    return image.convert("RGB")


def sharpness(image: Image.Image, side: int) -> float:
    value = focus(detail_of(image), side)
    assert value is not None
    return value


@pytest.mark.parametrize("seed", range(4))
def test_blur_at_the_size_trained_at_is_found(seed: int) -> None:
    image = discs(seed)
    assert sharpness(image, 512) > 3 * BLURRED
    for radius in (1.5, 2, 3, 4):
        assert sharpness(image.filter(ImageFilter.GaussianBlur(radius)), 512) < BLURRED


@pytest.mark.parametrize("radius", [6, 10, 16])
def test_a_blur_so_strong_that_hardly_more_than_rounding_is_left_is_found(radius: int) -> None:
    image = Image.merge("RGB", [discs(seed).getchannel(0) for seed in range(3)])
    image = image.filter(ImageFilter.GaussianBlur(radius))
    for side in (512, 256):
        assert sharpness(image, side) < BLURRED


@pytest.mark.parametrize("seed", range(4))
def test_sharp_drawings_of_few_edges_are_not_suspected(seed: int) -> None:
    for side in (512, 256, 128):
        assert sharpness(drawing(seed, 640, 512), side) > 2 * BLURRED


def test_a_blur_that_disappears_when_the_image_is_made_smaller_does_no_harm() -> None:
    large = discs(0, 1024).filter(ImageFilter.GaussianBlur(2))
    assert sharpness(large, 1024) < BLURRED
    assert sharpness(large, 256) > 1.4 * BLURRED


def test_a_small_image_blown_up_counts_as_blurred() -> None:
    blown = discs(1, 128).resize((512, 512), Image.Resampling.BICUBIC)
    assert sharpness(blown, 512) < BLURRED


def test_a_sharp_subject_before_a_blurred_ground_is_sharp() -> None:
    image = discs(2).filter(ImageFilter.GaussianBlur(6))
    image.paste(discs(3, 120), (200, 200))
    assert sharpness(image, 512) > 2 * BLURRED


@pytest.mark.parametrize(
    "image", [Image.new("RGB", (300, 300), (90, 20, 20)), Image.linear_gradient("L"), drawing(0, 12, 12)]
)
def test_where_nothing_could_be_sharp_nothing_is_said(image: Image.Image) -> None:
    assert focus(detail_of(image.convert("RGB")), 256) is None
