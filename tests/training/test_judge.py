"""A run that judges itself trains the same, exports its best step, says why, and never fails for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.config.schema import Config
from sdlora.events import Control, Estimate, Event, Judged, Notice, Reported, StepDone
from sdlora.formats.adapter_files import read_adapter
from sdlora.judging.verdict import Cell, PanelJudge, choose
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training import judge as judge_module
from sdlora.training.finish import finish_run
from sdlora.training.run import prepare_run
from sdlora.training.step import train_step
from sdlora.training.train import save, train

Settings = Callable[..., Config]


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Callable[..., Path]) -> Settings:
    folder = image_folder(count=10)
    usual = (
        *("adapter.rank=2", "training.batch_size=4", "data.validation=2", "optimizer.learning_rate=0.01"),
        *("training.steps=12", "judge.every=6", "judge.share=1000", "judge.strengths=[0.5, 1.0, 1.5]"),
        *("judge.images=4", "sample.steps=1", "sample.guidance=1", "sample.every=99", "data.resolution=32"),
        *("training.device=cpu", "training.precision=fp32", "optimizer.warmup_steps=0", "training.fast=off"),
        *("training.validate_every=99", "training.checkpoint_every=99", "data.trigger_word=zork"),
        *('sample.prompts=["zork, a cat"]', "output.dtype=fp32"),
    )

    def make(run: str, *given: str) -> Config:
        return run_settings(run, usual, given, {"data.folder": folder})

    return make


def trained(
    config: Config, *, stop_at: int = 0, resume: bool = False, more: int | None = None
) -> list[Event]:
    events: list[Event] = []
    control = Control()

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == stop_at:
            control.stop()

    train(config, resume=resume, continue_for=more, listeners=[hear], control=control)
    return events


def state(config: Config) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(folder(config).checkpoints)[-1].optimizer_file)


def folder(config: Config) -> RunFolder:
    return RunFolder(Path(str(config.output.folder)))


def assert_same(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert first.keys() == other.keys() and len(first) >= 4
    assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.long
def test_training_is_the_same_with_judging_and_its_best_is_shown_and_used(settings: Settings) -> None:
    plain, judged = settings("plain", "judge.every=0"), settings("judged")
    assert not any(isinstance(event, Judged) for event in trained(plain))
    events = trained(judged)
    told = [event for event in events if isinstance(event, Judged)]
    assert [event.step for event in told] == [6, 12]
    assert all(event.strengths == (0.5, 1.0, 1.5) for event in told)
    assert_same(state(plain), state(judged))
    assert not folder(plain).report.exists()
    (reported,) = (event for event in events if isinstance(event, Reported))
    assert_shown_and_used(folder(judged), reported)


def assert_shown_and_used(run: RunFolder, reported: Reported) -> None:
    names = {file.name for file in run.judging.iterdir()}
    cells = {f"step-{step:06d}-at-{s:g}.png" for step in (6, 12) for s in (0.5, 1.0, 1.5)}
    assert names == {"base.png", "judging.json", *cells}
    with Image.open(run.judging / "base.png") as base, Image.open(run.judging / min(cells)) as drawn:
        assert base.size == (5 * 32, 32) == drawn.size  # four prompts, and one without the trigger word
        assert not np.array_equal(np.asarray(base), np.asarray(drawn))
    page = run.report.read_text(encoding="utf-8")
    assert page.count("data:image/webp") == 6 + 2 and "<script" not in page
    assert f"step {reported.best_step} at strength {reported.strength:g}" in page
    card = json.loads(run.adapter_file("lora").with_suffix(".json").read_text(encoding="utf-8"))
    assert card["preferred weight"] == pytest.approx(reported.strength)
    header = read_adapter(run.adapter_file("lora")).info.metadata
    assert header["ss_steps"] == str(reported.best_step)
    assert float(header["sdlora.preferred_strength"]) == reported.strength


def cell(step: int, strength: float, score: float) -> Cell:
    draws = np.full(20, score)
    value = Estimate(score, score, score)
    return Cell(f"step {step}", step, strength, value, None, value, None, draws)


def test_the_best_step_is_exported_with_the_last_one_beside_it(settings: Settings) -> None:
    run = prepare_run(settings("run"), resume=False, emit=lambda event: None)  # type: ignore[arg-type]
    with run.held, run.loader:
        for _ in range(3):
            train_step(run)
            save(run)
        cells = [
            cell(2, 0.5, 0.4),
            cell(2, 1.0, 0.6),
            cell(2, 1.5, 0.5),
            cell(3, 1.0, 0.5),
            cell(3, 0.5, 0.1),
        ]
        file = finish_run(run, [0.5], choose(cells))
        checkpoints = {saved.step: saved.adapter_file for saved in list_checkpoints(run.folder.checkpoints)}
    for step, exported in ((2, file), (3, run.folder.adapter_file("lora-last"))):
        expected, written = load_file(checkpoints[step]), load_file(exported)
        assert expected.keys() == written.keys()
        assert all(torch.equal(expected[name], written[name]) for name in expected)
        header = read_adapter(exported).info.metadata
        assert header["ss_steps"] == str(step)
    assert float(read_adapter(file).info.metadata["sdlora.preferred_strength"]) == pytest.approx(
        1.1, abs=0.06
    )
    last = read_adapter(run.folder.adapter_file("lora-last")).info.metadata
    assert float(last["sdlora.preferred_strength"]) == 1.0


@pytest.mark.slow
def paired(scores: tuple[float, ...]) -> Cell:
    value = Estimate(float(np.mean(scores)), min(scores), max(scores))
    return Cell("step 12", 12, 1.0, value, None, value, None, np.array(scores))


def values(file: Path) -> torch.Tensor:
    """Return everything an adapter file holds but alphas, sorted."""
    parts = [tensor.flatten().float() for name, tensor in load_file(file).items() if "alpha" not in name]
    assert len(parts) >= 4
    return torch.cat(parts).sort().values


def master(config: Config, name: str) -> torch.Tensor:
    return state(config)[name].flatten().sort().values


@pytest.mark.parametrize(
    ("learned_scores", "taken"), [((0.6, 0.7, 0.8), "learned"), ((0.6, 0.7, 0.45), "average")]
)
def test_judging_says_whether_the_average_or_the_learned_weights_are_the_adapter(
    learned_scores: tuple[float, ...], taken: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("run", "training.average=ema", "judge.every=12", "judge.strengths=[1.0]")
    scores = {"step 12": paired((0.5, 0.5, 0.5)), "step 12 as learned": paired(learned_scores)}
    drawn: dict[str, Any] = {}

    def judged(
        judge: PanelJudge, source: str, step: int, strength: float, images: Any, plain: Any = ()
    ) -> Cell:
        drawn[source] = [np.asarray(image) for image in images]
        assert (step, strength) == (12, 1.0)
        return scores[source]

    monkeypatch.setattr(PanelJudge, "cell", judged)
    events = trained(config)
    # each was drawn with its own weights
    assert list(drawn) == ["step 12", "step 12 as learned"] and len(drawn["step 12"]) == 4
    assert not np.array_equal(drawn["step 12"][0], drawn["step 12 as learned"][0])
    names = {"learned": "unet.master", "average": "shown.unet"}
    assert not torch.equal(master(config, names["learned"]), master(config, names["average"]))
    file = folder(config).adapter_file("lora")
    assert torch.equal(values(file), master(config, names[taken]))
    assert f'"export_weights":"{taken}"' in read_adapter(file).info.metadata["sdlora.config"]
    (reported,) = (event for event in events if isinstance(event, Reported))
    word = "surely above" if taken == "learned" else "not surely above"
    (note,) = (note for note in reported.notes if "as learned have" in note)
    assert f"{word} their average's 0.50" in note
    assert note.rstrip(".").endswith("are the adapter" if taken == "learned" else "average is the adapter")
    assert folder(config).judged_images(12, 1.0, learned=True).is_file()


def test_judging_draws_the_weights_that_were_asked_for(settings: Settings) -> None:
    images: dict[tuple[str, bool], bytes] = {}
    for wanted in ("better", "average", "learned"):
        config = settings(
            wanted,
            *("training.average=ema", f"training.export_weights={wanted}"),
            *("judge.every=12", "judge.strengths=[1.0]"),
        )
        trained(config)
        for learned in (False, True):
            file = folder(config).judged_images(12, 1.0, learned=learned)
            if file.is_file():
                images[wanted, learned] = file.read_bytes()
        if wanted != "better":
            name = "unet.master" if wanted == "learned" else "shown.unet"
            assert torch.equal(values(folder(config).adapter_file("lora")), master(config, name))
    assert len(images) == 4
    assert images["better", False] == images["average", False] != images["learned", False]
    assert images["better", True] == images["learned", False]


def test_checkpoints_that_are_best_stay_and_others_go(settings: Settings) -> None:
    config = settings("run", "judge.every=2", "training.steps=12", "training.keep_checkpoints=1")
    trained(config)
    stored = json.loads(folder(config).judging_file.read_text(encoding="utf-8"))["cells"]
    tops: dict[int, float] = {}
    for entry in stored:
        tops[entry["step"]] = max(entry["score"], tops.get(entry["step"], 0.0))
    best = sorted(tops, key=lambda step: (-tops[step], step))[:2]
    kept = [saved.step for saved in list_checkpoints(folder(config).checkpoints)]
    assert len(tops) >= 3 and set(kept) == {*best, 12}


@pytest.mark.slow
def test_a_run_that_goes_on_judges_with_what_it_drew_before(settings: Settings) -> None:
    whole, halves = settings("whole"), settings("halves")
    expected = [event for event in trained(whole) if isinstance(event, Judged)]
    trained(halves, stop_at=8)
    rest = [event for event in trained(halves, resume=True) if isinstance(event, Judged)]
    assert_same(state(whole), state(halves))
    assert [event.scores for event in rest] == [expected[1].scores]
    assert (rest[0].best_step, rest[0].best_strength) == (expected[1].best_step, expected[1].best_strength)


_TWO = (("plain", ("judge.every=0",)), ("judged", ("judge.every=2",)))


@pytest.mark.parametrize("problem", ["memory", pytest.param("drawing", marks=pytest.mark.slow)])
def test_judging_that_fails_is_a_notice_and_training_goes_on(
    problem: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise (
            torch.OutOfMemoryError("CUDA out of memory")
            if problem == "memory"
            else ValueError("broken prompt")
        )

    plain, judged = (settings(name, "training.steps=3", *more) for name, more in _TWO)
    trained(plain)
    monkeypatch.setattr(judge_module, "render", broken)
    events = trained(judged)
    told = [event.message for event in events if isinstance(event, Notice) and "judging" in event.message]
    assert len(told) == 1 and ("memory" if problem == "memory" else "broken prompt") in told[0]
    assert_same(state(plain), state(judged))
    assert folder(judged).adapter_file("lora").is_file() and not folder(judged).report.exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("judge.share=0.001",), "too few for"),
        pytest.param(
            ("data.validation=7",), "3 images are too few to tell their style", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_judged_is_said(given: tuple[str, ...], told: str, settings: Settings) -> None:
    events = trained(settings("run", *given, "training.batch_size=2", "training.steps=2", "judge.every=1"))
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert sum(told in message for message in notices) == 1


def test_short_runs_are_not_judged_unless_asked(settings: Settings) -> None:
    config = settings("run").with_values({"judge.every": None})
    run = prepare_run(config, resume=False, emit=lambda event: None)  # type: ignore[arg-type]
    with run.held, run.loader:
        assert run.config.judge.every == 0


@pytest.mark.slow
def test_a_run_ends_when_nothing_gets_better(settings: Settings) -> None:
    config = settings("run", "judge.patience=1", "judge.every=2", "optimizer.learning_rate=1e-12")
    events = trained(config)
    done = [event.step for event in events if isinstance(event, StepDone)]
    told = [
        event.message for event in events if isinstance(event, Notice) and "judge.patience=1" in event.message
    ]
    assert 2 < done[-1] < 12 and len(told) == 1
    assert folder(config).adapter_file("lora").is_file()


def test_more_steps_are_made_when_asked(settings: Settings) -> None:
    config = settings("run", "training.steps=4", "judge.every=0")
    trained(config)
    from sdlora.config.toml import load_config

    stored = load_config(folder(config).config_file, (), {"output.folder": folder(config).path})
    steps = [event for event in trained(stored, more=3) if isinstance(event, StepDone)]
    assert [event.step for event in steps] == [5, 6, 7] and steps[0].learning_rate > 0
    after = load_config(folder(config).config_file)
    assert after.training.steps == 7
    assert read_adapter(folder(config).adapter_file("lora")).info.metadata["ss_steps"] == "7"


def test_judging_ends_when_a_stop_is_asked_for(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    control = Control()
    fold = judge_module.folded

    def counted(model: Any, weights: Any, strength: float) -> Any:
        drawn.append(strength)
        if strength == 1.0:
            control.stop()
        return fold(model, weights, strength)

    monkeypatch.setattr(judge_module, "folded", counted)
    config = settings("run", "training.steps=4", "judge.every=4")
    result = train(config, control=control)
    assert (
        list(dict.fromkeys(drawn)) == [0.0, 0.5, 1.0]
        and result.stop_asked
        and result.adapter_file is not None
    )
