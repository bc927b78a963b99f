"""One optimizer step, to be read from top to bottom.

For each micro-batch compute the loss and gather its gradients in fp32; then clip and step. A loss or a
gradient that is not finite never reaches the weights: it ends the run, or with a scaler the step is left out.
On a CPU that is known before the step is made. A card is not waited for: there it is decided on the card,
and what the step did is read afterwards (:mod:`.reports`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import TrainingError
from ..events import Notice
from ..run_folder import list_checkpoints
from .inputs import Ready
from .masters import clip_, shorten_
from .objective import loss_of
from .relief import remedy_of
from .reports import MicroReport, OpenStep, StepReport, total_of
from .schedules import schedule_factor
from .shown_weights import publish
from .state import Run

_MOST_SKIPPED = 16  # in a row: by then the scaler's 2^16 is halved down to 1, which is no scaling at all


def train_step(run: Run) -> tuple[float, float, float, int]:
    """Make one step and wait for it; return (mean loss, gradient norm, learning rate, images seen)."""
    launch_step(run)
    report = list(finished_steps(run, everything=True))[-1]
    return report.loss, report.norm, report.rate, report.images


def launch_step(run: Run) -> OpenStep:
    """Make one step, or on a card: give the card everything that it consists of.

    Raises:
        TrainingError: for a loss or a gradient that is not finite, if that is known already.
    """
    rates = rates_at(run, run.step)
    for options, rate in zip(run.optimizer.param_groups, rates, strict=True):
        options["lr"] = rate
    if run.step >= math.ceil(run.config.optimizer.text_encoder_until * run.steps):
        run.trainable.freeze_text(run.model)
    if run.scaler.is_enabled():
        # torch makes a scaler's scale at its first use: a rank without images in this step needs one, too
        run.scaler.scale(torch.zeros((), device=run.model.facts.device))
    names = (group.name for group in run.groups)
    step = OpenStep(run.step + 1, dict(zip(names, rates, strict=True)))
    rounds, rates_there = _gathered(run, step)
    if run.reports.deferred:
        _apply_on_device(run, step, rates_there)
    else:
        norm = _apply(run, step.names)
        step.done = _report(step, *total_of(rounds), norm)
    run.step += 1
    run.reports.add(step)
    return step


def _gathered(run: Run, step: OpenStep) -> tuple[list[list[tuple[float, int]]], Tensor | None]:
    """Add up the gradients of a step's micro-batches in the masters.

    Where the device lacks memory, or our kernels fail, nothing was applied yet: the same micro-batches are
    computed again, in another way (:mod:`.relief`).

    Returns:
        (sum, number) of the finite losses by round and process, and the rates, if they came with a batch.
    """
    while True:
        overflowed = run.overflowed.copy()
        try:
            return _rounds(run, step)
        except Exception as error:
            remedy = remedy_of(run, error)
            if remedy is None:
                raise
        # the error is gone by now, and with it the tensors that its frames held
        step.micro, step.images, run.overflowed = [], 0, overflowed
        remedy()


def _rounds(run: Run, step: OpenStep) -> tuple[list[list[tuple[float, int]]], Tensor | None]:
    rounds, rates_there = [], None
    batches = run.loader.step(run.step)
    for _ in range(run.order.rounds(run.step)):  # in each round all processes add their gradients
        ready = next(batches, None)
        share, there = (0.0, 0), None
        if ready is None:
            step.micro.append(None)
        else:
            share, there = _backward(run, ready, step)
        rates_there = rates_there if there is None else there
        seen = 0 if ready is None else len(ready.batch.names)
        told = run.processes.exchange((*share, seen), at_once=True)
        rounds.append([(loss, good) for loss, good, _ in told])
        step.images += sum(images for _, _, images in told)
        for group in run.groups:
            group.master.collect(run.processes.add_in_order)
    return rounds, rates_there


def rates_at(run: Run, step: int) -> list[float]:
    """Return the learning rate of each group at a step, numbered from 0."""
    factor = schedule_factor(run.config.optimizer, step, run.steps)
    return [group.learning_rate * factor for group in run.groups]


def finished_steps(run: Run, *, everything: bool = False) -> Iterator[StepReport]:
    """Yield what steps did that is not known yet, in their order: what has arrived, or all.

    Raises:
        TrainingError: for a loss or a gradient of a step that was not finite.
    """
    for step in run.reports.ready(everything=everything):
        report = step.done or _read(run, step)
        yield replace(report, seconds=step.seconds, waiting_share=step.waiting_share)


def _backward(run: Run, ready: Ready, step: OpenStep) -> tuple[tuple[float, int], Tensor | None]:
    """Compute the gradients of a micro-batch; return (sum of its finite losses, their number), if it is
    known, and the rates of the step, if they came with the batch."""
    batch, split = ready.batch, run.splitter
    predict = split.predict_with_gradients if split else None
    run.leave_out_parts(batch)
    received = ready.received()
    if received is None:
        weighted, plain = loss_of(run.model, batch, run.config, predict)
    else:
        weighted, plain = loss_of(run.model, batch, run.config, predict, received[0])
    # The number of images of a full step, also in a short step: so each image weighs the same in an epoch.
    run.backward(run.scaler.scale(weighted.sum() / run.images_per_step))
    micro = MicroReport(batch.names, weighted.detach(), plain)
    step.micro.append(micro)
    if run.reports.deferred:
        return (0.0, 0), None if received is None else received[1]
    # read in one piece, and once all is on its way: reading waits for a card
    objectives, plain = torch.stack([micro.objectives, micro.losses]).cpu()
    return _finite_sum(run, run.step, batch.names, objectives.tolist(), plain), None


def _finite_sum(
    run: Run, step: int, names: Sequence[str], objectives: Sequence[float], losses: Tensor
) -> tuple[float, int]:
    """Return sum and number of the losses whose objective is finite; refuse the others.

    Raises:
        TrainingError: see :func:`_note_non_finite`.
    """
    good = [math.isfinite(value) for value in objectives]
    if all(good):
        return float(losses.sum()), len(good)
    _note_non_finite(run, step, [name for name, fine in zip(names, good, strict=True) if not fine])
    return sum(loss for loss, fine in zip(losses.tolist(), good, strict=True) if fine), sum(good)


def _apply(run: Run, names: Sequence[str]) -> float:
    """Clip and step with the gradients gathered so far; return their norm."""
    run.scaler.unscale_(run.optimizer)
    norm = clip_(run.groups, run.config.optimizer.max_grad_norm)
    if not math.isfinite(norm):
        _note_overflow(run, run.step, names, run.scaler.get_scale())
    _count_step(run, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    _publish(run)
    return norm


def _apply_on_device(run: Run, step: OpenStep, rates: Tensor | None) -> None:
    """Clip and step without looking; the device itself leaves the step out if a number is not finite.

    Args:
        run: its optimizer heeds ``found_inf``, as those of torch do that step in one kernel.
        step: gets what was found.
        rates: (G,) by group, on the device; None to take them from the host.
    """
    scaler, optimizer = run.scaler, run.optimizer
    scaler.unscale_(optimizer)
    norm = shorten_(run.groups, run.config.optimizer.max_grad_norm)
    scale = scaler.scale(torch.ones_like(norm)) if scaler.is_enabled() else None
    known = [options["lr"] for options in optimizer.param_groups]
    if rates is not None:
        for options, rate in zip(optimizer.param_groups, rates.unbind(), strict=True):
            options["lr"] = rate
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = run.reports.send(step, norm, scale)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        for options, rate in zip(optimizer.param_groups, known, strict=True):
            options["lr"] = rate  # a checkpoint holds plain numbers
    if scaler.is_enabled():
        scaler.update()
    _publish(run)


def _publish(run: Run) -> None:
    if (longest := run.config.optimizer.max_update_norm) is not None:
        run.trainable.limit(longest)
    publish(run.groups)
    run.shown.step_done()


def _count_step(run: Run, norm: float) -> None:
    run.learned = run.learned or (math.isfinite(norm) and norm > 0)
    run.skipped = run.skipped + 1 if not math.isfinite(norm) else 0


def _read(run: Run, step: OpenStep) -> StepReport:
    """Read what a step did, and see to what was not finite; all processes do so for the same step."""
    numbers = step.read()
    shares: list[tuple[float, int]] = []
    for micro, values in zip(step.micro, numbers.micro, strict=True):
        if micro is None or values is None:
            shares.append((0.0, 0))
            continue
        shares.append(_finite_sum(run, step.step - 1, micro.names, values[0], torch.tensor(values[1])))
    every = run.processes.exchange(shares, at_once=True)
    total, finite = total_of(zip(*every, strict=True))
    if not math.isfinite(numbers.norm):
        _note_overflow(run, step.step - 1, step.names, numbers.scale)
    _count_step(run, numbers.norm)
    return _report(step, total, finite, numbers.norm)


def _report(step: OpenStep, total: float, finite: int, norm: float) -> StepReport:
    mean = total / finite if finite else math.nan
    rate = next(iter(step.rates.values()))
    return StepReport(mean, norm, rate, step.images, step.step, step.rates)


def _note_non_finite(run: Run, step: int, names: Sequence[str]) -> None:
    """Refuse a loss that is not finite; in fp16 only if it happens again for the same image.

    Overflows are what a scaler is for: by itself it leaves the step out and scales down.
    """
    run.overflowed.update(names)
    again = [name for name in names if run.overflowed[name] > 1]
    if not run.scaler.is_enabled():
        raise TrainingError(_not_finite(run, "the loss", step, names))
    if again:
        raise TrainingError(_not_finite(run, "the loss, once more,", step, again))


def _note_overflow(run: Run, step: int, names: Sequence[str], scale: float | None) -> None:
    """Refuse a gradient that is not finite; in fp16 only if it stays so at every scale.

    Args:
        run: its ``skipped`` are the steps before this one.
        step: numbered from 0.
        names: of its images.
        scale: that its losses were multiplied by.
    """
    if scale is not None and run.scaler.is_enabled() and run.skipped < _MOST_SKIPPED:
        scale *= run.scaler.get_backoff_factor()
        text = f"step {step + 1}: fp16 overflowed; the step is left out, and losses are scaled by {scale:g}"
        run.emit(Notice(text))
        return
    everywhere = [name for share in run.processes.exchange(list(names)) for name in share]
    what = f"the gradient, {run.skipped + 1} steps in a row," if run.skipped else "the gradient"
    raise TrainingError(_not_finite(run, what, step, everywhere))


def _not_finite(run: Run, what: str, step: int, names: Sequence[str]) -> str:
    saved = list_checkpoints(run.folder.checkpoints)
    kept = ""
    if saved:
        kept = f"; with adapter.from_file={saved[-1].adapter_file} it continues from step {saved[-1].step}"
    return (
        f"step {step + 1}: {what} is not a finite number for {', '.join(names)}; the adapter's weights were "
        "not touched. Look at these images, and start a new run in another --output with a lower "
        f"optimizer.learning_rate (now {run.config.optimizer.learning_rate:g}) or with "
        f"training.precision=bf16 or fp32 (now {run.config.training.precision}){kept}"
    )
