"""Calling the worker process: started on first use, restarted after a crash, ended when idle."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlora.errors import SdloraError

_CRASHED = (
    "the worker process ended: it was killed, or the machine ran out of memory; "
    "try a smaller size, or stop the training first (nothing was lost)"
)


class CallFailed(SdloraError):
    """The worker answered with an error text for the user; ``kind`` is the error's class there."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class CallCancelled(CallFailed):
    """A newer call replaced this one."""


@dataclass(frozen=True)
class Answer:
    """One message of a call: progress (done, total, note), a part, or the result."""

    progress: tuple[int, int, str] | None = None
    part: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None


@dataclass
class _Child:
    process: subprocess.Popen[str]
    inboxes: dict[int, queue.Queue[dict[str, Any] | None]] = field(default_factory=dict)


class WorkerClient:
    """One worker process and the calls under way in it. Safe to use from any thread."""

    def __init__(self, home: Path, idle_seconds: float = 600.0, program: Sequence[str] | None = None) -> None:
        """Start nothing yet.

        Args:
            home: working folder of the process.
            idle_seconds: after this long without a call, :meth:`end_if_idle` ends it.
            program: the program to start; :mod:`sdlora_ui.worker` when None.
        """
        self._home, self._idle = home, idle_seconds
        self._program = tuple(program or (sys.executable, "-m", "sdlora_ui.worker"))
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._child: _Child | None = None
        self._last = time.monotonic()
        self._newest: dict[str, int] = {}

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.process.poll() is None

    def call(
        self, task: str, arguments: Mapping[str, Any], *, replace: str | None = None
    ) -> Iterator[Answer]:
        """Yield a task's answers; the last one has its result.

        Args:
            task: key of :data:`sdlora_ui.worker.TASKS`.
            arguments: JSON values.
            replace: a newer call with the same word cancels this one.

        Raises:
            CallCancelled: when it was replaced.
            CallFailed: with the task's own error text.
        """
        number, inbox = next(self._numbers), queue.Queue[dict[str, Any] | None]()
        with self._lock:
            child = self._started()
            child.inboxes[number] = inbox
            if replace is not None:
                if (older := self._newest.get(replace)) in child.inboxes:
                    self._send(child, {"cancel": older})
                self._newest[replace] = number
            self._send(child, {"id": number, "task": task, "arguments": dict(arguments)})
        done = False
        try:
            while not done:
                message = inbox.get()
                done = message is None or "error" in message or "result" in message
                yield _answer(message)
        finally:
            with self._lock:
                child.inboxes.pop(number, None)
                self._last = time.monotonic()
                if not done:  # the caller no longer waits
                    self._send(child, {"cancel": number})

    def ask(self, task: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a task's result.

        Raises:
            CallFailed: with the task's own error text.
        """
        for answer in self.call(task, arguments):
            if answer.result is not None:
                return answer.result
        raise CallFailed(_CRASHED)

    def cancel(self, word: str) -> None:
        """Cancel the call that was made with ``replace=word``, if it is still under way."""
        with self._lock:
            if self._child and (number := self._newest.get(word)) in self._child.inboxes:
                self._send(self._child, {"cancel": number})

    def end_if_idle(self) -> None:
        """End the process when it has been idle for a while, because it holds a base in memory."""
        with self._lock:
            if self._child and not self._child.inboxes and time.monotonic() - self._last > self._idle:
                self._end()

    def close(self) -> None:
        """End the process, whatever it does; calls under way are cancelled."""
        with self._lock:
            if self._child:
                for inbox in self._child.inboxes.values():
                    inbox.put({"error": "ended", "cancelled": True})
                self._child.process.kill()
                self._end()

    def _end(self) -> None:
        assert self._child is not None
        process, self._child = self._child.process, None
        with suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
            return
        process.kill()

    def _started(self) -> _Child:
        if self._child is not None and self._child.process.poll() is None:
            return self._child
        process = subprocess.Popen(
            self._program,
            cwd=self._home,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._child = _Child(process)
        threading.Thread(target=self._listen, args=(self._child,), daemon=True).start()
        return self._child

    def _listen(self, child: _Child) -> None:
        assert child.process.stdout is not None
        with suppress(ValueError, OSError):
            for line in child.process.stdout:
                message = json.loads(line)
                inbox = child.inboxes.get(message["id"])
                if inbox is not None:
                    inbox.put(message)
        child.process.wait()
        with self._lock:
            for inbox in child.inboxes.values():
                inbox.put(None)

    def _send(self, child: _Child, message: Mapping[str, Any]) -> None:
        with suppress(OSError, ValueError):  # a dead child: its listener informs all callers
            assert child.process.stdin is not None
            child.process.stdin.write(json.dumps(message, default=str) + "\n")
            child.process.stdin.flush()


def _answer(message: Mapping[str, Any] | None) -> Answer:
    if message is None:
        raise CallFailed(_CRASHED)
    if message.get("cancelled"):
        raise CallCancelled("replaced by a newer one")
    if "error" in message:
        raise CallFailed(str(message["error"]), str(message.get("kind", "")))
    if "progress" in message:
        done, total = message["progress"]
        return Answer(progress=(done, total, message.get("note") or "starting"))
    return Answer(part=message.get("part"), result=message.get("result"))
