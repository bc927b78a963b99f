"""Folders and the mirror that the owner set once are there again; nobody else sets or gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
from sdlora_ui.owner import MOST_NEGATIVES, Owner
from sdlora_ui.server.allowed_paths import AllowedPaths, PathRefused, model_files

from sdlora.errors import ConfigError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    for name in ("me/photos/cat", "me/.ssh", "me/models", "home"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "me/models/mine.safetensors").write_bytes(b"")
    return tmp_path


def paths_of(place: Path, *, local: bool = True) -> AllowedPaths:
    folders = {name: Path(name) for name in ("runs", "images", "data")}
    return AllowedPaths.of(place / "home", **folders, local=local)


def test_a_folder_that_was_added_is_there_for_later_servers_of_this_machine_alone(place: Path) -> None:
    photos, models, file = place / "me/photos", place / "me/models", place / "settings/page.json"
    paths = paths_of(place)
    with pytest.raises(PathRefused):
        paths.readable(photos)
    owner = Owner(paths, file)
    assert owner.allow(str(photos)) == photos and owner.add_models(str(models)) == models
    assert paths.writable(photos / "cat" / "a.txt") == photos / "cat" / "a.txt"
    with pytest.raises(PathRefused):
        paths.writable(models / "x.safetensors")  # models are only read
    later = paths_of(place)
    Owner(later, file)
    assert later.readable(photos) == photos
    assert model_files(later, "base") == [models / "mine.safetensors"]
    strangers = paths_of(place, local=False)
    Owner(strangers, file)
    for folder in (photos, models):
        with pytest.raises(PathRefused):
            strangers.readable(folder)


def test_where_others_can_reach_the_server_nothing_is_added(place: Path) -> None:
    owner = Owner(paths_of(place, local=False), place / "page.json")
    for add in (owner.allow, owner.add_models, owner.set_endpoint):
        with pytest.raises(PathRefused, match="on the machine itself only"):
            add(str(place / "me/photos"))
    assert not (place / "page.json").exists()


@pytest.mark.parametrize(
    "name",
    ["me", "", "me/.ssh", "me/no such", "/", "/etc", "//server/share", "\\\\server\\x", "\0", "x" * 300],
)
def test_half_of_the_machine_is_not_added(place: Path, name: str) -> None:
    text = name if name.startswith(("/", "\\", "\0")) or not name else str(place / name)
    owner = Owner(paths_of(place), place / "page.json")
    with pytest.raises(PathRefused):
        owner.allow(text)
    assert owner.model_folders == [] and not (place / "page.json").exists()
    assert not paths_of(place).can_be_added(text)


def test_a_link_into_a_hidden_folder_is_not_added(place: Path) -> None:
    (place / "me/nice").symlink_to(place / "me/.ssh")
    with pytest.raises(PathRefused):
        Owner(paths_of(place), place / "page.json").allow(str(place / "me/nice"))


def test_a_mirror_is_an_address_and_remembered(place: Path) -> None:
    owner = Owner(paths_of(place), place / "page.json")
    assert owner.set_endpoint(" https://mirror.example/ ") == "https://mirror.example"
    assert Owner(paths_of(place), place / "page.json").endpoint == "https://mirror.example"
    for text in ("mirror.example", "file:///etc", "https://", "http://x/?a=b", "http://[::1"):
        with pytest.raises(ConfigError, match="give an address"):
            owner.set_endpoint(text)
    assert owner.set_endpoint("") == ""


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"allowed": 3, "models": [7], "endpoint": {}}', '{"allowed": ["/"]}']
)
def test_damaged_settings_grant_nothing(place: Path, text: str) -> None:
    (place / "page.json").write_text(text)
    paths = paths_of(place)
    owner = Owner(paths, place / "page.json")
    assert (paths.granted.allowed, paths.granted.bases, owner.endpoint) == ((), (), "")


def test_a_negative_prompt_is_kept_for_later_servers_and_removed(place: Path) -> None:
    file = place / "settings/page.json"
    owner = Owner(paths_of(place), file)
    assert owner.keep_negative(" my  own ", " blurry, text ") == "my own"
    owner.keep_negative("other", "watermark")
    owner.keep_negative("my own", "blurry")
    later = Owner(paths_of(place), file)
    assert later.negatives == {"my own": "blurry", "other": "watermark"}
    later.remove_negative("my own")
    assert Owner(paths_of(place), file).negatives == {"other": "watermark"}
    with pytest.raises(ConfigError, match="none of yours"):
        later.remove_negative("my own")


def test_negative_prompts_of_the_owner_are_not_for_strangers(place: Path) -> None:
    file = place / "page.json"
    Owner(paths_of(place), file).keep_negative("a", "b")
    strangers = Owner(paths_of(place, local=False), file)
    assert strangers.negatives == {}
    with pytest.raises(PathRefused, match="on the machine itself only"):
        strangers.keep_negative("c", "d")
    with pytest.raises(PathRefused, match="on the machine itself only"):
        strangers.remove_negative("a")
    assert Owner(paths_of(place), file).negatives == {"a": "b"}


@pytest.mark.parametrize(
    ("name", "text"), [("", "x"), ("a", " "), ("a" * 61, "x"), ("a", "x" * 4001), (" \n ", "x")]
)
def test_a_negative_prompt_needs_a_name_and_has_bounds(place: Path, name: str, text: str) -> None:
    owner = Owner(paths_of(place), place / "page.json")
    with pytest.raises(ConfigError, match="negative prompt: "):
        owner.keep_negative(name, text)
    for number in range(MOST_NEGATIVES):
        owner.keep_negative(str(number), "x")
    owner.keep_negative("5", "y")
    with pytest.raises(ConfigError, match="remove one first"):
        owner.keep_negative("one more", "x")
    assert len(owner.negatives) == MOST_NEGATIVES


def test_damaged_negative_prompts_are_passed_over(place: Path) -> None:
    file = place / "page.json"
    file.write_text('{"negatives": {"a": "b", "c": 5, "": "x", "d": ["y"]}}')
    assert Owner(paths_of(place), file).negatives == {"a": "b"}
    file.write_text('{"negatives": ["a"]}')
    assert Owner(paths_of(place), file).negatives == {}
