"""Captions edited in the browser lie beside their pictures, and every change can be undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sdlora_ui.captions import CaptionBook
from sdlora_ui.dataset_view import DataSets
from sdlora_ui.places import PlaceRefused, Places

from sdlora.errors import DatasetError


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places.of(tmp_path, runs=Path("runs"), pictures=Path("out"), data=Path("pictures"))


def test_an_edit_is_on_disk_and_can_be_undone_by_a_later_server(
    places: Places, picture_folder: Callable[..., Path]
) -> None:
    folder = picture_folder(3)
    assert CaptionBook(places).set(folder, {"thing00.png": "  a new\ncaption "}) == 1
    assert (folder / "thing00.txt").read_text() == "a new caption\n"
    later = CaptionBook(places)
    assert later.changes(folder) == 1 and later.undo(folder) == 1
    assert (folder / "thing00.txt").read_text() == "an icon of a cat 0"
    with pytest.raises(DatasetError, match="nothing to undo"):
        later.undo(folder)


def test_undoing_a_first_caption_removes_its_file(
    places: Places, picture_folder: Callable[..., Path]
) -> None:
    folder = picture_folder(1, caption=False)
    book = CaptionBook(places)
    book.set(folder, {"thing00.png": "a thing"})
    assert (folder / "thing00.txt").exists()
    book.undo(folder)
    assert not (folder / "thing00.txt").exists()


def test_undo_keeps_what_someone_else_wrote_since(
    places: Places, picture_folder: Callable[..., Path]
) -> None:
    folder = picture_folder(1)
    book = CaptionBook(places)
    book.set(folder, {"thing00.png": "mine"})
    (folder / "thing00.txt").write_text("theirs")
    assert book.undo(folder) == 0
    assert (folder / "thing00.txt").read_text() == "theirs"


def test_replace_in_all_and_trigger_word_are_one_undo_each(
    places: Places, picture_folder: Callable[..., Path]
) -> None:
    folder, book = picture_folder(3), CaptionBook(places)
    assert book.replace(folder, "cat", "do\\g<1>g") == 3
    assert (folder / "thing01.txt").read_text() == "an icon of a do\\g<1>g 1\n"
    assert book.add_trigger(folder, "mystyle") == 3
    assert book.add_trigger(folder, "mystyle") == 0
    assert (folder / "thing02.txt").read_text().startswith("mystyle, an icon")
    assert book.undo(folder) == 3 and book.undo(folder) == 3
    assert (folder / "thing02.txt").read_text() == "an icon of a cat 2"


def test_a_caption_file_that_is_there_keeps_its_ending(
    places: Places, picture_folder: Callable[..., Path]
) -> None:
    folder = picture_folder(1)
    (folder / "thing00.txt").rename(folder / "thing00.caption")
    CaptionBook(places).set(folder, {"thing00.png": "new"})
    assert sorted(file.name for file in folder.iterdir()) == ["thing00.caption", "thing00.png"]


@pytest.mark.parametrize(
    "name", ["../../outside.png", "/etc/passwd", "thing00.txt", "nobody.png", "thing00.png/.."]
)
def test_a_name_that_is_no_picture_of_the_folder_is_refused(
    places: Places, picture_folder: Callable[..., Path], name: str
) -> None:
    folder = picture_folder(1)
    with pytest.raises((DatasetError, PlaceRefused)):
        CaptionBook(places).set(folder, {name: "x"})


def test_a_caption_of_a_book_is_refused(places: Places, picture_folder: Callable[..., Path]) -> None:
    with pytest.raises(DatasetError, match="shorten"):
        CaptionBook(places).set(picture_folder(1), {"thing00.png": "x" * 20_000})


def test_the_view_has_crops_findings_and_the_hold_out() -> None:
    folder, sets = Path(__file__).parent.parent.parent / "datasets" / "ink-icons", DataSets()
    seen = sets.look(folder, trigger="inkicon", resolution=64)
    assert seen["num_images"] == 48 and len(seen["cards"]) == 48
    assert seen["held_out"] == sum(card["held"] for card in seen["cards"]) > 0
    assert all(0 <= edge <= 1 for card in seen["cards"] for edge in card["crop"])
    assert sum(bucket["count"] for bucket in seen["buckets"]) == 48
    assert seen["tags"][0] == ("inkicon", 48)
    assert sets.look(folder, trigger="inkicon", resolution=64, only="held")["matching"] == seen["held_out"]
    assert sets.look(folder, trigger="inkicon", resolution=64, page=1)["cards"] == []
    large = sets.look(folder, trigger="inkicon", resolution=1024)
    assert large["counts"]["warning"] and any(card["findings"] for card in large["cards"])


def test_the_view_follows_the_files(picture_folder: Callable[..., Path]) -> None:
    folder, sets = picture_folder(2), DataSets()
    assert sets.look(folder, trigger=None, resolution=64)["cards"][0]["caption"] == "an icon of a cat 0"
    (folder / "thing00.txt").write_text("something else entirely")
    assert sets.look(folder, trigger=None, resolution=64)["cards"][0]["caption"] == "something else entirely"
