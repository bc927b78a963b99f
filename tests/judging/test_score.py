"""The style score: that it can tell a style from its imitations, and that it is a fair ruler."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from sdlora.errors import SdloraError
from sdlora.judging.score import MIN_IMAGES, StyleRuler, energy_distance, features_of_all
from sdlora.judging.style_features import FEATURES, features_of

DATASETS = Path(__file__).parents[2] / "datasets"
Images = list[Image.Image]


def icons(name: str) -> Images:
    files = sorted((DATASETS / name).glob("*.png"))
    assert len(files) >= 40
    return [Image.open(f).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for f in files]


def coloured(icon: Image.Image, number: int) -> Image.Image:
    """The same subject in another hand: its silhouette in two flat colours with soft shading, no lines."""
    outside = icon.convert("L").point(lambda value: 255 if value > 127 else 0)
    ImageDraw.floodfill(outside, (0, 0), 128)
    silhouette = outside.point(lambda value: 0 if value == 128 else 255)
    hue = (number * 0.381966) % 1
    first, second = (
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb((hue + shift) % 1, 0.7, 0.85))
        for shift in (0.0, 0.12)
    )
    body = Image.new("RGB", icon.size, first)
    body.paste(second, (0, icon.height // 2, *icon.size))
    body = body.filter(ImageFilter.GaussianBlur(6))
    page = Image.new("RGB", icon.size, "white")
    page.paste(body, (0, 0), silhouette)
    return page.filter(ImageFilter.GaussianBlur(0.6))


TRUE = icons("ink-icons-holdout")
TRAINING = icons("ink-icons")
BASE = [coloured(icon, number) for number, icon in enumerate(TRUE)]


def changed(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    return [change(image).convert("RGB") for image in images]


def binarised(threshold: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.convert("L").point(lambda value: 255 if value > threshold else 0)


@pytest.fixture(scope="module")
def ruler() -> StyleRuler:
    return StyleRuler(BASE, TRUE)


def test_the_base_scores_0_and_the_style_1(ruler: StyleRuler) -> None:
    assert ruler.score(BASE).value == 0
    assert ruler.score(TRUE).value == pytest.approx(1, abs=0.05)
    assert ruler.ceiling() == pytest.approx(1, abs=0.05)
    assert min(ruler.splits()) < ruler.ceiling() < max(ruler.splits())


def test_other_subjects_of_the_style_score_about_1(ruler: StyleRuler) -> None:
    assert ruler.score(TRAINING).value > 0.9


CHEATS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "inverted": ImageOps.invert,
    "greyscaled": lambda image: image.convert("L"),
    "greyscaled with more contrast": lambda image: ImageOps.autocontrast(image.convert("L")),
    "binarised, dark": binarised(110),
    "binarised, middle": binarised(150),
    "binarised, light": binarised(215),
    "white": lambda image: Image.new("RGB", image.size, "white"),
    "black": lambda image: Image.new("RGB", image.size, "black"),
    # outlines are a part of this very style, so this one comes closest
    "edge filter": lambda image: ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheap_imitations_stay_clearly_below_the_style(name: str, ruler: StyleRuler) -> None:
    score = ruler.score(changed(BASE, CHEATS[name]))
    assert score.value < (0.75 if name == "edge filter" else 0.6)
    assert score.high < ruler.score(TRUE).low - 0.2


def test_each_group_of_features_sees_its_own_fault(ruler: StyleRuler) -> None:
    faults: dict[str, Callable[[Image.Image], Image.Image]] = {
        "colour": lambda image: ImageOps.colorize(image.convert("L"), "#c02020", "#ffffff"),
        "tone": ImageOps.invert,
        "edges": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
        "texture": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
        "strokes": lambda image: image.filter(ImageFilter.MinFilter(7)),
    }
    assert set(faults) == set(FEATURES)
    perfect = ruler.score(TRUE).groups
    for group, fault in faults.items():
        assert ruler.score(changed(TRUE, fault)).groups[group] < perfect[group] - 0.3, group


def test_it_rises_with_every_image_that_is_in_the_style(ruler: StyleRuler) -> None:
    values = [ruler.score(TRUE[:count] + BASE[count:]).value for count in (0, 15, 30, 45, 60)]
    assert values == sorted(values)
    # a share p left in the base's look costs p squared of the distance (docs/score.md)
    assert values[2] == pytest.approx(0.75, abs=0.08)


def test_order_carries_nothing_and_a_score_repeats_exactly(ruler: StyleRuler) -> None:
    mixed = TRUE[:20] + BASE[20:]
    shuffled = [mixed[i] for i in np.random.default_rng(3).permutation(len(mixed))]
    assert ruler.score(shuffled) == ruler.score(mixed)
    assert StyleRuler(BASE[::-1], TRUE[::-1]).score(mixed) == ruler.score(mixed)
    assert StyleRuler(BASE, TRUE).score(mixed) == ruler.score(mixed)


def test_features_in_the_rulers_units_give_its_distances(ruler: StyleRuler) -> None:
    rows = ruler.features(TRAINING), ruler.features(TRUE)
    assert energy_distance(*rows) == pytest.approx(ruler.score(TRAINING).distance)
    assert np.array_equal(ruler.features(TRUE[::-1]), rows[1][::-1])


def test_the_ruler_does_not_depend_on_what_it_measures(ruler: StyleRuler) -> None:
    before = ruler.score(TRAINING)
    ruler.score(changed(BASE, ImageOps.invert))
    assert ruler.score(TRAINING) == before


def test_the_interval_holds_the_score_and_widens_with_fewer_images(ruler: StyleRuler) -> None:
    mixed = TRUE[:30] + BASE[30:]
    many, few = ruler.score(mixed), ruler.score(mixed[22:38])
    assert many.low < many.value < many.high
    assert few.high - few.low > 1.3 * (many.high - many.low)


def test_energy_distance_is_0_on_average_for_one_distribution_and_grows_with_the_shift() -> None:
    draw = np.random.default_rng(0)
    same = [energy_distance(draw.normal(size=(12, 3)), draw.normal(size=(20, 3))) for _ in range(300)]
    assert abs(np.mean(same)) < 0.02  # the biased form would give 0.3
    assert min(same) < 0 < max(same)
    first, second = draw.normal(size=(40, 3)), draw.normal(size=(40, 3))
    shifted = [energy_distance(first, second + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted)


def test_energy_distance_is_its_definition() -> None:
    first, second = np.array([[0.0], [1.0], [3.0]]), np.array([[2.0], [5.0]])
    across = (2 + 5 + 1 + 4 + 1 + 2) / 6
    assert energy_distance(first, second) == pytest.approx(2 * across - (1 + 3 + 2) / 3 - 3)


def test_features_are_what_their_names_say() -> None:
    names = [name for group in FEATURES.values() for name in group]
    values = features_of_all(TRUE)
    assert values.shape == (len(TRUE), len(names)) == (60, len(set(names)))
    assert np.isfinite(values).all()
    square = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(square).rectangle((8, 8, 39, 39), fill="black")
    ImageDraw.Draw(square).rectangle((16, 16, 31, 31), fill="white")
    actual = dict(zip(names, features_of(square).tolist(), strict=True))
    assert actual["mean chroma"] == pytest.approx(0, abs=1e-6)
    assert actual["ink share"] == pytest.approx((32**2 - 16**2) / 64**2)
    assert actual["outline length"] == pytest.approx(4 * (32 + 16) / (16 * 64))
    assert (actual["pieces of ink"], actual["largest piece"]) == (0.25, 1.0)  # log2(1 + 1) / 4
    assert actual["holes in the ink"] == pytest.approx(np.log2(3) / 4)  # the ground and the window
    assert (actual["ink wider than 1/8"], actual["ink wider than 1/32"]) == (1.0, 1.0)


def test_strokes_are_measured_in_shares_of_the_image() -> None:
    small, large = features_of(TRUE[0]), features_of(TRUE[0].resize((256, 256), Image.Resampling.NEAREST))
    start = sum(len(FEATURES[group]) for group in ("colour", "tone", "edges", "texture"))
    assert small[start:] == pytest.approx(large[start:], abs=0.02)
    assert small[:13] == pytest.approx(large[:13], abs=0.02)


def test_results_are_plain_json(ruler: StyleRuler) -> None:
    stored: dict[str, Any] = json.loads(json.dumps(ruler.score(BASE).to_dict()))
    assert stored["value"] == 0 and set(stored["groups"]) == set(FEATURES)


def test_what_cannot_be_measured_is_refused_with_a_reason() -> None:
    with pytest.raises(SdloraError, match="3 base images are too few"):
        StyleRuler(BASE[: MIN_IMAGES - 1], TRUE)
    with pytest.raises(SdloraError, match="cannot be told from the true ones"):
        StyleRuler(TRUE, TRUE)
