"""Names in a run folder: read strictly, sorted by number, found wherever a run left them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdlora.run_folder import RunFolder, checkpoint_folder, checkpoint_of, list_checkpoints, was_run


def touched(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def test_checkpoints_are_sorted_by_step_even_past_a_million(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999, 40, 10_000_000):
        checkpoint_folder(tmp_path, step).path.mkdir()
    assert [folder.step for folder in list_checkpoints(tmp_path)] == [40, 999_999, 1_000_000, 10_000_000]


@pytest.mark.parametrize(
    "name", ["step-000020 copy", "step-20", "step-000020-best", "step-", "Step-000020", "step-00002\u00b2"]
)
def test_what_is_only_called_like_a_checkpoint_is_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    touched(tmp_path / "step-000030")
    assert list_checkpoints(tmp_path) == []


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize(
    "stray",
    [
        "step-000020-1 (1).png",
        "step-000020-1-best.png",
        "step-000020.png",
        "step-000020-0.png",
        "step-x-1.png",
    ],
)
def test_stray_files_among_the_previews_are_passed_over(tmp_path: Path, stray: str) -> None:
    run = RunFolder(tmp_path)
    touched(run.samples / stray)
    previews = [touched(run.preview(step, number)) for step in (0, 20, 1_000_000) for number in (1, 2, 10)]
    assert [preview.file for preview in run.list_previews()] == previews


def test_the_newest_preview_is_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.newest_preview() is None
    sweep = touched(tmp_path / "sweep.png")
    assert run.newest_preview() == sweep
    old, new = touched(run.samples / "b.png"), touched(run.samples / "a.png")
    os.utime(old, (1, 1))
    assert run.newest_preview() == new
    touched(run.samples / ".0123456789ab.png")  # one that is just being written
    assert run.newest_preview() == new
    touched(run.preview(20, 1))
    last = touched(run.preview(100, 1))
    os.utime(last, (1, 1))
    assert run.newest_preview() == last


def test_an_adapter_file_knows_its_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "ink")
    checkpoint = checkpoint_folder(run.checkpoints, 40)
    assert checkpoint_of(checkpoint.adapter_file) == (run, checkpoint)
    assert checkpoint_of(run.adapter_file("ink")) is None
    assert checkpoint_of(run.checkpoints / "step-000040 copy" / "adapter.safetensors") is None


def test_a_run_is_told_by_its_settings_and_something_it_wrote(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    touched(run.config_file)
    assert run.exists() and not was_run(tmp_path)
    touched(run.events_file)
    assert was_run(tmp_path)
