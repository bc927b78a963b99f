"""Calls to the worker process: progress, results, errors; replaced, crashed and idle ones."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from sdlora_ui import worker as worker_module
from sdlora_ui.worker_client import CallCancelled, CallFailed, WorkerClient

# The worker's protocol around tasks that need no torch.
PROGRAM = """
import os, sys, time
from sdlora_ui import worker
from sdlora.errors import ConfigError

def count(arguments, emit):
    for step in range(arguments["to"]):
        emit.progress(step, arguments["to"], "counting")
        time.sleep(arguments.get("pause", 0))
    emit.part({"half": True})
    return {"pid": os.getpid(), "to": arguments["to"]}

def refuse(arguments, emit):
    raise ConfigError("`x`: not so")

def crash(arguments, emit):
    os._exit(9)

def stumble(arguments, emit):
    print("noise on stdout must not reach the protocol")
    return {}["missing"]

sys.modules["tasks"] = sys.modules["__main__"]
worker.TASKS.update({name: f"tasks:{name}" for name in ("count", "refuse", "crash", "stumble")})
worker.main()
"""

ENDLESS = {"to": 10**9, "pause": 0.02}


@pytest.fixture
def worker(tmp_path: Path, processes_end: None) -> Iterator[WorkerClient]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    client = WorkerClient(tmp_path, idle_seconds=0.05, program=(sys.executable, str(program)))
    yield client
    client.close()


def test_a_call_tells_progress_parts_and_its_result(worker: WorkerClient) -> None:
    answers = list(worker.call("count", {"to": 3}))
    progress = [answer.progress for answer in answers if answer.progress]
    assert progress == [(0, 1, "starting"), (0, 3, "counting"), (1, 3, "counting"), (2, 3, "counting")]
    assert [answer.part for answer in answers if answer.part] == [{"half": True}]
    assert answers[-1].result is not None and answers[-1].result["to"] == 3


def test_the_process_stays_between_calls(worker: WorkerClient) -> None:
    assert worker.ask("count", {"to": 1})["pid"] == worker.ask("count", {"to": 1})["pid"]


def test_an_error_has_the_tasks_own_words(worker: WorkerClient) -> None:
    with pytest.raises(CallFailed, match="not so"):
        worker.ask("refuse", {})
    with pytest.raises(CallFailed, match="unexpected error: KeyError"):
        worker.ask("stumble", {})
    assert worker.ask("count", {"to": 1})["to"] == 1


def test_a_crash_fails_the_call_and_the_next_one_gets_a_new_process(worker: WorkerClient) -> None:
    first = worker.ask("count", {"to": 1})["pid"]
    with pytest.raises(CallFailed, match="nothing was lost"):
        worker.ask("crash", {})
    assert worker.ask("count", {"to": 1})["pid"] != first


def test_a_newer_call_replaces_an_older_one(worker: WorkerClient) -> None:
    outcome: list[str] = []
    begun = threading.Event()

    def old() -> None:
        try:
            for _ in worker.call("count", ENDLESS, replace="draw"):
                begun.set()
        except CallCancelled:
            outcome.append("old cancelled")

    def new() -> None:
        newest = list(worker.call("count", {"to": 1}, replace="draw"))[-1].result
        outcome.append("new done" if newest else "new without a result")

    threads = [threading.Thread(target=old, daemon=True), threading.Thread(target=new, daemon=True)]
    threads[0].start()
    assert begun.wait(PATIENCE)
    threads[1].start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(outcome) == ["new done", "old cancelled"]


def test_closing_cancels_what_is_under_way(worker: WorkerClient) -> None:
    calls = worker.call("count", ENDLESS)
    next(calls)
    worker.close()
    with pytest.raises(CallCancelled):
        list(calls)


def test_an_idle_process_is_ended(worker: WorkerClient, wait: Callable[..., Any]) -> None:
    worker.ask("count", {"to": 1})
    assert worker.running

    def ended() -> bool:
        worker.end_if_idle()
        return not worker.running

    wait(ended)


def test_the_worker_ends_with_its_input() -> None:
    out = io.StringIO()
    worker_module.serve(io.StringIO('{"id": 1, "task": "no such", "arguments": {}}\n'), out)
    [line] = out.getvalue().splitlines()[1:]
    assert "unexpected error" in json.loads(line)["error"]


class Silent:
    """Hears a task and keeps what it says."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.notes: list[str] = []

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.notes.append(note)

    def part(self, value: Any) -> None:
        self.parts.append(value)


class Leaving(Silent):
    """Does not wait until all images are encoded."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        super().progress(done, total, note)
        if note == "encoding the images":
            raise worker_module.Cancelled


def test_a_plan_that_nobody_waits_for_ends_while_images_are_encoded(
    tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from sdlora_ui.tasks.plan import plan

    emit = Leaving()
    values = {"model.base": str(tiny_base), "data.folder": str(image_folder())}
    with pytest.raises(worker_module.Cancelled):
        plan({"values": values | {"data.cache_folder": str(tmp_path / "cache")}}, emit)
    assert emit.notes.count("encoding the images") == 1 and not emit.parts


def test_drawing_keeps_the_base_and_writes_settings_that_can_be_sent_back(tmp_path: Path) -> None:
    from sdlora_ui.server.png_import import from_parameters
    from sdlora_ui.tasks.draw import draw

    from sdlora.generation.png_info import read_parameters

    emit = Silent()
    arguments = {
        "base": "mini", "prompt": "an icon of a cat", "negative": "", "seed": 5, "width": None,
        "height": None, "steps": 2, "guidance": 3.0, "sampler": "DDIM", "folder": str(tmp_path / "out"),
        "rows": [[]],
    }  # fmt: skip
    first = draw(arguments, emit)["images"]
    del emit.notes[:]  # whether it was loaded depends on the tests before
    again = draw(arguments | {"seed": 6}, emit)["images"]
    assert not any("loading" in note for note in emit.notes)
    assert len(emit.parts) == 2 and Path(first[0]["file"]) != Path(again[0]["file"])
    sent = from_parameters(read_parameters(Path(first[0]["file"])))
    assert (sent.prompt, sent.seed, sent.steps, sent.guidance) == ("an icon of a cat", 5, 2, 3.0)
    assert (sent.width, sent.height, sent.sampler) == (64, 64, "DDIM")
