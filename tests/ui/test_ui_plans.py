"""A run that cannot be is refused before its start, in the words of the training command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sdlora_ui.plans import Plans
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site
from sdlora_ui.worker_client import CallFailed, WorkerClient

from sdlora.config.schema import Config
from sdlora.config.toml import load_config

PROGRAM = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    steps = asked["arguments"]["values"].get("training.steps")
    if steps == 1:
        said = {"error": "this base is broken", "kind": "ModelError"}
    elif steps == 2:
        said = {"error": "not enough memory", "kind": "TrainingError"}
    else:
        said = {"result": {"device": "cpu", "steps": steps, "asked": True}}
    print(json.dumps({"id": asked["id"], "progress": [0, 1], "note": "looking"}), flush=True)
    print(json.dumps({"id": asked["id"], **said}), flush=True)
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    started = Site.open(AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path("data")))
    started.desk = WorkerClient(tmp_path, program=[sys.executable, "-c", PROGRAM])
    started.plans = Plans(started.desk, started.queue)
    yield started
    started.end()


@pytest.fixture
def config(image_folder: Callable[..., Path]) -> Callable[[int], Config]:
    folder = image_folder(2)
    return lambda steps: load_config(values={"data.folder": folder, "training.steps": steps})


def test_what_cannot_be_is_refused_with_the_commands_words(
    site: Site, config: Callable[[int], Config]
) -> None:
    with pytest.raises(CallFailed, match="this base is broken"):
        list(site.plans.refusals(config(1)))
    assert [answer.progress for answer in site.plans.refusals(config(3))] == [(0, 1, "looking")]
    assert site.plans.device == "cpu"


def test_a_known_plan_is_not_worked_out_again_until_an_image_changes(
    site: Site, config: Callable[[int], Config]
) -> None:
    assert list(site.plans.refusals(config(3))) and list(site.plans.refusals(config(3))) == []
    folder = config(3).data.folder
    assert folder is not None
    (folder / "thing00.txt").write_text("another caption")
    assert list(site.plans.refusals(config(3)))


def test_memory_that_another_job_holds_now_is_no_reason(
    site: Site, config: Callable[[int], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CallFailed, match="not enough memory"):
        list(site.plans.refusals(config(2)))
    monkeypatch.setattr("sdlora_ui.plans.trains", lambda queue: True)
    assert list(site.plans.refusals(config(2)))
    with pytest.raises(CallFailed, match="this base is broken"):
        list(site.plans.refusals(config(1)))


def test_nothing_is_planned_beside_a_job_on_the_gpu(
    site: Site, config: Callable[[int], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlora_ui.plans.trains", lambda queue: True)
    site.plans.device = "cuda"
    assert list(site.plans.refusals(config(1))) == []
    assert not site.desk.running
