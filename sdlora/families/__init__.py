"""The table of model families."""

from __future__ import annotations

from .base import DiffusionModel, FamilyInfo
from .sd1 import StableDiffusion1

FAMILIES: dict[str, type[DiffusionModel]] = {
    StableDiffusion1.info.name: StableDiffusion1,
}


def family_info(name: str) -> FamilyInfo:
    """Return the declared facts of a family (KeyError if unknown)."""
    return FAMILIES[name].info
