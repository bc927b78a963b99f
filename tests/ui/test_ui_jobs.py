"""The queue: one job at a time, state on disk, processes that outlive the server."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from processes import end_marked, marked, new_mark, with_mark
from sdlora_ui.job_memory import MemoryWatch
from sdlora_ui.job_process import process_of
from sdlora_ui.job_record import Job
from sdlora_ui.jobs import JobQueue
from sdlora_ui.progress import RunView, thinned

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, OutputError
from sdlora.events import Estimate, Judged, Reported, StepDone, to_json

# What `sdlora train` does as far as the queue can see it: events, STOP, checkpoints, one JSON line. Half way
# it waits for as long as there is a file "hold" where it works, and heeds only STOP.
PROGRAM = """
import json, sys, time, tomllib
from pathlib import Path
arguments = sys.argv[1:]
after = lambda name: arguments[arguments.index(name) + 1]
more = int(after("--continue-for")) if "--continue-for" in arguments else 0
resume = "--resume" in arguments or more > 0
if resume:
    run = Path(after("--output"))
    config = tomllib.loads((run / "config.toml").read_text())
else:
    config = tomllib.loads(Path(after("--config")).read_text())
    run = Path(config["output"]["folder"])
steps = config["training"]["steps"]
if steps == 1:
    print("sdlora: it is broken", file=sys.stderr)
    print(json.dumps({"error": "the images are gone", "kind": "DatasetError"}))
    sys.exit(2)
run.mkdir(parents=True, exist_ok=True)
if not resume:
    (run / "config.toml").write_text(Path(after("--config")).read_text())
events = open(after("--events"), "a")
def emit(kind, **values):
    events.write(json.dumps({"event": kind, **values}) + "\\n")
    events.flush()
saved = sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")) if resume else []
first = saved[-1] if saved else 0
if more:
    steps = first + more
    before, text = config["training"]["steps"], (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(f"steps = {before}", f"steps = {steps}"))
emit("RunStarted", steps=steps, first_step=first, expected_seconds=1.0, expected_bytes=5)
for step in range(first + 1, steps + 1):
    while step == steps // 2 and Path("hold").exists() and not (run / "STOP").exists():
        time.sleep(0.01)
    facts = dict(learning_rate=1e-4, seconds_left=0.1, images_per_second=2.0)
    emit("StepDone", step=step, steps=steps, loss=1 / step, **facts)
    stop = (run / "STOP").exists()
    if stop or step == steps:
        (run / "STOP").unlink(missing_ok=True)
        place = run / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True)
        (place / "adapter.safetensors").write_text("")
    if stop:
        print(json.dumps({"stopped": True, "step": step}))
        sys.exit(0)
emit("RunFinished", adapter_file=str(run / "x.safetensors"), seconds=1.0, stopped=False, step=steps)
print(json.dumps({"stopped": False, "step": steps}))
"""
Wait = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def make(tmp_path: Path, processes_end: None) -> Callable[[], JobQueue]:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    return lambda: JobQueue(tmp_path / "jobs", tmp_path, (sys.executable, str(program)))


def settings(tmp_path: Path, name: str = "style", steps: int = 5) -> Config:
    return load_config(
        values={"output.name": name, "output.folder": tmp_path / "runs" / name, "training.steps": steps}
    )


def held(tmp_path: Path) -> Path:
    """Make the jobs stop half way for as long as the returned file is there."""
    (tmp_path / "hold").touch()
    return tmp_path / "hold"


def ended(queue: JobQueue, job: Job, wait: Wait) -> Job:
    wait(lambda: queue.get(job.id).status in ("stopped", "finished", "failed"))
    return queue.get(job.id)


def test_a_job_runs_from_its_own_toml_and_ends_finished(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path))
    assert job.status == "waiting"
    assert queue.command(job.id) == ["sdlora", "train", "--config", str(queue.settings(job.id))]
    assert load_config(queue.settings(job.id)).training.steps == 5
    queue.tick()
    assert ended(queue, job, wait).status == "finished"
    view = queue.view(job.id)
    assert (view.step, view.steps, view.adapter_file) == (5, 5, str(job.run / "x.safetensors"))
    assert sorted(view.loss) == [1, 2, 3, 4, 5]


def test_only_one_job_trains_and_the_next_follows(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    hold = held(tmp_path)
    first, second = queue.add(settings(tmp_path, "a", 20)), queue.add(settings(tmp_path, "b"))
    queue.tick()
    queue.tick()
    assert [job.status for job in queue.all()] == ["running", "waiting"]
    memory = MemoryWatch().of(process_of(queue.get(first.id)))
    assert memory is not None and memory["process"] > 2**20
    hold.unlink()
    ended(queue, first, wait)
    queue.tick()
    assert ended(queue, second, wait).status == "finished"


def test_a_new_server_takes_over_running_and_waiting_jobs(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    old = make()
    hold = held(tmp_path)
    first, second = old.add(settings(tmp_path, "a", 60)), old.add(settings(tmp_path, "b"))
    old.tick()
    new = make()
    assert [job.status for job in new.all()] == ["running", "waiting"]
    new.tick()
    assert new.get(second.id).status == "waiting"
    assert new.stop(first.id).status == "stopping"
    assert ended(new, first, wait).status == "stopped"
    hold.unlink()
    new.tick()
    assert ended(new, second, wait).status == "finished"


def test_stop_saves_and_resume_goes_on_from_there(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    hold = held(tmp_path)
    job = queue.add(settings(tmp_path, "a", 100))
    queue.tick()
    wait(lambda: queue.view(job.id).step > 1)
    queue.stop(job.id)
    assert ended(queue, job, wait).status == "stopped"
    stopped_at = queue.view(job.id).step
    assert 0 < stopped_at < 100
    hold.unlink()
    queue.resume(job.id)
    assert queue.command(job.id) == ["sdlora", "train", "--resume", "--output", str(job.run)]
    queue.tick()
    assert ended(queue, job, wait).status == "finished"
    view = queue.view(job.id)
    assert view.first_step == stopped_at and sorted(view.loss) == list(range(1, 101))


def test_waiting_jobs_start_in_the_order_they_were_moved_to(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    hold = held(tmp_path)
    first, *others = [queue.add(settings(tmp_path, name)) for name in ("a", "b", "c", "d")]
    queue.tick()
    queue.move(others[2].id, -1)
    queue.move(others[0].id, 1)
    queue.move(others[0].id, 1)  # past the last: there is no further place
    queue.move(others[0].id, 1)
    assert [job.name for job in in_order(make())] == ["d", "c", "b"]
    queue.move(others[0].id, -2)
    assert [job.name for job in in_order(make())] == ["b", "d", "c"]
    assert make().start(others[1].id).status == "waiting"  # another one trains; it is the next
    assert [job.name for job in in_order(make())] == ["c", "b", "d"]
    with pytest.raises(ConfigError, match="is running, not waiting"):
        queue.move(first.id, 1)
    hold.unlink()
    for job in (first, others[1], others[0], others[2]):
        assert ended(queue, job, wait).status == "finished"
        queue.tick()
    starts = [(tmp_path / "jobs" / job.id / "output.txt").stat().st_mtime_ns for job in others]
    assert starts[1] < starts[0] < starts[2]


def in_order(queue: JobQueue) -> list[Job]:
    return sorted((job for job in queue.all() if job.status == "waiting"), key=lambda job: job.order)


def test_jobs_of_one_moment_can_be_moved(make: Callable[[], JobQueue], tmp_path: Path) -> None:
    queue = make()
    jobs = [queue.add(settings(tmp_path, name)) for name in ("a", "b", "c")]
    for job in jobs:
        written(tmp_path, replace(job, created=5.0))
    last = in_order(queue)[-1]
    queue.move(last.id, -1)
    assert in_order(queue)[1].id == last.id
    queue.move(last.id, -1)
    assert in_order(queue)[0].id == last.id


def test_a_job_waits_for_its_time_and_lets_others_pass(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    later = queue.add(settings(tmp_path, "later"), not_before=time.time() + 3600)
    now = queue.add(settings(tmp_path, "now"))
    queue.tick()
    assert ended(queue, now, wait).status == "finished"
    after = make()  # a server that is started again knows of it
    after.tick()
    assert after.get(later.id).status == "waiting"
    after.wait_until(later.id, time.time() - 1)
    after.tick()
    assert ended(after, later, wait).status == "finished"


def test_a_job_that_waits_for_its_time_can_be_started_at_once(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "later"), not_before=time.time() + 3600)
    assert queue.start(job.id).status == "running"
    assert ended(queue, job, wait).not_before is None


@pytest.mark.parametrize("moment", [math.nan, math.inf, -1.0, 1e18, 4e9])
def test_a_time_that_never_comes_is_refused(
    make: Callable[[], JobQueue], tmp_path: Path, moment: float
) -> None:
    queue = make()
    with pytest.raises(ConfigError, match="within a year"):
        queue.add(settings(tmp_path, "a"), not_before=moment)
    job = queue.add(settings(tmp_path, "a"))
    with pytest.raises(ConfigError, match="within a year"):
        queue.wait_until(job.id, moment)


def test_a_failed_job_is_tried_again_after_those_that_wait(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "a", 1))
    queue.tick()
    assert ended(queue, job, wait).status == "failed"
    other = queue.add(settings(tmp_path, "b"))
    again = queue.resume(job.id)
    assert (again.status, again.error) == ("waiting", "")
    assert [waiting.id for waiting in in_order(queue)] == [other.id, job.id]


def test_a_finished_job_goes_on_for_more_steps(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "a", 20))
    with pytest.raises(ConfigError, match="only a finished job"):
        queue.extend(job.id, 5)
    queue.tick()
    ended(queue, job, wait)
    for more in (0, -1, 10**9):
        with pytest.raises(ConfigError, match="give a number from 1 to"):
            queue.extend(job.id, more)
    queue.extend(job.id, 30)
    assert queue.command(job.id) == ["sdlora", "train", "--output", str(job.run), "--continue-for", "30"]
    hold = held(tmp_path)  # at step 25
    queue.tick()
    wait(lambda: queue.view(job.id).step == 24)
    queue.stop(job.id)
    assert ended(queue, job, wait).status == "stopped"
    queue.resume(job.id)
    # the settings in its folder ask for 50 steps by now
    assert queue.command(job.id) == ["sdlora", "train", "--resume", "--output", str(job.run)]
    hold.unlink()
    queue.tick()
    assert ended(queue, job, wait).status == "finished"
    view = queue.view(job.id)
    assert (view.step, view.steps, sorted(view.loss)) == (50, 50, list(range(1, 51)))


@pytest.mark.long
def test_a_real_run_goes_on_for_more_steps(
    tmp_path: Path, image_folder: Callable[..., Path], wait: Wait, processes_end: None
) -> None:
    queue = JobQueue(tmp_path / "jobs", tmp_path)
    values = {
        "data.folder": image_folder(2),
        "model.base": "mini",
        "output.name": "style",
        "output.folder": tmp_path / "run",
        "training.steps": 2,
        "sample.prompts": (),
    }
    job = queue.add(load_config(values=values))
    queue.tick()
    assert ended(queue, job, wait).status == "finished", queue.log(job.id)
    queue.extend(job.id, 3)
    queue.tick()
    assert ended(queue, job, wait).status == "finished", queue.log(job.id)
    view = queue.view(job.id)
    assert (view.first_step, view.step, view.steps) == (2, 5, 5)
    assert load_config(job.run / "config.toml").training.steps == 5


def test_more_steps_that_never_began_are_asked_for_again(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "a", 20))
    queue.tick()
    ended(queue, job, wait)
    queue.extend(job.id, 10)
    queue.stop(job.id)  # it leaves the queue before it was started
    queue.resume(job.id)
    assert queue.command(job.id)[-2:] == ["--continue-for", "10"]
    queue.tick()
    assert ended(queue, job, wait).status == "finished"
    assert queue.view(job.id).step == 30


def test_a_job_that_a_server_starts_is_not_changed_by_another(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    first, second = make(), make()
    jobs = [first.add(settings(tmp_path, f"job{number}", 2)) for number in range(6)]
    moved = threading.Event()

    def move() -> None:
        while not moved.is_set():
            for job in jobs:
                with suppress(ConfigError):  # it runs, or has ended
                    second.move(job.id, 1)
                with suppress(ConfigError):
                    second.wait_until(job.id, None)

    thread = threading.Thread(target=move)
    thread.start()
    try:

        def all_done() -> bool:
            first.tick()
            return all(first.get(job.id).status == "finished" for job in jobs)

        wait(all_done)
    finally:
        moved.set()
        thread.join()
    for job in jobs:
        starts = [event for event in read_events_of(tmp_path, job) if event["event"] == "RunStarted"]
        assert len(starts) == 1, job.name


def test_a_job_that_fails_says_why(make: Callable[[], JobQueue], tmp_path: Path, wait: Wait) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "a", 1))
    queue.tick()
    failed = ended(queue, job, wait)
    assert (failed.status, failed.error) == ("failed", "the images are gone")
    assert "it is broken" in queue.log(job.id)


def test_a_job_killed_from_outside_is_not_shown_as_running(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    held(tmp_path)
    job = queue.add(settings(tmp_path, "a", 500))
    queue.tick()
    wait(lambda: queue.view(job.id).step > 0)
    queue.kill(job.id)
    assert ended(queue, job, wait).status == "stopped"


def test_deleting_keeps_the_run_unless_told(make: Callable[[], JobQueue], tmp_path: Path, wait: Wait) -> None:
    queue = make()
    for name, with_run in (("a", False), ("b", True)):
        hold = held(tmp_path)
        job = queue.add(settings(tmp_path, name))
        queue.tick()
        with pytest.raises(ConfigError, match="stop it first"):
            queue.delete(job.id, with_run=False)
        hold.unlink()
        ended(queue, job, wait)
        queue.delete(job.id, with_run=with_run)
        assert queue.all() == [] and job.run.exists() is not with_run


def test_a_folder_that_no_run_wrote_is_never_removed(make: Callable[[], JobQueue], tmp_path: Path) -> None:
    queue = make()
    job = queue.add(settings(tmp_path))
    job.run.mkdir(parents=True)
    (job.run / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not written by a training run"):
        queue.delete(job.id, with_run=True)
    assert (job.run / "thesis.txt").exists()


def test_a_used_run_folder_is_refused(make: Callable[[], JobQueue], tmp_path: Path) -> None:
    queue = make()
    queue.add(settings(tmp_path, "a"))
    with pytest.raises(OutputError, match="a job in the queue"):
        queue.add(settings(tmp_path, "a"))
    (tmp_path / "runs" / "b").mkdir(parents=True)
    (tmp_path / "runs" / "b" / "x").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        queue.add(settings(tmp_path, "b"))


@pytest.mark.parametrize("job_id", ["../../etc", "x", "", "20260101-000000-zzzzzz"])
def test_an_unknown_or_hostile_job_id_is_refused(make: Callable[[], JobQueue], job_id: str) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        make().get(job_id)


def test_two_servers_do_not_start_one_job_twice(make: Callable[[], JobQueue], tmp_path: Path) -> None:
    first, second = make(), make()
    held(tmp_path)
    job = first.add(settings(tmp_path, "a", 30))
    first.tick()
    second.tick()
    assert first.get(job.id).pid == second.get(job.id).pid


def test_a_half_written_event_waits_for_its_rest(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    view = RunView(file)
    file.write_text('{"event": "Validated", "step": 3, "loss": 0.5}\n{"event": "Vali')
    view.refresh()
    assert view.validation == {3: 0.5}
    with file.open("a") as stream:
        stream.write('dated", "step": 6, "loss": 0.25}\n')
    view.refresh()
    assert view.validation == {3: 0.5, 6: 0.25}


def test_a_part_of_a_curve_is_as_fine_as_a_plot_can_show_it(tmp_path: Path) -> None:
    facts = {"steps": 5000, "learning_rate": 1e-4, "seconds_left": 1.0, "images_per_second": 2.0}
    lines = [
        json.dumps({"event": "StepDone", "step": step, "loss": float(step), **facts})
        for step in range(1, 5001)
    ]
    lines += [json.dumps({"event": "Validated", "step": step, "loss": 0.5}) for step in (100, 1000)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    view = RunView(tmp_path / "events.jsonl")
    view.refresh()
    whole, part = view.curve(0, math.inf), view.curve(950, 1050)
    assert whole["steps"] == part["steps"] == 5000
    assert 300 < len(whole["losses"]) <= 400 and len(whole["validation"]) == 2
    assert part["losses"] == [(step, float(step)) for step in range(950, 1051)]
    assert part["validation"] == [(1000, 0.5)]


def test_the_best_step_and_the_report_are_shown(tmp_path: Path) -> None:
    view = RunView(tmp_path / "events.jsonl")
    score = Estimate(0.5, 0.4, 0.6)
    judged = Judged(20, (1.0,), (score,), 20, 1.0, "score 0.50")
    reported = Reported(tmp_path / "report.html", 20, 0.9, "score 0.60", more_steps=False)
    (tmp_path / "events.jsonl").write_text(f"{to_json(judged)}\n", encoding="utf-8")
    view.refresh()
    assert (view.full()["best"], view.full()["reported"]) == (
        {"step": 20, "strength": 1.0, "reason": "score 0.50"},
        False,
    )
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(f"{to_json(reported)}\n")
    view.refresh()
    assert (view.full()["best"]["strength"], view.full()["reported"]) == (0.9, True)


def test_a_step_that_fp16_left_out_is_counted_and_has_no_loss(tmp_path: Path) -> None:
    rest = {
        "epoch": 0,
        "learning_rate": 0.1,
        "grad_norm": math.inf,
        "num_images": 2,
        "images_per_second": 1.0,
    }
    with (tmp_path / "events.jsonl").open("w", encoding="utf-8") as stream:
        for step, loss in ((1, 0.5), (2, math.nan)):
            line = to_json(StepDone(step, 4, loss=loss, seconds_left=1.0, data_wait_share=0.0, **rest))
            assert "NaN" not in line and "Infinity" not in line
            stream.write(f"{line}\n")
    view = RunView(tmp_path / "events.jsonl")
    view.refresh()
    assert (view.step, view.loss) == (2, {1: 0.5})
    json.dumps([view.brief(), view.full()], allow_nan=False)


@pytest.mark.parametrize(
    "change",
    [
        {"created": "x"},
        {"status": "odd"},
        {"pid": "1"},
        {"pid": -1},
        {"pid": 2**40},
        {"run": "a\0b"},
        {"run": 5},
        {"more": 1},
        {"forced": 2},
    ],
)
def test_a_job_file_that_says_something_else_is_passed_over(tmp_path: Path, change: dict[str, Any]) -> None:
    queue = JobQueue(tmp_path / "jobs", tmp_path)
    job = queue.add(load_config(None, [f"output.folder={tmp_path / 'run'}", "output.name=style"]))
    file = tmp_path / "jobs" / job.id / "job.json"
    sound = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(sound | {"id": "../x"}), encoding="utf-8")
    assert queue.all() == [job]  # its folder says who it is
    file.write_text(json.dumps(sound | change), encoding="utf-8")
    assert queue.all() == []


def test_long_curves_are_thinned_to_means() -> None:
    points = thinned({step: float(step) for step in range(1, 1001)}, 100)
    assert len(points) == 100 and points[0] == (10, 5.5) and points[-1] == (1000, 995.5)


def test_a_detached_job_can_be_found_and_ended_by_its_mark(tmp_path: Path, wait: Wait) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    held(tmp_path)
    mark = new_mark()
    script = (
        "import sys; from pathlib import Path; from sdlora_ui.jobs import JobQueue\n"
        "from sdlora.config.toml import load_config\n"
        "home = Path(sys.argv[1])\n"
        "queue = JobQueue(home / 'jobs', home, (sys.executable, str(home / 'program.py')))\n"
        "queue.add(load_config(values={'output.folder': home / 'run', 'training.steps': 50}))\n"
        "queue.tick()"
    )
    environment = {**with_mark(mark), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
    queue = JobQueue(tmp_path / "jobs", tmp_path)
    [job] = queue.all()
    assert job.status == "running", "it outlives the process that started it"
    assert job.pid in [process.pid for process in marked(mark)]
    end_marked(mark)
    assert process_of(job) is None


def test_two_servers_start_each_job_once(make: Callable[[], JobQueue], tmp_path: Path, wait: Wait) -> None:
    first, second = make(), make()
    jobs = [first.add(settings(tmp_path, f"job{number}", 2)) for number in range(8)]
    stop = threading.Event()

    def tend(queue: JobQueue) -> None:
        while not stop.is_set():
            queue.tick()

    threads = [threading.Thread(target=tend, args=(queue,)) for queue in (first, second)]
    for thread in threads:
        thread.start()
    try:
        wait(lambda: all(first.get(job.id).status == "finished" for job in jobs))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for job in jobs:
        starts = [event for event in read_events_of(tmp_path, job) if event["event"] == "RunStarted"]
        assert len(starts) == 1, job.name


def read_events_of(tmp_path: Path, job: Job) -> list[dict[str, Any]]:
    lines = (tmp_path / "jobs" / job.id / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def written(tmp_path: Path, job: Job) -> None:
    """Write a job's file, as the server that died did."""
    file = tmp_path / "jobs" / job.id / "job.json"
    assert file.is_file()
    file.write_text(json.dumps(job.to_dict()), encoding="utf-8")


def test_a_job_whose_server_died_before_its_process_began_waits_again(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "a", 2))
    (tmp_path / "jobs" / job.id / "claim").touch()  # what earlier versions left behind
    written(tmp_path, replace(queue.get(job.id), status="running"))
    after = make()
    wait(lambda: after.get(job.id).status == "waiting")
    after.tick()
    assert ended(after, job, wait).status == "finished"


def test_a_job_that_ended_before_its_server_wrote_the_process_down_is_not_run_again(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "a", 2))
    queue.tick()
    ended(queue, job, wait)
    written(tmp_path, replace(queue.get(job.id), status="running", pid=None, process_started=None))
    after = make()
    wait(lambda: after.get(job.id).status == "finished")
    # but an answer of an earlier start says nothing of one that was under way
    written(tmp_path, replace(after.get(job.id), status="stopped"))
    after.resume(job.id)
    after.tick()
    assert ended(after, job, wait).status == "finished"
    assert len([event for event in read_events_of(tmp_path, job) if event["event"] == "RunStarted"]) == 2


def test_a_job_whose_server_died_before_it_wrote_the_process_down_is_taken_over(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue, hold = make(), held(tmp_path)
    job = queue.add(settings(tmp_path, "a", 4))
    queue.tick()
    pid = queue.get(job.id).pid
    written(tmp_path, replace(queue.get(job.id), pid=None, process_started=None))
    after = make()
    assert (after.get(job.id).status, after.get(job.id).pid) == ("running", pid)
    after.tick()
    hold.unlink()
    assert ended(after, job, wait).status == "finished"
    assert len([event for event in read_events_of(tmp_path, job) if event["event"] == "RunStarted"]) == 1


def test_a_lock_that_another_server_holds_leaves_its_job_alone(
    make: Callable[[], JobQueue], tmp_path: Path
) -> None:
    queue = make()
    job = queue.add(settings(tmp_path, "a", 2))
    with FileLock(tmp_path / "jobs" / "starting.lock", thread_local=False):
        written(tmp_path, replace(queue.get(job.id), status="running"))
        assert queue.get(job.id).status == "running"
    assert queue.get(job.id).status == "waiting"


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    make: Callable[[], JobQueue], tmp_path: Path, wait: Wait
) -> None:
    queue, hold = make(), held(tmp_path)
    job = queue.add(settings(tmp_path, "a", 4))
    queue.tick()
    wait(lambda: queue.view(job.id).step >= 1)
    queue.kill(job.id)
    assert ended(queue, job, wait).status == "stopped"
    hold.unlink()
    assert queue.resume(job.id).resume
    queue.tick()
    assert ended(queue, job, wait).status == "finished"


def test_a_run_whose_steps_are_made_is_finishing_not_starting(tmp_path: Path) -> None:
    file, view = tmp_path / "events.jsonl", RunView(tmp_path / "events.jsonl")

    def told(kind: str, **values: Any) -> tuple[bool, bool]:
        with file.open("a") as stream:
            stream.write(json.dumps({"event": kind, **values}) + "\n")
        view.refresh()
        return view.started, view.finishing

    step = {"loss": 0.1, "learning_rate": 1e-4, "seconds_left": 1.0, "images_per_second": 2.0, "steps": 2}
    start = {"first_step": 0, "expected_seconds": 1.0, "expected_bytes": 5, "steps": 2}
    assert told("RunStarted", **start) == (True, False)
    assert told("StepDone", step=1, **step) == (True, False)
    assert told("StepDone", step=2, **step) == (True, True)
    assert told("RunFinished", adapter_file="x", seconds=1.0) == (False, True)
    assert view.brief()["finishing"]
    view.begin()  # its process is started once more
    assert not view.finishing
