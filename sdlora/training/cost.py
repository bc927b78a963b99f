"""What a step costs; its time is measured on the real model with a real batch before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.reading.items import Visit
from ..devices import is_out_of_memory
from ..errors import TrainingError
from ..families.offload import is_offloaded
from .choices import remembered_choice, try_choices, use, usual_choice
from .proof import prove
from .relief import can_be_relieved, relieve

if TYPE_CHECKING:
    from .state import Run


@dataclass(frozen=True)
class Cost:
    """Time of one optimizer step and memory of the run."""

    seconds_per_step: float
    bytes: int


def measure_cost(run: Run) -> Cost:
    """Decide how to compute, on the largest micro-batch, and time that; the gradients are thrown away.

    The first pass, by the reference, warms up; the last one is timed. The memory is the plan's, made before
    any weight was read.

    Raises:
        TrainingError: if the device does not have enough memory.
    """
    settings = run.config.training
    micros = [micro for rank in run.order.step(run.step) for micro in rank if micro]
    visits = max(micros, key=lambda micro: len(micro))
    while True:
        try:
            seconds = _settled(run, visits)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not can_be_relieved(run, error):
                raise TrainingError(
                    f"{run.model.facts.device}: not enough memory for "
                    f"training.batch_size={settings.batch_size} at {run.config.data.resolution} px; use a "
                    "smaller training.batch_size or a smaller data.resolution, or training.base_format=fp8"
                ) from None
        relieve(run)  # the error is gone by now, and with it the tensors that its frames held
    return Cost(seconds * settings.gradient_accumulation, run.memory.peak)


def _settled(run: Run, visits: tuple[Visit, ...]) -> float:
    """Have the run compute as its checkpoint, an earlier run or a trial says; return seconds of a pass.

    The fast paths prove themselves for the way that is used in the end.
    """
    names = run.paths()
    if is_offloaded(
        run.model.components()[run.model.info.denoiser.component]
    ):  # the weights keep their layout
        return prove(run, names, visits)
    if run.choice is None and run.fast_before is None and names:
        run.choice = remembered_choice(run)
    known = run.choice
    if known is not None:
        use(run, known)
    seconds = prove(run, names, visits)
    if known is None and run.fast_before is None and names:
        usual = usual_choice(run)
        if (try_choices(run, visits) or usual) != usual:
            seconds = prove(run, run.fast.names, visits)
    return seconds
