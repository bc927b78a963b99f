"""How sure a mean of few values is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..events import Estimate

# 95 % quantiles of Student's t for 1 to 30 degrees of freedom (Abramowitz and Stegun 1964, table 26.10)
_QUANTILES = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
    *(1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697),
)
_NORMAL = 1.6449


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of independent values with its 90 % interval (Student's t); None for fewer than two.

    The interval is that of another sample from where these came from, so the values must be independent:
    one an image, not one a timestep of an image.
    """
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = student_quantile(len(values) - 1) * error
    return Estimate(mean, mean - half, mean + half)


def student_quantile(degrees: int) -> float:
    """Return the 95 % quantile of Student's t, half of a 90 % interval, for 1 or more degrees of freedom."""
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    # beyond the table: the first term of the expansion in 1/degrees (26.7.5 there)
    return _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * degrees)
