"""Adapters named in prompts: found where they lie, acting as WebUI's do, and never words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from sdlora.adapters.attach import create_adapter
from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair
from sdlora.adapters.strength import by_role
from sdlora.config.schema import AdapterConfig
from sdlora.errors import ConfigError
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import write_adapter
from sdlora.generation.adapter_folders import find_adapter
from sdlora.generation.generate import generate
from sdlora.generation.lora_tags import read_tag, split_tags, take_tags
from sdlora.generation.png_info import read_parameters


@pytest.mark.parametrize(
    ("tag", "strength"),
    [
        ("<lora:ink>", 1.0),
        ("<lora:ink:0.8>", 0.8),
        ("<LORA:ink: -.5 >", -0.5),
        ("<lyco:ink:0.8>", 0.8),
        ("<lora:ink:0.6:0.8>", by_role(0.8, 0.6)),  # the text encoder's comes first
        ("<lora:ink:te=0.6:unet=0.8>", by_role(0.8, 0.6)),
        ("<lora:ink:0.5:unet=0.8>", by_role(0.8, 0.5)),
    ],
)
def test_a_tag_is_read_as_webui_reads_it(tag: str, strength: Any) -> None:
    read = read_tag(tag)
    assert read.name == "ink" and read.strength == strength


@pytest.mark.parametrize(
    "tag",
    ["<lora:>", "<lora: :1>", "<lora:ink:high>", "<lora:ink:1:1:1>", "<lora:ink:lbw=x>", "<lora:a:nan>"],
)
def test_a_tag_that_says_nothing_clear_is_an_error(tag: str) -> None:
    with pytest.raises(ConfigError, match=r"write <lora:NAME:0\.8>"):
        take_tags(f"a cat {tag}")
    with pytest.raises(ConfigError, match="only adapters"):
        take_tags("a cat <hypernet:x:1>")
    with pytest.raises(ConfigError, match="twice"):
        take_tags("<lora:x:1> a cat <lora:x:0.5>")


def test_what_stands_around_tags_stays() -> None:
    assert split_tags("a cat <lora:x:1>, sitting<lora:y:2>") == (
        "a cat, sitting",
        ["<lora:x:1>", "<lora:y:2>"],
    )
    for text in ("a < b > c", "<lora", "<loraX:1>", "  kept  "):
        assert split_tags(text) == (text, [])


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ink` and `clay`, which act on U-Net and text encoder."""
    folder = tmp_path_factory.mktemp("adapters")
    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    config = AdapterConfig(targets="all", rank=4, alpha=4.0, text_encoder=True)
    for seed, name in enumerate(("ink", "clay")):
        generator = torch.Generator().manual_seed(seed)
        fresh = create_adapter(model, config, seed)
        weights = {
            key: LowRankPair(pair.down, 0.3 * torch.randn(pair.up.shape, generator=generator), pair.alpha)
            for key, pair in fresh.items()
        }
        file = AdapterFile(AdapterWeights(weights), AdapterInfo(family="sd1", name=name))
        write_adapter(file, "webui", folder / f"{name}.safetensors", torch.float32, model.info)
    return folder


def drawn(tiny_base: Path, output: Path, prompts: list[str], **more: Any) -> list[Any]:
    options = {"adapters": [], "seed": 1, "steps": 3, "device": "cpu", "precision": "fp32", **more}
    result = generate(str(tiny_base), prompts=prompts, output=output, height=32, width=32, **options)
    return [numpy.asarray(Image.open(file)) for file in result.files]


def test_a_tag_draws_what_the_adapter_draws_at_that_strength(
    tiny_base: Path, adapters: Path, tmp_path: Path
) -> None:
    ink, clay = adapters / "ink.safetensors", adapters / "clay.safetensors"
    tagged = drawn(
        *(tiny_base, tmp_path / "tags"),
        ["a cat <lora:ink:0.2:0.7>", "a cat", "a <lora:clay:-0.5> cat <lora:ink>"],
        adapter_folders=[adapters],
    )
    expected = [
        *drawn(tiny_base, tmp_path / "1", ["a cat"], adapters=[(ink, by_role(0.7, 0.2))]),
        *drawn(tiny_base, tmp_path / "2", ["a cat"]),
        *drawn(tiny_base, tmp_path / "3", ["a cat"], adapters=[(ink, 1.0), (clay, -0.5)]),
    ]
    for mine, other in zip(tagged, expected, strict=True):
        assert numpy.abs(mine.astype(int) - other.astype(int)).max() <= 1
    assert numpy.abs(tagged[0].astype(int) - tagged[1].astype(int)).max() > 20
    # the text inside is what was asked for, and draws the same again
    first = sorted((tmp_path / "tags").glob("*.png"))[0]
    assert read_parameters(first)["Prompt"] == "a cat <lora:ink:0.2:0.7>"


def test_a_tag_sets_the_strength_of_an_adapter_that_was_given(
    tiny_base: Path, adapters: Path, tmp_path: Path
) -> None:
    given: list[Any] = [(adapters / "ink.safetensors", 1.0)]
    (tagged,) = drawn(tiny_base, tmp_path / "a", ["a cat <lora:ink:0.3>"], adapters=given)
    (expected,) = drawn(tiny_base, tmp_path / "b", ["a cat"], adapters=[(given[0][0], 0.3)])
    assert numpy.array_equal(tagged, expected)


def test_an_adapter_that_is_nowhere_is_an_error_that_says_where_it_looked(
    tiny_base: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError) as error:
        drawn(tiny_base, tmp_path / "out", ["a cat <lora:oil:0.8>"], adapter_folders=[adapters])
    assert f"<lora:oil>: there is no such adapter; looked in {adapters}, runs" in str(error.value)
    with pytest.raises(ConfigError, match="negative"):
        drawn(tiny_base, tmp_path / "out", ["a cat"], negative_prompt="bad <lora:ink:1>")
    assert not (tmp_path / "out").exists()


def test_adapters_are_found_in_runs_and_in_a_webui(tmp_path: Path) -> None:
    def empty(*parts: str) -> Path:
        file = tmp_path.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return file

    lora = empty("webui", "models", "Lora", "style", "Oil.safetensors")
    empty("webui", "models", "Stable-diffusion", "ink.safetensors")
    empty("runs", "first", "config.toml")
    ink = empty("runs", "first", "ink.safetensors")
    saved = empty("runs", "first", "checkpoints", "step-000050", "adapter.safetensors")
    copy = empty("runs", "exported", "ink.safetensors")
    folders = [tmp_path / "webui", tmp_path / "runs"]
    assert find_adapter("Oil", folders) == find_adapter("oil", folders) == lora
    assert find_adapter("first", folders) == ink
    assert find_adapter("first-step-000050", folders) == saved
    with pytest.warns(UserWarning, match="2 adapters have this name"):
        assert find_adapter("ink", folders) == copy  # of two as high, the first by name
    assert find_adapter("ink", [tmp_path / "runs" / "first"]) == ink
    with pytest.raises(ConfigError, match=r"adapter; looked in .*models.Lora, .*runs"):
        find_adapter("adapter", folders)
