"""The table of model families."""

from __future__ import annotations

from .base import FamilyInfo
from .sd1 import StableDiffusion1
from .sd2 import StableDiffusion2
from .sdxl import StableDiffusionXL
from .unet_model import UNetModel

FAMILIES: dict[str, type[UNetModel]] = {
    StableDiffusion1.info.name: StableDiffusion1,
    StableDiffusion2.info.name: StableDiffusion2,
    StableDiffusionXL.info.name: StableDiffusionXL,
}


def family_info(name: str) -> FamilyInfo:
    """Return the declared facts of a family (KeyError if unknown)."""
    return FAMILIES[name].info
