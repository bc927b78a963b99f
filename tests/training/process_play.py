"""What several processes do in the tests of :mod:`sdlora.training.processes`; each prints one JSON
object a scene.

Run as ``python process_play.py SCENE ...`` with the environment of a launcher.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from sdlora.errors import DatasetError, SdloraError
from sdlora.training.processes import Processes


def gradient(rank: int, count: int = 1003) -> torch.Tensor:
    """Return numbers of very different sizes, so that the order of adding shows."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (count,), generator=generator
    )


def agree(processes: Processes) -> Any:
    """Exchange short and long messages, and add."""
    long = "x" * (3000 * processes.rank)
    words = processes.exchange({"rank": processes.rank, "third": 1 / 3, "long": long}, at_once=True)
    total = gradient(99)
    for kind in (torch.float32, torch.bfloat16):
        processes.add_in_order(total, gradient(processes.rank).to(kind))
    main = processes.from_main(lambda: b"only the main process makes this").decode()
    return {
        "words": [(word["rank"], word["third"], len(word["long"])) for word in words],
        "total": total.tolist(),
        "main": main,
    }


def one_fails(processes: Processes) -> Any:
    """The last process fails where the others wait for its message."""
    if processes.rank == processes.count - 1:
        raise DatasetError("cat.png: broken")
    return processes.exchange("hello")


def all_fail(processes: Processes) -> Any:
    """Every process finds the same fault."""
    raise DatasetError("no images")


def one_dies(processes: Processes) -> Any:
    """The last process is killed."""
    processes.exchange("hello")
    if processes.rank == processes.count - 1:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return processes.exchange("hello again")


def one_hangs(processes: Processes) -> Any:
    """The last process is stopped, as if its machine's cable were cut."""
    processes.patience = 2.0
    if processes.rank == processes.count - 1:
        sys.stdin.read()
        os._exit(0)
    return processes.exchange("hello", at_once=True)


SCENES: dict[str, Callable[[Processes], Any]] = {
    scene.__name__: scene for scene in (agree, one_fails, all_fail, one_dies, one_hangs)
}


def answer(processes: Processes, scene: str) -> dict[str, Any]:
    """Play one scene as ``train`` would."""
    try:
        try:
            return {"result": SCENES[scene](processes)}
        except Exception as error:
            processes.fail(error)
            raise
    except SdloraError as error:
        return {"error": str(error), "kind": type(error).__name__}


def main() -> None:
    """Play some scenes one after the other."""
    processes = Processes.join("cpu")
    for scene in sys.argv[1:]:
        print(json.dumps({"rank": processes.rank, **answer(processes, scene)}), flush=True)


if __name__ == "__main__":
    main()
