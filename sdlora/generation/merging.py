"""Images drawn one after the other, with adapters merged into the base meanwhile where that is sooner.

Adapters cost time at every call of the denoiser, merging costs time once. On the mini base and one core
(Zen 4, its own time), an image of 8 steps takes 0.57 s with an adapter of rank 16 and 0.54 s without it,
merging and undoing 0.03 s. So adapters are merged where that is estimated to take less than 5 % of the time
that is left at their strengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch

from ..adapters.attach import updates_in
from ..adapters.canonical import ModuleKey, Update
from ..adapters.module_paths import base_parameter
from ..adapters.strength import Strength, strength_of
from ..errors import SdloraError
from .image_generator import ImageGenerator
from .render import GeneratedImage, GenerateRequest

SAVED = 0.05
"""Part of the drawing time that a merged adapter is taken to save."""

Estimate = Callable[[ImageGenerator, Mapping[str, Strength]], float]


def drawn_in_turn(
    generator: ImageGenerator,
    requests: Sequence[GenerateRequest],
    progress: Callable[[int, int], None] | None = None,
    *,
    estimate: Estimate | None = None,
) -> Generator[GeneratedImage, None, None]:
    """Yield the image of each request, in their order; whatever happens, every weight is put back.

    The images differ by rounding only from those of :meth:`ImageGenerator.generate`. So weights in bfloat16
    are left alone: of an update that is small beside its weight, their 8 bits keep too little.

    Args:
        generator: with the adapters that the requests name; nothing may be merged.
        requests: what to draw.
        progress: (images times calls done, all of them), after each call of the denoiser.
        estimate: seconds that merging at some strengths and undoing it takes; :func:`seconds_to_merge`.

    Raises:
        SdloraError: see :meth:`ImageGenerator.generate`.
    """
    estimate = estimate or seconds_to_merge
    total, done = sum(request.calls for request in requests), 0
    a_call: float | None = None  # seconds, of the image before
    merged: Mapping[str, Strength] | None = None
    tried: Mapping[str, Strength] | None = None
    try:
        for place, request in enumerate(requests):
            if merged is not None and dict(request.strengths) != merged:
                generator.unmerge()
                merged = None
            left = _calls_left(requests[place:])
            if merged is None and left > request.calls and a_call is not None and request.strengths != tried:
                tried = request.strengths
                if estimate(generator, tried) < SAVED * left * a_call and _merged(generator, tried):
                    merged = dict(tried)
            begun = time.monotonic()
            shifted = None if progress is None else _shifted(progress, done, total)
            generated = generator.generate([request], progress=shifted)[0]
            a_call = (time.monotonic() - begun) / request.calls
            done += request.calls
            yield generated
    finally:
        generator.unmerge()


def seconds_to_merge(generator: ImageGenerator, strengths: Mapping[str, Strength]) -> float:
    """Return about how long merging at these strengths and undoing it takes, from doing it beside one layer.

    Infinity where nothing is to be merged, or must not be: see :func:`drawn_in_turn`.
    """
    try:
        acting = [
            (base_parameter(generator.model, key), value, update)
            for key, value, update in _acting(generator, strengths)
        ]
    except (SdloraError, AttributeError):  # a quantised weight
        return float("inf")
    if not acting or any(weight.dtype == torch.bfloat16 for weight, _, _ in acting):
        return float("inf")
    acting.sort(key=lambda layer: layer[0].numel())
    weight, value, update = acting[len(acting) // 2]
    begun = time.monotonic()
    with torch.no_grad():
        kept = weight.detach().to("cpu", copy=True)
        original = weight.detach().float()
        changed = (original + value * update.delta(original)).to(weight.dtype)
        changed.copy_(kept)
        float(changed.flatten()[0])  # a card is done only when something of it is read
    share = sum(part.numel() for part, _, _ in acting) / max(1, weight.numel())
    return (time.monotonic() - begun) * max(share, len(acting))


def _acting(
    generator: ImageGenerator, strengths: Mapping[str, Strength]
) -> Iterator[tuple[ModuleKey, float, Update]]:
    for name, strength in strengths.items():
        for key, update in updates_in(generator.model, name):
            if (value := strength_of(strength, key.component)) != 0.0:
                yield key, value, update


def _merged(generator: ImageGenerator, strengths: Mapping[str, Strength]) -> bool:
    """Merge, and return whether that was possible; without the memory for it, images are drawn as before."""
    try:
        generator.merge(strengths)
    except (RuntimeError, MemoryError, SdloraError):
        return False
    return True


def _calls_left(requests: Sequence[GenerateRequest]) -> int:
    """Return the calls of the first request and of those right after it with equal strengths."""
    calls = 0
    for request in requests:
        if request.strengths != requests[0].strengths:
            break
        calls += request.calls
    return calls


def _shifted(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(before + done, total)
