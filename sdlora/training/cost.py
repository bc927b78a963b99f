"""What a step costs; its time is measured on the real model with a real batch before the first step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..data.batching.batches import make_batch
from ..data.reading.items import Visit
from ..devices import is_out_of_memory
from ..errors import TrainingError
from .objective import loss_of

if TYPE_CHECKING:
    from .state import Run


@dataclass(frozen=True)
class Cost:
    """Time of one optimizer step and memory of the run."""

    seconds_per_step: float
    bytes: int


def measure_cost(run: Run) -> Cost:
    """Run the largest micro-batch forward and backward twice, and discard the gradients.

    The first pass warms up, the second is timed. The memory is that of the plan made before loading the base.

    Raises:
        TrainingError: if the device does not have enough memory.
    """
    settings = run.config.training
    micros = [micro for rank in run.order.step(run.step) for micro in rank if micro]
    visits = max(micros, key=lambda micro: len(micro))
    try:
        _pass(run, visits)
        # kernels run asynchronously: without waiting, the rest of the first pass would be timed as well
        _wait_for(run.model.facts.device)
        began = time.perf_counter()
        _pass(run, visits)
        _wait_for(run.model.facts.device)
        seconds = time.perf_counter() - began
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{run.model.facts.device}: not enough memory for training.batch_size={settings.batch_size} at "
            f"{run.config.data.resolution} px; use a smaller training.batch_size, "
            "training.gradient_checkpointing=true or a smaller data.resolution"
        ) from None
    return Cost(seconds * settings.gradient_accumulation, run.memory.peak)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _pass(run: Run, visits: tuple[Visit, ...]) -> None:
    batch = make_batch(run.training, run.model, visits, seed=0)
    splitter = run.splitter
    predict = splitter.predict_with_gradients if splitter else None
    loss, _ = loss_of(run.model, batch, run.config, predict)
    loss.sum().backward()
    if splitter:
        splitter.backward(run.parameters())
    for group in run.groups:
        group.master.collect()
        group.master.publish()
