"""Folders to choose from are those that may be read, and nothing of the rest is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from sdlora_ui.server.allowed_paths import AllowedPaths, MissingPath, PathRefused
from sdlora_ui.server.folders import MOST_LISTED, list_folders


@pytest.fixture
def paths(tmp_path: Path) -> AllowedPaths:
    home = tmp_path / "home"
    for name in ("data/cats/small", "data/.hidden", "runs/.sdlora-ui", "images", "extra"):
        (home / name).mkdir(parents=True)
    (tmp_path / "secret" / "inside").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "notes.txt", ".c.png"):
        (home / "data" / "cats" / name).write_bytes(b"")
    (home / "data" / "out").symlink_to(tmp_path / "secret")
    folders = {name: Path(name) for name in ("runs", "images", "data")}
    return AllowedPaths.of(home, **folders, allowed=[Path("extra")])


def test_one_begins_with_the_servers_folders_and_goes_inside(paths: AllowedPaths) -> None:
    start = list_folders(paths, "")
    assert [each["name"] for each in start["folders"]] == ["data", "extra", "runs", "images"]
    data = list_folders(paths, start["folders"][0]["path"])
    assert [(each["name"], each["images"]) for each in data["folders"]] == [("cats", 2)]
    cats = list_folders(paths, data["folders"][0]["path"])
    assert (cats["images"], cats["up"], data["up"]) == (2, str(paths.data), "")
    assert list_folders(paths, "runs")["folders"] == []


@pytest.mark.parametrize(
    "text", ["..", "/", "data/out", "data/out/inside", "data/../../secret", "//x/y", "\0"]
)
def test_nothing_outside_is_listed(paths: AllowedPaths, text: str) -> None:
    with pytest.raises(PathRefused):
        list_folders(paths, text)


def test_a_long_list_is_cut(paths: AllowedPaths) -> None:
    for number in range(MOST_LISTED + 1):
        (paths.data / "cats" / f"f{number}").mkdir()
    listed = list_folders(paths, "data/cats")
    assert len(listed["folders"]) == MOST_LISTED and listed["more"]
    with pytest.raises(MissingPath):
        list_folders(paths, "data/nothing")
