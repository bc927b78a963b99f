"""Fast paths prove themselves before a run uses them: the first batch, by the reference and by the path.

Both start from the same values, and not from those of the run: its B are zero, which would hide every error
in the gradients of A. So the masters get random B for the time of the proof, and have their own bits back
afterwards. Compared are the loss and the gradient of every factor; how far two correct computations of one
number format may be apart is in :data:`BOUNDS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batching.batches import make_batch
from ..data.reading.items import Visit
from ..devices import is_out_of_memory
from ..events import Decided, Notice
from ..families.quantised import quantisation_of
from .objective import loss_of
from .shown_weights import putting_back

if TYPE_CHECKING:
    from .state import Run

BOUNDS = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Number format -> how far a gradient may be from the reference's, as a share of its length (Frobenius).

Rounding of whole networks, measured (tests/training/test_proof.py): float32 1e-5, bfloat16 up to 0.06 in the
layers farthest from the loss. Something wrong, such as a forgotten scale, is 0.5 and more.
"""
_LOSS_SHARE = 0.2
"""The loss may be off by this share of the bound: it is a mean, where single roundings even out."""
_UP_SIZE = 0.1
"""Of a layer's update in the proof, about, beside the layer's own output."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: the loss of each image, all gradients, one a group, and seconds."""

    losses: Tensor
    gradients: list[Tensor]
    seconds: float


@dataclass(frozen=True)
class Distance:
    """How far a pass is from the reference's: of the loss, and of the worst gradient, and whose that is.

    Attributes:
        fine: whether both are in bounds; what is not a number is not.
    """

    loss: float
    gradient: float
    worst: str
    fine: bool


def prove(run: Run, names: Sequence[str], visits: tuple[Visit, ...]) -> float:
    """Use the longest row of fast paths that agree with the reference; return seconds of a pass with them.

    What was found out is emitted. All processes use the same paths.
    """
    run.fast.take_out()
    with putting_back(run.groups):
        _randomise(run)
        reference = run_pass(run, visits)
        tried = tuple(names)
        while True:
            run.fast.use(tried)
            seconds, distance = reference.seconds, None
            if tried:
                try:
                    candidate = run_pass(run, visits)
                except Exception as error:  # compilers have classes of their own
                    if is_out_of_memory(error):
                        raise
                    distance = Distance(math.inf, math.inf, f"{type(error).__name__}: {error}", fine=False)
                    run.fast.forget()
                else:
                    seconds, distance = candidate.seconds, distance_of(run, reference, candidate)
            fine = distance is None or distance.fine
            if all(run.processes.exchange(fine)):
                break
            if not fine:
                assert distance is not None
                run.emit(Notice(_failed(tried, distance)))
            tried = tried[:-1]
    if names:
        denoiser = run.model.components()[run.model.info.denoiser.component]
        partly = "joint" in tried and quantisation_of(denoiser) is not None
        more = "; over a base in few bits `joint` takes together only what timesteps add" if partly else ""
        run.emit(Decided("training.fast", ", ".join(tried) or "off", _why(distance) + more))
    return seconds


def run_pass(run: Run, visits: tuple[Visit, ...]) -> Pass:
    """Make the loss and the gradients of a micro-batch, and leave none behind."""
    data = run.config.data
    batch = make_batch(
        run.training,
        run.model,
        visits,
        seed=run.config.training.seed,
        caption_dropout=data.caption_dropout,
        unmasked_weight=data.unmasked_weight,
    )
    _wait_for(run.model.facts.device)
    began = time.perf_counter()
    predict = run.splitter.predict_with_gradients if run.splitter else None
    run.leave_out_parts(batch)
    losses, _ = loss_of(run.model, batch, run.config, predict)
    # in fp16 small gradients would vanish
    run.backward(losses.mean() * (1024.0 if run.model.facts.dtype == torch.float16 else 1.0))
    _wait_for(run.model.facts.device)
    seconds = time.perf_counter() - began
    gradients = []
    for group in run.groups:
        group.master.collect()
        assert group.master.flat.grad is not None
        # in main memory: the next pass takes what a step takes, and there may be no more than that
        gradients.append(group.master.flat.grad.to("cpu", copy=True))
        group.master.publish()
    return Pass(losses.detach(), gradients, seconds)


@torch.no_grad()
def distance_of(run: Run, reference: Pass, candidate: Pass) -> Distance:
    """Compare two passes, each gradient with its own length, and with a hundredth of the usual one."""
    off: list[Tensor] = []
    lengths: list[Tensor] = []
    for group, wanted, given in zip(run.groups, reference.gradients, candidate.gradients, strict=True):
        lengths += torch._foreach_norm(group.master.shaped(wanted))
        off += torch._foreach_norm(group.master.shaped(given - wanted))
    length = torch.stack(lengths)
    shares = torch.stack(off) / (length + 0.01 * length.square().mean().sqrt() + 1e-30)
    loss = (candidate.losses.mean() / reference.losses.mean() - 1.0).abs()
    shares = torch.where(torch.isfinite(shares), shares, torch.inf)
    worst = int(shares.argmax())
    key, factor = [slot for group in run.groups for slot in group.slots][worst]
    bound = BOUNDS[run.model.facts.dtype]
    fine = bool(((shares <= bound).all() & (loss <= bound * _LOSS_SHARE)).cpu())
    return Distance(float(loss), float(shares[worst]), f"{key.path} {factor.removesuffix('.weight')}", fine)


def _randomise(run: Run) -> None:
    """Give the masters B that act: the same in every process, and whatever is drawn elsewhere."""
    generator = torch.Generator().manual_seed(17)
    scales = {layer.key: layer.update.scale for layer in run.trainable.layers}
    for group in run.groups:
        values = group.master.flat.data.cpu()
        for (key, factor), part in zip(group.slots, group.master.shaped(values), strict=True):
            if factor == "lora_up.weight":
                size = _UP_SIZE / (scales[key] * math.sqrt(part.shape[1]))
                part.add_(torch.randn(part.shape, generator=generator), alpha=size)
        group.master.load(values)


def _why(distance: Distance | None) -> str:
    if distance is None:
        return "no path agreed with the reference on the first batch"
    return (
        f"on the first batch the loss is {distance.loss:.1g} off the reference's, and no gradient more than "
        f"{distance.gradient:.2g} ({distance.worst})"
    )


def _failed(names: Sequence[str], distance: Distance) -> str:
    if names[-1] == "recompute":
        names = (*names[:-1], "recompute (whole blocks are computed again instead)")
    if math.isinf(distance.loss):
        return (
            f"fast paths {', '.join(names)}: failed on the first batch ({distance.worst[:200]}), so "
            f"{names[-1]} is not used in this run; please report this with the run's events.jsonl"
        )
    return (
        f"fast paths {', '.join(names)}: off the reference on the first batch (loss by {distance.loss:.2g}, "
        f"the gradient of {distance.worst} by {distance.gradient:.2g}), so {names[-1]} is not used in this "
        "run; please report this with the run's config.toml and events.jsonl"
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
