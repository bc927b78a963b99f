"""Which images count as nearly the same, and that the search misses none of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from drawings import drawing, encoded, put
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from sdlora.data.reading import likeness
from sdlora.data.reading.folder import scan
from sdlora.data.reading.likeness import NEAR_BITS, Likeness, likeness_of, near_duplicates


@dataclass(frozen=True)
class Shown:
    """What the search looks at."""

    digest: str
    likeness: Likeness | None


def shown(image: Image.Image) -> Shown:
    return Shown(hashlib.sha256(image.tobytes()).hexdigest(), likeness_of(image))


def test_resized_recompressed_and_brightened_copies_are_near_duplicates(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / f"p{number:02}.png", drawing(number, 160, 120))
    base = drawing(3, 160, 120)
    put(tmp_path / "q-small.png", base.resize((90, 68)))
    put(tmp_path / "q-jpeg.jpg", encoded(base, "JPEG", quality=60))
    put(tmp_path / "q-dark.png", ImageEnhance.Brightness(base).enhance(0.9))
    put(tmp_path / "q-same.png", base)
    items = scan(tmp_path, trigger_word="t").items
    groups = [[items[index].name for index in group] for group in near_duplicates(items)]
    assert groups == [["p03.png", "q-dark.png", "q-jpeg.jpg", "q-same.png", "q-small.png"]]


def test_every_usual_way_of_changing_a_copy_is_seen_through() -> None:
    images = [drawing(seed, 320, 240) for seed in range(24)]
    changes = {
        "half size": lambda image: image.resize((160, 120)),
        "twice the size": lambda image: image.resize((640, 480), Image.Resampling.NEAREST),
        "mirrored": ImageOps.mirror,
        "cropped": lambda image: image.crop((3, 3, 317, 237)),
        "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    }
    assert len(changes) == 6
    for name, change in changes.items():
        both = [shown(image) for image in (*images, *(change(image) for image in images))]
        assert near_duplicates(both) == [(seed, seed + 24) for seed in range(24)], name


def test_drawings_on_a_plain_ground_and_plain_colours_are_not_taken_for_each_other() -> None:
    images = []
    for number in range(6):
        image = Image.new("RGB", (64, 64), (255, 255, 255))
        image.paste((0, 0, 0), (4, 8 * number, 60, 8 * number + 6))
        images += [image, Image.new("RGB", (64, 64), (40 * number, 200, 90))]
    assert near_duplicates([shown(image) for image in images]) == []


def test_plain_areas_of_nearly_one_colour_are_near_duplicates() -> None:
    colours = [(200, 10, 10), (201, 12, 10), (10, 200, 10)]
    assert near_duplicates([shown(Image.new("RGB", (40, 40), colour)) for colour in colours]) == [(0, 1)]


def test_unrelated_icons_are_not_joined() -> None:
    folder = Path(__file__).parents[3] / "datasets" / "ink-icons"
    items = scan(folder).items
    assert len(items) == 48
    assert near_duplicates(items) == []


@given(
    bases=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    flips=st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=14)), max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_the_search_joins_exactly_what_a_comparison_of_all_pairs_joins(
    bases: list[int], flips: list[tuple[int, set[int]]]
) -> None:
    hashes = list(bases)
    for base, changed in flips:
        hashes.append(bases[base % len(bases)] ^ sum(1 << bit for bit in changed))
    image = bytes(range(256)) * 3  # one thumbnail for all, so that the hashes decide
    far = (1 << 64) - 1
    shows = [Shown(str(n), Likeness(bits, bits ^ far, image)) for n, bits in enumerate(hashes)]
    groups: list[set[int]] = []
    for index, bits in enumerate(hashes):
        near = {index} | {
            other for other, seen in enumerate(hashes[:index]) if (seen ^ bits).bit_count() <= NEAR_BITS
        }
        joined = [group for group in groups if group & near]
        groups = [group for group in groups if not group & near] + [near.union(*joined)]
    wanted = sorted(tuple(sorted(group)) for group in groups if len(group) > 1)
    assert sorted(near_duplicates(shows)) == wanted


@pytest.mark.parametrize("likeness", [None, Likeness(5, 5, bytes(768))])
def test_equal_files_are_one_group_whatever_they_look_like(likeness: Likeness | None) -> None:
    shows = [Shown("a", likeness), Shown("b", None), Shown("a", likeness)]
    assert near_duplicates(shows) == [(0, 2)]


def test_few_images_are_compared_without_numpy_and_to_the_same_result() -> None:
    changes = (ImageOps.mirror, lambda image: image.crop((3, 3, 157, 117)), lambda image: image)
    images = [drawing(seed, 160, 120) for seed in range(30)]
    images += [change(image) for image in images[:8] for change in changes]
    images += [Image.new("RGB", (64, 64), (200, 30, level)) for level in (0, 3, 30, 200)]
    likenesses = [likeness_of(image) for image in images]
    few = likeness.pairs_of_few(likenesses)
    assert few is not None and len(few) > 15
    assert set(few) == set(likeness.like_pairs(likenesses))
    assert likeness.pairs_of_few([likenesses[0]] * 20) is None  # 190 pairs: numpy is faster
    assert len(near_duplicates([Shown(str(n), likenesses[0]) for n in range(20)])[0]) == 20
