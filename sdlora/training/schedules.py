"""How the learning rate changes over a run: a warm-up, then one of a table of functions.

``docs/training.md`` shows them all; ``tools/draw_schedules.py`` draws that image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config.schema import OptimizerConfig
from ..errors import ConfigError

Course = Callable[[float, OptimizerConfig], float]
"""(share done of the steps after the warm-up, 0 to 1; settings) -> what the peak rate is multiplied by.

The settings hold the warm-up both ways: ``warmup_steps``, and ``warmup_share`` of all steps.
"""


def _constant(done: float, settings: OptimizerConfig) -> float:
    return 1.0


def _linear(done: float, settings: OptimizerConfig) -> float:
    """A straight line from 1 to 0."""
    return 1.0 - done


def _cosine(done: float, settings: OptimizerConfig) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _cosine_with_restarts(done: float, settings: OptimizerConfig) -> float:
    """Half cosines of equal length, each from 1 to 0 (Loshchilov and Hutter 2017, T_mult = 1)."""
    if done >= 1.0:
        return 0.0
    return _cosine(done * settings.schedule_cycles % 1.0, settings)


def _polynomial(done: float, settings: OptimizerConfig) -> float:
    """``(1 - done)^power``, as in the "poly" rule (Liu et al. 2015, ParseNet)."""
    return float((1.0 - done) ** settings.schedule_power)


def _rex(done: float, settings: OptimizerConfig) -> float:
    """``(1 - done) / (1/2 + (1 - done)/2)``: reflected exponential (Chen et al. 2021, section 3)."""
    return (1.0 - done) / (0.5 + 0.5 * (1.0 - done))


def _inverse_sqrt(done: float, settings: OptimizerConfig) -> float:
    """``sqrt(warm-up / step)`` (Vaswani et al. 2017, equation 3), 1 where the warm-up ends."""
    share = settings.warmup_share
    assert share, "an inverse square root needs a warm-up"
    return math.sqrt(share / (share + (1.0 - share) * done))


SCHEDULES: dict[str, Course] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "rex": _rex,
    "inverse_sqrt": _inverse_sqrt,
}
"""By the name in ``optimizer.schedule``; a new one is an entry here and its name in ``config/schema.py``."""


def schedule_factor(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Return what the peak learning rate is multiplied by at ``step`` (0-based) of ``steps``.

    The warm-up rises linearly, (step + 1) / (warm-up + 1), and never reaches 1 itself; the first step after
    it has the full rate. From there the schedule goes from 1 to ``schedule_floor``:
    floor + (1 - floor) * course.

    Raises:
        ConfigError: for a schedule that is not in the table.
    """
    course, warmup = SCHEDULES.get(settings.schedule or ""), settings.warmup(steps)
    if course is None:
        raise ConfigError(
            f"`optimizer.schedule={settings.schedule}`: no such schedule; use {', '.join(SCHEDULES)}"
        )
    if step < warmup:
        return (step + 1) / (warmup + 1)
    known = settings.model_copy(update={"warmup_steps": warmup, "warmup_share": warmup / max(1, steps)})
    floor = settings.schedule_floor
    # share done = (step - warmup) / (steps - warmup), 0 at the first step after the warm-up
    return floor + (1.0 - floor) * course((step - warmup) / max(1, steps - warmup), known)
