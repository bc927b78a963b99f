"""What a run does beside training: looked at with pleasure, and never a reason to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from ..devices import is_out_of_memory
from ..errors import SdloraError
from ..events import Notice

if TYPE_CHECKING:
    from .state import Run

Result = TypeVar("Result")


def attempt(run: Run, what: str, work: Callable[[Run], Result]) -> Result | None:
    """Do what training can do without; if it fails, for whatever reason, say so once and go on.

    In several processes, what fails in one has to fail in all of them, or come after the last message.

    Args:
        run: the run.
        what: for people, e.g. ``the previews``.
        work: what is tried.

    Raises:
        TrainingError: if another process ended the run.
    """
    try:
        return work(run)
    except Exception as error:
        if run.processes.is_end(error):
            raise
        problem = f"{what} could not be made ({reason(error)}); training continues without"
        if is_out_of_memory(error):
            problem = (
                f"{run.model.facts.device} does not have enough memory for {what}; skipped, and training "
                "continues. It fits with a smaller data.resolution; or switch it off: sample.prompts=[], "
                "data.validation=0, judge.every=0"
            )
    if run.model.facts.device.type == "cuda":
        torch.cuda.empty_cache()  # what the failed work had reached is released with its error
    if what not in run.told:
        run.told.add(what)
        run.emit(Notice(f"step {run.step}: {problem}"))
    return None


def reason(error: BaseException) -> str:
    """Return in one line why something failed."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, SdloraError) else f"{type(error).__name__}: {text}"
