"""A tab of the page is one file and one line in the table: here, this file is it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from sdlora_ui.app import make_app
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site
from sdlora_ui.tabs.shared import Shell, hint
from sdlora_ui.tabs.table import TABS, Tab
from starlette.testclient import TestClient


def build(site: Site, shell: Shell, tab: gr.Tab) -> None:
    """Put a page into the current tab: it lists the runs, and sends a folder to the training page."""
    prefix = gr.Textbox("", elem_id="judge-prefix")
    listed = gr.HTML(hint("not looked yet"), elem_id="judge-runs")

    def look(text: str) -> str:
        return hint(f"{text}: {', '.join(choice.label for choice in site.runs()) or 'no run'}")

    tab.select(look, prefix, listed)
    use = gr.Button("Train on it", elem_id="judge-use")
    use.click(lambda text: [gr.Tabs(selected="train"), text], prefix, [shell.tabs, shell.folder])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folders = {name: Path(name) for name in ("runs", "images", "data")}
    return Site.open(AllowedPaths.of(tmp_path, **folders))


def test_a_tab_is_added_by_one_line_and_its_events_are_answered(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABS, "judge", Tab("Judge", build))
    with TestClient(make_app(site)) as client:
        config = client.get("/config").json()
        parts = {part["id"]: part for part in config["components"]}
        assert config.get("run_history") in (False, None), (
            "what is typed would be kept in the browser's storage"
        )
        titles = [part["props"]["label"] for part in parts.values() if part["type"] == "tabitem"]
        assert titles == ["1 Data set", "2 Train", "3 Generate", "4 Export & tools", "5 Judge"]
        ids = {part["props"].get("elem_id"): number for number, part in parts.items()}
        assert answer(client, config, ids["judge-runs"], ["runs here"]) == [hint("runs here: no run")]
        (tabs, folder) = answer(client, config, ids["chosen-folder"], ["some/folder"], "judge-use")
        assert tabs["selected"] == "train" and folder == "some/folder"


def answer(client: Any, config: Any, output: int, given: list[Any], pressed: str | None = None) -> Any:
    """Return what the only event answers that writes to a part, as the browser would be told."""
    parts = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    (event,) = (
        event
        for event in config["dependencies"]
        if output in event["outputs"]
        and (pressed is None or pressed in [parts.get(number) for number, _ in event["targets"]])
    )
    body = {"data": given, "fn_index": event["id"], "session_hash": "test"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    told = client.get("/gradio_api/queue/data", params={"session_hash": "test"}).text
    (completed,) = (line for line in told.splitlines() if "process_completed" in line)
    return json.loads(completed.removeprefix("data: "))["output"]["data"]
