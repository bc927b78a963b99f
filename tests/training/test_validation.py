"""Validation: against the definition, against the base, as cheap as stated, and the same after a stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.config.schema import Config
from sdlora.data.batching.batches import generator_for
from sdlora.events import Control, Emitter, Event, Notice, StepDone, Validated, read_events
from sdlora.judging.held_out import places
from sdlora.training.run import prepare_run
from sdlora.training.step import train_step
from sdlora.training.train import train
from sdlora.training.validation import draws_of, measure

Settings = Callable[..., Config]


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Callable[..., Path]) -> Settings:
    folder = image_folder(count=8)
    usual = (
        *("adapter.rank=2", "training.batch_size=4", "data.validation=2", "optimizer.learning_rate=0.02"),
        *("training.steps=24", "training.validate_every=12", "training.checkpoint_every=12"),
        *("sample.prompts=[]", "training.device=cpu", "training.precision=fp32", "data.resolution=32"),
        *("optimizer.warmup_steps=0", "training.keep_checkpoints=9"),
    )

    def make(run: str, *given: str) -> Config:
        return run_settings(run, usual, given, {"data.folder": folder})

    return make


def validated(config: Config, *, stop_at: int = 0, resume: bool = False) -> list[Validated]:
    control, events = Control(), []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == stop_at:
            control.stop()

    train(config, resume=resume, listeners=[hear], control=control)
    return [event for event in events if isinstance(event, Validated)]


def test_losses_are_their_definition_row_by_row(settings: Settings) -> None:
    run = prepare_run(settings("run"), resume=False, emit=Emitter(()))
    with run.held, run.loader, torch.no_grad():
        losses = measure(run)
        assert (len(losses), {len(row) for row in losses}) == (2, {draws_of(run)}) and draws_of(run) > 1
        alphas = run.model.process.alphas_cumprod  # type: ignore[attr-defined]
        for index, item in enumerate(run.validation.items):
            clean = run.validation.image(index).posterior.mean * run.model.facts.latents.scaling
            shape = (draws_of(run), *clean.shape[1:])
            noises = torch.randn(shape, generator=generator_for("validation", item.digest))
            text = run.model.encode_text([item.caption])
            for row, place in enumerate(places(index, draws_of(run))):
                alpha = float(alphas[int(1000 * place)])
                noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noises[row]
                size = run.validation.image(index).size
                output = run.model.predict(noisy, torch.tensor([int(1000 * place)]), text, [size])
                expected = float(((output - noises[row]) ** 2).mean())
                assert losses[index][row] == pytest.approx(expected, rel=1e-4)


def test_the_base_stays_what_it_was_and_the_best_step_is_compared_with(settings: Settings) -> None:
    events = validated(settings("run"))
    assert [event.step for event in events] == [0, 12, 24]
    assert [event.base_losses is None for event in events] == [False, True, True]
    start = events[0]
    assert start.base_losses is not None and start.against_base is not None
    assert start.against_base.mean == pytest.approx(0, abs=1e-7)  # an adapter that adds nothing yet
    for event in events[1:]:
        means = [sum(row) / len(row) for row in event.losses]
        base = [sum(row) / len(row) for row in start.base_losses]
        gains = [mean - other for mean, other in zip(means, base, strict=True)]
        assert event.against_base is not None
        assert event.against_base.mean == pytest.approx(sum(gains) / 2)
        assert event.loss == pytest.approx(sum(means) / 2)
        assert event.best_step == min((e.loss, e.step) for e in events if e.step < event.step)[1]
        assert event.loss != start.loss and len(event.bands) == 2


@pytest.mark.long
def test_a_run_that_goes_on_compares_with_what_it_measured_before(settings: Settings) -> None:
    whole = validated(settings("whole"))
    first = validated(settings("halves"), stop_at=18)
    rest = validated(settings("halves"), resume=True)

    def told(events: Sequence[Validated]) -> list[tuple[Any, ...]]:
        return [
            (e.step, e.loss, e.losses, e.against_base, e.best_step, e.against_best, e.bands) for e in events
        ]

    assert len(first) == 2 and told([*first, *rest]) == told(whole)
    lines = [event for event in read_events(Path(str(settings("halves").output.folder))) if "losses" in event]
    assert sum(line["base_losses"] is not None for line in lines) == 1  # the base was measured once


@pytest.mark.parametrize(("steps", "every", "held"), [(60, 20, 3), (200, 20, 2), (40, 0, 5)])
def test_it_costs_a_tenth_of_the_forward_passes_that_training_counts_as(
    steps: int, every: int, held: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"training.steps={steps}", f"data.validation={held}"]
    config = settings("run", *given, *([f"training.validate_every={every}"] if every else []))
    if not every:
        config = config.with_values({"training.validate_every": None})
    run = prepare_run(config, resume=False, emit=Emitter(()))
    rows = 0
    predict = run.model.predict

    def seen(noisy: Tensor, *rest: Any) -> Tensor:
        nonlocal rows
        rows += noisy.shape[0]
        return predict(noisy, *rest)

    monkeypatch.setattr(run.model, "predict", seen)
    with run.held, run.loader:
        measure(run)
    interval = run.config.training.validate_every
    assert interval is not None
    measurements = 2 + -(-steps // interval)  # the start, the base alone, each interval and the end
    assert rows * measurements <= 0.1 * 2 * steps * 4
    assert rows >= held


def test_images_that_cost_more_than_that_are_told(settings: Settings) -> None:
    events: list[Event] = []
    train(
        settings("run", "training.steps=4", "training.validate_every=1", "training.checkpoint_every=9"),
        listeners=[events.append],
    )
    told = [event.message for event in events if isinstance(event, Notice) and "validation:" in event.message]
    assert len(told) == 1 and "2 held-out images every 1 steps take about" in told[0]


def test_the_base_alone_is_measured_without_what_was_learned(settings: Settings) -> None:
    run = prepare_run(settings("run"), resume=False, emit=Emitter(()))
    with run.held, run.loader:
        start = measure(run)
        for _ in range(2):
            train_step(run)
        learned, base = measure(run), measure(run, base_alone=True)
    for row, other, still in zip(start, learned, base, strict=True):
        assert row == pytest.approx(still, rel=1e-5) and row != pytest.approx(other, rel=1e-3)


def test_one_held_out_image_is_measured_but_compared_with_nothing(settings: Settings) -> None:
    events = validated(settings("run", "data.validation=1", "training.steps=4"))
    assert [event.against_base for event in events] == [None, None] == [e.against_best for e in events]
    assert all(event.loss > 0 and event.standard_error is None for event in events)
