"""Steps whose numbers are read later, as on a card: same bits, nothing lost, nothing bad in the weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdlora.config.schema import Config
from sdlora.errors import TrainingError
from sdlora.events import Control, Emitter, Event, Notice, StepDone
from sdlora.run_folder import list_checkpoints
from sdlora.training.inputs import packed, unpacked
from sdlora.training.objective import inputs_of, loss_of
from sdlora.training.reports import MOST, Reports
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.step import finished_steps, launch_step
from sdlora.training.train import train

Settings = Callable[..., Config]
USUAL = (
    *("adapter.rank=2", "training.batch_size=2", "data.validation=0", "sample.prompts=[]"),
    *("training.device=cpu", "training.precision=fp32", "training.steps=12"),
)


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Callable[..., Path]) -> Settings:
    folder = image_folder()
    return lambda run, *given: run_settings(run, USUAL, given, {"data.folder": folder})


def read_late(run: Run) -> Run:
    """Have a run's reports read as late as possible, and all that follows from them decided without them."""
    run.reports = Reports(deferred=True, together=True)
    return run


def prepared(config: Config) -> Run:
    return prepare_run(config, resume=False, emit=Emitter(()))


def flat(run: Run) -> torch.Tensor:
    return torch.cat([group.master.flat.detach().clone() for group in run.groups])


def stopping(control: Control, events: list[Event]) -> Callable[[Event], None]:
    """Return a listener that keeps all events, and asks to stop when it hears of the first step."""

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone):
            control.stop()

    return hear


def poison(monkeypatch: pytest.MonkeyPatch, where: str, image: list[str]) -> None:
    """Have the loss, or only its gradient, be no number for the first image of the third micro-batch on."""
    seen: list[int] = []

    def poisoned(model: Any, batch: Any, *more: Any) -> Any:
        weighted, plain = loss_of(model, batch, *more)
        seen.append(1)
        if len(seen) == 3:
            image.append(batch.names[0])
            if where == "loss":  # a constant: the gradient stays as it is
                weighted = weighted + torch.tensor([float("nan"), *[0.0] * (len(plain) - 1)])
            else:
                weighted.register_hook(partial(torch.mul, other=float("inf")))
        return weighted, plain

    monkeypatch.setattr(sys.modules["sdlora.training.step"], "loss_of", poisoned)


@pytest.mark.parametrize("more", [(), ("training.gradient_accumulation=2", "optimizer.max_grad_norm=0.01")])
def test_a_step_has_the_same_bits_and_report_whenever_that_is_read(
    settings: Settings, more: tuple[str, ...]
) -> None:
    results = []
    for name in ("early", "late"):
        run = prepared(settings(name, *more))
        run = read_late(run) if name == "late" else run
        with run.loader:
            for _ in range(3):
                launch_step(run)
        results.append((flat(run), list(finished_steps(run, everything=True))))
    (early, reports), (late, later) = results
    assert torch.equal(early, late)
    assert [done.step for done in reports] == [1, 2, 3] and len({done.loss for done in reports}) == 3
    assert [dataclasses.replace(done, norm=0, loss=0) for done in reports] == [
        dataclasses.replace(done, norm=0, loss=0) for done in later
    ]
    for first, second in zip(reports, later, strict=True):
        assert (first.loss, first.norm) == pytest.approx((second.loss, second.norm), rel=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported_later_with_its_images(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run, image = read_late(prepared(settings("run"))), list[str]()
    poison(monkeypatch, where, image)
    values = []
    with run.loader:
        for _ in range(4):
            launch_step(run)
            values.append(flat(run))
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])  # the third step
    assert not torch.equal(values[2], values[3]) and torch.isfinite(values[3]).all()
    reports = finished_steps(run, everything=True)
    assert [next(reports).step, next(reports).step] == [1, 2]
    with pytest.raises(TrainingError, match=f"^step 3: the {where} is not a finite number") as caught:
        next(reports)
    assert image[0] in str(caught.value)


def test_fp16_leaves_a_step_out_on_the_device_and_scales_down(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = read_late(prepared(settings("run", "training.precision=fp16"))), list[Event]()
    run.emit = Emitter((told.append,))
    poison(monkeypatch, "gradient", [])
    values, scales = [], [run.scaler.get_scale()]
    with run.loader:
        for _ in range(4):
            launch_step(run)
            values.append(flat(run))
            scales.append(run.scaler.get_scale())
    assert torch.equal(values[1], values[2]) and not torch.equal(values[2], values[3])
    assert [scale / scales[0] for scale in scales] == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert told == []
    assert [done.step for done in finished_steps(run, everything=True)] == [1, 2, 3, 4]
    (notice,) = (event.message for event in told if isinstance(event, Notice))
    assert f"step 3: fp16 overflowed; the step is left out, and losses are scaled by {scales[-1]:g}" == notice


def test_a_report_is_read_when_so_many_steps_are_open(settings: Settings) -> None:
    run = read_late(prepared(settings("run")))
    read = []
    with run.loader:
        for _ in range(MOST + 2):
            launch_step(run)
            read.append([done.step for done in finished_steps(run)])
    assert read == [[]] * MOST + [[1], [2]]
    assert [done.step for done in finished_steps(run, everything=True)] == list(range(3, MOST + 3))


def test_a_whole_run_tells_everything_in_order_and_is_resumed_exactly(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, told = {}, {}
    for name in ("early", "late"):
        config, events, control = settings(name, "training.steps=10"), list[Event](), Control()
        if name == "late":
            module = sys.modules["sdlora.training.run"]
            monkeypatch.setattr(module, "Reports", lambda **_: Reports(deferred=True, together=True))
            listen = stopping(control, events)
            assert train(config, listeners=[listen], control=control).stopped
        result = train(config, resume=name == "late", listeners=[events.append])
        assert result.step == 10 and result.loss is not None
        states[name] = load_file(list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file)
        told[name] = [event for event in events if isinstance(event, StepDone)]
    assert [done.step for done in told["late"]] == list(range(1, 11)) == [done.step for done in told["early"]]
    early, late = states["early"], states["late"]
    assert early.keys() == late.keys()
    assert [key for key in early if not torch.equal(early[key], late[key])] == []
    for first, second in zip(told["early"], told["late"], strict=True):
        assert (first.epoch, first.num_images, first.rates) == (second.epoch, second.num_images, second.rates)
        assert first.loss == pytest.approx(second.loss, rel=1e-6)


def test_tensors_of_all_formats_lie_in_one_buffer_and_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "noisy": torch.randn(3, 4, 5, 7, generator=generator).to(torch.bfloat16),
        "timesteps": torch.tensor([3, 999, 0]),
        "target": torch.randn(3, 4, 5, 7, generator=generator)[:, :, ::2],
        "weights": torch.rand(3, generator=generator),
        "text.states": torch.randn(3, 77, 9, generator=generator).to(torch.float16),
    }
    buffer, places = packed(tensors)
    assert all(place % 256 == 0 for place in places.values()) and buffer.dtype == torch.uint8
    back = unpacked(buffer.clone(), tensors, places)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].is_contiguous()
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("more", [(), ("training.loss=huber",)])
def test_the_loss_from_inputs_made_ahead_is_the_same(settings: Settings, more: tuple[str, ...]) -> None:
    run = prepared(settings("run", *more))
    with run.loader:
        (ready,) = run.loader.step(0)
        batch = ready.batch
        given = inputs_of(run.model.process, batch, run.config.training)
        ahead = loss_of(run.model, batch, run.config, None, given._replace(noisy=given.noisy.clone()))
        once = loss_of(run.model, batch, run.config)
    assert torch.equal(ahead[0], once[0]) and torch.equal(ahead[1], once[1])
    assert (given.threshold is None) == (not more)
