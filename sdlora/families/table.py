"""The table of model families."""

from __future__ import annotations

from .facts import FamilyInfo, component_order
from .latent_model import LatentModel
from .sd1 import StableDiffusion1
from .sd2 import StableDiffusion2
from .sdxl import StableDiffusionXL

FAMILIES: dict[str, type[LatentModel]] = {
    StableDiffusion1.info.name: StableDiffusion1,
    StableDiffusion2.info.name: StableDiffusion2,
    StableDiffusionXL.info.name: StableDiffusionXL,
}


def family_info(name: str) -> FamilyInfo:
    """Return the declared facts of a family (KeyError if unknown)."""
    return FAMILIES[name].info


def component_names() -> tuple[str, ...]:
    """Return the components that any family has, the denoisers first."""
    names = {name for family in FAMILIES.values() for name in family.info.components}
    return tuple(sorted(names, key=component_order))
