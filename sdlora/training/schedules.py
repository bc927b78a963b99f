"""How the learning rate goes over a run: a warm-up, then one of a table of functions."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config.schema import OptimizerConfig
from ..errors import ConfigError

Course = Callable[[float, OptimizerConfig], float]
"""What the peak rate is multiplied by when a share (0 to 1) of the steps after the warm-up is done."""


def _constant(done: float, settings: OptimizerConfig) -> float:
    return 1.0


def _linear(done: float, settings: OptimizerConfig) -> float:
    return 1.0 - done


def _cosine(done: float, settings: OptimizerConfig) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


SCHEDULES: dict[str, Course] = {"cosine": _cosine, "linear": _linear, "constant": _constant}
"""By the name in ``optimizer.schedule``; a new one is an entry here and its name in ``config/schema.py``."""


def schedule_factor(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Return what the peak learning rate is multiplied by at ``step`` (0-based) of ``steps``.

    The warm-up rises in a line, (step + 1) / (warmup_steps + 1), and never reaches 1 by itself.

    Raises:
        ConfigError: for a schedule that there is not.
    """
    course, warmup = SCHEDULES.get(settings.schedule), settings.warmup_steps
    assert warmup is not None, "settings must be final"
    if course is None:
        raise ConfigError(
            f"`optimizer.schedule={settings.schedule}`: no such schedule; use {', '.join(SCHEDULES)}"
        )
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return course((step - warmup) / max(1, steps - warmup), settings)
