"""The memory ladder: the mildest rungs that fit, planned with few counts, kept on resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from sdlora.config.defaults import BaseFacts, OpenSettings
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.events import Decided, Event, Notice, StepDone
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training import step as steps
from sdlora.training.checkpoint import load_checkpoint
from sdlora.training.fast import FAST_PATHS
from sdlora.training.foresight import foresee
from sdlora.training.ladder import APART, AUTO_SHARE, RECOMPUTE, budget_of, climb, next_rung, parse_size
from sdlora.training.memory import MemoryPlan
from sdlora.training.planning import save_memory
from sdlora.training.processes import Processes
from sdlora.training.train import train

MIB = 2**20
SAVED = dict(zip(RECOMPUTE, (0, 100, 180, 300, 500), strict=True))
WORK = dict(zip(RECOMPUTE, (1000, 1010, 1020, 1100, 1330), strict=True))


class Counter:
    """Plans by a made-up rule, in MiB: 1000 of weights, 600 of activations, encoding and previews of 1400."""

    def __init__(self) -> None:
        self.asked: list[Config] = []

    def __call__(self, config: Config) -> MemoryPlan:
        self.asked.append(config)
        training = config.training
        weights = {"full": 1000, "fp8": 500, "nf4": 260}[training.base_format or "full"]
        rung = training.recompute or "nothing"
        saved, work = SAVED[rung], WORK[rung]
        if training.recompute_blocks is not None:  # the first blocks save more than the last
            below = RECOMPUTE[RECOMPUTE.index(rung) - 1]
            share = training.recompute_blocks / 10
            saved = int(SAVED[below] + (saved - SAVED[below]) * (1 - (1 - share) ** 2))
            work = int(WORK[below] + (work - WORK[below]) * share)
        adapter = 20 if config.optimizer.name == "adamw8bit" else 50
        drawing = 200 if training.autoencoder == "banded" else 400
        others = {"encoding": 300 if training.autoencoder == "banded" else 1400, "placing": weights}
        plan = MemoryPlan(
            *(weights * MIB, adapter * MIB, (600 - saved) * MIB, None),
            {name: size * MIB for name, size in {**others, "previews": weights + adapter + drawing}.items()},
            work,
            dict.fromkeys(RECOMPUTE[1:], 10),
            (weights * MIB // 20,) * 16,
        )
        return plan.with_offloaded(training.offload_blocks) if training.offload_blocks else plan


def climbed(
    mib: float | None, *overrides: str, main_memory: int | None = None
) -> tuple[dict[str, Any], Any, Counter]:
    counter = Counter()
    config = load_config(None, ["training.batch_size=1", *overrides], {})
    planned = climb(config, None if mib is None else int(mib * MIB), counter, main_memory=main_memory)
    return {rung.key.partition(".")[2]: rung.value for rung in planned.taken}, planned, counter


@pytest.mark.parametrize("mib", [None, 1650, 5000])
def test_with_enough_memory_nothing_is_decided_and_one_count_is_made(mib: float | None) -> None:
    taken, planned, counter = climbed(mib)
    assert taken == {} and planned.fits and len(counter.asked) == 1 and planned.work == 1


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        (1550, {"recompute": "norms"}),
        (1470, {"recompute": "gates"}),
        (1460, {"recompute": "projections"}),
        (1400, {"autoencoder": "banded", "recompute": "projections"}),
        (1250, {"autoencoder": "banded", "recompute": "blocks"}),
        (1000, {"autoencoder": "banded", "recompute": "blocks", "offload_blocks": 7}),
    ],
)
def test_the_mildest_rungs_that_fit_are_taken(mib: float, expected: dict[str, Any]) -> None:
    taken, planned, counter = climbed(mib)
    blocks = taken.pop("recompute_blocks", None)
    assert taken == expected and planned.fits
    assert planned.plan.peak <= mib * MIB
    assert len(counter.asked) <= 8, "each count takes seconds"
    if blocks is not None:  # no more blocks than are needed, but for the straight lines
        less = planned.config.with_values({"training.recompute_blocks": max(0, blocks - 2)})
        assert not (counter(less).phases["step"] <= mib * MIB) or blocks <= 2


def test_copies_of_the_adapter_go_before_blocks_are_copied() -> None:
    """Where all blocks are made again and some MiB are missing; and never where others were named."""

    class Joint(Counter):
        def __call__(self, config: Config) -> MemoryPlan:
            plan = super().__call__(config)
            return replace(plan, adapter=plan.adapter + 120 * MIB * (config.training.fast != APART))

    named = {name for name, path in FAST_PATHS.items() if not path.follows}
    assert len(named) >= 4 and set(APART.split(", ")) == named - {"joint"}, "no other path is lost with it"
    for fast, expected in (("auto", APART), ("blocks, lora, joint", None)):
        config = load_config(None, ["training.batch_size=1", f'training.fast="{fast}"'], {})
        planned = climb(config, 1260 * MIB, Joint())
        taken = {rung.key: rung.value for rung in planned.taken}
        assert taken.get("training.fast") == expected and "training.offload_blocks" not in taken
        assert planned.fits and ("optimizer.name" in taken) == (expected is None)


def test_no_cheaper_rung_would_have_fitted() -> None:
    """Against all there are, tried one by one."""
    for mib in range(1200, 1660, 30):
        _, planned, counter = climbed(mib)
        work = counter(planned.config).flops
        base = load_config(None, ["training.batch_size=1"], {})
        banded = planned.config.training.autoencoder
        for rung in RECOMPUTE:
            trial = base.with_values({"training.recompute": rung, "training.autoencoder": banded})
            if counter(trial).peak <= mib * MIB:
                assert counter(trial).flops >= work, (mib, rung)


def test_what_changes_numbers_comes_last() -> None:
    taken, planned, _ = climbed(730, main_memory=100 * MIB)
    assert list(taken) == ["autoencoder", "recompute", "name", "base_format"]
    assert taken["name"] == "adamw8bit" and taken["base_format"] == "fp8" and planned.fits
    taken, planned, _ = climbed(500, main_memory=0)
    assert taken["base_format"] == "nf4" and planned.fits


def test_what_the_user_set_stays() -> None:
    taken, planned, _ = climbed(
        *(900, "training.recompute=gates", "optimizer.name=adamw", "training.base_format=full"),
        *("training.offload_blocks=0", "training.autoencoder=whole"),
    )
    assert taken == {} and not planned.fits


def test_less_arithmetic_than_without_is_not_called_more() -> None:
    """Counted for SD2.1: products that are made apart do not multiply the zeros of their joint form."""

    class Lighter(Counter):
        def __call__(self, config: Config) -> MemoryPlan:
            plan = super().__call__(config)
            return replace(plan, flops=997) if config.training.recompute == "norms" else plan

    planned = climb(load_config(None, ["training.batch_size=1"], {}), 1550 * MIB, Lighter())
    assert {rung.key: rung.cost for rung in planned.taken} == {
        "training.recompute": "hardly more arithmetic a step"
    }


def test_every_rung_says_what_it_costs() -> None:
    _, planned, _ = climbed(1000)
    costs = {rung.key: rung.cost for rung in planned.taken}
    assert costs["training.recompute"] == "33.0% more arithmetic a step"
    assert "copied to the device a step" in costs["training.offload_blocks"]
    assert all(rung.cost in rung.render() for rung in planned.taken)


def test_budgets() -> None:
    card, cpu = torch.device("cuda"), torch.device("cpu")
    assert budget_of("max", 10, card) is None
    assert budget_of("auto", 1000, card) == int(1000 * AUTO_SHARE)
    assert budget_of("auto", 1000, cpu) is None, "a CPU is left alone"
    assert budget_of("6GB", 1000, cpu) == 6 * 2**30 == parse_size("6 GiB")
    assert parse_size("512MB") == 512 * MIB
    for wrong in ("0GB", "much", "-3GB"):
        with pytest.raises(ConfigError, match="no amount of memory"):
            parse_size(wrong)


def test_the_next_rung_of_a_run_under_way() -> None:
    config = load_config(None, [], {})
    seen = []
    while (changes := next_rung(config)) is not None:
        config = config.with_values(changes)
        seen.append(config.training.recompute)
    assert seen == list(RECOMPUTE[1:])
    partly = config.with_values({"training.recompute": "blocks", "training.recompute_blocks": 3})
    assert next_rung(partly) == {"training.recompute": "blocks", "training.recompute_blocks": None}


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    folder = image_folder(4)

    def make(name: str, *overrides: str) -> Config:
        fixed = ("training.steps=3", "training.batch_size=1", "sample.prompts=[]", "data.validation=0")
        values = {
            "data.folder": folder,
            "data.cache_folder": tmp_path / "cache",
            "output.folder": tmp_path / name,
            "model.base": str(tiny_base),
        }
        return load_config(None, [*fixed, *overrides], values)

    return make


@pytest.mark.long
def test_a_run_tells_its_rungs_and_keeps_them_when_it_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    monkeypatch.setattr("sdlora.training.planning.budget_of", lambda *_: 1)  # nothing fits: as far as it goes
    monkeypatch.setattr("sdlora.training.run.refuse_what_cannot_fit", lambda *_: None)
    monkeypatch.setattr("sdlora.training.planning.offload_room", lambda *_: None)
    config = settings(
        "run", "training.base_format=full", "optimizer.name=adamw", "training.checkpoint_every=1"
    )
    train(config, listeners=[heard.append])
    told = {event.key: event for event in heard if isinstance(event, Decided)}
    assert (
        told["training.recompute"].value == "blocks"
        and "more arithmetic" in told["training.recompute"].reason
    )
    saved = load_config(RunFolder(config.output.folder or Path()).config_file)
    assert saved.training.recompute == "blocks" and saved.training.autoencoder == "banded"
    monkeypatch.setattr("sdlora.training.planning.budget_of", lambda *_: None)  # as if all memory were free
    longer: list[Event] = []
    train(config, continue_for=1, listeners=[longer.append])
    again = {event.key: event for event in longer if isinstance(event, Decided)}
    assert again["training.recompute"].value == "blocks", "decided once"
    assert [event.step for event in longer if isinstance(event, StepDone)] == [4]


@pytest.mark.long
@pytest.mark.parametrize("at", [1, 2])
def test_a_lack_of_memory_goes_one_rung_up_and_makes_the_step_again(
    at: int, settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws: the adapter is that of a run that had the rung from the start, bit for bit."""
    states = []
    for name in ("usual", "lacking"):
        heard: list[Event] = []
        overrides = ["training.gradient_accumulation=2"]
        if name == "usual":
            overrides.append("training.recompute=norms")
        else:
            original, calls = steps.loss_of, []

            def lacking(*given: Any, original: Any = original, calls: Any = calls) -> Any:
                calls.append(1)
                if len(calls) == 2 * at:  # in the second micro-batch, the first one's gradients being there
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return original(*given)

            monkeypatch.setattr(steps, "loss_of", lacking)
        config = settings(name, *overrides)
        result = train(config, listeners=[heard.append])
        assert [event.step for event in heard if isinstance(event, StepDone)] == [1, 2, 3]
        told = [
            event.message for event in heard if isinstance(event, Notice) and "out of memory" in event.message
        ]
        assert len(told) == (name == "lacking"), told
        losses = torch.tensor([event.loss for event in heard if isinstance(event, StepDone)])
        folder = list_checkpoints(result.folder / "checkpoints")[-1]
        states.append({**load_checkpoint(folder).tensors, "losses": losses})
        if name == "lacking":
            assert f"step {at}: " in told[0] and "training.recompute=norms" in told[0]
            saved = load_config(RunFolder(config.output.folder or Path()).config_file)
            assert saved.training.recompute == "norms"
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_no_rung_left_is_the_error_that_it_was(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "loss_of", lacking)
    with pytest.raises(torch.OutOfMemoryError):
        train(settings("run", "training.recompute=blocks"))


@pytest.mark.long
def test_a_family_can_be_asked_for_without_a_file() -> None:
    planned = foresee(load_config(None, ["training.batch_size=1"], {"model.base": "sd1"}), 2 * 2**30)
    assert planned.fits and planned.plan.peak <= 2 * 2**30 and planned.taken
    assert 1.0 < (planned.work or 0) < 1.34


def test_a_machine_without_the_run_folder_takes_the_rungs_that_the_main_process_finds() -> None:
    """It had asked the others for their memory instead, and they had gone on: found by test_two_machines."""

    class Second(Processes):
        asked: ClassVar[list[Any]] = []

        def exchange(self, message: Any = None, *, at_once: bool = False) -> list[Any]:
            self.asked.append(message)
            return [{"training.recompute": "gates"}, message]

    def planner(config: Config) -> MemoryPlan:
        raise AssertionError("nothing is to be planned")

    open_settings = OpenSettings(Config(), BaseFacts("a base", {}, 512, "cpu"))
    save_memory(open_settings, planner, None, Second())  # type: ignore[arg-type]
    assert open_settings.config.training.recompute == "gates" and Second.asked == [None]
