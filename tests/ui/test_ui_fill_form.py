"""The form filled at once, through the page's own events: presets, TOML, drawing many images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sdlora_ui.app import make_app
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site
from sdlora_ui.tabs.prompt_rows import from_rows
from starlette.testclient import TestClient

from sdlora.errors import ConfigError


class Page:
    """The page without a browser: its parts by their ids, its events asked as a browser asks them."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.config = client.get("/config").json()
        self.parts = {part["id"]: part for part in self.config["components"]}
        self.ids = {part["props"].get("elem_id"): number for number, part in self.parts.items()}

    def press(self, element: str, output: str, **typed: Any) -> dict[str, Any]:
        """Return element id -> what the event of ``element`` that writes to ``output`` tells it."""
        (event,) = (
            event
            for event in self.config["dependencies"]
            if self.ids[output] in event["outputs"]
            and self.ids[element] in [number for number, _ in event["targets"]]
        )
        names = [self.parts[number]["props"].get("elem_id") for number in event["inputs"]]
        held = {
            name: self.parts[number]["props"].get("value")
            for name, number in zip(names, event["inputs"], strict=True)
        }
        given = [typed.get(str(name).replace("-", "_"), held[name]) for name in names]
        body = {"data": given, "fn_index": event["id"], "session_hash": "test"}
        assert self.client.post("/gradio_api/queue/join", json=body).status_code == 200
        told = self.client.get("/gradio_api/queue/data", params={"session_hash": "test"}).text
        (completed,) = (line for line in told.splitlines() if "process_completed" in line)
        answer = json.loads(completed.removeprefix("data: "))["output"]["data"]
        shown = [self.parts[number]["props"].get("elem_id") for number in event["outputs"]]
        return dict(zip(shown, answer, strict=True))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folders = {name: Path(name) for name in ("runs", "images", "data")}
    site = Site.open(AllowedPaths.of(tmp_path_factory.mktemp("home"), local=True, **folders))
    with TestClient(make_app(site)) as client:
        yield Page(client)


def skipped(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update" and "value" not in value


def test_a_preset_is_put_into_its_controls_and_leaves_the_others(page: Page) -> None:
    told = page.press("preset", "filling-said", preset="detailed-subject")
    assert told["set-adapter-rank"] == "32" and told["set-adapter-targets"] == "all"
    assert told["set-output-presets"] == "detailed-subject"
    assert skipped(told["train-folder"]) and skipped(told["set-training-steps"])
    assert "Rank" in told["filling-said"] and "Targets" in told["filling-said"]


def test_a_text_is_used_or_said_to_be_wrong(page: Page) -> None:
    wrong = page.press("settings-use", "filling-said", settings_text="[adapter]\nrnak = 3\n")
    assert "rnak" in wrong["filling-said"] and all(
        skipped(v) for k, v in wrong.items() if k != "filling-said"
    )
    right = page.press("settings-use", "filling-said", settings_text="[adapter]\nrank = 3\n")
    assert right["set-adapter-rank"] == "3"


def test_the_form_is_shown_as_toml(page: Page) -> None:
    told = page.press("settings-show", "settings-text", set_adapter_rank="5", train_name="ink")
    assert "rank = 5" in told["settings-text"] and 'name = "ink"' in told["settings-text"]


def test_the_form_is_kept_as_a_preset(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDLORA_CONFIG_FOLDER", str(tmp_path))
    told = page.press("preset-keep", "filling-said", preset_name="mine", set_adapter_rank="5")
    assert ["mine (yours)", "mine"] in told["preset"]["choices"] and told["filling-said"] == ""
    assert "rank = 5" in (tmp_path / "presets" / "mine.toml").read_text(encoding="utf-8")


def test_what_is_no_grid_or_list_of_prompts_is_said_before_anything_is_drawn(page: Page) -> None:
    grid = page.press("draw-axes", "drawing", axis_across="colour=1", prompt="a cat")
    assert "give one of strength" in grid["drawing"]
    lines = page.press("draw-lines", "drawing", lines_text="a dog --s oops")
    assert "line 1" in lines["drawing"]


def test_rows_of_the_previews_table_become_lines_of_the_settings(page: Page) -> None:
    rows = {"lines": ["a cat --d 7 --w 64 --am 0.5", "a dog"], "at": 1}
    told = page.press("preview-rows", "set-sample-prompts", preview_rows=json.dumps(rows))
    assert told["set-sample-prompts"] == "a cat --d 7 --w 64 --am 0.5\na dog"
    assert told["set-sample-prompt-options"] == "true"
    plain = page.press("preview-rows", "set-sample-prompts", preview_rows=json.dumps({"lines": ["a dog"]}))
    assert plain["set-sample-prompts"] == "a dog" and skipped(plain["set-sample-prompt-options"])
    none = page.press("preview-rows", "set-sample-prompts", preview_rows=json.dumps({"lines": []}))
    assert none["set-sample-prompts"] == ""


@pytest.mark.parametrize("lines", [None, "a cat", [1], ["a\nb"], ["a"] * 1001, [""]])
def test_what_the_previews_table_never_sends_is_refused(lines: Any) -> None:
    with pytest.raises(ConfigError, match="reload it"):
        from_rows(lines)
