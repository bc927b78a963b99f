"""What single steps of a run do with their settings: rates, clipping, requests, and what a resume refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.events import Control, Emitter, Event, StepDone
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training.run import prepare_run
from sdlora.training.schedules import schedule_factor
from sdlora.training.state import Run
from sdlora.training.step import train_step
from sdlora.training.train import train

Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder(4)

    def make(*overrides: str) -> Config:
        usual = {
            "adapter.rank": "2",
            "training.batch_size": "2",
            "training.steps": "4",
            "training.precision": "fp32",
        }
        given = {text.partition("=")[0] for text in overrides}
        left = [f"{key}={value}" for key, value in usual.items() if key not in given]
        fixed = ("data.validation=0", "sample.prompts=[]", "training.device=cpu", "data.resolution=32")
        places = {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / "run",
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*fixed, *left, *overrides], places)

    return make


def prepared(config: Config, *, resume: bool = False) -> Run:
    return prepare_run(config, resume=resume, emit=Emitter(()))


def test_every_group_follows_the_schedule_from_its_own_peak(settings: Settings) -> None:
    config = settings(
        *("optimizer.schedule=linear", "optimizer.warmup_steps=1", "adapter.text_encoder=true"),
        *("optimizer.learning_rate=1e-3", "optimizer.text_encoder_learning_rate=1e-5"),
    )
    run = prepared(config)
    rates = []
    for _ in range(4):
        rate = train_step(run)[2]
        rates.append(tuple(group["lr"] for group in run.optimizer.param_groups))
        assert rate == rates[-1][0]
    factors = [schedule_factor(config.optimizer, step, 4) for step in range(4)]
    assert factors == pytest.approx([1 / 2, 1, 2 / 3, 1 / 3])
    assert rates == [pytest.approx((1e-3 * factor, 1e-5 * factor)) for factor in factors]


@pytest.mark.parametrize(("limit", "left"), [(1e-3, 1e-3), (0.0, None), (1e6, None)])
def test_the_gradient_that_steps_is_no_longer_than_the_setting_says(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, limit: float, left: float | None
) -> None:
    run = prepared(settings(f"optimizer.max_grad_norm={limit}"))
    lengths: list[float] = []
    step = run.optimizer.step

    def measured(*arguments: Any, **more: Any) -> Any:
        lengths.append(float(torch.linalg.vector_norm(run.groups[0].master.flat.grad)))
        return step(*arguments, **more)

    monkeypatch.setattr(run.optimizer, "step", measured)
    norm = train_step(run)[1]
    assert norm > 2e-3, "clipping has something to do"
    assert lengths == [pytest.approx(norm if left is None else left, rel=1e-3)]


def test_asked_to_save_a_run_writes_a_checkpoint_and_goes_on(settings: Settings) -> None:
    config = settings("training.checkpoint_every=100", "training.keep_checkpoints=9")
    assert config.output.folder is not None
    folder = RunFolder(config.output.folder)
    saved: dict[int, list[int]] = {}

    def ask(event: Event) -> None:
        if isinstance(event, StepDone):
            saved[event.step] = [checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)]
            if event.step == 2:
                folder.request_file("SAVE").touch()

    result = train(config, listeners=[ask])
    assert (result.stopped, result.step) == (False, 4)
    assert saved == {1: [], 2: [], 3: [2], 4: [2]}
    assert not folder.request_file("SAVE").exists()
    assert [checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)] == [2, 4]


def test_a_resume_refuses_every_setting_that_changes_the_numbers_and_no_other(settings: Settings) -> None:
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone):
            control.stop()

    assert train(settings(), listeners=[stop], control=control).step == 1
    refused = (
        *("optimizer.learning_rate=3e-5", "optimizer.schedule=constant", "optimizer.weight_decay=0.2"),
        *("training.seed=5", "training.noise_offset=0.1", "training.min_snr_gamma=1", "training.steps=5"),
        *("data.caption_dropout=0.3", "data.flip=true", "adapter.alpha=1", "data.repeats=2"),
    )
    for override in refused:
        key = override.partition("=")[0]
        with pytest.raises(ConfigError, match=f"cannot resume with other settings.*{key}: was"):
            prepared(settings(override), resume=True)
    free = ("training.checkpoint_every=7", "output.name=other", "sample.steps=3", "sample.seed=9")
    assert prepared(settings(*free), resume=True).step == 1


def test_a_scaler_goes_on_counting_where_it_stopped(settings: Settings) -> None:
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            control.stop()

    config = settings("training.precision=fp16")
    train(config, listeners=[stop], control=control)
    fresh = torch.amp.GradScaler("cpu").state_dict()
    resumed = prepared(config, resume=True).scaler.state_dict()
    assert resumed["scale"] == fresh["scale"] and fresh["_growth_tracker"] == 0
    assert resumed["_growth_tracker"] == 3
