"""Settings in a PNG: what WebUI expects, and back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from sdlora import __version__
from sdlora.errors import OutputError, SdloraError
from sdlora.families.base import BaseModelInfo
from sdlora.generation.png_info import lora_tag, parameters_text, parse_parameters, read_parameters, save_png
from sdlora.generation.render import GenerateRequest

BASE = BaseModelInfo(source="mini", title="mini", weights=Path(__file__))
HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
REQUEST = GenerateRequest(
    "an icon of a cat, ink style",
    "blurry",
    height=64,
    width=96,
    steps=20,
    guidance=7.0,
    sampler="DPM++ 2M Karras",
    seed=1,
    strengths={"ink-icons": 0.8, "soft": {"unet": 1.0, "text_encoder": 0.5, "text_encoder_2": 0.5}},
)


def test_the_text_is_webuis() -> None:
    text = parameters_text(REQUEST, BASE, {"ink-icons": "aabbccddeeff0011", "soft": "112233445566ffff"})
    assert text == (
        "an icon of a cat, ink style <lora:ink-icons:0.8> <lora:soft:0.5:1>\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 96x64, "
        f"Model hash: {HASH}, Model: mini, "
        f'Lora hashes: "ink-icons: aabbccddeeff, soft: 112233445566", Version: sdlora {__version__}'
    )


def test_without_negative_prompt_and_adapters_their_fields_are_missing() -> None:
    plain = GenerateRequest("a cat", height=64, width=64, steps=4, guidance=1.5, sampler="ddim", seed=0)
    lines = parameters_text(plain).split("\n")
    assert lines[0] == "a cat"
    assert (
        lines[1]
        == f"Steps: 4, Sampler: DDIM, CFG scale: 1.5, Seed: 0, Size: 64x64, Version: sdlora {__version__}"
    )
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("strength", "tag"),
    [
        (1.0, "<lora:x:1>"),
        (-0.25, "<lora:x:-0.25>"),
        ({"unet": 0.6, "text_encoder": 0.6}, "<lora:x:0.6>"),
        ({"unet": 0.6}, "<lora:x:0:0.6>"),
        ({"unet": 0.6, "text_encoder": 0.2}, "<lora:x:0.2:0.6>"),
    ],
)
def test_tags_have_the_text_encoder_first(strength: float | dict[str, float], tag: str) -> None:
    assert lora_tag("x", strength) == tag


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a cat", "a dog"),
        ("a cat", ""),
        ("Steps: 3, not really", "low: quality, ugly"),
        ("two\nlines", "of\neach"),
        ("ein Kätzchen, 猫", "плохо"),
        ('quotes " and \\ backslashes', ""),
        ("", ""),
    ],
)
def test_an_image_gives_its_settings_back(tmp_path: Path, prompt: str, negative: str) -> None:
    request = GenerateRequest(
        prompt, negative, height=64, width=96, steps=9, guidance=3.5, sampler="Euler a", seed=2**32
    )
    image = Image.new("RGB", (96, 64), (10, 200, 30))
    odd = BaseModelInfo(source="x", title='my "best", v1: final', weights=Path(__file__))
    file = tmp_path / "new" / "one.png"
    save_png(image, file, parameters_text(request, odd))
    parameters = read_parameters(file)
    assert parameters == {
        "Prompt": prompt,
        "Negative prompt": negative,
        "Steps": "9",
        "Sampler": "Euler a",
        "Schedule type": "Automatic",
        "CFG scale": "3.5",
        "Seed": str(2**32),
        "Size": "96x64",
        "Model hash": HASH,
        "Model": 'my "best", v1: final',
        "Version": f"sdlora {__version__}",
    }
    with Image.open(file) as back:
        assert back.tobytes() == image.tobytes()


@pytest.mark.parametrize(("prompt", "chunk"), [("a cat", b"tEXtparameters"), ("猫", b"iTXtparameters")])
def test_the_chunk_is_the_one_webui_writes(tmp_path: Path, prompt: str, chunk: bytes) -> None:
    request = GenerateRequest(prompt, height=64, width=64, steps=9, guidance=3.5, sampler="DDIM", seed=0)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", parameters_text(request))
    data = (tmp_path / "a.png").read_bytes()
    assert chunk in data
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_text_that_webui_wrote_is_read() -> None:
    parameters = parse_parameters(
        "masterpiece, (cat:1.2) <lora:ink:0.7>\nNegative prompt: EasyNegative,\nbad hands\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, "
        'Model hash: 6ce0161689, Lora hashes: "ink: 0123abcd4567", TI hashes: "a: 1, b: 2", Version: v1.10.1'
    )
    assert parameters["Prompt"] == "masterpiece, (cat:1.2) <lora:ink:0.7>"
    assert parameters["Negative prompt"] == "EasyNegative,\nbad hands"
    assert parameters["Lora hashes"] == "ink: 0123abcd4567" and parameters["TI hashes"] == "a: 1, b: 2"
    assert parameters["Size"] == "512x768" and parameters["Version"] == "v1.10.1"


def test_a_text_without_settings_is_all_prompt() -> None:
    assert parse_parameters("a cat\non a mat, Size: 3") == {
        "Prompt": "a cat\non a mat, Size: 3",
        "Negative prompt": "",
    }


def test_files_that_hold_no_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for name, reason in (
        ("missing.png", "no such"),
        ("broken.png", "not an image"),
        ("plain.png", "no `param"),
    ):
        with pytest.raises(SdloraError, match=rf"{name}: .*{reason}"):
            read_parameters(tmp_path / name)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="a file stands where a folder is needed"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "file" / "a.png", "text")
