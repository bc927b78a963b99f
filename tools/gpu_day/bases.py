"""The bases of the day: of the true sizes with random weights, or narrow ones for a rehearsal."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPTokenizer

from sdlora.families.locating import ASSETS
from tools.same_bits import narrow_bases
from tools.true_sizes import write_checkpoint, write_folder


def write_narrow(folder: Path, family: str) -> None:
    """Write a diffusers folder of few channels."""
    narrow_bases.write_base(folder, family, CLIPTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer"))


def write_true(file: Path, family: str) -> int:
    """Write a checkpoint in one file, whole or not at all; return its bytes."""
    unfinished = file.with_suffix(".part")
    size = write_checkpoint(unfinished, family, torch.float16)
    unfinished.rename(file)
    return size


def write_true_folder(folder: Path, family: str) -> int:
    """Write the diffusers folder of the file of the same name, whole or not at all; return its bytes."""
    unfinished = folder.with_name(f"{folder.name}.part")
    size = write_folder(unfinished, folder.with_suffix(".safetensors"), family, torch.float16)
    unfinished.rename(folder)
    return size
