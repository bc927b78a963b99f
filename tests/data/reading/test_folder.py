"""Which images a folder yields, with which captions, and what every kind of bad file gets."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from drawings import animation, drawing, encoded, folder_of, png_that_claims, put
from PIL import Image

from sdlora.config.data import DataConfig
from sdlora.data.reading.folder import Dataset, ImageItem, load_pixels, scan, survey, with_trigger, words_of
from sdlora.data.reading.sources import gather
from sdlora.errors import DatasetError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs named pipes and free file names")


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(DatasetError) as caught:
        action()
    return str(caught.value)


# --- what a folder yields


def test_an_item_holds_everything_about_its_image(tmp_path: Path) -> None:
    file = put(tmp_path / "sub" / "Tea.PNG", drawing(1, width=50, height=30))
    put(tmp_path / "sub" / "Tea.txt", "\ufeff a teapot,\r\n\r\n  blue  \n")

    dataset = scan(tmp_path, recursive=True, trigger_word="inkicon", repeats=3)

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = ImageItem(
        path=file,
        caption="inkicon, a teapot, blue",
        height=30,
        width=50,
        repeats=3,
        digest=digest,
        name="sub/Tea.PNG",
        caption_source="txt",
        trigger_added=True,
        traits=(),
        likeness=dataset.items[0].likeness,
        detail=dataset.items[0].detail,
        lines=("a teapot,", "blue"),
        trigger_word="inkicon",
    )
    assert dataset == Dataset(tmp_path, (expected,), "inkicon", (), ())
    assert dataset.num_visits == 3


def test_items_come_in_order_of_their_names_whatever_the_file_system_says(tmp_path: Path) -> None:
    names = ["b/z.png", "B2.png", "a.png", "C.png", "b/A.png", "ä.png", "Z.png"]
    for seed, name in enumerate(reversed(names)):
        put(tmp_path / name, drawing(seed))
    dataset_read = scan(tmp_path, recursive=True, trigger_word="t", repeats=1)
    assert [item.name for item in dataset_read.items] == [
        "a.png",
        "b/A.png",
        "b/z.png",
        "B2.png",
        "C.png",
        "Z.png",
        "ä.png",
    ]


def test_two_scans_of_one_folder_are_equal(tmp_path: Path) -> None:
    folder_of(tmp_path, 8)
    assert scan(tmp_path) == scan(tmp_path)
    assert len(scan(tmp_path).items) == 8


def test_a_flat_scan_leaves_folders_alone(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    folder_of(tmp_path / "more", 3)
    assert [item.name for item in scan(tmp_path, recursive=False).items] == ["p00.png", "p01.png"]
    assert len(scan(tmp_path, recursive=True).items) == 5


def test_hidden_files_runs_of_ours_and_system_folders_are_not_training_data(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    put(tmp_path / "._p00.png", b"macOS fork")
    put(tmp_path / ".cache" / "x.png", drawing(5))
    put(tmp_path / "__MACOSX" / "x.png", drawing(5))
    put(tmp_path / "runs" / "one" / "config.toml", "")
    put(tmp_path / "runs" / "one" / "checkpoints" / "x.png", drawing(6))
    put(tmp_path / "runs" / "one" / "samples" / "x.png", drawing(7))
    put(tmp_path / "samples" / "x.png", drawing(8))

    dataset_read = scan(tmp_path, recursive=True, trigger_word="t")

    assert [item.name for item in dataset_read.items] == ["p00.png", "samples/x.png"]
    assert dataset_read.notes == ("runs/one/: left out, it was written by a training run",)


def test_a_scanned_run_folder_does_not_yield_its_own_samples(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    put(tmp_path / "config.toml", "")
    put(tmp_path / "samples" / "x.png", drawing(8))
    dataset_read = scan(tmp_path, recursive=True)
    assert [item.name for item in dataset_read.items] == ["p00.png"]
    assert dataset_read.notes == ("samples/: left out, it was written by a training run",)


def test_files_that_look_like_images_but_are_not_read_are_noted(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    for name in ("a.psd", "b.PSD", "c.svg", "notes.md"):
        put(tmp_path / name, "x")
    assert scan(tmp_path).notes == (
        "2 .psd file(s) are not read; convert them to PNG to use them",
        "1 .svg file(s) are not read; convert them to PNG to use them",
    )


@linux_only
def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 1)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    dataset_read = scan(tmp_path, recursive=True)
    assert [item.name for item in dataset_read.items] == ["a/p00.png"]
    assert dataset_read.notes == ("a/loop/: leads to a folder already read; taken once",)


def test_progress_is_told_for_every_image(tmp_path: Path) -> None:
    folder_of(tmp_path, 3)
    progress: list[tuple[int, int]] = []
    scan(tmp_path, progress=lambda done, total: progress.append((done, total)))
    assert progress == [(1, 3), (2, 3), (3, 3)]


# --- captions


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("teapot_small-02", "teapot small"),
        ("red__door (3)", "red door"),
        ("a-cat_1_2", "a cat"),
        ("r2d2", "r2d2"),
        ("mp3 player", "mp3 player"),
        ("  spaced  ", "spaced"),
        ("3 bears", "3 bears"),
        ("bears 3 10", "bears"),
        ("0001", ""),
        ("12_34", ""),
        ("(2)", ""),
        ("IMG_0123", ""),
        ("image1", ""),
        ("DSC00012", ""),
        ("3f2a90bc11d2", ""),
        ("6f9619ff-8b86-d011-b42d-00cf4fc964ff", ""),
        ("facade", "facade"),
        ("Katze im Garten", "Katze im Garten"),
        ("猫_01", "猫"),
    ],
)
def test_words_of_a_file_name(stem: str, words: str) -> None:
    assert words_of(stem) == words


@pytest.mark.parametrize(
    ("caption", "result"),
    [
        ("a cat", "ink, a cat"),
        ("a cat in Ink", "a cat in Ink"),
        ("inkling", "ink, inkling"),
        ("ink_blot", "ink, ink_blot"),
        ("(ink:1.2), cat", "(ink:1.2), cat"),
        ("", "ink"),
    ],
)
def test_the_trigger_word_is_put_in_front_only_where_it_lacks_as_a_whole_word(
    caption: str, result: str
) -> None:
    assert with_trigger(caption, "ink") == result
    assert with_trigger(caption, None) == caption


def test_captions_come_from_txt_then_caption_then_the_file_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.b.png", "Cup_red-2.png", "d.png", "007.png"):
        put(tmp_path / name, drawing(len(name)))
    put(tmp_path / "a.txt", "an apple")
    put(tmp_path / "b.b.caption", "a banana")
    put(tmp_path / "D.TXT", "")
    items = scan(tmp_path, trigger_word="ink").items
    assert [(item.name, item.caption, item.caption_source) for item in items] == [
        ("007.png", "ink", "file name"),
        ("a.png", "ink, an apple", "txt"),
        ("b.b.png", "ink, a banana", "caption"),
        ("Cup_red-2.png", "ink, Cup red", "file name"),
        ("d.png", "ink", "txt"),
    ]


def test_an_empty_caption_file_is_an_empty_caption_without_a_trigger_word(tmp_path: Path) -> None:
    put(tmp_path / "a.png", drawing(1))
    put(tmp_path / "a.txt", " \n")
    assert [(item.caption, item.caption_source) for item in scan(tmp_path, trigger_word=" ").items] == [
        ("", "txt")
    ]


def test_caption_files_without_an_image_are_orphans_but_a_readme_is_not(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    for name in ("p00.png.txt", "lost.caption", "README.txt", "LICENSE.txt"):
        put(tmp_path / name, "x")
    assert scan(tmp_path).orphans == ("lost.caption", "p00.png.txt")


@pytest.mark.parametrize("name", ["p00.png.txt", "P00.PNG.caption"])
def test_a_caption_named_after_the_whole_file_belongs_to_it(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, 1, captions=False)
    put(tmp_path / name, "a cat")
    dataset = scan(tmp_path)
    assert [item.caption for item in dataset.items] == ["a cat"] and dataset.orphans == ()


def test_training_says_which_captions_it_does_not_use(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    put(tmp_path / "p00.png.txt", "not used: p00.txt is there")
    dataset = gather(DataConfig(folder=tmp_path))
    assert dataset.notes == ("1 caption file(s) belong to no image and are not used (first: p00.png.txt)",)


# --- pixels


def colour_of(file: Path, at: tuple[int, int] = (0, 0), background: str = "#ffffff") -> tuple[int, ...]:
    image = load_pixels(file, background)
    assert image.mode == "RGB"
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


def test_exif_rotation_turns_size_and_pixels(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 10))  # stored top left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: it moves to the top right
    for name, format in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.webp", "WEBP"), ("d.tif", "TIFF")):
        put(tmp_path / name, encoded(image, format, exif=exif))
    dataset = scan(tmp_path, trigger_word="t")
    assert [(item.name, item.height, item.width) for item in dataset.items] == [
        ("a.jpg", 40, 20),
        ("b.png", 40, 20),
        ("c.webp", 40, 20),
        ("d.tif", 40, 20),
    ]
    for item in dataset.items:
        assert max(colour_of(item.path, (19, 0))) < 40
        assert min(colour_of(item.path, (0, 39))) > 215
        assert load_pixels(item).tobytes() == load_pixels(item.path).tobytes()


def test_transparency_is_laid_on_the_stated_background(tmp_path: Path) -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    grey_alpha = Image.new("LA", (4, 4), (10, 0))
    files = [
        put(tmp_path / "rgba.png", half),
        put(tmp_path / "palette.png", encoded(palette, "PNG", transparency=0)),
        put(tmp_path / "la.png", grey_alpha),
        put(
            tmp_path / "rgb-key.png",
            encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        ),
    ]
    assert [colour_of(file) for file in files] == [(255, 255, 255)] * 4
    assert [colour_of(file, background="#102030") for file in files] == [(16, 32, 48)] * 4
    assert [item.traits for item in scan(tmp_path, trigger_word="t").items] == [("transparent",)] * 4


def test_half_transparent_pixels_are_mixed_and_opaque_alpha_is_no_transparency(tmp_path: Path) -> None:
    mixed = put(tmp_path / "mixed.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    put(tmp_path / "opaque.png", Image.new("RGBA", (4, 4), (9, 8, 7, 255)))
    assert colour_of(mixed) == (127, 127, 127)
    items = scan(tmp_path, trigger_word="t").items
    assert [(item.name, item.traits) for item in items] == [
        ("mixed.png", ("transparent",)),
        ("opaque.png", ()),
    ]


def test_every_colour_mode_becomes_rgb_of_the_same_look(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    files = {
        put(tmp_path / "grey16.png", Image.new("I;16", (4, 4), 100 * 257)): (100, 100, 100),
        put(tmp_path / "grey16.tif", encoded(Image.new("I;16", (4, 4), 65535), "TIFF")): (255, 255, 255),
        put(tmp_path / "grey.png", Image.new("L", (4, 4), 77)): (77, 77, 77),
        put(tmp_path / "bits.png", Image.new("1", (4, 4), 1)): (255, 255, 255),
        put(tmp_path / "palette.png", palette): (200, 100, 50),
        put(tmp_path / "cmyk.tif", encoded(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF")): (0, 255, 255),
        put(tmp_path / "frames.gif", animation()): (255, 0, 0),
        put(tmp_path / "pages.tif", animation("TIFF")): (255, 0, 0),
        put(tmp_path / "wrong-ending.jpg", Image.new("RGB", (4, 4), (1, 2, 3))): (1, 2, 3),
    }
    assert {file.name: colour_of(file) for file in files} == {file.name: rgb for file, rgb in files.items()}


def test_cmyk_jpeg_keeps_its_look(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jpg", encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = colour_of(file)
    assert red > 245 and green < 10 and blue < 10


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken_and_noted(tmp_path: Path, format: str) -> None:
    file = put(tmp_path / f"x.{format.lower()}", animation(format))
    dataset_read = scan(tmp_path, trigger_word="t")
    assert dataset_read.notes == (f"{file.name}: is animated; its first frame is taken",)
    red, green, blue = colour_of(file)
    assert red > 250 and green < 5 and blue < 5


def test_every_promised_format_is_read(tmp_path: Path) -> None:
    formats = {"PNG": ["png"], "JPEG": ["jpg", "jpeg", "jfif"], "WEBP": ["webp"], "BMP": ["bmp"]}
    formats |= {"TIFF": ["tif", "tiff"], "GIF": ["gif"], "AVIF": ["avif"]}
    names = [f"{ending}.{ending}" for endings in formats.values() for ending in endings]
    for format, endings in formats.items():
        for ending in endings:
            put(tmp_path / f"{ending}.{ending}", encoded(drawing(3), format))
    items = scan(tmp_path, trigger_word="t").items
    assert [item.name for item in items] == sorted(names)
    assert {(item.height, item.width) for item in items} == {(40, 48)}


# --- bad input


def test_a_missing_folder_a_file_and_an_empty_folder_say_what_to_do(tmp_path: Path) -> None:
    file = put(tmp_path / "x.png", drawing(1))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert error_of(lambda: scan(tmp_path / "no")) == f"{tmp_path / 'no'}: no such folder; check the path"
    assert error_of(lambda: scan(file)) == (
        f"{file}: is a file where a folder of images is needed; give the folder it is in"
    )
    assert error_of(lambda: scan(empty)).startswith(f"{empty}: is empty; put images there (avif, bmp, ")
    assert error_of(lambda: scan(tmp_path, repeats=0)).startswith(f"{tmp_path}: repeats=0 would never show")


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "x")
    put(tmp_path / "b.txt", "x")
    put(tmp_path / "c.psd", "x")
    put(tmp_path / "sub" / "d.md", "x")
    message = error_of(lambda: scan(tmp_path, recursive=True))
    assert message.startswith(
        f"{tmp_path}: holds no images, only 1 .md, 1 .psd, 2 .txt, 1 folder(s); "
        "1 .psd file(s) are not read; convert them to PNG to use them; put images there ("
    )
    assert "\n" not in message


def test_images_only_in_subfolders_without_recursive_are_pointed_at(tmp_path: Path) -> None:
    folder_of(tmp_path / "in here", 2)
    assert error_of(lambda: scan(tmp_path, recursive=False)) == (
        f"{tmp_path}: holds no images itself, but the folder `in here` in it does; "
        "set data.recursive=true or give that folder"
    )


def truncated(format: str, share: float = 0.6) -> bytes:
    data = encoded(drawing(1, 200, 200), format)
    return data[: int(len(data) * share)]


def caption(content: bytes | str) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        put(root / "x.png", drawing(1))
        put(root / "x.txt", content)
        return "x.txt"

    return make


def image(content: bytes | Image.Image, name: str = "x.png") -> Callable[[Path], str]:
    def make(root: Path) -> str:
        put(root / name, content)
        return name

    return make


def two_caption_files(root: Path) -> str:
    put(root / "x.png", drawing(1))
    put(root / "x.txt", "a")
    put(root / "x.caption", "b")
    return "x.png"


def caption_is_a_folder(root: Path) -> str:
    put(root / "x.png", drawing(1))
    (root / "x.txt").mkdir()
    return "x.txt"


def two_images_of_one_stem(root: Path) -> str:
    put(root / "x.png", drawing(1))
    put(root / "X.jpg", encoded(drawing(2), "JPEG"))
    return "X.jpg and x.png"


def no_caption(root: Path) -> str:
    put(root / "0001.png", drawing(1))
    return "0001.png"


def named_pipe(root: Path) -> str:
    os.mkfifo(root / "x.png")
    return "x.png"


def name_that_is_not_utf8(root: Path) -> str:
    with open(os.fsencode(root) + b"/\xff\xfe.png", "wb") as stream:
        stream.write(b"")
    return "\\udcff\\udcfe.png"


NO_IMAGE = "is not an image of a known format, whatever its ending says; replace or delete it"
TORTURE: dict[str, tuple[Callable[[Path], str], str]] = {
    "empty file": (image(b""), "is empty (0 bytes); replace or delete it"),
    "text as image": (image(b"hello, this is text"), NO_IMAGE),
    "html as image": (image(b"<!DOCTYPE html><html>404</html>", "x.jpg"), NO_IMAGE),
    "svg as image": (image(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), NO_IMAGE),
    "postscript as image": (image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), NO_IMAGE),
    "zeros as image": (image(bytes(5000), "x.jpeg"), NO_IMAGE),
    "truncated png": (image(truncated("PNG")), "cannot be decoded ("),
    "truncated jpeg": (image(truncated("JPEG"), "x.jpg"), "cannot be decoded ("),
    "truncated webp": (image(truncated("WEBP"), "x.webp"), "cannot be decoded ("),
    "truncated gif": (image(truncated("GIF"), "x.gif"), "cannot be decoded ("),
    "truncated tiff": (image(truncated("TIFF"), "x.tif"), "cannot be decoded ("),
    "truncated bmp": (image(truncated("BMP"), "x.bmp"), "cannot be decoded ("),
    "truncated avif": (image(truncated("AVIF"), "x.avif"), ""),
    "header only": (image(truncated("PNG", 0.02)), ""),
    "garbled png": (image(encoded(drawing(1))[:60] + bytes(40) + encoded(drawing(1))[100:]), ""),
    "bomb that warns": (
        image(png_that_claims(10_000, 10_000)),
        "has more than 89 million pixels; save it smaller",
    ),
    "bomb that fails": (
        image(png_that_claims(60_000, 60_000)),
        "has more than 89 million pixels; save it smaller",
    ),
    "float tiff": (
        image(encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "x.tif"),
        "has 32 bits per value (mode F); save it with 8 or 16 bits",
    ),
    "int32 tiff": (
        image(encoded(Image.new("I", (8, 8), 70_000), "TIFF"), "x.tif"),
        "has 32 bits per value (mode I); save it with 8 or 16 bits",
    ),
    "latin-1 caption": (caption(b"caf\xe9"), "is not UTF-8 text (byte 3 is not); save it as UTF-8 text"),
    "utf-16 caption": (caption("tea".encode("utf-16")), "is not UTF-8 text (UTF-16); save it as UTF-8 text"),
    "utf-16 caption without mark": (
        caption("tea".encode("utf-16-le")),
        "holds zero bytes, so it is not UTF-8 text; save it as UTF-8 text",
    ),
    "image as caption": (
        caption(encoded(drawing(1))),
        "is not UTF-8 text (byte 0 is not); save it as UTF-8 text",
    ),
    "book as caption": (
        caption("word " * 20_000),
        "has 100000 bytes, too many for a caption; shorten it to 65536 bytes",
    ),
    "two caption files": (
        two_caption_files,
        "has two caption files, x.caption and x.txt; delete one of them",
    ),
    "folder as caption": (
        caption_is_a_folder,
        "is a folder where a caption file is expected; rename the folder, or put a text file in its place",
    ),
    "two images of one stem": (
        two_images_of_one_stem,
        "have one stem and would share a caption; rename one of them",
    ),
    "no caption": (
        no_caption,
        "has no caption, and its file name says nothing; "
        "write `0001.txt` beside it, or set data.trigger_word",
    ),
    "named pipe": (named_pipe, "is not a regular file; delete it"),
    "name that is not UTF-8": (name_that_is_not_utf8, "has a name that is not UTF-8; rename it"),
}
NEEDS_LINUX = {"named pipe", "name that is not UTF-8"}


@pytest.mark.parametrize("kind", TORTURE)
def test_each_kind_of_bad_file_is_one_line_with_what_where_and_how(tmp_path: Path, kind: str) -> None:
    if kind in NEEDS_LINUX and sys.platform != "linux":
        pytest.skip("needs named pipes and free file names")
    make, says = TORTURE[kind]
    where = make(tmp_path)
    message = error_of(lambda: scan(tmp_path))
    assert message.startswith(f"{tmp_path}: {where}: {says}")
    assert "\n" not in message
    message.encode("utf-8")


@linux_only
def test_a_torture_folder_is_reported_as_a_whole_and_its_good_images_survive(tmp_path: Path) -> None:
    assert len(TORTURE) >= 20
    folder_of(tmp_path / "good", 3)
    for number, (make, _) in enumerate(TORTURE.values()):
        root = tmp_path / f"{number:02}"
        root.mkdir()
        make(root)

    survey_result = survey(tmp_path, recursive=True)
    assert len(survey_result.problems) == len(TORTURE)
    names = {item.name for item in survey_result.dataset.items}
    # an image whose name clashes is itself fine, and so is one beside a folder named as a caption
    assert names >= {"good/p00.png", "good/p01.png", "good/p02.png"}

    lines = error_of(lambda: scan(tmp_path, recursive=True)).splitlines()
    assert lines[0] == f"{tmp_path}: {len(TORTURE)} problems"
    assert len(lines) == 22
    assert all(line.startswith("  - ") for line in lines[1:21])
    assert lines[-1] == f"  and {len(TORTURE) - 20} more; `sdlora check` lists all"


def test_a_pillow_without_avif_reads_the_rest_and_names_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.avif", encoded(drawing(1), "AVIF"))
    put(tmp_path / "b.webp", encoded(drawing(2), "WEBP"))
    monkeypatch.delitem(Image.OPEN, "AVIF")
    survey_result = survey(tmp_path, trigger_word="t")
    assert [item.name for item in survey_result.dataset.items] == ["b.webp"]
    assert [str(problem) for problem in survey_result.problems] == [
        "a.avif: is an AVIF image that this Pillow cannot read; "
        "run `pip install 'pillow>=11.3'`, or convert it to PNG"
    ]


def test_load_pixels_fails_with_the_path_of_the_file(tmp_path: Path) -> None:
    file = put(tmp_path / "x.png", truncated("PNG"))
    assert error_of(lambda: load_pixels(file)).startswith(f"{file}: cannot be decoded (")
    gone = tmp_path / "gone.png"
    assert error_of(lambda: load_pixels(gone)).startswith(f"{gone}: cannot be read (No such file")
