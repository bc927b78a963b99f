"""Which part of an image is seen at each visit, in which colours, and where masks come to lie."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from drawings import drawing, folder_of, put
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sdlora.config.toml import load_config
from sdlora.data.batching.buckets import Placement, flipped, place
from sdlora.data.batching.views import AugmentationView, AugmentationViews, random_crop, shown, shown_mask
from sdlora.data.reading.folder import Reading, scan, survey
from sdlora.data.reading.items import ImageItem, Point, Visit
from sdlora.data.reading.masks import load_mask
from sdlora.errors import ConfigError, DatasetError


def item(number: int = 0, repeats: int = 1, focus: Point | None = None) -> ImageItem:
    return ImageItem(Path("x"), "", 64, 128, repeats, f"digest {number}", "x", focus=focus)


def views_of(*items: ImageItem, **options: object) -> AugmentationViews:
    placements = tuple(
        place(image_item.height, image_item.width, [(64, 64)], image_item.focus) for image_item in items
    )
    return AugmentationViews(placements, items, **options)  # type: ignore[arg-type]


# --- without chance


def test_without_options_an_image_looks_the_same_at_each_visit() -> None:
    views = views_of(item())
    assert {views.at(Visit(0, epoch, 0), 7) for epoch in range(5)} == {views.plain(0)}
    assert views.to_encode(0) == [views.plain(0)]


def test_half_of_the_visits_are_mirrored_with_their_crop() -> None:
    views = views_of(item(focus=(0.2, 0.5)), flip=True)
    seen = Counter(views.at(Visit(0, epoch, 0), 7) for epoch in range(200))
    plain = views.plain(0)
    assert plain.placement.crop == (0, 0) and flipped(plain.placement).crop == (0, 64)
    assert set(seen) == {plain, AugmentationView(flipped(plain.placement), True)} == set(views.to_encode(0))
    assert 75 < seen[plain] < 125


# --- random crops and colours


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_a_random_crop_stays_inside_and_holds_the_focus(
    down: int, across: int, seed: int, x: float, y: float
) -> None:
    import random

    placement = Placement((32, 48), (32 + down, 48 + across), (0, 0))
    for focus in (None, (x, y)):
        top, left = random_crop(placement, focus, random.Random(seed).random).crop
        assert 0 <= top <= down and 0 <= left <= across
        if focus:
            assert left <= x * (48 + across) <= left + 48 + 1
            assert top <= y * (32 + down) <= top + 32 + 1


def test_random_crops_reach_every_place() -> None:
    views = views_of(item(), random_crop=True, variants=0)
    lefts = Counter(views.at(Visit(0, epoch, 0), 0).placement.crop[1] for epoch in range(2000))
    assert set(lefts) == set(range(65))


def test_variants_are_taken_in_turn_each_as_often_and_are_all_encoded() -> None:
    views = views_of(item(repeats=2), random_crop=True, colour_jitter=0.1, variants=4, seed=5)
    seen = Counter(views.at(Visit(0, epoch, repeat), 5) for epoch in range(6) for repeat in range(2))
    assert len(seen) == 4 and set(seen.values()) == {3}
    assert set(views.to_encode(0)) == set(seen)
    mirrored = views_of(item(repeats=2), random_crop=True, variants=4, seed=5, flip=True)
    visits = [Visit(0, epoch, repeat) for epoch in range(60) for repeat in range(2)]
    assert {mirrored.at(visit, 5) for visit in visits} == set(mirrored.to_encode(0))
    assert len(mirrored.to_encode(0)) == 8


def test_looks_follow_from_seed_epoch_and_image() -> None:
    for variants in (0, 3):
        first = views_of(item(1), item(2), random_crop=True, colour_jitter=0.2, variants=variants, seed=1)
        two = views_of(item(1), item(2), random_crop=True, colour_jitter=0.2, variants=variants, seed=1)
        visits = [Visit(index, epoch, 0) for index in range(2) for epoch in range(5)]
        assert [first.at(visit, 1) for visit in visits] == [two.at(visit, 1) for visit in reversed(visits)][
            ::-1
        ]
        assert len({first.at(visit, 1) for visit in visits}) == (10 if variants == 0 else 6)
    assert views_of(item(), random_crop=True, variants=0).to_encode(0) == []


def test_an_image_that_fits_its_bucket_needs_one_look_however_many_variants() -> None:
    square = ImageItem(Path("x"), "", 64, 64, 1, "d", "x")
    assert len(views_of(square, random_crop=True, variants=4).to_encode(0)) == 1


def test_colours_change_by_at_most_the_given_share_and_only_then() -> None:
    views = views_of(item(), colour_jitter=0.2, variants=0)
    factors = [views.at(Visit(0, epoch, 0), 0).colours for epoch in range(300)]
    values = [value for colours in factors if colours for value in colours]
    assert len(values) == 900
    assert 0.8 <= min(values) < 0.82 and 1.18 < max(values) <= 1.2
    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    whole = Placement((64, 64), (64, 64), (0, 0))
    assert shown(grey, AugmentationView(whole, colours=(1.5, 1.0, 1.0))).getpixel((0, 0)) == (150, 150, 150)
    assert shown(grey, AugmentationView(whole)).tobytes() == grey.tobytes()
    coloured = Image.new("RGB", (64, 64), (200, 100, 0))
    red, green, blue = shown(coloured, AugmentationView(whole, colours=(1.0, 1.0, 0.0))).getpixel((0, 0))  # type: ignore[misc]
    assert red == green == blue


def test_mirrored_cut_and_coloured_equals_cutting_the_mirrored_image() -> None:
    image = drawing(3, 128, 64)
    view = AugmentationView(Placement((64, 64), (64, 128), (0, 10)), mirror=True)
    assert shown(image, view).tobytes() == ImageOps.mirror(image).crop((10, 0, 74, 64)).tobytes()


# --- masks


def masked(tmp_path: Path, mask: Image.Image, image: Image.Image | None = None) -> ImageItem:
    put(tmp_path / "p" / "a.png", image or drawing(1, 128, 64))
    put(tmp_path / "m" / "a.png", mask)
    return scan(tmp_path / "p", reading=Reading(mask_folder=tmp_path / "m")).items[0]


def test_a_mask_is_cut_and_mirrored_with_its_image_and_averaged(tmp_path: Path) -> None:
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (0, 0, 40, 64))
    image_item = masked(tmp_path, mask)
    assert image_item.mask == tmp_path / "m" / "a.png" and len(image_item.mask_digest) == 64
    loaded = load_mask(image_item, alpha=False)
    assert loaded is not None
    placement = Placement((64, 64), (64, 128), (0, 0))
    small = np.asarray(shown_mask(loaded, AugmentationView(placement), 8, 8))
    assert small.tolist() == [[255] * 5 + [0] * 3] * 8
    mirrored = np.asarray(shown_mask(loaded, AugmentationView(flipped(placement), mirror=True), 8, 8))
    assert mirrored.tolist() == small[:, ::-1].tolist()
    moved = np.asarray(shown_mask(loaded, AugmentationView(Placement((64, 64), (64, 128), (0, 36))), 8, 8))
    assert moved[0, :2].tolist() == [128, 0]


def test_masks_of_another_size_but_the_same_shape_are_brought_to_the_image(tmp_path: Path) -> None:
    mask = Image.new("L", (64, 32), 255)
    loaded = load_mask(masked(tmp_path, mask), alpha=False)
    assert loaded is not None and loaded.size == (128, 64)


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (Image.new("L", (64, 64), 255), "has 64x64 px, but its image 128x64; make it as large"),
        (Image.new("L", (128, 64), 0), "is all black: nothing would be trained"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path: Path, mask: Image.Image, complaint: str) -> None:
    with pytest.raises(DatasetError, match=complaint):
        masked(tmp_path, mask)


def test_missing_masks_and_masks_of_nothing_are_noted(tmp_path: Path) -> None:
    folder_of(tmp_path / "p", 3)
    masks = tmp_path / "p" / "masks"
    for name in ("p00.jpg", "p01.png", "lost.png"):
        put(masks / name, Image.new("L", (48, 40), 255))
    dataset = scan(tmp_path / "p", reading=Reading(mask_folder=masks))
    assert [image_item.mask is not None for image_item in dataset.items] == [True, True, False]
    assert dataset.notes == (
        f"{masks}: 1 of 3 images have no mask and are trained whole",
        f"{masks}: 1 masks belong to no image (first: lost.png)",
    )
    (tmp_path / "other").mkdir()
    put(tmp_path / "other" / "x.png", drawing(1))
    survey_result = survey(tmp_path / "p", reading=Reading(mask_folder=tmp_path / "other"), recursive=False)
    assert [str(problem) for problem in survey_result.problems] == [
        f"{tmp_path / 'other'}: holds no mask of any of the images; name each mask as its image"
    ]


def test_transparency_serves_as_a_mask(tmp_path: Path) -> None:
    image = Image.new("RGBA", (128, 64), (9, 9, 9, 0))
    image.paste((1, 2, 3, 255), (64, 0, 128, 64))
    image_item = scan(put(tmp_path / "a.png", image).parent, trigger_word="t").items[0]
    mask = load_mask(image_item, alpha=True)
    assert mask is not None
    assert (mask.getpixel((0, 0)), mask.getpixel((127, 63))) == (0, 255)
    assert load_mask(image_item, alpha=False) is None


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.variants=2"], "`data.variants` has no effect"),
        (["data.unmasked_weight=0.1"], "`data.unmasked_weight` has no effect"),
        (["data.alpha_mask=true", "data.folder=x", "data.mask_folder=m"], "both give the mask"),
        (["data.mask_folder=m"], "`data.mask_folder` belongs to `data.folder`"),
        (["data.resolution=512", "data.more_resolutions=[512]"], "repeats `data.resolution=512`"),
        (["data.more_resolutions=[640, 640]"], "names a resolution twice"),
    ],
)
def test_settings_of_images_without_effect_are_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert complaint in str(caught.value)
