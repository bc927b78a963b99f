"""What fails in a step is made again in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdlora.config.schema import Config
from sdlora.events import Event, Notice, StepDone
from sdlora.training import step as steps
from sdlora.training.train import train


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is there, but computes as torch does: so it agrees with the reference on a CPU."""
    monkeypatch.setattr("sdlora.training.fast.can_launch", lambda device, dtype: True)
    monkeypatch.setattr("sdlora.training.fast.can_multiply", lambda device: False)
    monkeypatch.setattr("sdlora.training.fast.use_kernels", lambda denoiser: None)


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Callable[..., Any]) -> Callable[..., Config]:
    fixed = ("adapter.rank=2", "training.steps=3", "training.batch_size=2", "training.device=cpu")
    off = ("data.validation=0", "sample.prompts=[]", "training.precision=fp32", "judge.every=0")
    folder = image_folder()
    return lambda run: run_settings(run, fixed, off, {"data.folder": folder})


def failing(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Have these calls for a step's losses fail as a compiler does."""
    original, asked = steps.loss_of, list[int]()

    def loss_of(*given: Any) -> Any:
        asked.append(1)
        if len(asked) in calls:
            raise RuntimeError("PassManager::run failed")
        return original(*given)

    monkeypatch.setattr(steps, "loss_of", loss_of)


@pytest.mark.usefixtures("kernels")
def test_kernels_that_fail_in_a_later_step_are_dropped_and_it_is_made_again(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = train(settings("usual")).adapter_file
    assert file is not None
    usual = load_file(file)
    failing(monkeypatch, 2)
    heard: list[Event] = []
    result = train(settings("failing"), listeners=[heard.append])
    assert [event.step for event in heard if isinstance(event, StepDone)] == [1, 2, 3]
    (told,) = (event.message for event in heard if isinstance(event, Notice) and "kernels" in event.message)
    assert told.startswith(
        "step 2: failed with the fast path kernels (RuntimeError: PassManager::run failed)"
    )
    assert result.adapter_file is not None
    again = load_file(result.adapter_file)
    assert again.keys() == usual.keys() and all(torch.equal(again[name], usual[name]) for name in usual)


@pytest.mark.usefixtures("kernels")
def test_what_fails_without_the_kernels_too_is_the_error_that_it_was(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 2, 3)
    with pytest.raises(RuntimeError, match="PassManager"):
        train(settings("failing"))
