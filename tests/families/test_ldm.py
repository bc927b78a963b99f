"""Names of the original checkpoints' modules are those that diffusers' own converter knows."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from sdlora.families.ldm import UNET_PREFIX, to_ldm, unet_blocks
from sdlora.families.table import FAMILIES, family_info
from sdlora.files import ASSETS


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_module_of_a_unet_has_the_name_that_diffusers_converts_to_it(family: str) -> None:
    file = ASSETS / family_info(family).assets / "unet" / "config.json"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(file.read_text(encoding="utf-8")))
    levels = [name for name, block in unet.up_blocks.named_children() if hasattr(block, "attentions")]
    blocks = unet_blocks(levels=len(unet.up_blocks), attending=[int(name) for name in levels])
    original: dict[str, str] = {}
    for key in unet.state_dict():
        path, _, part = key.rpartition(".")
        name = to_ldm(path, blocks)
        assert name is not None, path
        original[f"{UNET_PREFIX}{name}.{part}"] = key
    assert len(original) == len(unet.state_dict()) > 600
    assert {key: name for name, key in original.items()} == {
        value: f"{UNET_PREFIX}{key}" for key, value in _stored(original, unet).items()
    }


def _stored(original: dict[str, str], unet: UNet2DConditionModel) -> dict[str, str]:
    """Return what diffusers' converter makes of the names: the original's, without prefix -> its key."""
    converted = convert_ldm_unet_checkpoint({name: name for name in original}, unet.config)
    return {name.removeprefix(UNET_PREFIX): key for key, name in converted.items()}
