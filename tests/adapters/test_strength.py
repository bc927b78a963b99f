"""How adapters and strengths are written on a command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdlora.adapters.strength import parse_adapter, strength_of
from sdlora.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir/a.safetensors:-1.5", "dir/a.safetensors", -1.5),
        ("a:.5", "a", 0.5),
        ("a:1e-1", "a", 0.1),
        ("my.lora:0", "my.lora", 0.0),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:0.8", r"C:\loras\x.safetensors", 0.8),
        ("D:/x.safetensors:1:0", "D:/x.safetensors", (1.0, 0.0)),
        ("a.safetensors:0.8:0.5", "a.safetensors", (0.8, 0.5)),
        ("  a b.safetensors:+2 ", "a b.safetensors", 2.0),
    ],
)
def test_adapter_specs(text: str, file: str, strength: float | tuple[float, float]) -> None:
    path, actual = parse_adapter(text)
    assert path == Path(file)
    if isinstance(strength, tuple):
        denoiser, encoder = strength
        for name, wanted in (("unet", denoiser), ("transformer", denoiser), ("text_encoder", encoder)):
            assert strength_of(actual, name) == wanted
        assert strength_of(actual, "text_encoder_2") == encoder
    else:
        assert actual == strength


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no file"),
        (":0.8", "names no file"),
        ("a.safetensors:", "`` is not a strength"),
        ("a.safetensors:strong", "`strong` is not a strength"),
        ("a.safetensors:0,8", "`0,8` is not a strength"),
        ("a.safetensors:nan", "`nan` is not a strength"),
        ("a.safetensors:1:2:3", "`1` is not a strength"),
    ],
)
def test_bad_adapter_specs_say_how_to_write_them(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_adapter(text)


def test_surgery_needs_no_model_library() -> None:
    """Importing peft and transformers took a fifth of the time of baking into an SDXL checkpoint."""
    code = (
        "import sys, sdlora.commands.surgery, sdlora.adapters.strength, sdlora.surgery.bake, "
        "sdlora.surgery.merge, sdlora.surgery.resize, sdlora.surgery.extract, sdlora.surgery.diff, "
        "sdlora.surgery.convert, sdlora.surgery.strengths; "
        "print({'peft', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
