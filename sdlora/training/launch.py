"""``sdlora train --processes N``: the same command N times on this machine, with torchrun's launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..errors import ConfigError, TrainingError

_SECONDS_TO_SAVE = 45  # after a signal: for the step, the checkpoint, and an end within a minute


def train_in_processes(words: Sequence[str], count: int) -> int:
    """Run ``sdlora WORDS`` in several processes and wait for their end.

    Args:
        words: a command line without ``--processes``.
        count: of the processes.

    Returns:
        The exit code: that of the first process that failed, or 128 plus the number of the signal that
        ended them all.

    Raises:
        ConfigError: on Windows.
        TrainingError: if a process was killed, since it could not say so itself.
    """
    if sys.platform == "win32":
        raise ConfigError(
            "--processes: NVIDIA's NCCL, through which cards talk, is not for Windows; use one card, or WSL"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # each process says in one line what is wrong; torch would add pages
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_SAVE))
    known = {field.name for field in fields(LaunchConfig)}
    new: dict[str, Any] = {"shutdown_timeout": _SECONDS_TO_SAVE}  # not in torch 2.6
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        **{name: value for name, value in new.items() if name in known},
    )
    try:
        elastic_launch(config, sys.executable)("-m", "sdlora", *words)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise TrainingError(
                f"process {rank + 1} of {count} was ended by {name} (the system does that when memory runs "
                "out, too); --resume continues from the last checkpoint"
            ) from None
        return int(failure.exitcode)
    return 0
