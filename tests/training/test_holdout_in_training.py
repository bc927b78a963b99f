"""What a run measures it has not trained on: kohya's default split had 14 of 20 images on both sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from drawings import drawing, put
from PIL import Image, ImageOps

from sdlora.config.toml import load_config
from sdlora.data.reading.likeness import near_duplicates
from sdlora.events import Emitter
from sdlora.training.run import prepare_run
from sdlora.training.state import Run

Make = Callable[..., Path]


@pytest.fixture
def prepared(tiny_base: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(folder: Path, *settings: str) -> Run:
        base = ["adapter.rank=2", "training.steps=2", "sample.prompts=[]", "training.batch_size=2"]
        values = {"data.folder": folder, "model.base": str(tiny_base), "output.folder": tmp_path / "run"}
        return prepare_run(load_config(None, [*base, *settings], values), resume=False, emit=Emitter(()))

    return make


def photos(folder: Path, count: int, first: int = 0) -> Path:
    """Make images that look different, as the tests of the data side have them."""
    for number in range(first, first + count):
        put(folder / f"p{number:02}.png", drawing(number, 96, 72))
        put(folder / f"p{number:02}.txt", f"thing {number}")
    return folder


@pytest.mark.parametrize("wanted", ["0.15", "3", "9"])
def test_no_image_and_no_copy_of_it_is_on_both_sides(
    prepared: Callable[..., Run], tmp_path: Path, wanted: str
) -> None:
    folder = photos(tmp_path / "images", 14)
    for number in range(6):
        with Image.open(folder / f"p{number:02}.png") as image:
            ImageOps.mirror(image).resize((72, 54)).save(folder / f"p{number:02} copy.jpg", quality=85)
        (folder / f"p{number:02} copy.txt").write_text("a copy", encoding="utf-8")
    run = prepared(folder, f"data.validation={wanted}")
    training, held = run.training.items, run.validation.items
    assert (len(training) + len(held), len(held) > 0) == (20, True)
    assert not {item.name[:3] for item in training} & {item.name[:3] for item in held}
    groups = near_duplicates([*training, *held])
    assert groups
    assert all((max(group) < len(training)) == (min(group) < len(training)) for group in groups)


def test_a_folder_of_its_own_is_measured(prepared: Callable[..., Run], tmp_path: Path) -> None:
    folder, validation_folder = photos(tmp_path / "images", 4), photos(tmp_path / "own", 3, first=20)
    run = prepared(folder, f"data.validation='{validation_folder}'")
    assert [item.name for item in run.training.items] == ["p00.png", "p01.png", "p02.png", "p03.png"]
    assert [item.name for item in run.validation.items] == ["p20.png", "p21.png", "p22.png"]
