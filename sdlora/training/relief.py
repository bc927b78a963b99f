"""A run that lacks memory under way goes one rung up, and makes what failed again, instead of ending.

Only rungs are taken that leave the numbers as they are, bit for bit: what the backward pass makes again
(:mod:`sdlora.families.recompute`). The settings of the run's folder say so, so that a run that goes on stays
there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.toml import save_config
from ..devices import is_out_of_memory, release_unused
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


def relieve(run: Run) -> None:
    """Go one rung up, and drop the gradients so far; to be called once the error is gone."""
    changes = next_rung(run.config)
    assert changes is not None
    run.fast.forget()
    run.config = run.config.with_values(changes)
    if run.splitter is not None:  # a CPU takes a batch whole then
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
