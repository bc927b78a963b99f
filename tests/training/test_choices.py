"""How a run computes: tried in a small share of it, remembered, and used only where that holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config.schema import Config
from sdlora.data.reading.items import Visit
from sdlora.events import Emitter, Event, Notice
from sdlora.families.layout import Layout
from sdlora.families.lean import LeanResidual
from sdlora.families.lean_blocks import LeanBlock
from sdlora.training.choices import SHARE, remembered_choice, try_choices, use, usual_choice
from sdlora.training.cost import measure_cost
from sdlora.training.fast import Choice
from sdlora.training.proof import Pass
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.train import save

Settings = Callable[..., Config]
USUAL = (
    *("adapter.rank=2", "training.batch_size=2", "data.validation=0", "sample.prompts=[]"),
    *("training.device=cpu", "training.precision=fp32"),
)
pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which choices are remembered."""
    monkeypatch.setenv("SDLORA_CACHE_FOLDER", str(tmp_path / "kept"))
    return tmp_path / "kept" / "choices.json"


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Callable[..., Path]) -> Settings:
    folder = image_folder()
    return lambda run, *given: run_settings(run, USUAL, given, {"data.folder": folder})


def prepared(config: Config, *, resume: bool = False) -> Run:
    return prepare_run(config, resume=resume, emit=Emitter(()))


def way_of(run: Run) -> Choice:
    """Return how a run computes, as its model and its splitter have it."""
    model: Any = run.model
    kernels = [m.weight for m in model.denoiser.modules() if isinstance(m, torch.nn.Conv2d)]
    last = {weight.permute(0, 2, 3, 1).is_contiguous() for weight in kernels if weight.shape[-1] == 3}
    assert len(last) == 1
    processors = {type(m.processor).__name__ for m in model.denoiser.modules() if hasattr(m, "processor")}
    layout: Layout = "channels-last" if last == {True} else "channels-first"
    fused = processors == {"AttnProcessor2_0"}
    forwards = [module.__dict__.get("forward") for module in model.denoiser.modules()]
    ours = {forward.kernels for forward in forwards if isinstance(forward, LeanBlock | LeanResidual)}
    kernels = "kernels" not in run.fast.names or ours != {False}
    return Choice(layout, run.splitter is not None, "sdpa" if fused else "classic", kernels)


class Clock:
    """Stands in for a timed pass: notes the way it is made, and takes as long as a table says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Choice], float]) -> None:
        self.ways: list[Choice] = []
        self._seconds = seconds
        monkeypatch.setattr(sys.modules["sdlora.training.choices"], "run_pass", self)

    def __call__(self, run: Run, visits: tuple[Visit, ...]) -> Pass:
        self.ways.append(way_of(run))
        return Pass(torch.zeros(1), [], self._seconds(self.ways[-1]))


def first_visits(run: Run) -> tuple[Visit, ...]:
    return run.order.step(0)[0][0]


def slow_unless_first_and_split(way: Choice) -> float:
    return 1.0 - 0.2 * (way.layout == "channels-first") - 0.1 * way.split


def test_a_trial_takes_two_percent_of_the_run_at_most_and_a_short_run_tries_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    run = prepared(settings("run"))
    usual, visits = usual_choice(run), first_visits(run)
    for steps, passes in ((149, 0), (150, 3), (249, 3), (250, 5), (4000, 5)):
        run.steps, clock = steps, Clock(monkeypatch, slow_unless_first_and_split)
        chosen = try_choices(run, visits)
        assert len(clock.ways) == passes <= SHARE * steps
        assert (chosen is not None) == own_cache.exists() == (passes > 0)
        assert run.choice == chosen
        use(run, usual)
        run.choice = None
        own_cache.unlink(missing_ok=True)
    run.step = 3900  # of a run that goes on only what is left counts
    assert try_choices(run, visits) is None


def test_the_fastest_way_is_used_told_and_remembered_by_the_next_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = prepared(settings("one", "training.steps=300")), list[Event]()
    run.emit = Emitter((told.append,))
    usual, clock = usual_choice(run), Clock(monkeypatch, slow_unless_first_and_split)
    assert way_of(run) == usual == Choice("channels-last", False, "sdpa")
    best = Choice("channels-first", True, "sdpa")
    assert try_choices(run, first_visits(run)) == best == run.choice == way_of(run)
    assert set(clock.ways) == {usual, Choice("channels-last", True, "sdpa"), best}
    (notice,) = (event.message for event in told if isinstance(event, Notice))
    assert "computing channels-first, batch in parts, sdpa attention" in notice and "1 s a pass" in notice
    again = prepared(settings("two", "training.steps=9"))
    assert remembered_choice(again) == best
    measure_cost(again)
    assert again.choice == best == way_of(again) and len(clock.ways) == 5


def test_kernels_of_our_own_are_used_where_they_are_faster(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(settings("run", "training.steps=400"))
    run.fast.use(("blocks", "kernels"))
    for faster in (True, False):
        Clock(monkeypatch, lambda way, faster=faster: 1.0 - 0.2 * (way.kernels == faster))
        chosen = try_choices(run, first_visits(run))
        assert chosen is not None and chosen.kernels == faster == way_of(run).kernels
        assert run.fast.names == ("blocks", "kernels")  # proven, whether used or not
        assert ("torch's norms and gates" in chosen.render()) == (not faster)
        run.choice = None
    values = {"layout": "channels-last", "split": False, "attention": "sdpa"}
    assert Choice.of(values).kernels, "choices of earlier versions name none"


def test_a_difference_that_may_be_chance_changes_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(settings("run", "training.steps=300"))
    usual = usual_choice(run)
    Clock(monkeypatch, lambda way: 1.0 if way == usual else 0.98)
    assert try_choices(run, first_visits(run)) == usual == way_of(run)


def test_in_bf16_attentions_are_tried_unless_one_is_asked_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(settings("run", "training.steps=400", "training.precision=bf16"))
    usual, seen = usual_choice(run), {}
    config = run.config
    for asked in ("auto", "sdpa"):
        run.config = config.with_values({"training.attention": asked})
        clock = Clock(monkeypatch, lambda way: 2.0 - (way.attention == "sdpa"))
        chosen = try_choices(run, first_visits(run))
        assert chosen is not None
        seen[asked] = chosen.attention, {way.attention for way in clock.ways}
        use(run, usual)
    assert seen == {"auto": ("sdpa", {"classic", "sdpa"}), "sdpa": ("classic", {"classic"})}


def test_a_choice_holds_only_for_the_same_machine_versions_and_shapes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(settings("one", "training.steps=300"))
    Clock(monkeypatch, slow_unless_first_and_split)
    kept, config = try_choices(run, first_visits(run)), run.config
    for key, value in (("training.batch_size", 1), ("data.resolution", 640), ("training.attention", "sdpa")):
        run.config = config.with_values({key: value})
        assert remembered_choice(run) is None, key
    run.config = config
    changes: list[tuple[Any, str, Any]] = [
        (torch, "__version__", "99.1"),
        (torch, "get_num_threads", lambda: 64),
        (sys.modules["platform"], "processor", lambda: "another"),
    ]
    for module, name, changed in changes:
        with monkeypatch.context() as other:
            other.setattr(module, name, changed)
            assert remembered_choice(run) is None, name
    assert remembered_choice(run) == kept is not None


def test_a_file_that_cannot_be_meant_is_as_good_as_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    run = prepared(settings("run", "training.steps=300"))
    Clock(monkeypatch, slow_unless_first_and_split)
    assert try_choices(run, first_visits(run)) == remembered_choice(run) is not None
    ((key, entry),) = json.loads(own_cache.read_text(encoding="utf-8")).items()
    entries = [entry | {"layout": "diagonal"}, entry | {"attention": "xformers"}, {"split": True}, 3]
    for text in ("[]", "{broken", *(json.dumps({key: damaged}) for damaged in entries)):
        own_cache.write_text(text, encoding="utf-8")
        assert remembered_choice(run) is None, text
    own_cache.write_text(json.dumps({key: entry}), encoding="utf-8")
    assert remembered_choice(run) == run.choice


def test_a_resumed_run_keeps_its_way_whatever_is_remembered_now(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("run", "training.steps=300")
    run = prepared(config)
    first = Choice("channels-first", True, "sdpa")
    use(run, first)
    assert way_of(run) == first
    run.step = 1
    assert save(run) is None
    run.held.close()
    clock = Clock(monkeypatch, lambda way: 2.0 - (way == Choice("channels-last", False, "sdpa")))
    other = prepared(settings("other", "training.steps=300"))
    assert try_choices(other, first_visits(other)) == Choice("channels-last", False, "sdpa")
    tried = len(clock.ways)
    resumed = prepared(config, resume=True)
    measure_cost(resumed)
    assert resumed.choice == first == way_of(resumed) and len(clock.ways) == tried
