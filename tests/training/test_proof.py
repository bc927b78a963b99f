"""Fast paths are used when they agree with the reference on the first batch, and only then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sdlora.adapters.joint as joint
import sdlora.families.recompute as recompute
from sdlora.adapters.direct import DirectLinear
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.events import Control, Decided, Emitter, Event, Notice, StepDone, Validated
from sdlora.run_folder import list_checkpoints
from sdlora.training.checkpoint import load_checkpoint
from sdlora.training.run import prepare_run
from sdlora.training.train import train
from tools.measure_step import draw_images

Start = Callable[..., tuple[dict[str, Tensor], list[Event]]]


@pytest.fixture
def make(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    folder = image_folder()

    def settings(run: str, *overrides: str) -> Config:
        fixed = (
            *("adapter.rank=2", "adapter.alpha=3", "training.batch_size=2", "data.validation=0"),
            *("sample.prompts=[]", "training.device=cpu", "training.steps=2", "training.precision=fp32"),
        )
        values = {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / run,
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*fixed, *overrides], values)

    return settings


@pytest.fixture
def trained(make: Callable[..., Config]) -> Start:
    """A function that trains two steps and returns the last checkpoint's tensors and all events."""

    def start(run: str, *overrides: str) -> tuple[dict[str, Tensor], list[Event]]:
        config = make(run, *overrides)
        events: list[Event] = []
        train(config, listeners=[events.append])
        assert config.output.folder is not None
        return _tensors(config.output.folder), events

    return start


def _tensors(folder: Path) -> dict[str, Tensor]:
    saved = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    assert len(saved.tensors) >= 3
    return dict(saved.tensors)


def decided(events: list[Event]) -> list[tuple[str, str]]:
    return [(e.value, e.reason) for e in events if isinstance(e, Decided) and e.key == "training.fast"]


@pytest.mark.long
def test_all_paths_are_used_and_said_and_a_run_is_the_same_but_for_rounding(trained: Start) -> None:
    reference, silent = trained("off", "training.fast=off")
    fast, events = trained("auto")
    ((value, reason),) = decided(events)
    assert value == "blocks, lora, joint" and "no gradient more than" in reason and not decided(silent)
    master = reference["unet.master"]
    assert master.abs().sum() > 0 and not torch.equal(fast["unet.master"], master)
    assert torch.allclose(fast["unet.master"], master, rtol=1e-3, atol=1e-6)
    lean, events = trained("blocks", "training.fast=blocks")
    assert [value for value, _ in decided(events)] == ["blocks"]
    assert reference.keys() == lean.keys()
    assert all(torch.equal(reference[name], lean[name]) for name in reference)


def _ten_times_too_large(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradients_of_input = original(ctx, *gradients)
        ctx.sink.down.mul_(10.0)
        return gradients_of_input

    return backward


def test_a_path_that_is_wrong_is_not_used_and_the_run_says_so(
    trained: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, _ = trained("without", "training.fast=blocks,lora")
    # an error in A's gradient alone, which zero B would hide
    backward = _ten_times_too_large(joint.SideBySide.backward)
    monkeypatch.setattr(joint.SideBySide, "backward", staticmethod(backward))
    tensors, events = trained("broken")
    (notice,) = [event.message for event in events if isinstance(event, Notice) and "fast" in event.message]
    assert "joint is not used in this run" in notice and "attn1" in notice and "lora_down" in notice
    assert [value for value, _ in decided(events)] == ["blocks, lora"]
    assert all(torch.equal(without[name], tensors[name]) for name in without)
    told = [
        json.loads(line) for line in (tmp_path / "broken" / "events.jsonl").read_text("utf-8").splitlines()
    ]
    assert any(line["event"] == "Notice" and line.get("message") == notice for line in told)


@pytest.mark.long
def test_kernels_that_cannot_be_compiled_are_not_used_and_the_run_says_so(
    trained: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU they cannot, or Triton is not even there: whatever its compiler raises, training goes on."""
    without, _ = trained("without")
    monkeypatch.setattr("sdlora.training.fast.can_launch", lambda device, dtype: True)
    tensors, events = trained("failing")
    (notice,) = [event.message for event in events if isinstance(event, Notice) and "fast" in event.message]
    assert "failed on the first batch" in notice and "kernels is not used in this run" in notice
    assert [value for value, _ in decided(events)] == ["blocks, lora, joint"]
    assert all(torch.equal(without[name], tensors[name]) for name in without)


@pytest.mark.slow
def test_where_everything_is_wrong_the_reference_is_used(
    trained: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = trained("off", "training.fast=off")
    monkeypatch.setattr(DirectLinear, "backward", staticmethod(_ten_times_too_large(DirectLinear.backward)))
    tensors, events = trained("broken")
    assert [value for value, _ in decided(events)] == ["blocks"]
    assert all(torch.equal(reference[name], tensors[name]) for name in reference)


@pytest.mark.parametrize(
    ("override", "paths"),
    [
        ("adapter.dropout=0.1", "blocks"),
        ("adapter.init=pissa", "blocks"),
        ("adapter.text_encoder=true", "blocks, lora, joint"),
        ("training.recompute=projections", "blocks, lora, joint, recompute"),
    ],
)
def test_what_cannot_be_computed_directly_stays_pefts(
    override: str, paths: str, make: Callable[..., Config]
) -> None:
    run = prepare_run(make("run", override), resume=False, emit=Emitter(()))
    assert ", ".join(run.paths()) == paths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "paths"),
    [
        ("adapter.kind=dora", "blocks"),
        ("adapter.dropout=0.1", "blocks"),
        ("adapter.text_encoder=true", "blocks, lora, joint"),
        ("training.recompute=norms", "blocks, lora, joint, recompute"),
        ("training.recompute=blocks", "blocks, lora, joint, recompute"),
        ("data.prior_preservation=1.0", "blocks, lora, joint"),
        ("optimizer.lora_plus_ratio=4", "blocks, lora, joint"),
        ("training.precision=bf16", "blocks, lora, joint"),
    ],
)
def test_the_paths_that_are_possible_prove_themselves(override: str, paths: str, trained: Start) -> None:
    _, events = trained("run", override)
    assert [value for value, _ in decided(events)] == [paths]


@pytest.mark.parametrize("rung", ["gates", pytest.param("blocks", marks=pytest.mark.long)])
def test_a_run_that_recomputes_ends_with_the_same_bits(rung: str, trained: Start) -> None:
    """On a CPU a batch is computed whole then, so the other run is, too."""
    single = "training.batch_size=1"
    without, _ = trained("without", single)
    tensors, events = trained(rung, single, f"training.recompute={rung}")
    assert [value for value, _ in decided(events)] == ["blocks, lora, joint, recompute"]
    assert all(torch.equal(without[name], tensors[name]) for name in without)


@pytest.mark.parametrize("override", ["training.fast=off", "adapter.dropout=0.1"])
def test_where_a_rung_cannot_be_taken_whole_blocks_are_and_the_run_says_so(
    override: str, make: Callable[..., Config]
) -> None:
    events: list[Event] = []
    config = make("run", override, "training.recompute=projections")
    run = prepare_run(config, resume=False, emit=Emitter((events.append,)))
    assert "recompute" not in run.paths() and run.model.components()["unet"].is_gradient_checkpointing
    told = [event.message for event in events if isinstance(event, Notice) and "recompute" in event.message]
    assert len(told) == 1 and "whole blocks are computed again instead" in told[0]


def test_a_rung_that_is_wrong_is_not_used_and_whole_blocks_are(
    trained: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = "training.batch_size=1"
    without, _ = trained("without", single)
    named = recompute.Kept.again

    def wrongly(
        kept: Any, rung: Any, tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor
    ) -> Tensor:
        return named(kept, rung, tensor, lambda *given: make(*given) * 9, *sources)

    monkeypatch.setattr(recompute.Kept, "again", wrongly)
    tensors, events = trained("broken", single, "training.recompute=norms")
    (notice,) = [event.message for event in events if isinstance(event, Notice) and "fast" in event.message]
    assert "recompute (whole blocks are computed again instead) is not used in this run" in notice
    assert [value for value, _ in decided(events)] == ["blocks, lora, joint"]
    assert all(torch.equal(without[name], tensors[name]) for name in without)


def test_a_stopped_run_goes_on_with_the_paths_it_had_bit_for_bit(make: Callable[..., Config]) -> None:
    whole = make("whole", "training.fast=blocks,lora")
    train(whole)
    parted = make("parted", "training.fast=blocks,lora")
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            control.stop()

    train(parted, listeners=[stop], control=control)
    events: list[Event] = []
    train(make("parted"), resume=True, listeners=[events.append])  # auto: what it had, not all
    assert [value for value, _ in decided(events)] == ["blocks, lora"]
    assert whole.output.folder and parted.output.folder
    first, other = _tensors(whole.output.folder), _tensors(parted.output.folder)
    assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_a_run_may_go_on_with_other_paths_which_is_said(make: Callable[..., Config]) -> None:
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            control.stop()

    train(make("run"), listeners=[stop], control=control)
    events: list[Event] = []
    train(make("run", "training.fast=off"), resume=True, listeners=[events.append])
    (notice,) = [event.message for event in events if isinstance(event, Notice) and "fast" in event.message]
    assert "other fast paths (none) than before (blocks, lora, joint)" in notice


def test_names_that_mean_no_path_are_refused(make: Callable[..., Config]) -> None:
    with pytest.raises(
        ConfigError, match=r"no fast path `wings`; use auto, off, or some of blocks, lora, joint"
    ):
        train(make("run", "training.fast=blocks,wings"))
    with pytest.raises(ConfigError, match="`joint` builds upon blocks"):
        train(make("run", "training.fast=lora,joint"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_steps_end_at_the_same_held_out_loss(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 16, 64)
    losses = {}
    for fast in ("off", "auto"):
        config = load_config(
            None,
            [
                *(
                    "training.steps=200",
                    "training.batch_size=2",
                    "training.precision=bf16",
                    "data.validation=4",
                ),
                *("sample.prompts=[]", "training.device=cpu", "data.resolution=64", f"training.fast={fast}"),
                *("training.validate_every=200", "adapter.rank=8", "judge.every=0"),
            ],
            {
                "data.folder": tmp_path / "images",
                "model.base": "mini",
                "output.folder": tmp_path / fast,
                "data.cache_folder": tmp_path / "cache",
            },
        )
        events: list[Event] = []
        train(config, listeners=[events.append])
        losses[fast] = [event.loss for event in events if isinstance(event, Validated)]
    assert len(losses["off"]) == len(losses["auto"]) == 2
    assert losses["off"][1] < 0.95 * losses["off"][0], f"nothing was learned: {losses}"
    assert losses["auto"][1] == pytest.approx(losses["off"][1], rel=0.005), losses
