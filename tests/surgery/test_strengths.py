"""Which modules a block name covers."""

from __future__ import annotations

import pytest
from formats.adapters import EVERYTHING, SDXL, models_of, random_adapter

from sdlora.adapters.canonical import ModuleKey
from sdlora.errors import ConfigError
from sdlora.surgery.strengths import ModuleStrength, is_in_block, parse_blocks, webui_block


@pytest.mark.parametrize(
    ("component", "path", "block"),
    [
        ("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "IN04"),
        ("unet", "down_blocks.0.downsamplers.0.conv", "IN03"),
        ("unet", "mid_block.attentions.0.proj_in", "MID"),
        ("unet", "up_blocks.1.resnets.2.conv1", "OUT05"),
        ("unet", "conv_in", "IN00"),
        ("unet", "time_embedding.linear_1", None),
        ("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1", "BASE"),
    ],
)
def test_modules_have_the_block_numbers_of_webui(component: str, path: str, block: str | None) -> None:
    assert webui_block(ModuleKey(component, path)) == block


def test_every_layer_of_an_sdxl_unet_has_a_block_number() -> None:
    weights = random_adapter(models_of(SDXL), EVERYTHING)
    blocks = {webui_block(module) for module in weights.pairs}
    assert blocks == {"BASE", "MID", *(f"IN{i:02d}" for i in range(1, 9)), *(f"OUT{i:02d}" for i in range(9))}


def test_names_cover_whole_steps_of_a_path_only() -> None:
    module = ModuleKey("text_encoder", "text_model.encoder.layers.1.mlp.fc1")
    for name in ("text_encoder", "text_encoder.encoder.layers.1", "text_model.encoder.layers.1", "BASE"):
        assert is_in_block(module, name), name
    assert not is_in_block(
        ModuleKey("text_encoder", "text_model.encoder.layers.11.mlp.fc1"), "text_model.encoder.layers.1"
    )
    assert not is_in_block(ModuleKey("text_encoder_2", module.path), "text_encoder")


def test_the_longest_name_counts() -> None:
    strength = ModuleStrength({"unet": 2.0}, {"unet": 0.5, "up_blocks.1": 3.0})
    assert strength.of(ModuleKey("unet", "up_blocks.1.resnets.0.conv1")) == 6.0
    assert strength.of(ModuleKey("unet", "up_blocks.0.resnets.0.conv1")) == 1.0
    assert strength.of(ModuleKey("text_encoder", "text_model.encoder.layers.0.mlp.fc1")) == 0.0


def test_block_texts_are_for_all_adapters_or_one() -> None:
    assert parse_blocks(["IN04=0.5, up_blocks.1=-1", "2:MID=0"], 2) == [
        {"IN04": 0.5, "up_blocks.1": -1.0},
        {"IN04": 0.5, "up_blocks.1": -1.0, "MID": 0.0},
    ]


@pytest.mark.parametrize("text", ["IN04", "IN04=", "=1", "3:IN04=1", "x:IN04=1", "IN04=nan", "MID=1,MID=2"])
def test_texts_that_are_no_block_weights_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--block"):
        parse_blocks([text], 2)
