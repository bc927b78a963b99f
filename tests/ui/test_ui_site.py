"""What the parts of a server know of each other: no run starts on captions that are being written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site
from sdlora_ui.tabs.train import begin_run
from sdlora_ui.worker_client import WorkerClient

from sdlora.config.toml import load_config
from sdlora.errors import ConfigError

# A captioner that is at work for as long as there is a file "hold" where it works.
PROGRAM = """
import json, sys, time
from pathlib import Path
for line in sys.stdin:
    asked = json.loads(line)
    while Path("hold").exists():
        time.sleep(0.01)
    print(json.dumps({"id": asked["id"], "result": {"written": 1}}), flush=True)
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    started = Site.open(AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path(".")))
    started.captioning.worker = WorkerClient(tmp_path, program=[sys.executable, "-c", PROGRAM])
    yield started
    (tmp_path / "hold").unlink(missing_ok=True)
    started.end()


def test_a_run_waits_for_the_captions_of_its_folder(
    site: Site, tmp_path: Path, image_folder: Callable[..., Path], wait: Callable[..., Any]
) -> None:
    folder = image_folder(2)
    (tmp_path / "hold").touch()
    values = {"output.name": "x", "output.folder": tmp_path / "runs" / "x", "data.folder": folder}
    job = site.queue.add(load_config(values=values))
    model = {"model": "owner/name"}
    site.captioning.start(folder, model, preview=False)
    assert site.captioning.holds([folder.parent]) and not site.captioning.holds([tmp_path / "runs"])
    with pytest.raises(ConfigError, match=f"{folder.name}: its captions are being written"):
        site.queue.start(job.id)
    site.queue.tick()
    assert site.queue.get(job.id).status == "waiting"
    raw = {"model.base": "mini", "data.folder": str(folder), "output.name": "y"}
    assert "its captions are being written" in list(begin_run(site, raw))[-1]
    (tmp_path / "hold").unlink()
    wait(lambda: site.captioning.state(folder)["status"] == "finished")
    assert not site.captioning.holds([folder])
    (tmp_path / "hold").touch()
    site.captioning.start(folder, model, preview=True)  # writes nothing
    assert not site.captioning.holds([folder])
