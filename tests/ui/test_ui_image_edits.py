"""Images changed on the page take what belongs to them along, and every change can be put back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sdlora_ui import image_bin
from sdlora_ui.captions import CaptionBook
from sdlora_ui.image_edits import EXCLUDED, MASKS, ImageEdits, mask_of
from sdlora_ui.server.allowed_paths import AllowedPaths, PathRefused

from sdlora.data.reading.folder import Reading, survey
from sdlora.data.reading.masks import load_mask
from sdlora.errors import ConfigError, DatasetError


@pytest.fixture
def paths(tmp_path: Path) -> AllowedPaths:
    return AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path("images"))


@pytest.fixture
def edits(paths: AllowedPaths) -> ImageEdits:
    return ImageEdits(paths)


def held(folder: Path) -> dict[str, bytes]:
    """What a data set holds, apart from sdlora's own records."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    named = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return {name: data for name, data in named.items() if not name.startswith(".sdlora")}


def read(folder: Path) -> list[str]:
    return [item.name for item in survey(folder).dataset.items]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_deleted_goes_with_all_that_belongs_to_it_and_comes_back(
    paths: AllowedPaths, edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder, book = image_folder(3), CaptionBook(paths)
    (folder / "thing01.json").write_text('{"focus": [0.1, 0.2]}')
    edits.set_mask(folder, "thing01.png", png(Image.new("L", (64, 32), 255)), folder / MASKS)
    before = held(folder)
    book.noted(folder)
    assert edits.delete(folder, ["thing01.png", "thing02.png"]) == 2
    assert sorted(held(folder)) == ["thing00.png", "thing00.txt"] and read(folder) == ["thing00.png"]
    assert book.noted(folder) == 2 and book.listed(folder)[0] == {"what": "2 images deleted", "files": 6}
    assert book.undo(folder) == 6 and held(folder) == before and book.changes(folder) == 1


def test_changes_of_images_and_captions_are_undone_in_their_order(
    paths: AllowedPaths, edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder, book = image_folder(2), CaptionBook(paths)
    before = held(folder)
    book.set(folder, {"thing00.png": "one"})
    edits.delete(folder, ["thing00.png"])
    book.noted(folder)
    book.set(folder, {"thing01.png": "two"})
    whats = ["captions edited", "thing00.png deleted", "captions edited"]
    assert [change["what"] for change in book.listed(folder)] == whats
    book.undo(folder)
    assert (folder / "thing01.txt").read_text() == "an icon of a cat 1" and not (
        folder / "thing00.txt"
    ).exists()
    book.undo(folder)
    assert (folder / "thing00.txt").read_text() == "one\n"
    book.undo(folder)
    assert held(folder) == before


def test_what_is_excluded_is_not_trained_on_and_can_be_taken_back_at_any_time(
    edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(3)
    (folder / "in").mkdir()
    for name in ("thing02.png", "thing02.txt"):
        (folder / name).rename(folder / "in" / name)
    before = held(folder)
    edits.exclude(folder, ["thing00.png", "in/thing02.png"])
    assert read(folder) == ["thing01.png"]
    assert [image["name"] for image in edits.excluded(folder)] == ["thing00.png", "in/thing02.png"]
    edits.include(folder, ["in/thing02.png"])
    edits.include(folder, ["thing00.png"])
    assert held(folder) == before and edits.excluded(folder) == []


def test_nothing_is_written_over_when_an_image_is_taken_back(
    edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(2)
    edits.exclude(folder, ["thing00.png"])
    (folder / "thing00.txt").write_text("another one's")
    with pytest.raises(DatasetError, match=r"thing00\.txt: is there already"):
        edits.include(folder, ["thing00.png"])
    assert (folder / "thing00.txt").read_text() == "another one's"
    assert (folder / EXCLUDED / "thing00.png").is_file()


def test_no_more_is_turned_at_once_than_memory_should_hold(
    edits: ImageEdits, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(2)
    monkeypatch.setattr("sdlora_ui.image_edits.MOST_BYTES", 100)
    before = held(folder)
    with pytest.raises(DatasetError, match="2 images: more than 1 GiB; turn fewer at once"):
        edits.turn(folder, ["thing00.png", "thing01.png"], 1)
    assert held(folder) == before


def test_a_turn_takes_mask_and_focus_along(edits: ImageEdits, image_folder: Callable[..., Path]) -> None:
    folder = image_folder(2)  # thing01 has 64 x 32 px
    edits.set_focus(folder, "thing01.png", [0.25, 0.0])
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 32, 16))
    edits.set_mask(folder, "thing01.png", png(mask), folder / MASKS)
    before = held(folder)
    answer = edits.turn(folder, ["thing01.png"], 1, folder / MASKS)
    assert answer == {"turned": 1, "anew": []}
    (item,) = (
        item
        for item in survey(folder, reading=Reading(mask_folder=folder / MASKS)).dataset.items
        if item.mask
    )
    assert (item.width, item.height, item.focus) == (32, 64, (1.0, 0.25))
    now = load_mask(item, alpha=False)
    assert (
        now is not None
        and now.getpixel((31, 0)) == 255
        and now.getpixel((0, 0)) == now.getpixel((31, 63)) == 0
    )
    image_bin.undo(folder, image_bin.points(folder)[-1])
    assert held(folder) == before


def test_a_mask_is_read_by_training_and_its_older_version_is_kept(
    edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(2)
    soft = Image.linear_gradient("L").resize((40, 40))
    edits.set_mask(folder, "thing00.png", png(soft), folder / MASKS)
    edits.set_mask(folder, "thing00.png", png(Image.new("L", (40, 40), 128)), folder / MASKS)
    image_bin.undo(folder, image_bin.points(folder)[-1])
    result = survey(folder, reading=Reading(mask_folder=folder / MASKS))
    assert not result.problems and len(result.dataset.items) == 2
    mask = load_mask(result.dataset.items[0], alpha=False)
    assert mask is not None and mask.tobytes() == soft.tobytes()
    assert (
        edits.remove_mask(folder, "thing00.png", folder / MASKS)
        and mask_of(folder / MASKS, "thing00.png") is None
    )


def test_masks_from_transparency_are_its_opacity(
    edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(3)
    clear = Image.new("RGBA", (40, 40), (9, 9, 9, 255))
    clear.putalpha(Image.linear_gradient("L").resize((40, 40)))
    clear.save(folder / "thing00.png")
    Image.new("RGBA", (40, 40), (9, 9, 9, 0)).save(folder / "thing01.png")  # nothing of it would be trained
    names = [f"thing0{number}.png" for number in range(3)]
    assert edits.masks_from_transparency(folder, names, folder / MASKS) == 1
    with Image.open(folder / MASKS / "thing00.png") as mask:
        assert mask.mode == "L" and mask.tobytes() == clear.getchannel("A").tobytes()


def test_a_mask_of_nothing_and_one_elsewhere_are_refused(
    edits: ImageEdits, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder(1)
    white = png(Image.new("L", (40, 40), 255))
    with pytest.raises(DatasetError, match="all black"):
        edits.set_mask(folder, "thing00.png", png(Image.new("L", (40, 40))), folder / MASKS)
    with pytest.raises(ConfigError, match="outside of the data set"):
        edits.set_mask(folder, "thing00.png", white, tmp_path / "masks")
    with pytest.raises(DatasetError, match="mask"):
        edits.set_mask(folder, "thing00.png", b"no image", folder / MASKS)


def test_a_focus_keeps_what_else_the_sidecar_says(
    edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(1)
    (folder / "thing00.json").write_text('{"author": "me", "focus": [0, 0]}')
    edits.set_focus(folder, "thing00.png", [0.5, 0.75])
    assert json.loads((folder / "thing00.json").read_text()) == {"author": "me", "focus": [0.5, 0.75]}
    assert edits.focus_of(folder, "thing00.png") == (0.5, 0.75)
    edits.set_focus(folder, "thing00.png", None)
    assert json.loads((folder / "thing00.json").read_text()) == {"author": "me"}
    (folder / "thing00.json").write_text("broken")
    with pytest.raises(DatasetError, match="correct it, or delete it"):
        edits.set_focus(folder, "thing00.png", [0.5, 0.5])
    assert (folder / "thing00.json").read_text() == "broken"


@pytest.mark.parametrize(
    "name", ["../../outside.png", "/etc/passwd", "thing00.txt", "nobody.png", ".hidden/a.png", "link.png"]
)
def test_what_is_no_image_of_the_folder_is_not_touched(
    edits: ImageEdits, image_folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = image_folder(1)
    (folder / ".hidden").mkdir()
    Image.new("RGB", (9, 9)).save(folder / ".hidden" / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    before = held(tmp_path)
    for change in (
        lambda: edits.delete(folder, [name]),
        lambda: edits.exclude(folder, [name]),
        lambda: edits.turn(folder, [name], 1),
        lambda: edits.set_focus(folder, name, [0.5, 0.5]),
    ):
        with pytest.raises((DatasetError, PathRefused)):
            change()
    assert held(tmp_path) == before


def test_a_change_that_was_changed_since_stays_and_its_older_version_is_kept(
    edits: ImageEdits, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(1)
    first = (folder / "thing00.png").read_bytes()
    edits.turn(folder, ["thing00.png"], 1)
    Image.new("RGB", (5, 5), "red").save(folder / "thing00.png")
    theirs = (folder / "thing00.png").read_bytes()
    (point,) = image_bin.points(folder)
    assert image_bin.undo(folder, point) == (0, 1)
    assert (folder / "thing00.png").read_bytes() == theirs
    assert first in [file.read_bytes() for file in (folder / image_bin.FOLDER).rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "name", ["../outside.png", "/tmp/x.png", "a.py", "in/../../outside.png", "out/a.png"]
)
def test_a_bin_that_a_stranger_packed_writes_nowhere_else(
    image_folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = image_folder(1)
    (tmp_path / "elsewhere").mkdir()
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    point = folder / image_bin.FOLDER / "20260101-000000-abcdef"
    point.mkdir(parents=True)
    (point / "0").write_bytes(b"evil")
    for record in ({"name": name, "kept": "0"}, {"name": name, "moved": "thing00.png"}):
        (point / "record.json").write_text(json.dumps({"what": "x", "files": [record]}))
        assert image_bin.undo(folder, point.name) == (0, 1)
        (folder / image_bin.FOLDER / f"kept-{point.name}").rename(point)
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "outside.png").exists()
    (point / "record.json").write_text(
        json.dumps({"what": "x", "files": [{"name": "a.png", "kept": "../x"}]})
    )
    with pytest.raises(DatasetError, match="cannot be read"):
        image_bin.undo(folder, point.name)


def test_a_crash_before_a_change_leaves_nothing_to_put_back(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(1)
    before = held(folder)
    point = folder / image_bin.FOLDER / "20260101-000000-abcdef"
    point.mkdir(parents=True)
    files = [{"name": "thing00.png", "kept": "0"}, {"name": "new.json", "kept": None, "after": "0" * 64}]
    (point / "record.json").write_text(json.dumps({"what": "x", "files": files}))
    assert image_bin.undo(folder, point.name) == (2, 0) and held(folder) == before
