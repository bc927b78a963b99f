"""The routes of the queue and of curves: what they take, and what they refuse."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from past_runs import put_run
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.server.routes import MOST_CURVES, routes
from sdlora_ui.shell_runs import held_inodes
from sdlora_ui.site import Site
from starlette.applications import Starlette
from starlette.testclient import TestClient

from sdlora.files import parse_json
from sdlora.run_folder import STOP, RunFolder


class Asker:
    """A page's requests to a server that starts no jobs by itself."""

    def __init__(self, home: Path) -> None:
        folders = {"runs": Path("runs"), "images": Path("out"), "data": Path("data")}
        self.home = home
        self.site = Site.open(AllowedPaths.of(home, **folders, allowed=[], local=False))
        parts = (self.site.paths, self.site.queue, self.site.captioning, self.site.drafts, self.site.owner)
        self.client = TestClient(Starlette(routes=routes(*parts, self.site.adapters)))

    def get(self, what: str, status: int = 200, **asked: Any) -> Any:
        answer = self.client.get(f"/sdlora/{what}", params=asked)
        assert answer.status_code == status, answer.text
        return answer.json()

    def post(self, what: str, body: str = "{}", status: int = 200) -> Any:
        headers = {"x-sdlora": "1", "content-type": "application/json"}
        answer = self.client.post(f"/sdlora/{what}", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        return parse_json(answer.text)


@pytest.fixture
def page(tmp_path: Path) -> Asker:
    return Asker(tmp_path)


def test_waiting_jobs_are_moved_and_given_a_time(page: Asker) -> None:
    soon = time.time() + 3600
    first, second = [put_run(page.home, name, 4, status="waiting", not_before=soon) for name in "ab"]
    moved = page.post(f"jobs/{second}/move", '{"by": -1}')
    jobs = {job["id"]: job for job in page.get("jobs")["jobs"]}
    assert jobs[second]["order"] == moved["order"] < jobs[first]["order"]
    assert jobs[first]["waits"] is True
    assert page.post(f"jobs/{first}/wait", '{"until": null}')["not_before"] is None
    assert page.post(f"jobs/{first}/wait", f'{{"until": {soon}}}')["not_before"] == soon


@pytest.mark.parametrize(
    ("action", "body", "status"),
    [
        ("move", "{}", 400),
        ("move", '{"by": true}', 400),
        ("move", '{"by": 1e999}', 400),
        ("move", '{"by": "1"}', 400),
        ("wait", "{}", 400),
        ("wait", '{"until": "now"}', 400),
        ("wait", '{"until": 1e30}', 422),
        ("wait", '{"until": -1e30}', 422),
        ("wait", '{"until": ' + "9" * 40 + "}", 422),
        ("extend", '{"steps": 1.5}', 400),
        ("extend", '{"steps": 10}', 422),  # it waits, and is not finished
        ("no-such-thing", "{}", 422),
    ],
)
def test_what_means_nothing_changes_nothing(page: Asker, action: str, body: str, status: int) -> None:
    job = put_run(page.home, "a", 4, status="waiting", not_before=time.time() + 3600)
    before = page.get(f"jobs/{job}")
    assert "error" in page.post(f"jobs/{job}/{action}", body, status)
    after = page.get(f"jobs/{job}")
    assert (after["order"], after["not_before"], after["goal"]) == (
        before["order"],
        before["not_before"],
        None,
    )


def test_a_run_without_checkpoints_cannot_go_on(page: Asker) -> None:
    job = put_run(page.home, "a", 4)
    assert "no checkpoint" in page.post(f"jobs/{job}/extend", '{"steps": 10}', 422)["error"]
    (page.home / "runs" / "a" / "checkpoints" / "step-000004").mkdir(parents=True)
    (page.home / "runs" / "a" / "checkpoints" / "step-000004" / "adapter.safetensors").touch()
    assert page.post(f"jobs/{job}/extend", '{"steps": 10}')["goal"] == 14


def test_curves_of_several_runs_are_given_at_once(page: Asker) -> None:
    ids = [put_run(page.home, f"run{number}", 40) for number in range(MOST_CURVES + 2)]
    curves = page.get("curves", run=ids, **{"from": "10", "to": "20"})["curves"]
    assert [curve["id"] for curve in curves] == ids[:MOST_CURVES]
    assert [step for step, _ in curves[0]["losses"]] == list(range(10, 21))
    assert [step for step, _ in curves[0]["validation"]] == [10, 20]
    assert len(page.get("curves", run=ids[0])["curves"][0]["losses"]) == 40
    page.get("curves", 400, run=ids[0], to="the end")
    page.get("curves", 422, run="../../etc")


@pytest.mark.skipif(held_inodes() is None, reason="only Linux lists the locks that are held")
def test_a_run_in_a_shell_is_listed_with_the_jobs_and_can_be_stopped(page: Asker) -> None:
    job = put_run(page.home, "a-job", 20)
    put_run(page.home, "a-shell", 20, status="running")
    folder = RunFolder(page.home / "runs" / "a-shell")
    [shells] = [path for path in (page.home / "runs" / ".sdlora-ui" / "jobs").iterdir() if path.name != job]
    (shells / "events.jsonl").rename(folder.events_file)
    (shells / "job.json").unlink()
    with FileLock(folder.lock_file):
        listed = {run["name"]: run for run in page.get("jobs")["jobs"]}
        run = listed["a-shell"]
        assert (run["status"], run["step"], listed["a-job"]["id"]) == ("running", 20, job)
        full = page.get(f"jobs/{run['id']}")
        assert full["prompts"] == ["prompt a of a-shell", "prompt b of a-shell"]
        assert [step for step, _ in full["samples"]] == [10, 20] and full["command"] == ""
        curves = page.get("curves", run=[job, run["id"]])["curves"]
        assert [curve["name"] for curve in curves] == ["a-job", "a-shell"]
        for refused in ("delete", "resume", "kill", "extend", "move"):
            assert (
                "in a shell" in page.post(f"jobs/{run['id']}/{refused}", '{"confirmed": true}', 422)["error"]
            )
        page.get(f"jobs/{run['id']}/log", 422)
        assert page.post(f"jobs/{run['id']}/stop")["status"] == "stopping"
    assert folder.request_file(STOP).exists()
