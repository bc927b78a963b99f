"""Grids and curves: sizes, places, and what must be readable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

from sdlora.errors import OutputError
from sdlora.generation.grids import grid, loss_curve, steps_by_prompts

COLOURS = [(200, 20, 20), (20, 200, 20), (20, 20, 200), (180, 180, 20), (20, 180, 180), (180, 20, 180)]


def squares(count: int, width: int = 64, height: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), COLOURS[i % len(COLOURS)]) for i in range(count)]


def areas(page: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int, int]:
    """Left, top, width, height and number of the pixels of one colour."""
    rows, columns = numpy.nonzero((numpy.asarray(page) == colour).all(axis=2))
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1, len(rows)


@pytest.mark.parametrize(("side", "shown"), [(64, 192), (32, 96), (128, 256), (176, 176), (512, 512)])
def test_small_images_are_enlarged_by_a_whole_factor(side: int, shown: int) -> None:
    page = grid(squares(2, side, side), 2, ["row"], ["a", "b"])
    for colour in COLOURS[:2]:
        assert areas(page, colour)[2:] == (shown, shown, shown * shown)


def test_cells_stand_in_rows_and_columns() -> None:
    page = grid(squares(6), 3, ["one", "two"], ["0", "0.5", "1"], "strength")
    places = [areas(page, colour)[:2] for colour in COLOURS]
    assert places[0][1] == places[1][1] == places[2][1] < places[3][1] == places[4][1] == places[5][1]
    assert places[0][0] == places[3][0] < places[1][0] == places[4][0] < places[2][0] == places[5][0]
    assert page.mode == "RGB"
    assert page.width > places[2][0] + 192 and page.height > places[3][1] + 192


def test_a_bare_grid_has_only_its_cells_and_margins() -> None:
    assert grid(squares(3), 2).size == (2 * 192 + 6 + 2 * 12, 2 * 192 + 6 + 2 * 12)


def test_images_of_different_sizes_are_centred_in_equal_cells() -> None:
    images = [Image.new("RGB", (200, 100), COLOURS[0]), Image.new("RGB", (100, 200), COLOURS[1])]
    page = grid(images, 2)
    first, second = areas(page, COLOURS[0]), areas(page, COLOURS[1])
    assert first[2:4] == (200, 100) and second[2:4] == (100, 200)
    assert first[0] + 100 + 206 == second[0] + 50 and first[1] + 50 == second[1] + 100


def ink(page: Image.Image, box: tuple[int, int, int, int]) -> int:
    return int((numpy.asarray(page.crop(box).convert("L")) < 128).sum())


def test_labels_are_drawn_beside_and_above_and_never_over_a_cell() -> None:
    long = "an icon of a cat that sits on a mat and looks out of the window into the rain " * 6
    page = grid(squares(2), 2, [long], [long, "W" * 200], "a title " * 60)
    for colour in COLOURS[:2]:
        assert areas(page, colour)[4] == 192 * 192
    left, top = areas(page, COLOURS[0])[:2]
    assert ink(page, (0, top, left - 2, top + 192)) > 200
    assert ink(page, (left, 0, page.width, top - 2)) > 200
    assert page.width < 700 and page.height < 360


def test_a_label_needs_its_row() -> None:
    with pytest.raises(ValueError, match=r"1 x 2 images, but 2 row and 0 column labels"):
        grid(squares(2), 2, ["a", "b"])
    with pytest.raises(ValueError, match="needs images"):
        grid([], 3)


def test_previews_are_a_row_a_step_in_order(tmp_path: Path) -> None:
    images = squares(6)
    file = tmp_path / "new" / "grid.png"
    steps_by_prompts({100: images[3:], 0: images[:3]}, ["a", "b", "c"], file)
    with Image.open(file) as page:
        places = [areas(page, colour) for colour in COLOURS]
    assert [place[4] for place in places] == [192 * 192] * 6
    assert places[0][1] == places[2][1] < places[3][1] == places[5][1]
    before = file.read_bytes()
    steps_by_prompts({100: images[3:], 0: images[:3]}, ["a", "b", "c"], file)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_a_curve_of_any_length_is_an_image_with_ink(tmp_path: Path, count: int) -> None:
    points = [(i + 1, 0.2 / (i + 1) + 0.1, 1e-3) for i in range(count)]
    loss_curve(points, [(0, 0.3), (count, 0.15)] if count else [], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (990, 550)
        blue = (
            numpy.abs(numpy.asarray(image.convert("RGB")).astype(int) - (31, 95, 153)).sum(axis=2) < 30
        ).sum()
    assert blue > (1000 if count == 500 else 30)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_curve_bends_neither_to_a_spike_nor_to_a_rate_of_zero(tmp_path: Path) -> None:
    points = [(i, 50.0 if i == 300 else 0.1, 0.0) for i in range(1, 401)]
    loss_curve(points, [], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        pixels = numpy.asarray(image.convert("RGB")).astype(int)
    line = numpy.nonzero(numpy.abs(pixels[:400, 400] - (31, 95, 153)).sum(axis=1) < 30)[0]
    assert len(line) > 0 and line.max() < 200  # not pressed flat onto the step axis


def test_a_curve_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="file"):
        loss_curve([(1, 0.1, 1e-3)], [], tmp_path / "file" / "loss.png")


def test_importing_it_loads_neither_torch_nor_matplotlib_nor_pillow() -> None:
    heavy = "{'torch', 'matplotlib', 'PIL'}"
    code = f"import sys, sdlora.generation.grids; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
