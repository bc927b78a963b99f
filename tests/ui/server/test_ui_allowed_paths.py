"""Only the folders that the user named can be read or written, whatever a request says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sdlora_ui.server.allowed_paths import (
    PlaceRefused,
    Places,
    model_files,
    program_folders,
    usual_model_folders,
)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    home = tmp_path / "home"
    for name in ("runs", "pictures", "data", "extra", "models/checkpoints"):
        (home / name).mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "diary.png").write_bytes(b"private")
    return Places.of(
        home,
        runs=Path("runs"),
        pictures=Path("pictures"),
        data=Path("data"),
        allowed=[Path("extra")],
        models=[home / "models" / "checkpoints"],
    )


@pytest.mark.parametrize(
    "text",
    [
        "../secret/diary.png",
        "runs/../../secret/diary.png",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "~nobody/x",
        "",
        " ",
        ".",
        "runs2",
        "//server/share/x.png",
        "\\\\server\\share\\x.png",
        "runs/\0/../../../etc/passwd",
        "data/../../secret",
    ],
)
def test_a_path_outside_is_refused(places: Places, text: str) -> None:
    with pytest.raises(PlaceRefused, match="outside the folders"):
        places.readable(text)
    with pytest.raises(PlaceRefused):
        places.writable(text)


def test_paths_inside_are_resolved_from_the_home(places: Places) -> None:
    assert places.readable("runs/a/../b.png") == places.home / "runs" / "b.png"
    assert places.writable(places.home / "extra" / "x") == places.home / "extra" / "x"


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_to_the_outside_is_refused(places: Places, tmp_path: Path) -> None:
    (places.data / "link").symlink_to(tmp_path / "secret", target_is_directory=True)
    (places.data / "picture.png").symlink_to(tmp_path / "secret" / "diary.png")
    for name in ("data/link/diary.png", "data/picture.png"):
        with pytest.raises(PlaceRefused):
            places.readable(name)


def test_model_folders_may_be_read_but_not_written(places: Places) -> None:
    file = places.models[0] / "base.safetensors"
    assert places.readable(file) == file
    with pytest.raises(PlaceRefused):
        places.writable(file)


def test_the_queues_records_cannot_be_written_by_request(places: Places) -> None:
    with pytest.raises(PlaceRefused, match="records"):
        places.writable(places.state / "jobs" / "x" / "job.json")


def test_programs_to_export_into_are_told_from_those_that_were_not_named(tmp_path: Path) -> None:
    for inside in ("webui/models/Lora", "ComfyUI/models/loras", "plain/pictures"):
        (tmp_path / inside).mkdir(parents=True)
    places = Places.of(
        tmp_path,
        runs=Path("runs"),
        pictures=Path("out"),
        data=Path("data"),
        allowed=[tmp_path / "webui", tmp_path / "plain"],
        models=[tmp_path / "ComfyUI" / "models" / "loras", tmp_path / "webui" / "models" / "Lora"],
    )
    assert program_folders(places) == ([tmp_path / "webui"], [tmp_path / "ComfyUI"])


def test_an_allowed_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(PlaceRefused, match="no such folder"):
        Places.of(tmp_path, runs=Path("r"), pictures=Path("p"), data=Path("d"), allowed=[Path("gone")])


def test_bases_and_adapters_are_found_in_the_usual_folders(tmp_path: Path) -> None:
    for name in ("ComfyUI/models/checkpoints/a.safetensors", "webui/models/Lora/b.safetensors"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
    found = usual_model_folders(tmp_path)
    assert [folder.name for folder in found] == ["checkpoints"]
    places = Places.of(
        tmp_path,
        runs=Path("r"),
        pictures=Path("p"),
        data=Path("d"),
        allowed=[Path("webui")],
        models=found,
    )
    assert [file.name for file in model_files(places, "base")] == ["a.safetensors"]
    assert [file.name for file in model_files(places, "adapter")] == ["b.safetensors"]
