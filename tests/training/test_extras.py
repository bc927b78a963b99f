"""What a run does beside training never stops it, and a trained adapter is never lost."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import SdloraError
from sdlora.events import (
    CheckpointSaved,
    Control,
    Emitter,
    Event,
    Journal,
    Notice,
    Sampled,
    StepDone,
    Validated,
    read_events,
)
from sdlora.formats.adapter_files import read_adapter
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training.train import TrainResult, train

Settings = Callable[..., Config]
OVERRIDES = (
    *("adapter.rank=2", "training.batch_size=2", "training.steps=4", "training.device=cpu"),
    *("training.precision=fp32", "training.checkpoint_every=2", "sample.prompts=['a cat']"),
    *("sample.every=2", "sample.steps=1", "training.validate_every=2", "data.validation=1"),
)


class Watcher:
    """Keeps every event, and does something in a run's folder at a step."""

    def __init__(self, at: int = -1, what: Callable[[], object] | None = None) -> None:
        self.events: list[Event] = []
        self._at, self._what = at, what

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._what and isinstance(event, StepDone) and event.step == self._at:
            self._what()

    def notices(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a cache, and what runs leave."""
    folder = tmp_path_factory.mktemp("extras")
    (folder / "images").mkdir()
    for number in range(3):
        Image.effect_noise((32, 32), 40.0 + 20 * number).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"a cup number {number}", encoding="utf-8")
    return folder


def config_of(place: Path, base: Path, run: Path, *overrides: str) -> Config:
    values = {"data.folder": place / "images", "model.base": str(base), "output.folder": run}
    return load_config(None, [*OVERRIDES, *overrides], {**values, "data.cache_folder": place / "cache"})


@pytest.fixture
def settings(tiny_base: Path, place: Path, tmp_path: Path) -> Settings:
    return lambda run, *overrides: config_of(place, tiny_base, tmp_path / run, *overrides)


@pytest.fixture(scope="module")
def whole(tiny_base: Path, place: Path) -> tuple[TrainResult, Watcher]:
    """A run in which nothing went wrong."""
    watcher = Watcher()
    return train(config_of(place, tiny_base, place / "whole"), listeners=[watcher]), watcher


def tensors_of(result: TrainResult) -> dict[str, torch.Tensor]:
    saved = load_file(list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file)
    return {name: tensor.clone() for name, tensor in saved.items()}


def same(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert len(first) >= 4
    return first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def test_a_step_is_saved_before_it_is_shown(whole: tuple[TrainResult, Watcher]) -> None:
    kinds = (CheckpointSaved, Validated, Sampled)
    order = [(event.step, type(event).__name__) for event in whole[1].events if isinstance(event, kinds)]
    shown = ["Validated", "Sampled"]
    assert order == [
        *((0, kind) for kind in shown),
        *((step, kind) for step in (2, 4) for kind in ("CheckpointSaved", *shown)),
    ]


def samples_is_a_file(run: RunFolder) -> None:
    shutil.rmtree(run.samples, ignore_errors=True)
    run.samples.write_bytes(b"mine")


def preview_is_a_folder(run: RunFolder) -> None:
    for step in (2, 4):
        run.preview(step, 1).mkdir(parents=True)


def grid_is_a_folder(run: RunFolder) -> None:
    run.grid.unlink(missing_ok=True)
    (run.grid / "x").mkdir(parents=True)


def odd_images(run: RunFolder) -> None:
    run.samples.mkdir(exist_ok=True)
    run.preview(1, 1).write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    run.preview(1, 7).write_bytes(b"")
    (run.samples / "step-000001-1 (1).png").write_bytes(b"x")
    (run.samples / "step-000001-1-best.png").mkdir()


def curve_is_a_folder(run: RunFolder) -> None:
    run.loss_curve.mkdir()


def events_is_a_folder(run: RunFolder) -> None:
    run.events_file.unlink()
    run.events_file.mkdir()


def card_is_a_folder(run: RunFolder) -> None:
    (run.path / "lora.json").mkdir()
    (run.path / "lora.png").mkdir()


def stray_checkpoints(run: RunFolder) -> None:
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / "step-000002").write_bytes(b"mine")
    (run.checkpoints / "step-000002 copy").mkdir()
    (run.checkpoints / "step-000001").mkdir()


def request_is_a_folder(run: RunFolder) -> None:
    (run.path / "STOP").mkdir()


OBSTACLES: dict[Callable[[RunFolder], None], str] = {
    samples_is_a_file: "the previews could not be made",
    preview_is_a_folder: "the previews could not be made",
    grid_is_a_folder: "the previews could not be made",
    odd_images: "",
    curve_is_a_folder: "the loss curve could not be made",
    events_is_a_folder: "some events are missing",
    card_is_a_folder: "the card beside the adapter is missing",
    stray_checkpoints: "",
    request_is_a_folder: "",
}


TOGETHER = [
    *(samples_is_a_file, events_is_a_folder, card_is_a_folder, stray_checkpoints, request_is_a_folder),
]
BY_THEMSELVES = [pytest.param([obstacle], marks=pytest.mark.slow) for obstacle in OBSTACLES]


@pytest.mark.parametrize("obstacles", [TOGETHER, *BY_THEMSELVES])
def test_whatever_lies_in_its_folder_a_run_ends_with_its_adapter(
    settings: Settings, obstacles: list[Callable[[RunFolder], None]]
) -> None:
    config = settings("run")
    run = RunFolder(config.output.folder or Path())
    watcher = Watcher(1, lambda: [obstacle(run) for obstacle in obstacles])
    result = train(config, listeners=[watcher])
    assert result.adapter_file is not None
    assert len(read_adapter(result.adapter_file).weights.updates) > 0
    for obstacle in obstacles:
        words = OBSTACLES[obstacle]
        told = [notice for notice in watcher.notices() if words and words in notice]
        assert len(told) == (1 if words else 0), watcher.notices()
    again = train(config, resume=True)  # and is gone on with, whatever lies there
    assert (again.step, again.adapter_file) == (4, result.adapter_file)
    if stray_checkpoints in obstacles:
        assert any(path.read_bytes() == b"mine" for path in run.checkpoints.iterdir() if path.is_file())


FAILURES: list[tuple[str, str, str]] = [
    ("sdlora.training.train", "preview", "the previews could not be made"),
    ("sdlora.training.train", "validate", "validation could not be made"),
    ("sdlora.training.train", "draw_loss_curve", "the loss curve could not be made"),
    ("sdlora.training.previews", "render", "the previews could not be made"),
    ("sdlora.training.previews", "steps_by_prompts", "the previews could not be made"),
    ("sdlora.training.previews", "loss_curve", "the loss curve could not be made"),
    ("sdlora.training.finish", "card_image", "the adapter's preview could not be made"),
]


ALL_FAIL = [FAILURES[at] for at in (1, 3, 5, 6)]
EACH_FAILS = [pytest.param([failure], marks=pytest.mark.slow) for failure in FAILURES]


@pytest.mark.parametrize("failures", [ALL_FAIL, *EACH_FAILS])
def test_an_extra_that_fails_in_any_way_is_told_once_and_changes_no_bit(
    settings: Settings,
    whole: tuple[TrainResult, Watcher],
    monkeypatch: pytest.MonkeyPatch,
    failures: list[tuple[str, str, str]],
) -> None:
    errors = [
        ValueError("odd"),
        OSError(errno.ENOSPC, "No space left on device"),
        ImportError("no matplotlib"),
    ]
    for number, (module, name, _) in enumerate(failures):
        monkeypatch.setattr(sys.modules[module], name, raising(errors[number % len(errors)]))
    watcher = Watcher()
    result = train(settings("run"), listeners=[watcher])
    assert result.adapter_file is not None
    assert result.adapter_file.is_file()
    for _, name, words in failures:
        told = [notice for notice in watcher.notices() if words in notice]
        assert (name, len(told)) == (name, 1), watcher.notices()
    assert same(tensors_of(result), tensors_of(whole[0]))


def test_a_checkpoint_that_cannot_be_saved_does_not_end_the_run(
    settings: Settings, whole: tuple[TrainResult, Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = sys.modules["sdlora.training.checkpoint"].save_checkpoint, []

    def full_at_first(root: Path, step: int, *rest: Any) -> Path:
        calls.append(step)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return Path(save(root, step, *rest))

    monkeypatch.setattr(sys.modules["sdlora.training.checkpoint"], "save_checkpoint", full_at_first)
    watcher = Watcher()
    result = train(settings("run"), listeners=[watcher])
    assert [notice for notice in watcher.notices() if "step 2: no checkpoint was saved" in notice]
    assert (calls, same(tensors_of(result), tensors_of(whole[0]))) == ([2, 4], True)


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        ("sdlora.exporting.export", "write_proven", OSError(errno.ENOSPC, "No space left on device")),
        pytest.param(
            *("sdlora.training.train", "finish_run", ValueError("a header that cannot be")),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("sdlora.formats.proof", "compare", RuntimeError("a bug in the proof")), marks=pytest.mark.slow
        ),
    ],
)
def test_a_finished_run_whose_file_cannot_be_written_says_where_the_adapter_is(
    settings: Settings,
    whole: tuple[TrainResult, Watcher],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    error: Exception,
) -> None:
    """Proof, header or disk fail after the last step; the checkpoint holds the adapter."""
    config = settings("run")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, raising(error))
        with pytest.raises(SdloraError, match="nothing is lost") as caught:
            train(config)
    saved = list_checkpoints(RunFolder(config.output.folder or Path()).checkpoints)[-1]
    assert str(saved.adapter_file) in str(caught.value)
    assert str(error).rpartition("] ")[2] in str(caught.value)
    result = train(config, resume=True)  # as the message says
    assert result.adapter_file is not None
    assert same(tensors_of(result), tensors_of(whole[0]))


def test_a_run_that_can_write_nothing_into_its_folder_leaves_the_adapter_elsewhere(
    settings: Settings, whole: tuple[TrainResult, Watcher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    config = settings("parent/run", "training.checkpoint_every=100")
    folder = config.output.folder
    assert folder is not None

    def gone() -> None:
        shutil.rmtree(folder.parent)
        folder.parent.write_bytes(b"a file where the disk was")

    watcher = Watcher(3, gone)
    with pytest.raises(SdloraError, match="was written to") as caught:
        train(config, listeners=[watcher])
    (file,) = work.iterdir()
    assert str(file) in str(caught.value)
    first, other = load_file(file), load_file(whole[0].adapter_file or Path())
    assert len(first) >= 4
    assert first.keys() == other.keys()
    assert all(torch.equal(first[key], other[key]) for key in first)


def test_stopping_without_room_for_a_checkpoint_is_an_error_that_says_where_the_adapter_is(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(sys.modules["sdlora.training.checkpoint"], "save_checkpoint", full)
    control = Control()
    with pytest.raises(SdloraError, match=r"lora-rescued\.safetensors"):
        train(settings("run"), listeners=[Watcher(3, control.stop)], control=control)


@pytest.mark.long
def test_advice_after_a_loss_that_is_no_number_can_be_followed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = sys.modules["sdlora.training.step"].loss_of
    steps = []

    def poisoned(*arguments: Any) -> Any:
        weighted, plain = loss_of(*arguments)
        steps.append(1)
        return (weighted * float("nan") if len(steps) > 2 else weighted), plain

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["sdlora.training.step"], "loss_of", poisoned)
        with pytest.raises(SdloraError, match="not a finite number") as caught:
            train(settings("run"))
    text = str(caught.value)
    assert "--resume" not in text
    file = text.partition("adapter.from_file=")[2].partition(" ")[0]
    config = settings("next", "optimizer.learning_rate=1e-6", "adapter.from_file=" + file, "training.steps=1")
    assert train(config.with_values({"adapter.rank": None})).adapter_file is not None


def test_events_are_appended_by_themselves(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    journal = Journal(file)
    journal(Notice("one"))
    file.rename(tmp_path / "kept")
    file.mkdir()
    journal(Notice("two"))
    file.rmdir()
    (tmp_path / "kept").rename(file)
    file.write_bytes(file.read_bytes() + b'{"event": "Not')  # cut short by a full disk
    journal(Notice("three"))
    assert [event["message"] for event in read_events(tmp_path)] == ["one", "three"]
    assert "some events are missing" in str(journal.problem)


def test_a_listener_that_is_dropped_is_told_to_the_others() -> None:
    heard: list[Event] = []
    emit = Emitter((raising(RuntimeError("display gone")), heard.append))
    with pytest.warns(UserWarning, match="display gone"):
        emit(Notice("one"))
    emit(Notice("two"))
    messages = [event.message for event in heard if isinstance(event, Notice)]
    assert [text for text in ("one", "two") if text in messages] == ["one", "two"]
    assert len([text for text in messages if "display gone" in text]) == 1


def test_a_request_file_that_cannot_be_removed_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control(tmp_path)
    file = tmp_path / "SAVE"
    file.write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", raising(PermissionError(errno.EROFS, "Read-only file system")))
        assert control.take() == {"SAVE"}
        assert control.take() == frozenset()
    file.unlink()
    assert control.take() == frozenset()
    file.write_bytes(b"")
    assert (control.take(), file.exists()) == ({"SAVE"}, False)
