"""A new folder starts automatic, a known one where it was left; what was set is listed and taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from sdlora_ui.folder_settings import (
    automatic,
    changed,
    demo_settings,
    keep,
    reset,
    same_folder,
    settings_for,
    trigger_of,
)
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site

TAB = "0123456789abcdef"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    started = Site.open(AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path("data")))
    for name in ("ink-icons", "cats", "dogs"):
        (started.paths.data / name).mkdir()
    (started.paths.data / "ink-icons" / "README.md").write_text("Trigger word: `inkicon`")
    return started


def test_nothing_of_the_demo_is_left_for_another_folder(site: Site) -> None:
    demo, cats = site.paths.data / "ink-icons", site.paths.data / "cats"
    held = demo_settings(site, demo)
    assert {"output.license", "output.description", "adapter.targets", "sample.steps"} <= {
        setting.key for setting in changed(held)
    }
    assert (held["model.base"], held["data.trigger_word"], held["output.folder"]) == ("mini", "inkicon", "")
    keep(site, held, TAB)
    after = settings_for(site, str(cats), held)
    assert after == automatic(site) | {"data.folder": str(cats)} and changed(after) == []
    assert after["model.base"] == "" and after["data.trigger_word"] == ""


def test_a_known_folder_comes_back_as_it_was_left_and_the_base_that_was_chosen_stays(site: Site) -> None:
    cats, dogs = (str(site.paths.data / name) for name in ("cats", "dogs"))
    mine = {
        "model.base": "owner/name",
        "adapter.rank": "3",
        "data.trigger_word": "zork",
        "output.name": "first",
    }
    keep(site, settings_for(site, cats, {}) | mine, TAB)
    other = settings_for(site, dogs, automatic(site) | {"model.base": "owner/name", "data.folder": cats})
    assert (other["model.base"], other["adapter.rank"], other["data.trigger_word"]) == ("owner/name", "", "")
    back = settings_for(site, "data/cats", other)
    assert (back["adapter.rank"], back["data.trigger_word"], back["output.name"]) == (
        "3",
        "zork",
        other["output.name"],
    )
    assert trigger_of(site, cats) == "zork" and trigger_of(site, dogs) == ""
    assert same_folder(site, "data/cats", cats) and not same_folder(site, "", cats)


def test_one_setting_or_all_go_back_to_automatic(site: Site) -> None:
    held = automatic(site) | {
        "adapter.rank": "3",
        "training.steps": "7",
        "output.name": "x",
        "data.flip": True,
    }
    keys = list(held)
    assert {setting.key for setting in changed(held)} == {"adapter.rank", "training.steps", "data.flip"}
    some = reset(site, held, "adapter.rank", keys)
    assert (some["adapter.rank"], some["training.steps"]) == ("", "7")
    whole = reset(site, held, "all", keys)
    assert changed(whole) == [] and whole["output.name"] == "x"
    assert reset(site, held, "no.such", keys) == held
