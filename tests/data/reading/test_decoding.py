"""Images come in through one door: decoders on a list, bounded pixels, metadata that may be broken."""

from __future__ import annotations

import ast
import io
import struct
import threading
import zlib
from pathlib import Path

import pytest
from drawings import drawing, encoded, png_that_claims, put
from patience import PATIENCE
from PIL import Image

import sdlora
from sdlora.data.check.salvage import mend
from sdlora.data.reading import image_files
from sdlora.data.reading.decoding import ImageFileError, PixelBudget, decoded_image, opened_image
from sdlora.data.reading.folder import survey
from sdlora.data.reading.image_files import load_pixels, load_small
from sdlora.errors import DatasetError
from sdlora.generation.png_info import read_parameters

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\n%%EOF\n"
PNG = encoded(drawing(1))


def chunk(kind: bytes, body: bytes, *, good: bool = True) -> bytes:
    check = zlib.crc32(kind + body) ^ (0 if good else 1)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def with_chunk(part: bytes, data: bytes = PNG) -> bytes:
    """Return a PNG with one more chunk before its pixels."""
    at = data.index(b"IDAT") - 4
    return data[:at] + part + data[at:]


BOMB = zlib.compress(bytes(80 * 2**20))
BROKEN_METADATA = {
    "text of 80 MiB": chunk(b"zTXt", b"Comment\0\0" + BOMB),
    "international text of 80 MiB": chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB),
    "profile of 80 MiB": chunk(b"iCCP", b"profile\0\0" + BOMB),
    "bad checksum of a text": chunk(b"tEXt", b"Comment\0hello", good=False),
    "bad checksum of a profile": chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"x"), good=False),
    "camera data that are none": chunk(b"eXIf", b"not a TIFF header at all"),
    "text that does not unpack": chunk(b"zTXt", b"Comment\0\0 not zlib"),
    "profile that does not unpack": chunk(b"iCCP", b"profile\0\0 not zlib"),
}


def test_no_image_is_opened_elsewhere() -> None:
    """Pillow's ``Image.open`` stands in one module; salvage needs it for files cut short, with formats."""
    package = Path(sdlora.__file__).parent
    calls = []
    for root in (package, package.parent / "ui"):
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                    assert any(keyword.arg == "formats" for keyword in node.keywords), path
                    calls.append(path.name)
    assert sorted(calls) == ["decoding.py", "salvage.py"]


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.eps"])
def test_a_file_that_would_start_a_program_is_no_image(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("os.system", started)
    file = put(tmp_path / name, EPS)
    for read in (load_pixels, load_small, read_parameters, lambda path: mend(path.read_bytes(), path.name)):
        arguments = (file, 64) if read is load_small else (file,)
        with pytest.raises(Exception, match="is not an image of a known format"):
            read(*arguments)  # type: ignore[operator]


@pytest.mark.parametrize("case", BROKEN_METADATA)
def test_pixels_count_and_broken_metadata_is_left_out(tmp_path: Path, case: str) -> None:
    file = put(tmp_path / "a.png", with_chunk(BROKEN_METADATA[case]))
    assert load_pixels(file).tobytes() == drawing(1).tobytes()
    (item,) = (result := survey(tmp_path, trigger_word="t")).dataset.items
    assert result.problems == ()
    if "does not unpack" not in case:  # Pillow passes these over by itself
        assert item.traits == ("damaged metadata",)
        assert any("damaged metadata" in note for note in result.dataset.notes)


def test_broken_metadata_is_mended_away(tmp_path: Path) -> None:
    mended = mend(with_chunk(BROKEN_METADATA["bad checksum of a text"]), "a.png")
    assert mended.done == ("without its damaged metadata",)
    with decoded_image(mended.data, "a.png") as loaded:
        assert not loaded.damaged_metadata and loaded.image.tobytes() == drawing(1).tobytes()


def test_junk_camera_data_in_webp_is_left_out(tmp_path: Path) -> None:
    data = encoded(drawing(2), "WEBP", lossless=True, exif=b"Exif\0\0 no TIFF header")
    file = put(tmp_path / "a.webp", data)
    assert load_pixels(file).tobytes() == drawing(2).tobytes()
    with opened_image(file) as loaded:
        assert loaded.damaged_metadata


def test_a_good_image_says_nothing_of_damage(tmp_path: Path) -> None:
    for name, data in (("a.png", PNG), ("b.png", with_chunk(chunk(b"tEXt", b"parameters\0a cat")))):
        with decoded_image(data, name) as loaded:
            assert not loaded.damaged_metadata and not loaded.turned


def test_an_image_of_a_palette_that_it_has_not_is_a_problem_of_its_folder(tmp_path: Path) -> None:
    """Found by tools/fuzz_texts: Pillow asserts that there is one."""
    data = encoded(drawing(1).convert("P"), "PNG")
    start = data.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    file = put(tmp_path / "a.png", data[:start] + data[end:])
    put(tmp_path / "b.png", PNG)
    with pytest.raises(DatasetError, match="has lost its palette"):
        load_pixels(file)
    result = survey(tmp_path, trigger_word="t")
    assert [problem.what for problem in result.problems] == [
        "has lost its palette, so its colours are unknown"
    ]
    assert [item.name for item in result.dataset.items] == ["b.png"]


def test_pixels_are_bounded_before_they_are_decoded(tmp_path: Path) -> None:
    file = put(tmp_path / "bomb.png", png_that_claims(60_000, 60_000))
    message = r"bomb\.png: has more than 89 million pixels; save it smaller"
    with pytest.raises(ImageFileError, match=message), opened_image(file):
        pass


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16", "CMYK"])
def test_bands_give_the_same_pixels_as_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = drawing(3, 61, 47)
    if mode == "I;16":
        odd = Image.frombytes("I;16", image.size, bytes(range(256)) * 22 + bytes(61 * 47 * 2 - 256 * 22))
    elif mode in ("RGBA", "LA"):
        alpha = Image.linear_gradient("L").resize(image.size)
        alpha.paste(255, (0, 0, 61, 20))
        odd = image.convert(mode)
        odd.putalpha(alpha)
    else:
        odd = image.convert(mode)
    whole = image_files.to_rgb(odd.copy(), "#204080")
    monkeypatch.setattr(image_files, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(image_files, "BAND_PIXELS", 61 * 5)
    bands = image_files.to_rgb(odd.copy(), "#204080")
    assert bands[0].tobytes() == whole[0].tobytes() and bands[1] == whole[1]


@pytest.mark.parametrize(("mode", "format"), [("RGB", "JPEG"), ("RGBA", "PNG"), ("L", "PNG")])
def test_a_small_view_looks_like_the_image(tmp_path: Path, mode: str, format: str) -> None:
    image = drawing(4, 900, 700).convert(mode)
    file = put(tmp_path / "a.img", encoded(image, format))
    small = load_small(file, 90)
    assert small.size == (90, 70) and small.mode == "RGB"
    exact = load_pixels(file)
    exact.thumbnail((90, 90))
    difference = [abs(a - b) for a, b in zip(small.tobytes(), exact.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK"])
def test_bands_are_reduced_to_the_same_pixels_as_the_whole(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = drawing(4, 61, 47)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    whole = (image.convert("L") if mode == "1" else image).reduce(4)
    monkeypatch.setattr(image_files, "BAND_PIXELS", 61 * 10)
    bands = image_files.reduced(image, 4)
    assert (bands.mode, bands.size) == (whole.mode, whole.size) == (bands.mode, (16, 12))
    assert bands.tobytes() == whole.tobytes()


def test_the_budget_lets_no_more_pixels_in_than_fit() -> None:
    budget, inside, most, lock = PixelBudget(100), [0], [0], threading.Lock()

    def work(pixels: int) -> None:
        with budget.taking(pixels):
            with lock:
                inside[0] += min(pixels, 100)
                most[0] = max(most[0], inside[0])
            with lock:
                inside[0] -= min(pixels, 100)

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in (60, 50, 40, 1000, 30) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert 0 < most[0] <= 100


@pytest.mark.parametrize(("call", "copies"), [("load_pixels(path)", 3.2), ("load_small(path, 256)", 1.6)])
def test_a_large_transparent_image_is_read_in_little_memory(tmp_path: Path, call: str, copies: float) -> None:
    """The peak of a 4,000 x 4,400 image with alpha stays below so many copies of four bytes a pixel."""
    resource = pytest.importorskip("resource", reason="memory is measured with getrusage")
    image = Image.new("RGBA", (4000, 4400), (10, 200, 30, 128))
    file = put(tmp_path / "large.png", encoded(image))
    del image
    import subprocess
    import sys

    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from sdlora.data.reading.image_files import load_pixels, load_small\n"
        "path, before = Path(sys.argv[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"{call}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    assert resource is not None
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < copies * 4 * 4000 * 4400


def test_png_settings_are_read_from_memory_only(tmp_path: Path) -> None:
    data = with_chunk(chunk(b"tEXt", b"parameters\0a cat\nSteps: 20, Sampler: Euler, Seed: 1"))
    assert read_parameters(put(tmp_path / "a.png", data))["Prompt"] == "a cat"
    assert io.BytesIO(data).read(4) == b"\x89PNG"
