"""Whether the yardstick itself is right: sets of images whose order is known must come out in it.

The expectations name no style and hold for any: what is in the style scores high and what is in other
hands low, more true images score higher, copies are flagged, and mixed-up subjects are seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .compare import BASE, COPIES, Comparison
from .measure import Measured

if TYPE_CHECKING:
    from PIL.Image import Image

SHARES = (0.25, 0.5, 0.75)
NEAR, GAP = 0.2, 0.2
"""Other images of the style come this near to the ceiling, and other hands stay this far below those."""


@dataclass(frozen=True)
class Finding:
    """One expectation: what should be, what was found, and whether it holds."""

    expected: str
    result: str
    holds: bool


def findings(comparison: Comparison) -> Iterator[Finding]:
    """Yield every expectation about the yardstick of a style."""
    yardstick = comparison.yardstick
    base, copies = comparison.references[BASE][1], comparison.references[COPIES][1]
    ceiling = yardstick.ceiling()
    spread = f"true images have {ceiling.low:.2f}..{ceiling.high:.2f} against each other"
    yield Finding("the base is far enough from the style to measure it", spread, yardstick.measurable)
    if not yardstick.measurable:
        return
    yield Finding("the base has style 0", f"{base.style.value:.3f}", base.style.value == 0)
    yield Finding(
        "true images have style 1 against each other", f"{ceiling.value:.2f}", abs(ceiling.value - 1) < 0.1
    )
    style = copies.style.value
    yield Finding(
        f"other subjects of the style come within {NEAR} of 1", f"{style:.2f}", abs(1 - style) < NEAR
    )
    for name, (_, measured) in comparison.references.items():
        if name in (BASE, COPIES) or comparison.style.name in name:
            continue
        value = measured.style.value
        yield Finding(f"{name}: style below {style - GAP:.2f}", f"{value:.2f}", value < style - GAP)
    yield from _mixtures(comparison)
    yield from _copies(copies)
    yield from _subjects(comparison)


def _mixtures(comparison: Comparison) -> Iterator[Finding]:
    """More true images: more style, closer to the true ones, and only by as much as they are."""
    base, true = comparison.references[BASE][0], comparison.yardstick.true
    order = np.random.default_rng(0).permutation(len(true))
    values, near = [], []
    for share in SHARES:
        chosen = set(order[: round(share * len(true))].tolist())
        mixed = [true[i] if i in chosen else base[i] for i in range(len(true))]
        measured = comparison.yardstick.measure(mixed)
        values.append(measured.style.value)
        near.append(_value(measured, "likeness"))
    text = ", ".join(f"{value:.2f}" for value in values)
    rising = 0 < values[0] < values[1] < values[2] < 1.1
    yield Finding("style rises with 1/4, 1/2, 3/4 true images", text, rising)
    expected = [1 - (1 - share) ** 2 for share in SHARES]
    off = max(abs(value - wanted) for value, wanted in zip(values, expected, strict=True))
    yield Finding("... as 1 - (share of the base) squared, to 0.1", f"off by {off:.2f}", off < 0.1)
    text = ", ".join(f"{value:.2f}" for value in near)
    yield Finding("likeness to the true images rises with them", text, near[0] < near[1] < near[2])


def _copies(copies: Measured) -> Iterator[Finding]:
    copied = copies.figure("copied")
    assert copied is not None
    yield Finding(
        "copies of training images are flagged, all of them",
        f"{copied.value:.0%}",
        copies.flagged and copied.value == 1,
    )
    closer = copies.figure("closer")
    assert closer is not None
    yield Finding(
        "they are no closer to the true images than chance (50 %)",
        f"{closer.value:.0%} ({closer.low:.0%}..{closer.high:.0%})",
        closer.low - 0.05 < 0.5 < closer.high + 0.05,
    )


def _subjects(comparison: Comparison) -> Iterator[Finding]:
    """True images show their subjects, and shown under each other's names they do not."""
    true = comparison.true
    copied = _value(true, "copied")
    yield Finding("true images are not flagged as copies", f"{copied:.0%}", not true.flagged)
    shuffled: Sequence[Image] = [*comparison.yardstick.true[1:], comparison.yardstick.true[0]]
    swapped = comparison.yardstick.measure(shuffled)
    closer = swapped.figure("closer")
    assert closer is not None
    yield Finding(
        "true images under each other's names: style stays",
        f"{swapped.style.value:.2f}",
        abs(swapped.style.value - true.style.value) < 1e-9,
    )
    yield Finding("... closeness falls to chance", f"{closer.value:.0%}", abs(closer.value - 0.5) < 0.12)
    if "named" not in true.draws:
        return
    named, wrong = _value(true, "named"), _value(swapped, "named")
    yield Finding("the judge names true images", f"{named:.0%}", named > 0.7)
    yield Finding("... but not under each other's names", f"{wrong:.0%}", wrong < 0.1)


def _value(measured: Measured, name: str) -> float:
    figure = measured.figure(name)
    assert figure is not None
    return figure.value
