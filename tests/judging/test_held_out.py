"""What is said of held-out losses: how sure means are, where images are noised, pairs instead of totals."""

from __future__ import annotations

import numpy as np
import pytest

from sdlora.judging.held_out import Measured, bands, difference, places
from sdlora.judging.intervals import estimate


@pytest.mark.parametrize("count", [2, 5, 12, 40])
def test_the_interval_holds_the_true_mean_nine_times_of_ten(count: int) -> None:
    draw = np.random.default_rng(count)
    estimates = [estimate(draw.normal(3.0, 2.0, count).tolist()) for _ in range(4000)]
    inside = [known is not None and known.low <= 3.0 <= known.high for known in estimates]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.015)  # three standard errors of this mean


def test_one_value_says_nothing_of_others() -> None:
    assert estimate([1.0]) is None and estimate([]) is None


@pytest.mark.parametrize(("images", "draws"), [(1, 16), (2, 3), (5, 4), (8, 1), (37, 2)])
def test_each_part_of_the_range_is_seen_by_each_image_and_all_places_together_leave_no_gap(
    images: int, draws: int
) -> None:
    all_places = [places(image, draws) for image in range(images)]
    for row in all_places:
        assert [int(place * draws) for place in row] == list(range(draws))
    within = np.sort([row[0] * draws for row in all_places])
    gaps = np.diff([*within, within[0] + 1.0])
    assert gaps.max() <= 2.62 / images or images == 1  # random places: about log(images) / images


def test_pairs_see_what_totals_cannot() -> None:
    draw = np.random.default_rng(1)
    hard = draw.uniform(0.05, 0.5, (6, 1))  # how hard an image is differs far more than two steps do
    base = hard + draw.normal(0, 0.002, (6, 4))
    better = base - 0.01 + draw.normal(0, 0.002, (6, 4))
    rows = [tuple(map(tuple, table.tolist())) for table in (better, base)]
    paired = difference(*rows)
    total = estimate(better.mean(1).tolist())
    assert paired is not None and total is not None
    assert paired.high < 0 and paired.mean == pytest.approx((better - base).mean())
    assert (total.high - total.low) > 20 * (paired.high - paired.low)


def test_bands_divide_the_draws_and_the_best_step_is_the_lowest_mean() -> None:
    base = ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 6.0))
    losses = ((1.0, 2.0, 3.0, 3.0), (1.0, 1.0, 3.0, 4.0))
    parts = bands(losses, base)
    assert [(part.start, part.end) for part in parts] == [(0, 0.25), (0.25, 0.5), (0.5, 1)]
    assert [part.loss for part in parts] == [1.0, 1.5, 3.25]
    assert [part.against_base.mean for part in parts if part.against_base] == [0.0, -0.5, -0.75]
    known = Measured(base)
    for step, rows in ((0, base), (10, losses), (20, base)):
        known.add(step, rows)
    assert (known.best_step, known.best) == (10, losses)
