"""The child process for tasks that need torch: draw, plan, export. One JSON object per line, both ways.

In: ``{"id": 1, "task": "draw", "arguments": {...}}`` or ``{"cancel": 1}``. Out: ``{"id": 1, "progress":
[done, total], "note": "..."}``, ``{"id": 1, "part": {...}}`` for an early part, and at the end one of
``{"id": 1, "result": {...}}``, ``{"id": 1, "error": "..."}``. It ends when its input does, so it never
outlives its server.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from sdlora.errors import SdloraError

TASKS = {
    "draw": "sdlora_ui.tasks.draw:draw",
    "plan": "sdlora_ui.tasks.plan:plan",
    "caption": "sdlora_ui.tasks.caption:caption",
    "bases": "sdlora_ui.tasks.bases:recognise_bases",
    "fetch": "sdlora_ui.tasks.fetch:fetch",
    "export": "sdlora_ui.tasks.tools:export",
    "inspect": "sdlora_ui.tasks.tools:inspect",
    "merge": "sdlora_ui.tasks.tools:merge",
    "bake": "sdlora_ui.tasks.tools:bake",
    "resize": "sdlora_ui.tasks.tools:resize",
}


class Cancelled(BaseException):
    """Nobody waits for this task any more.

    Not an ``Exception``, so that a task that suppresses its listeners' errors, as a run does, ends too.
    """


class Emit(Protocol):
    """How a task reports while it works; each call raises :class:`Cancelled` when nobody waits for it."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Report how far the task is."""

    def part(self, value: Mapping[str, Any]) -> None:
        """Send a part of the result that is ready before the rest."""


class _Voice:
    def __init__(self, task_id: int, send: Callable[[Mapping[str, Any]], None], gone: set[int]) -> None:
        self._id, self._send, self._gone = task_id, send, gone

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._stop_if_gone()
        self._send({"id": self._id, "progress": [done, total], "note": note})

    def part(self, value: Mapping[str, Any]) -> None:
        self._stop_if_gone()
        self._send({"id": self._id, "part": value})

    def _stop_if_gone(self) -> None:
        if self._id in self._gone:
            raise Cancelled


def serve(incoming: TextIO, outgoing: TextIO) -> None:
    """Do the incoming tasks, one after the other, until the input ends."""
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
    gone: set[int] = set()
    lock = threading.Lock()

    def send(message: Mapping[str, Any]) -> None:
        with lock:
            outgoing.write(json.dumps(message, default=str) + "\n")
            outgoing.flush()

    def listen() -> None:
        for line in incoming:
            message = json.loads(line)
            if "cancel" in message:
                gone.add(message["cancel"])
            else:
                waiting.put(message)
        waiting.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (message := waiting.get()) is not None:
        send(_do(message, _Voice(message["id"], send, gone)))


def _do(message: Mapping[str, Any], voice: _Voice) -> Mapping[str, Any]:
    answer: dict[str, Any] = {"id": message["id"]}
    try:
        voice.progress(0, 1)
        module, _, name = TASKS[message["task"]].partition(":")
        task = getattr(importlib.import_module(module), name)
        return answer | {"result": task(message["arguments"], voice)}
    except Cancelled:
        return answer | {"error": "cancelled", "cancelled": True}
    except SdloraError as error:
        return answer | {"error": str(error), "kind": type(error).__name__}
    except Exception as error:  # the page must say something, and the next task must still be done
        traceback.print_exc()
        return answer | {"error": f"unexpected error: {type(error).__name__}: {error}"}


def main() -> None:
    """Serve on the standard streams; all other output goes to stderr."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    outgoing = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    serve(sys.stdin, outgoing)


if __name__ == "__main__":
    main()
