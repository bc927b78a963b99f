"""Trackers hear what a run tells, in files of their own, and never stop it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdlora.config.contradictions import contradictions
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.events import Event, Notice, StepDone, Validated
from sdlora.training import trackers
from sdlora.training.trackers import shareable_settings
from sdlora.training.train import TrainResult, train

Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder()

    def make(*overrides: str) -> Config:
        usual = (
            *("adapter.rank=2", "training.batch_size=2", "data.validation=2", 'sample.prompts=["a cat"]'),
            *("training.device=cpu", "training.precision=fp32", "training.steps=2", "sample.steps=1"),
            *("training.validate_every=1", "sample.every=9", "sample.guidance=1", "output.name=mine"),
        )
        values = {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / "run",
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*usual, *overrides], values)

    return make


def followed(config: Config) -> tuple[TrainResult, list[Event]]:
    events: list[Event] = []
    return train(config, listeners=[events.append]), events


def test_tensorboard_has_every_value_and_image_of_a_run(settings: Settings) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, events = followed(settings('output.trackers=["tensorboard"]'))
    board = EventAccumulator(str(result.folder / "trackers" / "mine"))
    board.Reload()
    steps = [event for event in events if isinstance(event, StepDone)]
    measured = [event for event in events if isinstance(event, Validated)]

    def values(tag: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in board.Scalars(tag)]

    assert len(steps) == 2 and len(measured) == 3
    assert values("loss") == [(event.step, pytest.approx(event.loss)) for event in steps]
    assert values("gradient norm") == [(event.step, pytest.approx(event.grad_norm)) for event in steps]
    assert values("rate/unet") == [(event.step, pytest.approx(event.learning_rate)) for event in steps]
    assert values("validation/loss") == [(event.step, pytest.approx(event.loss)) for event in measured]
    low, high = (values(f"validation/loss {end}") for end in ("low", "high"))
    for event, (_, below), (_, above) in zip(measured, low, high, strict=True):
        assert below < event.loss < above
        assert (above - below) / 4 == pytest.approx(event.standard_error, rel=1e-3)
    assert values("memory (GiB)")[0][1] > 0.05 and values("images per second")[0][1] > 0
    assert [image.step for image in board.Images("previews")] == [0, 2]
    assert not any(isinstance(event, Notice) and "failed" in event.message for event in events)


@pytest.mark.slow
def test_wandb_keeps_a_run_in_its_folder_without_a_network(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    result, events = followed(settings('output.trackers=["wandb"]', "output.tracker_project=styles"))
    assert [event for event in events if isinstance(event, Notice) and "failed" in event.message] == []
    (kept,) = (result.folder / "trackers" / "wandb").glob("offline-run-*")
    (record,) = kept.glob("*.wandb")
    content = record.read_bytes()
    assert all(word in content for word in (b"gradient norm", b"validation/loss low", b"styles", b"previews"))


class Breaking:
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.values = values

    def log(self, values: dict[str, float], step: int) -> None:
        raise RuntimeError(f"no space left at step {step}\nand more")

    def finish(self) -> None:
        raise OSError("closed already")


def test_a_tracker_that_fails_is_a_notice_and_the_run_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "TRACKERS", {"tensorboard": lambda run: Breaking()})
    result, events = followed(settings('output.trackers=["tensorboard"]'))
    assert result.step == 2 and result.adapter_file is not None and result.adapter_file.is_file()
    failed = [event.message for event in events if isinstance(event, Notice) and "failed" in event.message]
    assert failed == ["tensorboard failed (no space left at step 1); training continues without it"]


def test_a_missing_package_is_refused_before_anything_is_done(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more)
    )
    config = settings('output.trackers=["wandb"]')
    with pytest.raises(ConfigError, match="the package wandb is not installed; run: pip install wandb, or"):
        train(config)
    assert config.output.folder is not None and not config.output.folder.exists()


def test_settings_go_along_flat_and_a_private_run_keeps_names_to_itself(settings: Settings) -> None:
    told = shareable_settings(settings("data.trigger_word=secret"))
    assert told["adapter.rank"] == 2 and told["data.trigger_word"] == "secret"
    assert all(isinstance(value, bool | int | float | str) for value in told.values())
    private = shareable_settings(settings("data.trigger_word=secret", "output.private=true"))
    assert private["adapter.rank"] == 2 and len(private) > 40
    assert not any(key.startswith(("data.", "sample.", "output.", "model.base")) for key in private)


def test_settings_of_a_tracker_that_is_not_asked_for_are_contradictions() -> None:
    (problem,) = contradictions(Config().with_values({"output.wandb_mode": "online"}))
    assert problem == '`output.wandb_mode` has no effect without `output.trackers=["wandb"]`'
    with pytest.raises(ConfigError, match=r"output\.trackers\[0\]=comet`: must be one of tensorboard, wandb"):
        load_config(None, ['output.trackers=["comet"]'])
