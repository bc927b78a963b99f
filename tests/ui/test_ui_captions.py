"""Captions edited in the browser lie beside their images, and every change can be undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sdlora_ui.captions import CaptionBook
from sdlora_ui.dataset_view import DataSets, for_folder, version_of_settings
from sdlora_ui.server.allowed_paths import AllowedPaths, PathRefused

from sdlora.config.toml import load_config
from sdlora.data.reading.holdout import divide
from sdlora.data.reading.sources import gather
from sdlora.errors import DatasetError


@pytest.fixture
def paths(tmp_path: Path) -> AllowedPaths:
    return AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path("images"))


def test_an_edit_is_on_disk_and_can_be_undone_by_a_later_server(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(3)
    assert CaptionBook(paths).set(folder, {"thing00.png": "  a new \n\n caption "}) == 1
    assert (folder / "thing00.txt").read_text() == "a new\ncaption\n"
    later = CaptionBook(paths)
    assert later.changes(folder) == 1 and later.undo(folder) == 1
    assert (folder / "thing00.txt").read_text() == "an icon of a cat 0"
    with pytest.raises(DatasetError, match="nothing to undo"):
        later.undo(folder)


def test_undoing_a_first_caption_removes_its_file(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(1, caption=False)
    book = CaptionBook(paths)
    book.set(folder, {"thing00.png": "a thing"})
    assert (folder / "thing00.txt").exists()
    book.undo(folder)
    assert not (folder / "thing00.txt").exists()


def test_undo_keeps_what_someone_else_wrote_since(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(1)
    book = CaptionBook(paths)
    book.set(folder, {"thing00.png": "mine"})
    (folder / "thing00.txt").write_text("theirs")
    assert book.undo(folder) == 0
    assert (folder / "thing00.txt").read_text() == "theirs"


def test_replace_in_all_and_trigger_word_are_one_undo_each(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder, book = image_folder(3), CaptionBook(paths)
    assert book.replace(folder, "cat", "do\\g<1>g") == 3
    assert (folder / "thing01.txt").read_text() == "an icon of a do\\g<1>g 1\n"
    assert book.add_trigger(folder, "mystyle") == 3
    assert book.add_trigger(folder, "mystyle") == 0
    assert (folder / "thing02.txt").read_text().startswith("mystyle, an icon")
    assert book.undo(folder) == 3 and book.undo(folder) == 3
    assert (folder / "thing02.txt").read_text() == "an icon of a cat 2"


def test_a_caption_file_that_is_there_keeps_its_ending(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(1)
    (folder / "thing00.txt").rename(folder / "thing00.caption")
    CaptionBook(paths).set(folder, {"thing00.png": "new"})
    assert sorted(file.name for file in folder.iterdir()) == ["thing00.caption", "thing00.png"]


@pytest.mark.parametrize(
    "name", ["../../outside.png", "/etc/passwd", "thing00.txt", "nobody.png", "thing00.png/.."]
)
def test_a_name_that_is_no_image_of_the_folder_is_refused(
    paths: AllowedPaths, image_folder: Callable[..., Path], name: str
) -> None:
    folder = image_folder(1)
    with pytest.raises((DatasetError, PathRefused)):
        CaptionBook(paths).set(folder, {name: "x"})


def test_a_caption_of_a_book_is_refused(paths: AllowedPaths, image_folder: Callable[..., Path]) -> None:
    with pytest.raises(DatasetError, match="shorten"):
        CaptionBook(paths).set(image_folder(1), {"thing00.png": "x" * 20_000})


def test_the_view_has_crops_findings_and_the_hold_out() -> None:
    folder, sets = Path(__file__).parent.parent.parent / "datasets" / "ink-icons", DataSets()
    seen = sets.look(folder, trigger="inkicon", resolution=64)
    assert seen["num_images"] == 48 and len(seen["cards"]) == 48
    assert seen["held_out"] == sum(card["held"] for card in seen["cards"]) > 0
    assert all(0 <= edge <= 1 for card in seen["cards"] for edge in card["crop"])
    assert sum(bucket["count"] for bucket in seen["buckets"]) == 48 - seen["held_out"]
    assert seen["tags"][0] == (
        "an icon of a basketball",
        1,
    )  # the trigger word is everywhere and does not count
    assert sets.look(folder, trigger=None, resolution=64)["tags"][0] == ("inkicon", 48)
    assert sets.look(folder, trigger="inkicon", resolution=64, only="held")["matching"] == seen["held_out"]
    assert sets.look(folder, trigger="inkicon", resolution=64, page=1)["cards"] == []
    large = sets.look(folder, trigger="inkicon", resolution=1024)
    assert large["counts"]["warning"] and any(card["findings"] for card in large["cards"])


def test_what_cannot_be_read_has_a_card_with_the_reason(image_folder: Callable[..., Path]) -> None:
    folder, sets = image_folder(2), DataSets()
    (folder / "torn.png").write_bytes(b"\x89PNG and no more")
    seen = sets.look(folder, trigger=None, resolution=64)
    assert (seen["num_images"], seen["num_unusable"]) == (2, 1)
    torn = next(card for card in seen["cards"] if card["name"] == "torn.png")
    assert torn["path"] is None and torn["findings"][0]["severity"] == "error"
    assert sets.look(folder, trigger=None, resolution=64, only="findings")["cards"][0] == torn


def test_crops_are_those_of_training_with_the_subject_kept(tmp_path: Path) -> None:
    Image.new("RGB", (800, 100), "red").save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a wide red thing")
    middle = DataSets().look(tmp_path, trigger=None, resolution=64)["cards"][0]["crop"]
    (tmp_path / "wide.json").write_text('{"focus": [0.0, 0.5]}')
    left = DataSets().look(tmp_path, trigger=None, resolution=64)["cards"][0]["crop"]
    assert middle[0] == pytest.approx(1 - middle[2]) and middle[0] > 0.1
    assert left[0] == 0 and left[2] == pytest.approx(middle[2] - middle[0])


def test_a_folder_of_another_tab_is_read_only_once(image_folder: Callable[..., Path]) -> None:
    folder, sets = image_folder(2), DataSets()
    first = sets.look(folder, trigger=None, resolution=64)
    version = version_of_settings(for_folder(folder, None, None))
    assert first["version"] == version == sets.look(folder, trigger=None, resolution=64)["version"]
    assert sets.progress(folder) is None
    (folder / "thing00.txt").write_text("changed by another program")
    assert version_of_settings(for_folder(folder, None, None)) != first["version"]


def test_the_view_treats_images_as_the_run_will(image_folder: Callable[..., Path]) -> None:
    folder, sets = image_folder(6), DataSets()
    mine = load_config(values={"data.validation": 2, "training.seed": 3})
    seen = sets.look(folder, trigger=None, resolution=64, settings=mine)
    held = {card["name"] for card in seen["cards"] if card["held"]}
    config = mine.with_values({"data.folder": folder})
    _, expected = divide(gather(config.data), 2, None, 3, ())
    assert held == {item.name for item in expected.items} and seen["held_out"] == 2
    assert sets.look(folder, trigger=None, resolution=64)["held_out"] == 0  # six are too few by themselves


def test_an_image_that_only_lacks_a_caption_is_shown_with_room_for_one(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (90, 60), (number * 80, 9, 9)).save(tmp_path / f"DSC0{number}.jpg")
    bare = DataSets().look(tmp_path, trigger=None, resolution=64)
    assert [(card["path"], card["edit"], card["caption"]) for card in bare["cards"]] == [
        (str(tmp_path / name), name, "") for name in ("DSC00.jpg", "DSC01.jpg", "DSC02.jpg")
    ]
    assert "“Trigger word”" in bare["cards"][0]["findings"][0]["fix"]
    assert DataSets().look(tmp_path, trigger=None, resolution=64, only="uncaptioned")["matching"] == 3
    named = DataSets().look(tmp_path, trigger="zork", resolution=64)
    assert (named["num_images"], named["num_unusable"], named["counts"]["error"]) == (3, 0, 0)


def test_the_trigger_word_is_put_into_images_without_a_caption(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(1)
    Image.new("RGB", (64, 64)).save(folder / "DSC00.jpg")
    assert CaptionBook(paths).add_trigger(folder, "zork") == 2
    assert (folder / "DSC00.txt").read_text() == "zork\n"


def test_typing_is_one_change_to_undo(paths: AllowedPaths, image_folder: Callable[..., Path]) -> None:
    folder, book = image_folder(2), CaptionBook(paths)
    before = (folder / "thing00.txt").read_text()
    for text in ("a", "a b", "a bee"):
        assert book.set(folder, {"thing00.png": text}, typing="one") == 1
    book.set(folder, {"thing00.png": "a bee again"}, typing="two")
    assert book.changes(folder) == 2
    assert book.undo(folder) == 1 and (folder / "thing00.txt").read_text() == "a bee\n"
    assert book.undo(folder) == 1 and (folder / "thing00.txt").read_text() == before
    assert book.changes(folder) == 0


def test_captions_of_several_lines_keep_their_lines(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder, book = image_folder(1), CaptionBook(paths)
    book.set(folder, {"thing00.png": "a cat\n\n  a small   cat "})
    assert (folder / "thing00.txt").read_text() == "a cat\na small cat\n"
    assert book.replace(folder, "cat", "dog") == 1
    assert book.add_trigger(folder, "zz") == 1
    assert (folder / "thing00.txt").read_text() == "zz, a dog\nzz, a small dog\n"
    assert DataSets().look(folder, trigger=None, resolution=64)["cards"][0]["caption"] == (
        "zz, a dog\nzz, a small dog"
    )


def test_a_caption_in_a_metadata_file_is_not_doubled(
    paths: AllowedPaths, image_folder: Callable[..., Path]
) -> None:
    folder, book = image_folder(2), CaptionBook(paths)
    (folder / "thing00.txt").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "thing00.png", "text": "from the table"}\n')
    with pytest.raises(DatasetError, match="metadata file of the folder; edit it there"):
        book.set(folder, {"thing00.png": "twice"})
    assert book.add_trigger(folder, "zz") == 1  # the other one
    assert not (folder / "thing00.txt").exists()


def test_the_view_follows_the_files(image_folder: Callable[..., Path]) -> None:
    folder, sets = image_folder(2), DataSets()
    assert sets.look(folder, trigger=None, resolution=64)["cards"][0]["caption"] == "an icon of a cat 0"
    (folder / "thing00.txt").write_text("something else entirely")
    assert sets.look(folder, trigger=None, resolution=64)["cards"][0]["caption"] == "something else entirely"


def test_typing_into_a_large_folder_lists_it_once(
    paths: AllowedPaths, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, book, listed = image_folder(3), CaptionBook(paths), []
    real = CaptionBook.set.__globals__["list_files"]

    def counted(*given: object, **more: object) -> object:
        listed.append(given)
        return real(*given, **more)

    monkeypatch.setitem(CaptionBook.set.__globals__, "list_files", counted)
    for text in ("a", "a c", "a cat"):
        book.set(folder, {"thing00.png": text}, typing="one")
    assert len(listed) == 1
    (folder / "thing01.txt").rename(folder / "thing01.caption")  # another program's, seen at once
    book.set(folder, {"thing01.png": "a dog"})
    assert len(listed) == 2 and (folder / "thing01.caption").read_text() == "a dog\n"
    assert not (folder / "thing01.txt").exists()
    (folder / "thing02.txt").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "thing02.png", "text": "from the table"}\n')
    with pytest.raises(DatasetError, match="metadata file"):
        book.set(folder, {"thing02.png": "twice"})
