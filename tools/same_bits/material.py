"""What the cases work on: eight of the sample icons in several forms, bases, a LoCon with Tucker factors."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

_ICONS = ("basketball", "bee", "candle", "cheese", "cherries", "chili-pepper", "christmas-tree", "church")
_OTHERS = ("cocktail", "cookie", "crab", "dog")


def lay_out(checkout: Path, python: Path, folder: Path) -> dict[str, Path]:
    """Write all material below ``folder``; return the places by the names the cases use.

    Args:
        checkout: has the icons and the built-in base.
        python: interpreter with diffusers.
        folder: where to.
    """
    icons = checkout / "datasets" / "ink-icons"
    names = ("data", "other", "mixed", "masks", "worded", "mini")
    places = {name: folder / name for name in names}
    for place in places.values():
        place.mkdir(parents=True)
    for name, ours in (("data", _ICONS), ("other", _OTHERS)):
        for icon in ours:
            for ending in (".png", ".txt"):
                shutil.copy2(icons / f"{icon}{ending}", places[name])
    _mixed(icons, places["mixed"])
    _masks(places["masks"])
    _worded(icons, places["worded"])
    _base(checkout, places["mini"])
    places |= {"sdxl": folder / "sdxl", "sd2": folder / "sd2"}
    script = Path(__file__).with_name("narrow_bases.py")
    subprocess.run(
        [python, script, places["mini"] / "tokenizer", places["sdxl"], places["sd2"]],
        check=True,
        capture_output=True,
    )
    places["tucker"] = folder / "tucker.safetensors"
    _tucker(places["tucker"])
    return places


def _mixed(icons: Path, folder: Path) -> None:
    """Write wide, tall and square images, some of them transparent, one with no caption."""
    shapes = ((256, 160), (160, 256), (256, 256), (200, 128))
    for number, icon in enumerate(_ICONS):
        width, height = shapes[number % len(shapes)]
        with Image.open(icons / f"{icon}.png") as image:
            cut = image.convert("RGBA").crop((0, 0, width, height))
        if number % 2:
            ramp = np.linspace(0, 255, width).astype(np.uint8)
            cut.putalpha(Image.fromarray(np.tile(ramp, (height, 1))))
        cut.save(folder / f"{icon}.png")
        if number:
            shutil.copy2(icons / f"{icon}.txt", folder)


def _masks(folder: Path) -> None:
    for number, icon in enumerate(_ICONS):
        mask = np.zeros((256, 256), np.uint8)
        mask[16 * number :, 32:224] = 255 - 20 * number
        Image.fromarray(mask).save(folder / f"{icon}.png")


def _worded(icons: Path, folder: Path) -> None:
    """Write captions that vary: many tags, alternatives, brackets, several lines."""
    for number, icon in enumerate(_ICONS):
        shutil.copy2(icons / f"{icon}.png", folder)
        words = f"inkicon, a {{black|dark}} {icon}, (thick lines:1.3), [grey], white ground, no {number}"
        (folder / f"{icon}.txt").write_text(f"{words}\ninkicon, an icon of a {icon}\n", encoding="utf-8")


def _base(checkout: Path, folder: Path) -> None:
    """Copy the built-in base as a diffusers folder, wherever the checkout keeps it."""
    weights = "mini/unet/diffusion_pytorch_model.safetensors"
    file = next(place for place in sorted(checkout.glob(f"sdlora/**/{weights}")))
    shutil.copytree(file.parent.parent, folder, dirs_exist_ok=True)


def _tucker(file: Path) -> None:
    """Write a LoCon with Tucker factors as LyCORIS writes it, for one linear layer and two convolutions."""
    random = np.random.Generator(np.random.PCG64(11))
    tensors: dict[str, np.ndarray] = {}
    rank = 2
    for module, channels in (("mid_block_resnets_0_conv1", 192), ("down_blocks_0_resnets_0_conv2", 64)):
        prefix = f"lora_unet_{module}"
        tensors[f"{prefix}.lora_down.weight"] = 0.05 * random.standard_normal((rank, channels, 1, 1))
        tensors[f"{prefix}.lora_mid.weight"] = 0.5 * random.standard_normal((rank, rank, 3, 3))
        tensors[f"{prefix}.lora_up.weight"] = 0.5 * random.standard_normal((channels, rank, 1, 1))
        tensors[f"{prefix}.alpha"] = np.array(1.5)
    prefix = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{prefix}.lora_down.weight"] = 0.05 * random.standard_normal((rank, 64))
    tensors[f"{prefix}.lora_up.weight"] = 0.5 * random.standard_normal((64, rank))
    tensors[f"{prefix}.alpha"] = np.array(1.0)
    header: dict[str, object] = {
        "__metadata__": {"ss_base_model_version": "sd_v1", "ss_network_dim": str(rank)}
    }
    data = b""
    for name, values in tensors.items():
        piece = values.astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": offsets}
        data += piece
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    file.write_bytes(struct.pack("<Q", len(words)) + words + data)
