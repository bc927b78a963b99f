"""All mutants."""

from __future__ import annotations

from . import adapters, images, training
from .mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*training.MUTANTS, *images.MUTANTS, *adapters.MUTANTS)
