"""A run whose step fails for want of memory, or in our kernels, makes it again in another way, and goes on.

Where memory lacks it goes one rung up. Only rungs are taken that leave the numbers as they are, bit for bit:
what the backward pass makes again (:mod:`sdlora.families.recompute`). The settings of the run's folder say
so, so that a run that goes on stays there. Kernels are compiled for the shapes they meet, and some come late.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..config.toml import save_config
from ..devices import is_out_of_memory, release_unused
from ..errors import SdloraError
from ..events import Notice
from .fast import FAST_PATHS, recompute_of
from .ladder import next_rung

if TYPE_CHECKING:
    from .state import Run


def can_be_relieved(run: Run, error: BaseException) -> bool:
    """Tell whether an error is a lack of memory that another rung may help against.

    With several processes none: the others wait in the middle of the step.
    """
    return is_out_of_memory(error) and run.processes.count == 1 and next_rung(run.config) is not None


def remedy_of(run: Run, error: BaseException) -> Callable[[], None] | None:
    """Return what lets a failed step be made again, to be called once the error is gone; None if nothing.

    What fails beside our kernels is laid to them once: without them it fails again if it was something else.
    """
    if is_out_of_memory(error):
        return partial(relieve, run) if can_be_relieved(run, error) else None
    used = "kernels" in run.fast.names and run.fast.kernels
    if isinstance(error, SdloraError) or not used or run.processes.count > 1:
        return None
    return partial(_without_kernels, run, f"{type(error).__name__}: {error}"[:200])


def _without_kernels(run: Run, what: str) -> None:
    run.fast.forget()
    run.fast.use([name for name in run.fast.names if name != "kernels"])
    run.emit(
        Notice(
            f"step {run.step + 1}: failed with the fast path kernels ({what}), which is not used from here "
            "on; what failed is made again; please report this with the run's events.jsonl"
        )
    )


def relieve(run: Run) -> None:
    """Go one rung up, and drop the gradients so far; to be called once the error is gone."""
    changes = next_rung(run.config)
    assert changes is not None
    run.fast.forget()
    run.config = run.config.with_values(changes)
    if run.made_splitter is not None:  # a CPU takes a batch whole then
        run.splitter = run.made_splitter = run.fast.splitter = None
    names = [name for name in run.fast.names if name != "recompute"]
    run.fast.use(())
    run.fast.recompute = recompute_of(run.config, run.model)
    path = FAST_PATHS["recompute"]
    if set(path.needs) <= set(names) and path.possible(run.fast):
        names.append("recompute")
    run.ready_to_train()
    run.fast.use([name for name in FAST_PATHS if name in names])
    run.ready_to_train()
    if run.processes.is_main and run.folder.config_file.is_file():
        save_config(run.config, run.folder.config_file)
    release_unused()
    told = ", ".join(f"{key}={value}" for key, value in changes.items() if value is not None)
    run.emit(
        Notice(
            f"step {run.step + 1}: {run.model.facts.device} ran out of memory; from here on "
            f"{told or 'all blocks are at ' + run.config.training.rung}, and what failed is made again"
        )
    )
