"""The hold-out: nothing trained on is measured, whatever is asked for."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from drawings import drawing, encoded, folder_of, put
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps

from sdlora.data.reading.folder import Dataset, ImageItem, scan
from sdlora.data.reading.holdout import divide, keep_apart, split
from sdlora.data.reading.likeness import Likeness, near_duplicates
from sdlora.errors import DatasetError


def item(number: int, digest: str | None = None, likeness: Likeness | None = None) -> ImageItem:
    text = digest or hashlib.sha256(str(number).encode()).hexdigest()
    return ImageItem(Path(f"{number}.png"), "x", 8, 8, 1, text, f"{number}.png", likeness=likeness)


def looks(motif: int, variant: int) -> Likeness:
    """Return likenesses that are near for one motif and far for another."""
    bits = int.from_bytes(hashlib.sha256(f"motif {motif}".encode()).digest()[:8], "big")
    thumbnail = bytearray(hashlib.shake_256(f"motif {motif}".encode()).digest(768))
    thumbnail[variant % 768] ^= 1
    return Likeness(bits ^ (1 << variant % 64), ~bits & (1 << 64) - 1, bytes(thumbnail))


@given(
    contents=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    motifs=st.booleans(),
    validation=st.one_of(st.floats(0, 0.99), st.integers(0, 40).map(float)),
    seed=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_a_split_never_leaks_loses_or_takes_the_last_image(
    contents: list[int], motifs: bool, validation: float, seed: int, order: object
) -> None:
    """Contents of one number are copies of one file, or different images of one motif."""
    items = tuple(
        item(n, likeness=looks(content, n)) if motifs else item(n, digest=f"digest {content}")
        for n, content in enumerate(contents)
    )
    dataset = Dataset(Path("x"), items)
    training, held = split(dataset, validation, seed)

    assert sorted(i.name for i in training.items + held.items) == sorted(i.name for i in items)
    content_of = {image_item.name: content for image_item, content in zip(items, contents, strict=True)}
    assert not {content_of[i.name] for i in training.items} & {content_of[i.name] for i in held.items}
    assert training.items
    if validation == 0:
        assert held.items == ()
    asked = max(1, int(validation * len(items) + 0.5)) if 0 < validation < 1 else int(validation)
    assert training.notes == (
        ()
        if len(held.items) == asked
        else (f"{len(held.items)} of {asked} wanted images are held out; near duplicates stay together",)
    )
    assert [i for i in items if i in training.items] == list(training.items)

    shuffled = list(items)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    again = split(replace(dataset, items=tuple(shuffled)), validation, seed)
    assert [{i.digest for i in part.items} for part in again] == [
        {i.digest for i in part.items} for part in (training, held)
    ]


@pytest.mark.parametrize(
    ("validation", "count"), [(0, 0), (0.01, 1), (0.1, 1), (0.25, 3), (1, 1), (4, 4), (99, 11)]
)
def test_twelve_images_are_split_as_asked(validation: float, count: int) -> None:
    dataset = Dataset(Path("x"), tuple(item(number) for number in range(12)))
    training, held = split(dataset, validation, seed=7)
    assert (len(training.items), len(held.items)) == (12 - count, count)


def test_the_hold_out_depends_on_the_seed_and_hardly_on_added_images() -> None:
    items = tuple(item(number) for number in range(40))
    chosen = [{i.name for i in split(Dataset(Path("x"), items), 8, seed)[1].items} for seed in range(3)]
    assert len({frozenset(names) for names in chosen}) == 3
    more = Dataset(Path("x"), (*items, item(100)))
    assert len(chosen[0] & {i.name for i in split(more, 8, 0)[1].items}) >= 7


def test_where_all_groups_are_too_large_the_smallest_is_held_out_if_half_the_images_remain() -> None:
    pairs = Dataset(Path("x"), tuple(item(n, digest=f"digest {n // 2}") for n in range(12)))
    training, held = split(pairs, 1, seed=0)
    assert (len(training.items), len(held.items)) == (10, 2)
    one_motif = Dataset(Path("x"), tuple(item(n, digest="same") for n in range(12)))
    training, held = split(one_motif, 0.1, seed=0)
    assert (len(training.items), len(held.items)) == (12, 0)
    assert training.notes == ("0 of 1 wanted images are held out; near duplicates stay together",)


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"data\.validation=-1: a share or a number of images cannot"):
        split(Dataset(Path("x"), (item(0),)), -1, 0)


def test_real_copies_of_twelve_images_never_straddle_the_split(tmp_path: Path) -> None:
    for number in range(12):
        image = drawing(number, 160, 120)
        put(tmp_path / f"p{number:02}.png", image)
        put(tmp_path / f"q{number:02}.jpg", encoded(image.resize((120, 90)), "JPEG", quality=80))
        put(tmp_path / f"r{number:02}.png", ImageOps.mirror(image))
    dataset = scan(tmp_path, trigger_word="t")
    assert len(near_duplicates(dataset.items)) == 12
    for seed in range(5):
        training, held = split(dataset, 0.25, seed)
        assert (len(training.items), len(held.items)) == (27, 9)
        assert not {i.name[1:3] for i in training.items} & {i.name[1:3] for i in held.items}


def test_a_folder_of_its_own_is_held_out_whole(tmp_path: Path) -> None:
    training = scan(folder_of(tmp_path / "train", 4))
    for number in (10, 11):
        put(tmp_path / "val" / f"v{number}.png", drawing(number))
    validation = scan(tmp_path / "val", trigger_word="t")
    kept, held = keep_apart(training, validation)
    assert (kept, held.items) == (training, validation.items)


def test_a_folder_inside_the_training_folder_is_not_trained_on(tmp_path: Path) -> None:
    folder_of(tmp_path, 4)
    put(tmp_path / "val" / "v.png", drawing(10))
    training, validation = scan(tmp_path, trigger_word="t"), scan(tmp_path / "val", trigger_word="t")
    assert len(training.items) == 5
    kept, held = keep_apart(training, validation)
    assert [i.name for i in kept.items] == ["p00.png", "p01.png", "p02.png", "p03.png"]
    assert [i.name for i in held.items] == ["v.png"]
    assert kept.notes == (f"val/v.png is not trained on: data.validation={tmp_path / 'val'} holds them",)


def test_held_out_images_like_trained_ones_are_not_measured(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", 4)
    put(tmp_path / "val" / "new.png", drawing(10))
    put(tmp_path / "val" / "old.jpg", encoded(drawing(2), "JPEG", quality=90))
    training, validation = (scan(tmp_path / name, trigger_word="t") for name in ("train", "val"))
    kept, held = keep_apart(training, validation)
    assert [i.name for i in held.items] == ["new.png"]
    assert kept.items == training.items
    assert kept.notes == ("old.jpg is not measured: nearly the same as images trained on",)


def test_held_out_images_that_are_like_each_other_are_all_measured(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", 3)
    for name in ("one.png", "two.png"):
        put(tmp_path / "val" / name, drawing(10))
    put(tmp_path / "val" / "three.jpg", encoded(drawing(10), "JPEG", quality=90))
    training, validation = (scan(tmp_path / name, trigger_word="t") for name in ("train", "val"))
    assert [len(group) for group in near_duplicates(validation.items)] == [3]
    kept, held = keep_apart(training, validation)
    assert sorted(i.name for i in held.items) == ["one.png", "three.jpg", "two.png"]
    assert kept.notes == training.notes


def test_a_hold_out_folder_that_leaves_one_side_empty_is_refused(tmp_path: Path) -> None:
    training = scan(folder_of(tmp_path / "train", 2))
    shutil.copytree(tmp_path / "train", tmp_path / "copy")
    with pytest.raises(DatasetError, match="each of its images is nearly the same as one that is trained"):
        keep_apart(training, scan(tmp_path / "copy"))
    with pytest.raises(DatasetError, match="so none is left to train on"):
        keep_apart(training, training)


@given(
    contents=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    priors=st.sets(st.integers(0, 9), max_size=6),
    validation=st.integers(0, 20).map(float),
)
@settings(max_examples=80, deadline=None)
def test_nothing_like_a_regularisation_image_is_held_out(
    contents: list[int], priors: set[int], validation: float
) -> None:
    items = tuple(item(n, likeness=looks(content, n)) for n, content in enumerate(contents))
    trained = tuple(item(100 + content, likeness=looks(content, 300)) for content in sorted(priors))
    training, held = split(Dataset(Path("x"), items), validation, 0, trained)
    assert sorted(i.name for i in training.items + held.items) == sorted(i.name for i in items)
    content_of = {image_item.name: content for image_item, content in zip(items, contents, strict=True)}
    assert not {content_of[i.name] for i in held.items} & priors
    if set(contents) <= priors:
        assert held.items == ()


def test_a_hold_out_folder_does_not_measure_regularisation_images(tmp_path: Path) -> None:
    training = scan(folder_of(tmp_path / "train", 2))
    priors = scan(put(tmp_path / "class" / "dog.png", drawing(20)).parent).items
    put(tmp_path / "val" / "same dog.jpg", encoded(drawing(20), "JPEG"))
    put(tmp_path / "val" / "another dog.png", drawing(21))
    _, held = keep_apart(training, scan(tmp_path / "val"), priors)
    assert [i.name for i in held.items] == ["another dog.png"]


def test_holding_out_as_many_images_as_there_are_is_refused() -> None:
    dataset = Dataset(Path("x"), tuple(item(n, likeness=looks(n, n)) for n in range(12)))
    for wanted in (12.0, 20.0):
        with pytest.raises(DatasetError, match=rf"data\.validation={wanted:g}: there are only 12 images"):
            divide(dataset, wanted, None, 0)
    for wanted, count in ((11.0, 11), (0.1, 1), (0.0, 0), (None, 0)):
        training, held = divide(dataset, wanted, None, 0)
        assert (len(training.items), len(held.items)) == (12 - count, count)
