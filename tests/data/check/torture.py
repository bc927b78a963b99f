"""A folder of bad files, each with what the doctor must say about it and what a repaired copy holds of it.

    PYTHONPATH=tests python tests/data/check/torture.py

prints the outcome of each file as a table.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drawings import animation, drawing, encoded, png_that_claims, put
from PIL import Image, ImageFilter

Content = bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Bad:
    """A bad file: what it holds, what must be found (severity, kind), its names in a repaired copy."""

    name: str
    content: Content
    expected: tuple[tuple[str, str], ...]
    mended: tuple[str, ...] = ()
    caption: str | None = "own"
    """Text of the caption file beside an image: `own` says something of its own, None makes none."""


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]


def _noise(seed: int, size: int = 96) -> Image.Image:
    return Image.frombytes("RGB", (size, size), random.Random(seed).randbytes(3 * size * size))


def _oriented(seed: int, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(drawing(seed, 64, 60), "JPEG", exif=exif.tobytes())


def _big_tail_lost() -> bytes:
    """A JPEG of which the last few rows are missing."""
    data = encoded(_noise(70, 320), "JPEG", quality=90)
    return data[: int(len(data) * 0.96)]


def _link(file: Path) -> None:
    file.symlink_to("nowhere.png")


def _misnamed(file: Path) -> None:
    file.parent.joinpath(os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(drawing(43)))


def _pipe(file: Path) -> None:
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.mkdir()


UNDECODABLE = (("error", "undecodable"),)
TRUNCATED = (("error", "truncated"),)
UNREADABLE = (("error", "unreadable"),)
BAD_CAPTION = (("error", "bad caption"),)
NO_FILE = ("note", "no caption file")

BROKEN_IMAGES = [
    Bad("empty.png", b"", UNDECODABLE),
    Bad("text.png", b"this is not an image\n" * 9, UNDECODABLE),
    Bad("page.jpg", b"<!doctype html><title>404</title>", UNDECODABLE),
    Bad("vector.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNDECODABLE),
    Bad("document.jpg", b"%PDF-1.7\n1 0 obj", UNDECODABLE),
    Bad("archive.png", b"PK\x03\x04" + bytes(60), UNDECODABLE),
    Bad("program.bmp", b"MZ" + bytes(200), UNDECODABLE),
    Bad("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNDECODABLE),
    Bad("random.png", random.Random(1).randbytes(900), UNDECODABLE),
    Bad("random marker.jpg", b"\xff\xd8\xff\xe0" + random.Random(2).randbytes(900), TRUNCATED),
    Bad("zeros.jpg", bytes(4096), UNDECODABLE),
    Bad("half of a png.png", _half(encoded(_noise(1))), TRUNCATED),
    Bad("half of a jpg.jpg", _half(encoded(_noise(2), "JPEG")), TRUNCATED, caption="own"),
    Bad("half of a webp.webp", _half(encoded(_noise(3), "WEBP")), UNDECODABLE),
    Bad("half of a gif.gif", _half(encoded(_noise(4), "GIF")), TRUNCATED),
    Bad("half of a bmp.bmp", _half(encoded(_noise(5), "BMP")), TRUNCATED),
    Bad("half of an avif.avif", _half(encoded(_noise(11), "AVIF")), TRUNCATED),
    Bad("half of a tif.tif", _half(encoded(_noise(6), "TIFF")), TRUNCATED),
    Bad("head of a png.png", encoded(_noise(7))[:33], UNDECODABLE),
    Bad("head of a jpg.jpg", encoded(_noise(8), "JPEG")[:100], TRUNCATED),
    Bad("start of a jpg.jpg", b"\xff\xd8", UNDECODABLE),
    Bad("start of a gif.gif", b"GIF89a", UNDECODABLE),
    Bad("start of a webp.webp", b"RIFF\x10\0\0\0WEBP", UNDECODABLE),
    Bad("flipped.png", _flipped_bit(encoded(_noise(9))), UNDECODABLE),
    Bad("bomb.png", png_that_claims(60_000, 60_000), UNDECODABLE),
    Bad("nothing.png", png_that_claims(0, 8), UNDECODABLE),
    Bad("missing-data.png", encoded(_noise(10))[:41] + encoded(_noise(10))[-12:], UNDECODABLE),
    Bad("float.tif", encoded(Image.new("F", (60, 60), 0.5), "TIFF"), UNDECODABLE),
    Bad("lost-tail.jpg", _big_tail_lost(), TRUNCATED, ("lost-tail.png", "lost-tail.txt")),
    Bad("cut-number.bmp", b"BM" + struct.pack("<I", 70) + bytes(20), UNDECODABLE),
]
BAD_CAPTIONS = [
    Bad("latin.txt", "caf\xe9 am See".encode("latin-1"), BAD_CAPTION, ("latin.txt",)),
    Bad("wide.txt", "two bytes each".encode("utf-16"), BAD_CAPTION, ("wide.txt",)),
    Bad("wide-no-mark.txt", "two bytes each".encode("utf-16-le"), BAD_CAPTION, ("wide-no-mark.txt",)),
    Bad("zero.txt", b"a\0b\0\0\0c", BAD_CAPTION),
    Bad("huge.txt", b"word " * 20_000, BAD_CAPTION),
    Bad("a folder.txt", _folder, BAD_CAPTION),
    Bad("pointless.json", b'{"focus": [0.5, 7]}', (("error", "bad sidecar"),)),
    Bad("no json.json", b'{"focus": [0.5', (("error", "bad sidecar"),)),
    Bad("orphan.caption", b"belongs to nobody", (("warning", "orphan caption"),)),
]
POOR_IMAGES = [
    Bad("0001.png", encoded(drawing(30)), (("error", "no caption"),), ("0001.png",), caption=None),
    Bad("named cup.png", encoded(drawing(31)), (NO_FILE,), ("named cup.png",), caption=None),
    Bad(
        "silent.png", encoded(drawing(32)), (("warning", "empty caption"),), ("silent.png", "silent.txt"), ""
    ),
    Bad(
        "wordy.png",
        encoded(drawing(33)),
        (("warning", "long caption"),),
        ("wordy.png", "wordy.txt"),
        "a very long tale of a cup and a plate " * 9,
    ),
    Bad("tiny.png", encoded(drawing(34, 14, 14)), (("warning", "tiny"),), ("tiny.png", "tiny.txt")),
    Bad("small.png", encoded(drawing(35, 26, 26)), (("warning", "upscaled"),), ("small.png", "small.txt")),
    Bad("strip.png", encoded(drawing(36, 480, 60)), (("warning", "aspect"),), ("strip.png", "strip.txt")),
    Bad(
        "view.png",
        encoded(drawing(37, 300, 90)),
        (("warning", "cropped"),),
        ("view.png", "view.txt"),
    ),
    Bad(
        "soft.png",
        encoded(
            _noise(38, 8).resize((400, 400), Image.Resampling.NEAREST).filter(ImageFilter.GaussianBlur(24))
        ),
        (("warning", "blurred"),),
        ("soft.png", "soft.txt"),
    ),
    Bad("z copy.png", encoded(drawing(0)), (("warning", "duplicate"),)),
    Bad(
        "near copy.jpg",
        encoded(drawing(39, 96, 80), "JPEG", quality=90),
        (("warning", "near duplicate"),),
        ("near copy.jpg", "near copy.txt"),
    ),
    Bad("near original.png", encoded(drawing(39, 96, 80)), (), ("near original.png", "near original.txt")),
    Bad(
        "glass.png",
        encoded(Image.effect_noise((50, 50), 90).convert("RGBA").point(lambda value: value // 2)),
        (("note", "transparent"),),
        ("glass.png", "glass.txt"),
    ),
    Bad("moving.gif", animation(), (("note", "animated"),), ("moving.png", "moving.txt")),
    Bad("turned.jpg", _oriented(40, 6), (), ("turned.jpg", "turned.txt")),
    Bad("mirrored.jpg", _oriented(41, 2), (), ("mirrored.jpg", "mirrored.txt")),
    Bad("print.jpg", encoded(drawing(42).convert("CMYK"), "JPEG"), (), ("print.jpg", "print.txt")),
    Bad("deep.png", encoded(Image.radial_gradient("L").convert("I;16")), (), ("deep.png", "deep.txt")),
]
ONLY_LINUX = [
    Bad("gone.png", _link, (("note", "remark"),)),
    Bad("pipe.png", _pipe, UNREADABLE),
    Bad("caf\\udce9.png", _misnamed, UNREADABLE, caption=None),
]
CASES = [
    *BROKEN_IMAGES,
    *BAD_CAPTIONS,
    *POOR_IMAGES,
    *(ONLY_LINUX if sys.platform == "linux" else []),
]


def make_torture_folder(root: Path) -> Path:
    """Write all cases, a good image, and a pair that clashes."""
    put(root / "a good one.png", drawing(0))
    put(root / "a good one.txt", "good")
    put(root / "twin.png", drawing(50))
    put(root / "twin.jpg", encoded(drawing(51), "JPEG"))
    put(root / "twin.txt", "a twin")
    for number, case in enumerate(CASES):
        file = root / case.name
        if callable(case.content):
            case.content(file)
        else:
            put(file, case.content)
        if file.suffix in (".txt", ".caption", ".json"):
            if file.suffix != ".caption" and file.is_file():
                put(file.with_suffix(".png"), drawing(100 + number))
            if file.suffix == ".json":
                put(file.with_suffix(".txt"), f"thing {number}")
        elif case.caption is not None:
            put(file.with_suffix(".txt"), f"thing {number}" if case.caption == "own" else case.caption)
    return root


def main() -> None:
    """Make the folder, check and mend it, and print the outcome of each file."""
    from sdlora.data.check.doctor import examine
    from sdlora.data.check.repair import repair

    with tempfile.TemporaryDirectory() as scratch:
        folder, copy = make_torture_folder(Path(scratch) / "images"), Path(scratch) / "mended"
        findings = examine(folder, resolution=48, multiple=16).findings
        changes = {change.name: change for change in repair(folder, copy)}
    print(f"{len(CASES)} files\n\n| file | the check says | in a repaired copy |\n|---|---|---|")
    for case in CASES:
        verdicts = "; ".join(
            f"{finding.severity}: {finding.kind}: {finding.what}"
            for finding in findings
            if finding.where == case.name
        )
        change = changes.get(case.name)
        mended = "as it is" if change is None else f"{change.what} ({change.written or 'not there'})"
        row = (case.name, verdicts or "nothing: it is read rightly", mended)
        print(f"| {' | '.join(part.replace('|', '/') for part in row)} |")


if __name__ == "__main__":
    main()
