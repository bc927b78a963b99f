"""Runs that were started in a shell are seen while they train, and only then heed the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from past_runs import put_run
from patience import wait_for
from processes import end_marked, new_mark, with_mark
from sdlora_ui.job_record import Job
from sdlora_ui.jobs import JobQueue
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.shell_runs import ShellRun, ShellRuns, held_inodes, trains
from sdlora_ui.site import Site

from sdlora.config.toml import load_config, save_config
from sdlora.errors import ConfigError
from sdlora.run_folder import SAVE, STOP, RunFolder

on_linux = pytest.mark.skipif(held_inodes() is None, reason="only Linux lists the locks that are held")


@pytest.fixture
def runs(tmp_path: Path) -> ShellRuns:
    folders = {"runs": Path("runs"), "images": Path("out"), "data": Path("data")}
    (tmp_path / "runs").mkdir(exist_ok=True)
    return ShellRuns(AllowedPaths.of(tmp_path, **folders, allowed=[], local=False))


def begun(home: Path, name: str, *, ended: bool = False) -> RunFolder:
    """Write what a run in a shell has in its folder half way, or at its end."""
    job = put_run(home, name, 20, status="finished" if ended else "running")
    folder = RunFolder(home / "runs" / name)
    (home / "runs" / ".sdlora-ui" / "jobs" / job / "events.jsonl").rename(folder.events_file)
    return folder


def seen(runs: ShellRuns, of_jobs: set[Path] | None = None) -> list[ShellRun]:
    return runs.listed(of_jobs or set())


@on_linux
def test_a_run_is_seen_while_it_trains_and_how_it_ended(runs: ShellRuns, tmp_path: Path) -> None:
    live, over, of_a_job = (begun(tmp_path, name) for name in ("live", "over", "of-a-job"))
    with FileLock(live.lock_file), FileLock(of_a_job.lock_file):
        [run] = seen(runs, {of_a_job.path})
        shown = run.to_dict()
        assert (shown["name"], shown["status"], shown["step"], shown["shell"]) == (
            "live",
            "running",
            20,
            True,
        )
        assert runs.get(run.id).view.samples[10] == [str(live.preview(10, number)) for number in (1, 2)]
        runs.request(run.id, SAVE)
        runs.request(run.id, STOP)
        assert live.request_file(SAVE).exists() and run.status == "stopping"
    wait_for(lambda: seen(runs)[0].status == "stopped", "the next look")
    with pytest.raises(ConfigError, match="is not training right now"):
        runs.request(run.id, SAVE)
    with live.events_file.open("a") as stream:
        event = {"event": "RunFinished", "adapter_file": "x", "seconds": 1.0, "stopped": False}
        stream.write(json.dumps(event) + "\n")
    assert [run.status for run in seen(runs)] == ["finished"]
    assert over.exists(), "it was over before anybody looked, and is no news"
    with pytest.raises(ConfigError, match="there is none"):
        runs.get("run-../../etc")


@on_linux
def test_the_queue_waits_for_a_run_on_its_device_unless_told_to_start(tmp_path: Path) -> None:
    folders = {"runs": Path("runs"), "images": Path("out"), "data": Path("data")}
    paths = AllowedPaths.of(tmp_path, **folders, allowed=[], local=False)
    site = Site(paths, JobQueue(tmp_path / "jobs", tmp_path, (sys.executable, "-c", "pass")))
    queue = site.queue

    def added(name: str, device: str) -> Job:
        folder = {"output.folder": tmp_path / "runs" / name, "output.name": name}
        return queue.add(load_config(values={**folder, "training.device": device}))

    def status(job: Job) -> str:
        return queue.get(job.id).status

    live = begun(tmp_path, "live")
    save_config(load_config(live.config_file).with_values({"training.device": "cuda:0"}), live.config_file)
    with FileLock(live.lock_file):
        same, asked, elsewhere = added("same", "cuda"), added("asked", "cuda:0"), added("elsewhere", "cuda:1")
        assert [queue.waits_for(job) for job in (same, asked, elsewhere)] == ["live", "live", ""]
        queue.tick()
        assert status(same) == "waiting" and status(elsewhere) != "waiting"
        wait_for(lambda: status(elsewhere) == "failed", "its end")
        queue.tick()
        assert status(same) == status(asked) == "waiting"
        queue.start(asked.id)
        assert status(asked) != "waiting"
    wait_for(lambda: (queue.tick(), status(same) != "waiting")[1], "the next look")


@on_linux
def test_a_run_whose_files_lead_elsewhere_is_not_read(runs: ShellRuns, tmp_path: Path) -> None:
    folder = begun(tmp_path, "linked")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.jsonl"
    folder.events_file.rename(outside)
    folder.events_file.symlink_to(outside)
    with FileLock(folder.lock_file):
        assert seen(runs) == []


def test_without_a_list_of_locks_a_run_that_says_something_trains(tmp_path: Path) -> None:
    live, over = begun(tmp_path, "live"), begun(tmp_path, "over", ended=True)
    assert trains(live, None) and not trains(over, None)
    long_ago = time.time() - 3600
    os.utime(live.events_file, (long_ago, long_ago))
    assert not trains(live, None) and not trains(RunFolder(tmp_path / "none"), None)


@on_linux
@pytest.mark.long
def test_a_real_run_in_a_shell_is_seen_and_stopped(
    runs: ShellRuns, tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    mark = new_mark()
    settings = ["model.base=mini", "training.steps=100000", "sample.prompts=[]", "output.name=style"]
    command = [
        sys.executable,
        "-m",
        "sdlora",
        "train",
        str(image_folder(2)),
        "--output",
        "runs/mine",
        *settings,
    ]
    environment = {**with_mark(mark), "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        run = wait_for(lambda: next((run for run in seen(runs) if run.view.step > 1), None), "its steps")
        runs.request(run.id, STOP)
        wait_for(lambda: process.poll() is not None, "its end")
        wait_for(lambda: seen(runs)[0].status == "stopped", "the next look")
    finally:
        end_marked(mark)
        process.wait()
