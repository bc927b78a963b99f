"""Captions that vary: encoded before training, each variant once, or in the loop, whichever costs less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...config.data import EncodeWhen
from ...files import size_text
from ..reading.items import ImageItem, Visit
from ..reading.wording import Wording
from .order import Order

_MOST_BYTES = 1 << 30
"""The encoded captions of one run may take this much space on the disk."""
_MOST_VISITS = 2_000_000
"""Most visits whose captions are generated to count the different ones; 100,000 take a second or two."""


@dataclass(frozen=True)
class CaptionPlan:
    """When the captions of a run are encoded, and why.

    Attributes:
        when: ``before`` training or ``in loop``.
        texts: what is encoded before training, without the empty caption.
        reason: in words, with figures.
    """

    when: EncodeWhen
    texts: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class CaptionRun:
    """How the captions of a run reach the denoiser.

    Attributes:
        wording: what varies; None if nothing does.
        emphasis: whether brackets weight words; if not, they are ordinary characters.
        in_loop: whether captions are encoded at each visit and not kept.
        texts: what is encoded before training besides the plain captions.
    """

    wording: Wording | None = None
    emphasis: bool = False
    in_loop: bool = False
    texts: tuple[str, ...] = ()


def plan_captions(
    items: Sequence[ImageItem],
    wording: Wording,
    order: Order,
    steps: int,
    seed: int,
    bytes_each: int,
    asked: EncodeWhen | None,
) -> CaptionPlan:
    """Return how captions that vary are encoded in a run.

    Every caption of the run follows from the seed, so the different ones can be counted beforehand.
    Encoding them before training never means more work, as each is encoded once, and frees the text
    encoder; it is chosen while they fit into a gigabyte.

    Args:
        items: the images trained on.
        wording: what varies.
        order: which image is visited when.
        steps: optimizer steps of the run.
        seed: of the run.
        bytes_each: size of one encoded caption.
        asked: what the user wants, if anything.
    """
    most = max(1, _MOST_BYTES // bytes_each)
    plain = tuple(dict.fromkeys(wording.plain(item) for item in items))
    if asked == "in loop":
        return CaptionPlan("in loop", plain, "as asked for")
    if asked is None and steps * order.images_per_epoch > _MOST_VISITS * order.steps_per_epoch:
        reason = "there are too many visits to count their captions; the text encoder stays in memory"
        return CaptionPlan("in loop", plain, reason)
    texts = dict.fromkeys(plain)
    visits = 0
    for visit in _visits(order, steps):
        texts[wording.at(items[visit.index], visit, seed)] = None
        visits += 1
        if asked is None and len(texts) > most:
            reason = (
                f"more than {most} different captions ({size_text(_MOST_BYTES, 1)} encoded); each is encoded "
                "at its visit, and the text encoder stays in memory"
            )
            return CaptionPlan("in loop", plain, reason)
    reason = (
        f"{len(texts)} different captions in {visits} visits, {size_text(len(texts) * bytes_each, 1)} encoded"
    )
    return CaptionPlan("before", tuple(texts), reason)


def _visits(order: Order, steps: int) -> Iterator[Visit]:
    for step in range(steps):
        for rank in order.step(step):
            for micro_batch in rank:
                yield from micro_batch
