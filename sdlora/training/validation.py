"""Loss on held-out images, at noise and timesteps that are the same at every step, compared image by image.

At which noise, and what is made of the losses: :mod:`sdlora.judging.held_out`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.attach import adapters_disabled
from ..config.defaults import VALIDATION_SHARE, validation_draws
from ..data.batching.batches import generator_for
from ..diffusion.process import draw_noise, per_image_loss
from ..events import Validated, read_events
from ..families.base import Conditioning
from ..judging.held_out import Losses, Measured, bands, difference, mean_loss, places
from .memory import validation_rows

if TYPE_CHECKING:
    from .state import Run

_RANGE = 1000  # places that the timesteps are chosen from


def validate(run: Run, learned: float | None = None) -> float | None:
    """Measure the held-out images, emit what that says and return the mean; None if there are none.

    Args:
        run: its model holds the values to show.
        learned: the mean of the values as learned, where what is shown is an average of them.

    Raises:
        torch.OutOfMemoryError: in all processes, if one of them lacks memory.
    """
    if not run.validation.items:
        return None
    known = _measured_before(run) if run.measured is None else run.measured
    base = None
    if known is None:
        base = measure(run, base_alone=True)
        known = Measured(base)
    losses = measure(run)
    mean, images = mean_loss(losses), [statistics.fmean(row) for row in losses]
    run.emit(
        Validated(
            step=run.step,
            loss=mean,
            num_images=len(losses),
            standard_error=statistics.stdev(images) / math.sqrt(len(images)) if len(images) > 1 else None,
            learned_loss=learned,
            against_base=difference(losses, known.base),
            best_step=known.best_step,
            against_best=difference(losses, known.best) if known.best else None,
            bands=bands(losses, known.base),
            losses=losses,
            base_losses=base,
        )
    )
    known.add(run.step, losses)
    run.measured = known
    return mean


def measure(run: Run, *, base_alone: bool = False) -> Losses:
    """Return the losses with what the model holds now, each process measuring its share of the images.

    Args:
        run: with held-out images.
        base_alone: leave the adapter out.

    Raises:
        torch.OutOfMemoryError: in all processes, if one of them lacks memory.
    """
    if not run.validation.items:
        return ()
    shares = run.processes.together(lambda: json.dumps(_losses(run, base_alone=base_alone)).encode())
    pairs = sorted(pair for share in shares for pair in json.loads(share))
    return tuple(tuple(row) for _, row in pairs)


def draws_of(run: Run) -> int:
    """Return K: as many draws as a tenth of the training's time pays for, at least 1."""
    return max(1, math.floor(_paid_draws(run)))


def cost_notice(run: Run) -> str | None:
    """Return a notice if one draw an image costs more than is meant, as only a user's settings can."""
    if not run.validation.items or (paid := _paid_draws(run)) >= 1:
        return None
    return (
        f"validation: {len(run.validation.items)} held-out images every {_every(run)} steps take about "
        f"{VALIDATION_SHARE / paid:.0%} of the time of training; a larger training.validate_every, or fewer "
        "images, takes less"
    )


def _paid_draws(run: Run) -> float:
    return validation_draws(run.steps, run.images_per_step, _every(run), len(run.validation.items))


def _every(run: Run) -> int:
    return run.config.training.validate_every or run.steps


def _measured_before(run: Run) -> Measured | None:
    """Return what a run that continues had measured before this step, from its events; None if nothing."""

    def told() -> bytes:
        shape = [draws_of(run)] * len(run.validation.items)
        steps: dict[int, Losses] = {}
        base: Losses | None = None
        for event in read_events(run.folder.path):
            if event.get("event") != Validated.__name__:
                continue
            base = _rows(event.get("base_losses"), shape) or base
            step, rows = event.get("step"), _rows(event.get("losses"), shape)
            if isinstance(step, int) and step < run.step and rows:
                steps[step] = rows
        return json.dumps([base, sorted(steps.items())]).encode()

    base, steps = json.loads(run.processes.from_main(told))
    if base is None or run.step == 0:
        return None
    known = Measured(_rows(base, [len(row) for row in base]) or ())
    for step, rows in steps:
        known.add(step, tuple(map(tuple, rows)))
    return known


def _rows(value: Any, shape: Sequence[int]) -> Losses | None:
    """Return losses as an event tells them; None where they are of other images or draws, or damaged."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        return None
    rows = tuple(tuple(row) for row in value)
    numbers = all(type(number) in (int, float) for row in rows for number in row)
    return rows if numbers and [len(row) for row in rows] == list(shape) else None


@torch.no_grad()
def _losses(run: Run, *, base_alone: bool) -> list[tuple[int, list[float]]]:
    """Return the losses of the images of this process' share, each with its number."""
    adaptable = [run.model.components()[name] for name in run.model.info.components]
    for module in adaptable:
        module.eval()
    share = range(run.processes.rank, len(run.validation.items), run.processes.count)
    try:
        with adapters_disabled(run.model) if base_alone else nullcontext():
            return [(index, _losses_of_image(run, index)) for index in share]
    finally:
        for module in adaptable:
            module.train()


def _losses_of_image(run: Run, index: int) -> list[float]:
    model, item, draws = run.model, run.validation.items[index], draws_of(run)
    encoded = run.validation.image(index)
    chosen = [int(place * _RANGE) for place in places(index, draws)]
    timesteps = model.process.spread_timesteps(_RANGE)[chosen]
    clean = model.facts.latents.scaled(encoded.posterior.mean.float()).repeat(draws, 1, 1, 1)
    # the noise follows from the image's content, not from seed or step, so that losses are comparable
    noise = draw_noise(clean.shape, generator_for("validation", item.digest))
    corrupted = model.process.corrupt(clean, noise, timesteps)
    if run.validation.encode_captions:
        text = {name: tensor[None] for name, tensor in run.validation.caption(item.caption).items()}
    else:
        text = model.encode_text([run.validation.prompt(item.caption)])
    rows = validation_rows(run.config)
    output = torch.cat(
        [
            model.predict(noisy, times, _repeated(text, len(times)), [encoded.size] * len(times)).cpu()
            for noisy, times in zip(corrupted.noisy.split(rows), timesteps.split(rows), strict=True)
        ]
    )
    losses: list[float] = per_image_loss(output, corrupted.target, encoded.mask).tolist()
    return losses


def _repeated(text: Conditioning, count: int) -> Conditioning:
    return {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in text.items()}
