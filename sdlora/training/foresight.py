"""What a run would take on a card that need not be here: the rungs of the memory ladder, phase by phase."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config.defaults import DataFacts, OpenSettings, fill_data, fill_training
from ..config.schema import Config
from ..data.batching.prepare import base_facts
from ..families.attention import Attention, Attentions
from ..families.compute import Compute
from ..families.table import FAMILIES
from ..number_formats import dtype_of
from .ladder import Climbed, climb
from .optimizers import optimizer_kind
from .planning import META, Planner, make_base

USUAL_IMAGES = 20
"""Images that are reckoned with where no folder is given."""
_CARD = torch.device("cuda")


def foresee(config: Config, budget: int | None, images: tuple[int, int] | None = None) -> Climbed:
    """Return the rungs that a run on a card with so much free memory would take.

    Args:
        config: settings; open ones are decided as for a card that computes in bf16.
        budget: bytes that are free; None for any number.
        images: how many are learned from, and how many held out; None for a folder that is not known.

    Raises:
        ModelError: for a base that cannot be used.
        ConfigError: for settings that contradict it.
    """
    fixed = {"training.device": "cuda", "training.precision": config.training.precision or "bf16"}
    config = config.with_values(fixed)
    precision = config.training.precision
    assert precision is not None
    attention = Attention("sdpa", "planned")
    compute = Compute(_CARD, dtype_of(precision), Attentions(attention, attention))
    blueprint = make_base(config, compute, META)
    open_settings = OpenSettings(config, replace(base_facts(blueprint, "cuda")))
    open_settings.take_recommended()
    fill_data(open_settings, sum(images) if images else USUAL_IMAGES)
    held = max(1, USUAL_IMAGES // 10) if open_settings.config.data.validation else 0
    learned, held = images or (USUAL_IMAGES - held, held)
    facts = DataFacts(learned, learned, held, ("a prompt",) * 4)
    fill_training(open_settings, facts, optimizer_kind(config.optimizer).rate)
    planner = Planner(compute, blueprint, config, free=budget or 1)
    return climb(open_settings.final(), budget, planner)


def is_family(base: str) -> bool:
    """Tell whether a base is named by its family only, of which nothing can be trained."""
    return base in FAMILIES
