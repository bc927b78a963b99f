"""The settings of judging: which steps and strengths a run tries, to say which are best."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import NonNegative, Section

Strengths = Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1, max_length=9)]


class JudgeConfig(Section):
    """Images that a run draws of itself to find its best step and strength."""

    every: NonNegative | None = None
    """Steps between judged checkpoints; 0 switches judging off. An eighth of the run when left open; off in
    runs of fewer than 100 steps."""
    strengths: Strengths = (0.5, 0.75, 1.0, 1.25, 1.5)
    """Strengths that are drawn; fewer, around the middle one, where the time does not suffice for all."""
    images: Annotated[int, Field(ge=4, le=64)] = 8
    """Most images drawn at each strength, held-out captions first; fewer in runs too short for so many."""
    share: Annotated[float, Field(gt=0, le=1000)] = 0.15
    """Share of the training's time that judging may take, as measured; 1 is as long as training itself."""
    patience: NonNegative = 0
    """End the run when that many judged checkpoints in a row were not better than the best one before, by
    the interval; 0 trains all steps."""
