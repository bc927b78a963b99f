"""What is dropped is checked as images, bounded, and never lands outside its new folder."""

from __future__ import annotations

import io
import random
import stat
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from sdlora_ui.server import uploads
from sdlora_ui.server.uploads import copy_folder, folder_name, import_files

from sdlora.errors import DatasetError


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(file: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file


def test_images_captions_and_zips_become_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a red square")
    archive = make_zip(
        tmp_path / "more.zip", {"10_cat/b.png": png(), "10_cat/b.txt": b"b", "notes.pdf": b"x"}
    )
    taken = import_files([tmp_path / "a.png", tmp_path / "a.txt", archive], tmp_path / "data", "my set")
    names = sorted(str(file.relative_to(taken.folder)) for file in taken.folder.rglob("*") if file.is_file())
    assert names == ["10_cat/b.png", "10_cat/b.txt", "a.png", "a.txt"]
    assert taken.num_images == 2 and taken.folder.name == "my set"
    assert taken.left_out == ("notes.pdf: neither an image nor a caption",)


def test_a_second_upload_does_not_touch_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    first = import_files([tmp_path / "a.png"], tmp_path / "data", "set")
    second = import_files([tmp_path / "a.png"], tmp_path / "data", "set")
    assert [first.folder.name, second.folder.name] == ["set", "set-2"]


def test_what_is_no_image_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"<script>alert(1)</script>")
    taken = import_files([tmp_path / "good.png", tmp_path / "bad.png"], tmp_path / "data", "set")
    assert taken.num_images == 1 and "bad.png" in taken.left_out[0]
    assert not (taken.folder / "bad.png").exists()


def test_nothing_usable_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="no usable image"):
        import_files([tmp_path / "bad.png"], tmp_path / "data", "set")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png"]
)
def test_a_zip_that_names_places_outside_is_refused(tmp_path: Path, name: str) -> None:
    archive = make_zip(tmp_path / "evil.zip", {"fine.png": png(), name: png()})
    with pytest.raises(DatasetError, match="outside its folder"):
        import_files([archive], tmp_path / "data", "set")
    assert [file for file in tmp_path.rglob("*.png")] == []


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DatasetError, match="link"):
        import_files([tmp_path / "link.zip"], tmp_path / "data", "set")


def test_a_zip_bomb_is_stopped_by_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 1000)
    archive = make_zip(tmp_path / "bomb.zip", {"a.png": b"\0" * 100_000})
    assert archive.stat().st_size < 1000
    with pytest.raises(DatasetError, match="larger than"):
        import_files([archive], tmp_path / "data", "set")


def test_the_number_of_files_and_all_bytes_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "many.zip", {f"{n}.png": png() for n in range(5)})
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    with pytest.raises(DatasetError, match="more than 3 files"):
        import_files([archive], tmp_path / "data", "set")
    monkeypatch.setattr(uploads, "MAX_FILES", 10)
    monkeypatch.setattr(uploads, "MAX_TOTAL_BYTES", 3 * len(png()))
    with pytest.raises(DatasetError, match="GiB"):
        import_files([archive], tmp_path / "data", "set")


def test_a_broken_zip_is_an_error_with_words(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        import_files([tmp_path / "broken.zip"], tmp_path / "data", "set")


COMPRESSIONS = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_damaged_member_is_an_error_with_words(tmp_path: Path, name: str) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", COMPRESSIONS[name]) as writer:
        writer.writestr("a.png", png() + random.Random(1).randbytes(500))
        writer.writestr("a.txt", "a cat " * 100)
    data, outcomes = whole.getvalue(), set()
    for at in range(0, len(data), 11):
        file = tmp_path / "case.zip"
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])
        try:
            import_files([file], tmp_path / "data", f"case{at}")
            outcomes.add("taken")
        except DatasetError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
            outcomes.add("refused: cannot be unpacked" if "cannot be unpacked" in str(error) else "refused")
    assert {"taken", "refused: cannot be unpacked"} <= outcomes
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize(
    ("text", "name"), [("a/b\\c", "a-b-c"), ("../..", "images"), ("  x. ", "x"), ("", "images")]
)
def test_folder_names_are_plain(text: str, name: str) -> None:
    assert folder_name(text) == name


def test_copying_the_demo_keeps_a_copy_that_is_there(tmp_path: Path) -> None:
    source = tmp_path / "style"
    source.mkdir()
    (source / "a.png").write_bytes(png())
    (source / "a.txt").write_text("one")
    copied = copy_folder(source, tmp_path / "data")
    (copied / "a.txt").write_text("edited")
    assert copy_folder(source, tmp_path / "data") == copied
    assert (copied / "a.txt").read_text() == "edited"
