"""Checkpoints: whole or not there, found newest first, pruned by rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlora.errors import TrainingError
from sdlora.run_folder import list_checkpoints
from sdlora.training.checkpoint import load_newest, prune_checkpoints, save_checkpoint


def save(root: Path, step: int) -> Path:
    tensors = {"unet.master": torch.arange(4.0) + step}
    return save_checkpoint(root, step, tensors, {"note": "x"}, lambda path: path.write_bytes(b"adapter"))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 3)
    loaded = load_newest(tmp_path, lambda text: None)
    assert (loaded.step, loaded.state) == (3, {"note": "x"})
    assert torch.equal(loaded.tensors["unet.master"], torch.arange(4.0) + 3)


def test_newest_good_one_wins_and_damage_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    (tmp_path / "step-000010" / "adapter.safetensors").write_bytes(b"other")
    (tmp_path / "step-000002" / "state.json").write_text("{", encoding="utf-8")
    notices: list[str] = []
    assert load_newest(tmp_path, notices.append).step == 1
    assert len(notices) == 2


def test_no_usable_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no usable checkpoint"):
        load_newest(tmp_path, lambda text: None)


def test_a_failed_save_leaves_the_old_ones_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(path: Path) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        save_checkpoint(tmp_path, 2, {"unet.master": torch.zeros(1)}, {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_second_save_at_one_step_keeps_the_first_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}

    def refuse(path: Path) -> None:
        raise AssertionError("the state of a step is one: it is not written again")

    again = save_checkpoint(tmp_path, 1, {"unet.master": torch.zeros(4)}, {"note": "y"}, refuse)
    assert again == folder and len(before) == 3
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_pruning_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / ".0123456789ab").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000004", "step-000005"]
    prune_checkpoints(tmp_path, keep=0)
    assert [folder.step for folder in list_checkpoints(tmp_path)] == [5]


def damage(root: Path, step: int) -> None:
    file = root / f"step-{step:06d}" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_of_the_same_step_is_written_again(tmp_path: Path) -> None:
    save(tmp_path, 3)
    damage(tmp_path, 3)
    save(tmp_path, 3)
    assert load_newest(tmp_path, pytest.fail).step == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_whole_checkpoint_is_never_pruned(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    for step in range(3, 6):
        damage(tmp_path, step)
    prune_checkpoints(tmp_path, keep)
    assert [folder.step for folder in list_checkpoints(tmp_path)] == [2, *range(6 - keep, 6)]
    assert load_newest(tmp_path, lambda text: None).step == 2


@pytest.mark.parametrize("state", ["", "{", "[]", "{}", '{"digests": {}}', '{"digests": 3}', "[" * 100_000])
def test_a_state_that_says_nothing_is_not_whole(tmp_path: Path, state: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "state.json").write_text(state, encoding="utf-8")
    with pytest.raises(TrainingError, match="no usable checkpoint"):
        load_newest(tmp_path, lambda text: None)
