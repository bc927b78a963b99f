"""What a step costs, measured on the real model with a real batch before the first step is made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .data.batches import generator_for, make_batch
from .data.order import Visit
from .errors import TrainingError
from .objective import loss_of

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class Cost:
    """Time of one optimizer step and memory of the run."""

    seconds_per_step: float
    bytes: int


def measure_cost(run: Run) -> Cost:
    """Run forward and backward of the largest micro-batch twice, and throw the gradients away.

    The first pass warms up and counts the bytes kept for the backward pass, the second is timed.

    Raises:
        TrainingError: if the device's memory does not suffice.
    """
    settings = run.config.training
    micros = [micro for rank in run.order.step(run.step) for micro in rank if micro]
    visits = max(micros, key=lambda micro: len(micro))
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            _pass(run, visits, split=False)  # the hooks hear only this thread
        began = time.perf_counter()
        _pass(run, visits, split=True)
        if run.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    except torch.OutOfMemoryError:
        raise TrainingError(
            f"{run.model.device}: not enough memory for training.batch_size={settings.batch_size} at "
            f"{run.config.data.resolution} px; use a smaller training.batch_size, "
            "training.gradient_checkpointing=true or a smaller data.resolution"
        ) from None
    weights = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in run.model.components().values()
        for tensor in module.parameters()
    }
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    # master, its gradient and two moments in fp32; the model's own copy and gradient
    per_value = 16 + 2 * run.model.dtype.itemsize
    adapter = sum(group.master.flat.numel() for group in run.groups) * per_value
    return Cost(seconds * settings.gradient_accumulation, sum(weights.values()) + adapter + activations)


def _pass(run: Run, visits: tuple[Visit, ...], *, split: bool) -> None:
    generator = generator_for("cost")
    batch = make_batch(run.training, run.model, visits, generator, seed=0)
    splitter = run.splitter if split else None
    predict = splitter.predict_with_gradients if splitter else None
    loss, _ = loss_of(run.model, batch, run.config, generator, predict)
    loss.sum().backward()
    if splitter:
        splitter.backward(run.parameters())
    for group in run.groups:
        group.master.collect()
        group.master.publish()
