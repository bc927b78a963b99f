"""The training form: what is slow never comes after what is newer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sdlora_ui.app import make_app
from sdlora_ui.plans import Plans
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site
from sdlora_ui.worker_client import WorkerClient
from starlette.testclient import TestClient

# A planner that answers when there is no file "hold" where it works (any more), and says that it was asked.
PROGRAM = """
import json, sys, time
from pathlib import Path
plan = {"device": "cpu", "images": 2, "defaults": [], "steps": 7, "seconds": 1, "bytes": 1, "free_bytes": 9}
for line in sys.stdin:
    asked = json.loads(line)
    Path("asked").touch()
    while Path("hold").exists():
        time.sleep(0.01)
    if "task" in asked:
        print(json.dumps({"id": asked["id"], "result": plan}), flush=True)
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    started = Site.open(AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path(".")))
    started.desk = WorkerClient(tmp_path, program=[sys.executable, "-c", PROGRAM])
    started.plans = Plans(started.desk, started.queue)
    return started


def test_a_plan_that_is_slower_than_the_next_one_is_not_shown_after_it(
    site: Site, tmp_path: Path, image_folder: Callable[..., Path], wait: Callable[..., Any]
) -> None:
    folder, hold = str(image_folder(2)), tmp_path / "hold"
    hold.touch()
    with TestClient(make_app(site)) as client:
        config = client.get("/config").json()
        parts = {part["id"]: part["props"] for part in config["components"]}
        ids = {props.get("elem_id"): number for number, props in parts.items()}
        edit = next(
            event
            for event in config["dependencies"]
            if event["outputs"] == [ids["plan"], ids["changed"]]
            and [ids["train-name"], "input"] in event["targets"]
        )

        def send(base: str, steps: str) -> None:
            texts = {"base": base, "train-folder": folder, "train-name": "x", "set-training-steps": steps}
            given = [
                texts.get(parts[part].get("elem_id"), parts[part].get("value")) for part in edit["inputs"]
            ]
            body = {"data": given, "fn_index": edit["id"], "session_hash": "one"}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200

        send("mini", "7")
        wait((tmp_path / "asked").exists)
        send("", "8")
        draft = tmp_path / "runs" / ".sdlora-ui" / "forms" / "train.json"
        wait(lambda: json.loads(draft.read_text())["training.steps"] == "8")
        hold.unlink()
        answered = client.get("/gradio_api/queue/data", params={"session_hash": "one"}).text
    assert answered.count("process_completed") == 2
    assert "Choose your base model" in answered and "Training &gt; Steps" in answered
    assert "images to train on" not in answered
