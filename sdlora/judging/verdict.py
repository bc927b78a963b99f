"""Which step and strength of an adapter is best: style against the training images times subject kept.

A panel of prompts is drawn by the base alone and by each candidate, with the same seeds. A candidate's score
is how far its images went towards the training images' look (:mod:`sdlora.judging.score`), times how much of
the base's own drawing of the same prompt and seed is left (:mod:`sdlora.judging.structure`): style alone
grows with strength until the subject is gone, and the subject alone is best where nothing was learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..events import Estimate
from .copying import likeness
from .score import MIN_IMAGES, StyleRuler
from .structure import pair_likeness, structure_likeness
from .style_features import Array

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAWS = 400
_MOST_SIDE = 256  # px at which images are judged
_LEAST_COPY = 0.85  # likeness to a training image below which nothing is called a copy
_COPIED = 0.25  # share of copies from which on it is told
_DRIFT = 0.5  # of the way to the style, without the trigger word, from which on it is told


@dataclass(frozen=True)
class Cell:
    """One candidate: an adapter at a strength.

    Attributes:
        source: what the adapter is called, e.g. ``step 200``.
        step: optimizer steps it learned for; None where that is not known.
        strength: at which it was drawn.
        style: share of the way from the base's look (0) to that of the training images (1).
        kept: 1 the base's own drawings of these prompts, 0 drawings as unlike as those of other prompts; None
            where it cannot be judged.
        score: style times what is kept, with its 90 % interval over the prompts.
        drift: share of the way to the style that prompts without the trigger word went; None without such.
        draws: (draws,) the score for each resampling of the prompts, the same for all cells.
    """

    source: str
    step: int | None
    strength: float
    style: Estimate
    kept: Estimate | None
    score: Estimate
    drift: float | None
    draws: Array = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.source} at strength {self.strength:g}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the draws as JSON values."""

        def plain(value: Estimate | None) -> dict[str, float] | None:
            if value is None:
                return None
            return {name: round(getattr(value, name), 4) for name in ("mean", "low", "high")}

        return {
            "source": self.source,
            "step": self.step,
            "strength": self.strength,
            "score": plain(self.score),
            "style": plain(self.style),
            "subject_kept": plain(self.kept),
            "drift_without_trigger": None if self.drift is None else round(self.drift, 4),
        }


class PanelJudge:
    """Judges sets of images of one panel of prompts.

    Args:
        base: the base's own images of the panel, at least :data:`MIN_IMAGES`.
        training: training images, best through the base's autoencoder, as many at least.
        held_out: images of the style that were not trained on; for telling copies from mere likeness.
        plain_base: the base's own images of prompts without the trigger word; may be empty.
        judges_subject: whether the prompts differ, so that one can tell whether a subject was kept.

    Raises:
        SdloraError: if there are too few images, or the base draws the style already.
    """

    def __init__(
        self,
        base: Sequence[Image],
        training: Sequence[Image],
        held_out: Sequence[Image] = (),
        plain_base: Sequence[Image] = (),
        *,
        judges_subject: bool = True,
    ) -> None:
        self._base, self._training = _small(base), _small(training)
        self._held_out, self._plain_base = _small(held_out), _small(plain_base)
        self._ruler = StyleRuler(self._base, self._training)
        self._base_rows = self._ruler.features(self._base)
        count = len(self._base)
        generator = np.random.default_rng(0)
        self._weights = generator.multinomial(count, np.full(count, 1 / count), _DRAWS).astype(float)
        self._weights = self._weights[(self._weights > 0).sum(1) > 1]  # a single prompt has no spread
        self._chance = 0.0
        self.judges_subject = judges_subject
        if judges_subject:
            among = structure_likeness(self._base, self._base)
            self._chance = float(among[~np.eye(count, dtype=bool)].mean())

    def cell(
        self,
        source: str,
        step: int | None,
        strength: float,
        images: Sequence[Image],
        plain: Sequence[Image] = (),
    ) -> Cell:
        """Return what a candidate's images of the panel say.

        Args:
            source: what the adapter is called.
            step: optimizer steps it learned for.
            strength: at which it was drawn.
            images: of the panel, in its order.
            plain: of the prompts without the trigger word, in the order of ``plain_base``.
        """
        images = _small(images)
        rows = self._ruler.features(images)
        style_draws = _way(self._ruler.resampled(rows, self._base_rows, self._weights))
        style, kept = float(_way(np.array(self._ruler.of_features(rows)))), None
        draws, score = style_draws.clip(0, 1), min(1.0, max(0.0, style))
        if self.judges_subject:
            alike = (pair_likeness(images, self._base) - self._chance) / (1 - self._chance)
            kept_draws = self._weights @ alike / self._weights.sum(1)
            kept = _estimate(float(alike.mean()), kept_draws)
            draws, score = draws * kept_draws.clip(0, 1), score * min(1.0, max(0.0, kept.mean))
        return Cell(
            source=source,
            step=step,
            strength=strength,
            style=_estimate(style, style_draws),
            kept=kept,
            score=_estimate(score, draws),
            drift=self._drift(_small(plain)),
            draws=draws,
        )

    def copies(self, images: Sequence[Image]) -> float:
        """Return the share of images that come nearer to a training image than the style explains.

        What different images of this style have in common is measured on held-out images, or, where there are
        fewer than four, on the training images among themselves.
        """
        known = self._training
        if len(self._held_out) >= MIN_IMAGES:
            usual = likeness(self._held_out, known).max(1)
        else:
            among = likeness(known, known)
            np.fill_diagonal(among, -1.0)
            usual = among.max(1)
        limit = max(_LEAST_COPY, float(np.percentile(usual, 95)))
        return float((likeness(_small(images), known).max(1) > limit).mean())

    def _drift(self, plain: Sequence[Image]) -> float | None:
        if not plain or len(plain) != len(self._plain_base):
            return None
        now, before = self._ruler.features(plain), self._ruler.features(self._plain_base)
        way = self._ruler.features(self._training).mean(0) - self._base_rows.mean(0)
        # how far these images went along the way that the style lies in
        return float(((now - before).mean(0) @ way) / max(float(way @ way), 1e-12))


@dataclass(frozen=True)
class Verdict:
    """What all cells together say.

    Attributes:
        cells: in the order they were judged.
        best: the cell with the highest score; the last step's, if the interval does not tell them apart.
        runner_up: the best one of another adapter (of another strength, if there is one adapter only).
        surely: whether the best is above the runner-up by the paired interval.
        rising: whether the last step is the best and above the one before the last by the interval.
        strength: the recommended one for the best adapter: the top of a parabola through its best strength
            and its neighbours.
        notes: warnings, and what cannot be judged.
        learned: the last step's weights as learned, if the best cell is their average.
    """

    cells: tuple[Cell, ...]
    best: Cell
    runner_up: Cell | None
    surely: bool
    rising: bool
    strength: float
    notes: tuple[str, ...] = ()
    learned: Cell | None = None

    def beside(self, learned: Cell) -> Verdict:
        """Return the same with the weights as learned, drawn like the best cell, which is their average."""
        above = is_better(learned, self.best)
        word = "surely above" if above else "not surely above"
        note = (
            f"the weights as learned have the score {_span(learned.score)}, {word} their average's "
            f"{_span(self.best.score)}: the {'weights as learned are' if above else 'average is'} the adapter"
        )
        return replace(self, learned=learned, notes=(*self.notes, note))

    @property
    def takes_learned(self) -> bool:
        """Whether the weights as learned are surely better than the average that was judged."""
        return self.learned is not None and is_better(self.learned, self.best)

    @property
    def reason(self) -> str:
        """Why, in one line."""
        best = self.best
        kept = "" if best.kept is None else f", subject kept {best.kept.mean:.2f}"
        text = f"score {_span(best.score)}: style {best.style.mean:.2f}{kept}"
        if self.runner_up is None:
            return text
        word = "surely above" if self.surely else "not to be told from"
        return f"{text}; {word} the runner-up, {self.runner_up.name} ({_span(self.runner_up.score)})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "best": self.best.to_dict(),
            "recommended_strength": self.strength,
            "runner_up": self.runner_up and self.runner_up.to_dict(),
            "surely_better_than_runner_up": self.surely,
            "more_steps_would_help": self.rising,
            "reason": self.reason,
            "notes": list(self.notes),
            "as_learned": self.learned and self.learned.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
        }


def choose(cells: Sequence[Cell], notes: Sequence[str] = ()) -> Verdict:
    """Return which of the cells is best, and how sure that is.

    Of a run's steps, an earlier one is chosen only if it is surely better than the last: the highest of many
    scores that cannot be told apart is highest by chance.

    Args:
        cells: one or more.
        notes: what cannot be judged.
    """
    best = max(cells, key=lambda cell: (cell.score.mean, -(cell.step or 0), -cell.strength))
    steps = best_by_step(cells)
    if len({cell.source for cell in steps}) == len(steps) > 1 and not is_better(best, steps[-1]):
        best = steps[-1]  # the end of the run, unless something is surely better
    others = [cell for cell in cells if cell.source != best.source] or [c for c in cells if c is not best]
    runner_up = max(others, key=lambda cell: cell.score.mean, default=None)
    told = list(notes)
    if best.drift is not None and best.drift > _DRIFT:
        told.append(
            f"without the trigger word images went {best.drift:.0%} of the way to the style: the base's own "
            "look is not kept; prior preservation, fewer steps or a lower strength help"
        )
    return Verdict(
        cells=tuple(cells),
        best=best,
        runner_up=runner_up,
        surely=runner_up is not None and is_better(best, runner_up),
        rising=_rising(cells, best),
        strength=_strength([cell for cell in cells if cell.source == best.source], best),
        notes=tuple(told),
    )


def choose_strength(judge: PanelJudge, images: Mapping[float, Sequence[Image]]) -> Verdict:
    """Return which strength of one adapter is best: the one rule of training, demo and benchmark.

    Args:
        judge: of the panel that was drawn.
        images: strength above 0 -> the panel's images, in its order.
    """
    return choose([judge.cell("the adapter", None, value, drawn) for value, drawn in images.items()])


def copy_note(share: float) -> str | None:
    """Return a warning if that share of the best cell's images repeats training images."""
    if share < _COPIED:
        return None
    return (
        f"{share:.0%} of the best cell's images come nearer to a training image than the style explains: "
        "look whether they are copies; fewer steps, a lower rank or more images help"
    )


def is_better(cell: Cell, other: Cell) -> bool:
    """Return whether the paired 90 % interval of the difference in score lies above 0."""
    return bool(np.percentile(cell.draws - other.draws, 5) > 0)


def best_by_step(cells: Sequence[Cell]) -> list[Cell]:
    """Return the best cell of each step, by step."""
    steps = sorted({cell.step for cell in cells if cell.step is not None})
    return [
        max((cell for cell in cells if cell.step == step), key=lambda cell: cell.score.mean) for step in steps
    ]


def without_gain(cells: Sequence[Cell]) -> int:
    """Return how many judged steps at the end were not surely better than the best one before them."""
    tops = best_by_step(cells)
    if not tops:
        return 0
    leader, count = tops[0], 0
    for top in tops[1:]:
        if is_better(top, leader):
            leader, count = top, 0
        else:
            count += 1
    return count


def _rising(cells: Sequence[Cell], best: Cell) -> bool:
    tops = best_by_step(cells)
    return len(tops) > 1 and best.step == tops[-1].step and is_better(tops[-1], tops[-2])


def _strength(cells: Sequence[Cell], best: Cell) -> float:
    """Return the top of the parabola through the best strength and its neighbours, to 0.05."""
    row = sorted(cells, key=lambda cell: cell.strength)
    at = row.index(best)
    if not 0 < at < len(row) - 1:
        return best.strength
    (a, fa), (b, fb), (c, fc) = ((cell.strength, cell.score.mean) for cell in row[at - 1 : at + 2])
    left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
    curve = (right - left) / (c - a)
    if curve >= 0:
        return best.strength
    top = (a + b) / 2 - left / (2 * curve)  # where the derivative of Newton's form is 0
    return round(20 * min(c, max(a, top))) / 20


def _way(score: Array) -> Array:
    """Return the share of the way gone for style scores: the distance grows with the square of the way.

    A set of which a share p is in the style has the score 1 - (1 - p)^2, and gets p. Without this, half and
    half would count almost as much as the whole.
    """
    way: Array = 1 - np.sqrt(np.maximum(1 - score, 0))
    return way


def _span(value: Estimate) -> str:
    return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


def _estimate(value: float, draws: Array) -> Estimate:
    low, high = np.percentile(draws, [5, 95])
    return Estimate(value, float(low), float(high))


def _small(images: Sequence[Image]) -> list[Image]:
    small = []
    for image in images:
        copy = image.convert("RGB")
        copy.thumbnail((_MOST_SIDE, _MOST_SIDE))
        small.append(copy)
    return small
