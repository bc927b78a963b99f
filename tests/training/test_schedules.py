"""How the learning rate goes: each schedule by its numbers, and no schedule without a name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from sdlora.config.contradictions import contradictions, warmup_problem
from sdlora.config.schema import Config, OptimizerConfig, Schedule
from sdlora.errors import ConfigError
from sdlora.training.schedules import SCHEDULES, schedule_factor


def settings(schedule: str, warmup: int | float = 0, **more: Any) -> OptimizerConfig:
    """Return settings with a warm-up of so many steps, or of a share."""
    key = "warmup_share" if isinstance(warmup, float) else "warmup_steps"
    return OptimizerConfig(**{key: warmup}, **more).model_copy(update={"schedule": schedule})


# at a quarter, half and three quarters of the steps after the warm-up; 1 at its end
QUARTERS = {
    "constant": (1.0, 1.0, 1.0),
    "linear": (0.75, 0.5, 0.25),
    # half a cosine: 0.5 (1 + cos(pi / 4)), 0.5, 0.5 (1 - cos(pi / 4))
    "cosine": (0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4),
    "cosine_with_restarts": (0.5, 1.0, 0.5),  # of two cycles
    "polynomial": (0.5625, 0.25, 0.0625),  # of power 2
    "rex": (6 / 7, 2 / 3, 0.4),
    "inverse_sqrt": (0.5, math.sqrt(1 / 7), math.sqrt(1 / 10)),  # the warm-up and 3, 6 and 9 times it
}
OWN: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"schedule_cycles": 2},
    "polynomial": {"schedule_power": 2.0},
}


@pytest.mark.parametrize("schedule", QUARTERS)
@pytest.mark.parametrize("warmup", [10, 10 / 130])
def test_each_schedule_has_its_value_at_every_quarter(schedule: str, warmup: int | float) -> None:
    quarters = [10 + 120 * n // 4 for n in range(4)]
    factors = [
        schedule_factor(settings(schedule, warmup, **OWN.get(schedule, {})), step, 130) for step in quarters
    ]
    assert factors == pytest.approx((1.0, *QUARTERS[schedule]), abs=1e-12)


@pytest.mark.parametrize("schedule", sorted(set(QUARTERS) - {"inverse_sqrt"}))
def test_without_a_warm_up_it_begins_at_the_peak(schedule: str) -> None:
    more = OWN.get(schedule, {})
    factors = [schedule_factor(settings(schedule, 0, **more), step, 100) for step in (0, 25, 50, 75)]
    assert factors == pytest.approx((1.0, *QUARTERS[schedule]), abs=1e-12)


def of_library(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """Return the rates that a library's scheduler gives, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


STEPS, WARMUP = 60, 12
LIBRARY: dict[str, tuple[OptimizerConfig, Callable[[torch.optim.Optimizer], Any]]] = {
    "linear": (
        settings("linear"),
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=1.0),
    ),
    "cosine": (settings("cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS)),
    "cosine to a floor": (
        settings("cosine", schedule_floor=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1),
    ),
    "cosine_with_restarts": (
        settings("cosine_with_restarts", schedule_cycles=3),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=STEPS // 3),
    ),
    "polynomial": (
        settings("polynomial", schedule_power=1.7),
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=1.7),
    ),
    "inverse_sqrt": (
        settings("inverse_sqrt", WARMUP),
        lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP),
    ),
    "restarts after a warm-up": (
        settings("cosine_with_restarts", WARMUP, schedule_cycles=2),
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, STEPS, 2),
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_it_is_what_other_libraries_have(name: str) -> None:
    options, make = LIBRARY[name]
    first = options.warmup(STEPS)  # the warm-up itself differs: ours never begins at a rate of 0
    ours = [schedule_factor(options, step, STEPS) for step in range(first, STEPS)]
    assert len(ours) >= 48
    assert ours == pytest.approx(of_library(make, STEPS)[first:], abs=1e-6)


@pytest.mark.parametrize("schedule", QUARTERS)
def test_the_warm_up_rises_in_a_line_whatever_comes_after(schedule: str) -> None:
    factors = [schedule_factor(settings(schedule, 3, schedule_floor=0.5), step, 10) for step in range(4)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_falling_schedules_end_at_their_floor_and_never_rise() -> None:
    for schedule in ("linear", "cosine", "polynomial", "rex"):
        for floor in (0.0, 0.2):
            options = settings(schedule, schedule_floor=floor)
            factors = [schedule_factor(options, step, 50) for step in range(51)]
            assert factors[-1] == pytest.approx(floor, abs=1e-12)
            assert factors == sorted(factors, reverse=True)


def test_an_unknown_schedule_is_an_error_and_not_some_other_one() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.schedule=cosin`: no such schedule; use cosine"):
        schedule_factor(settings("cosin"), 5, 10)


def test_a_new_schedule_is_an_entry_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        SCHEDULES, "steps", lambda done, settings: 1.0 if done < 0.5 else settings.weight_decay
    )
    assert [schedule_factor(settings("steps", 2), step, 12) for step in (1, 2, 6, 7)] == [
        2 / 3,
        1.0,
        1.0,
        0.01,
    ]


def test_settings_name_every_schedule_there_is() -> None:
    assert set(SCHEDULES) == set(get_args(Schedule)) == set(QUARTERS)


def problems(**values: Any) -> list[str]:
    return contradictions(Config().with_values({f"optimizer.{key}": value for key, value in values.items()}))


def test_a_schedules_own_settings_are_contradictions_with_another_one() -> None:
    assert problems(schedule="polynomial", schedule_power=2.0, schedule_floor=0.1) == []
    assert problems(schedule="rex", schedule_power=2.0) == [
        "`optimizer.schedule_power` has no effect with `optimizer.schedule=rex`"
    ]
    assert problems(schedule_cycles=2) == [
        "`optimizer.schedule_cycles` has no effect with `optimizer.schedule=cosine`"
    ]
    (floor,) = problems(schedule="constant", schedule_floor=0.1)
    assert floor.startswith("`optimizer.schedule_floor` has no effect with `optimizer.schedule=constant`")
    (both,) = problems(warmup_steps=3, warmup_share=0.1)
    assert "both fix the warm-up" in both


def test_a_warm_up_as_long_as_the_run_is_a_problem_in_steps_and_as_a_share() -> None:
    def problem(steps: int, **values: Any) -> str | None:
        return warmup_problem(OptimizerConfig(**values), steps, f"{steps} steps")

    assert problem(10, warmup_steps=9) is problem(10, warmup_share=0.9) is problem(10) is None
    assert problem(10, warmup_steps=10) == (
        "`optimizer.warmup_steps=10` must be below 10 steps, or the full learning rate is never reached"
    )
    assert (problem(10, warmup_share=0.97) or "").startswith("`optimizer.warmup_share=0.97` must be below 10")
    none = problem(10, schedule="inverse_sqrt", warmup_share=0.01) or ""
    assert "`optimizer.warmup_share=0.01` gives no step of 10 steps; give more" in none
    assert problem(10, schedule="inverse_sqrt", warmup_share=0.1) is None
