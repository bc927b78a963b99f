"""Whatever a test starts ends with the tests, even when pytest is killed.

A process inherits its environment, also one that is detached or whose parent is gone (a training that the web
UI starts is both). So a mark in the environment tells whose it is. Each pytest process has a mark and a
watchdog: a process that waits for the end of its input, which the system closes however pytest ends, and then
ends all that carries the mark.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from patience import PATIENCE

MARKS = "SDLORA_TEST_MARKS"  # environment variable: marks with a colon between each two


def new_mark() -> str:
    """Return a mark that no process carries yet."""
    return uuid.uuid4().hex


def with_mark(mark: str) -> Mapping[str, str]:
    """Return this process' environment with one mark more, for a process that is started."""
    return os.environ | {MARKS: ":".join(filter(None, (os.environ.get(MARKS), mark)))}


def marked(mark: str, keep: frozenset[int] = frozenset()) -> list[psutil.Process]:
    """Return the living processes that carry a mark and all that descend from them, but for some ids."""
    carriers: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # another user's, or gone meanwhile
            if process.pid not in keep and mark in process.environ().get(MARKS, ""):
                carriers |= {process, *process.children(recursive=True)}
    return [process for process in carriers if process.pid not in keep and lives(process)]


def lives(process: psutil.Process) -> bool:
    """Tell whether a process still does something."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end_marked(mark: str, keep: frozenset[int] = frozenset()) -> None:
    """Kill the processes of a mark, and those that they start meanwhile, and see them gone.

    Raises:
        TimeoutError: when some are still there after :data:`patience.PATIENCE`.
    """
    end = time.monotonic() + PATIENCE
    keep |= {os.getpid()}
    while processes := marked(mark, keep):
        if time.monotonic() > end:
            raise TimeoutError(f"these processes do not end: {processes}")
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)


class Watch:
    """A mark on all that this process starts from now on, and the watchdog that ends it."""

    def __init__(self) -> None:
        """Start the watchdog, without the mark: it ends by itself."""
        self.mark = new_mark()
        detached = (  # Ctrl-C in the terminal must not end it before its time
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        self._watchdog = subprocess.Popen(
            [sys.executable, str(Path(__file__)), self.mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **detached,
        )
        self._before = os.environ.get(MARKS)
        os.environ.update(with_mark(self.mark))

    def sweep(self) -> None:
        """End what was started so far and still lives."""
        end_marked(self.mark)

    def close(self) -> None:
        """End all that was started, and the watchdog."""
        if self._before is None:
            os.environ.pop(MARKS, None)
        else:
            os.environ[MARKS] = self._before
        self._watchdog.communicate()


def main() -> None:
    """Wait for the end of the input, then end what carries the mark; the process that asked for it stays."""
    mark, asking = sys.argv[1:]
    sys.stdin.buffer.read()
    end_marked(mark, frozenset({int(asking)}))


if __name__ == "__main__":
    main()
