"""What a repaired copy changes, byte for byte, and that it never touches the folder itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawings import animation, drawing, encoded, folder_of, put
from PIL import Image, ImageChops

from sdlora.commands.cli import main
from sdlora.data.check.repair import Change, repair, to_utf8
from sdlora.data.check.salvage import mend
from sdlora.data.reading.folder import load_pixels, scan
from sdlora.data.reading.problems import Unusable
from sdlora.errors import OutputError


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_good_folder_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", 3)
    folder_of(source / "deeper", 2)
    put(source / "deeper" / "p01.json", '{"focus": [0.2, 0.3]}')
    (source / "deeper" / "p01.png").write_bytes(encoded(drawing(8)))
    (source / "deeper" / "p00.png").write_bytes(encoded(drawing(9)))
    assert repair(source, tmp_path / "copy") == []
    assert files(tmp_path / "copy") == files(source)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_metadata_files_name_the_images_of_the_copy(tmp_path: Path, ending: str) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    put(source / "in" / "a.png", drawing(1))
    put(source / "in" / "b.gif", animation())
    put(source / "in" / "broken.png", b"x")
    put(source / "in" / "own.png", drawing(4))
    put(source / "in" / "own.txt", "a caption of its own")
    rows = [
        ("a.png", "a cup, \u00fc"),
        ("b.gif", "a moving cup"),
        ("broken.png", "nothing"),
        ("own.png", "another caption"),
        ("gone.png", "not there"),
        ("./a.png", "a cup again"),
    ]
    if ending == "csv":
        text = "file_name,text\n" + "".join(f'{name},"{caption}"\n' for name, caption in rows)
    else:
        text = "".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in rows)
        text += "{not json\n"
    put(source / "in" / f"metadata.{ending}", text.encode("utf-16"))
    changes = {change.name: change for change in repair(source, copy)}
    scanned = scan(copy)
    assert {item.name: item.caption for item in scanned.items} == {
        "in/a.png": "a cup, \u00fc",
        "in/b.png": "a moving cup",
        "in/own.png": "a caption of its own",
    }
    change = changes[f"in/metadata.{ending}"]
    assert change.written == f"in/metadata.{ending}"
    for words in (
        "converted to UTF-8 from UTF-16",
        "1 line named after the image in the copy",
        "2 lines left out: its image is not in the copy",
        "1 line left out: its image has a caption file",
        "1 line left out: its image was named before",
        *(["1 line left out: not readable"] if ending == "jsonl" else []),
    ):
        assert words in change.what


def test_metadata_files_that_need_nothing_are_copied_byte_for_byte(tmp_path: Path) -> None:
    put(tmp_path / "source" / "a.png", drawing(1))
    text = b'\xef\xbb\xbf{ "text":"a cup" , "file_name":"a.png", "more": [1] }\r\n\r\n'
    put(tmp_path / "source" / "metadata.jsonl", text)
    assert repair(tmp_path / "source", tmp_path / "copy") == []
    assert (tmp_path / "copy" / "metadata.jsonl").read_bytes() == text


def test_sidecars_that_say_nothing_right_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "source" / "a cup.png", drawing(1))
    put(tmp_path / "source" / "a cup.json", '{"focus": "middle"}')
    (change,) = repair(tmp_path / "source", tmp_path / "copy")
    assert change == Change("a cup.json", 'left out: has `focus` "middle"', None)
    assert len(scan(tmp_path / "copy").items) == 1


def test_rotated_images_are_written_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "source" / "p.jpg", encoded(drawing(1, 90, 60), "JPEG", quality=95, exif=exif.tobytes()))
    put(tmp_path / "source" / "p.txt", "a cup")
    assert repair(tmp_path / "source", tmp_path / "copy") == [Change("p.jpg", "rotated upright", "p.jpg")]
    with Image.open(tmp_path / "copy" / "p.jpg") as image:
        assert (image.size, image.getexif().get(0x0112)) == ((60, 90), None)
    shown = [load_pixels(tmp_path / name / "p.jpg") for name in ("source", "copy")]
    assert max(high for _, high in ImageChops.difference(*shown).getextrema()) <= 24


def test_a_lost_end_is_cut_off_and_a_lost_half_is_not_passed_off_as_whole() -> None:
    whole = drawing(2, 200, 400)
    data = encoded(whole, "BMP")  # its rows come from the bottom up
    with pytest.raises(Unusable):
        mend(data[: len(data) // 2], "p.bmp")
    noise = Image.effect_noise((200, 400), 80).convert("RGB")
    jpeg = encoded(noise, "JPEG", quality=90)
    mended = mend(jpeg[: int(len(jpeg) * 0.96)], "p.jpg")
    import io

    with Image.open(io.BytesIO(mended.data)) as image:
        assert image.width == 200
        assert 360 <= image.height < 400
        assert mended.done == (f"the last {400 - image.height} of 400 rows were lost and are cut off",)
        with Image.open(io.BytesIO(jpeg)) as original:
            box = (0, 0, 200, image.height - 16)
            assert ImageChops.difference(image.crop(box), original.convert("RGB").crop(box)).getbbox() is None
    with pytest.raises(Unusable):
        mend(jpeg[: len(jpeg) // 2], "p.jpg")
    coarse = encoded(noise, "JPEG", quality=90, progressive=True)
    with pytest.raises(Unusable):
        mend(coarse[: int(len(coarse) * 0.96)], "p.jpg")


def test_copies_clashes_and_animations_are_told(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source / "a.png", drawing(1))
    put(source / "a.txt", "one")
    put(source / "b.png", drawing(1))
    put(source / "b.txt", "two")
    put(source / "twin.png", drawing(2))
    put(source / "twin.jpg", encoded(drawing(3), "JPEG"))
    put(source / "twin.txt", "a twin")
    put(source / "move.gif", animation())
    put(source / "move.caption", "moves")
    assert repair(source, tmp_path / "copy") == [
        Change("b.png", "left out with its caption: is the same file as a.png", None),
        Change("move.gif", "its first frame alone", "move.png"),
        Change("twin.png", "renamed", "twin-2.png"),
    ]
    copy = files(tmp_path / "copy")
    assert set(copy) == {
        *("a.png", "a.txt", "move.png", "move.caption"),
        *("twin.jpg", "twin.txt", "twin-2.png", "twin-2.txt"),
    }
    assert copy["twin-2.txt"] == copy["twin.txt"] == b"a twin"
    assert len(scan(tmp_path / "copy").items) == 4


@pytest.mark.parametrize(
    ("data", "text", "done"),
    [
        (b"plain", "plain", ""),
        ("\ufeffcaf\xe9".encode(), "\ufeffcaf\xe9", ""),
        ("caf\xe9".encode("cp1252"), "caf\xe9", "converted to UTF-8 from Windows-1252 (assumed: look at it)"),
        ("caf\xe9 \u732b".encode("utf-16"), "caf\xe9 \u732b", "converted to UTF-8 from UTF-16"),
        ("a cat".encode("utf-16-be"), "a cat", "converted to UTF-8 from UTF-16 without mark"),
        ("a cat".encode("utf-16-le"), "a cat", "converted to UTF-8 from UTF-16 without mark"),
        ("a cat".encode("utf-32"), "a cat", "converted to UTF-8 from UTF-32"),
        (b"\x81 odd", "\x81 odd", "converted to UTF-8 from Latin-1 (assumed: look at it)"),
    ],
)
def test_texts_become_utf_8(data: bytes, text: str, done: str) -> None:
    assert to_utf8(data, "x.txt") == (text.encode(), done)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(Unusable):
        to_utf8(b"\xff\xfe\x00\xd8", "x.txt")


def test_two_captions_of_one_image_leave_one(tmp_path: Path) -> None:
    put(tmp_path / "source" / "p.png", drawing(1))
    put(tmp_path / "source" / "p.caption", "one")
    put(tmp_path / "source" / "p.txt", "another")
    changes = repair(tmp_path / "source", tmp_path / "copy")
    assert [(change.name, change.written) for change in changes] == [("p.txt", None)]
    assert changes[0].what == "left out: a second caption of one image, p.caption is taken"
    assert set(files(tmp_path / "copy")) == {"p.png", "p.caption"}


def test_the_copy_goes_to_a_place_of_its_own(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", 1)
    put(tmp_path / "used" / "mine.txt", "x")
    with pytest.raises(OutputError, match="not empty"):
        repair(source, tmp_path / "used")
    with pytest.raises(OutputError, match="lies inside"):
        repair(source, source / "copy")
    (tmp_path / "empty").mkdir()
    assert repair(source, tmp_path / "empty") == []
    assert set(files(tmp_path / "empty")) == {"p00.png", "p00.txt"}
    assert set(files(source)) == {"p00.png", "p00.txt"}


def test_the_command_tells_the_changes_and_judges_the_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of(tmp_path / "source", 4)
    put(source / "broken.png", b"x")
    put(source / "p00.txt", "caf\xe9".encode("latin-1"))
    arguments = ["check", str(source), "--resolution", "48", "--multiple", "8", "--json"]
    assert main(arguments) == 1
    capsys.readouterr()
    assert main([*arguments, "--fix", "--output", str(tmp_path / "copy")]) == 0
    lines = capsys.readouterr().out.splitlines()
    fixed = json.loads(lines[-1])["fix"]
    assert [change["name"] for change in fixed["changes"]] == ["broken.png", "p00.txt"]
    assert (fixed["num_images"], fixed["harmful"]) == (4, False)
    assert any("4 images; 0 error(s)" in line for line in lines)
    for wrong in (["--fix"], ["--output", str(tmp_path / "other")]):
        assert main([*arguments, *wrong]) == 2
