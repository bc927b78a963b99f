"""How the learning rate goes: each schedule by its numbers, and no schedule without a name."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from sdlora.config.schema import OptimizerConfig, Schedule
from sdlora.errors import ConfigError
from sdlora.training.schedules import SCHEDULES, schedule_factor


def settings(schedule: str, warmup: int = 0) -> OptimizerConfig:
    return OptimizerConfig(warmup_steps=warmup).model_copy(update={"schedule": schedule})


QUARTERS = {
    "constant": (1.0, 1.0, 1.0, 1.0),
    "linear": (1.0, 0.75, 0.5, 0.25),
    # half a cosine: 0.5 (1 + cos(pi / 4)), 0.5, 0.5 (1 - cos(pi / 4))
    "cosine": (1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4),
}


@pytest.mark.parametrize("schedule", QUARTERS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 100), (20, 120)])
def test_each_schedule_has_its_value_at_every_quarter(schedule: str, warmup: int, steps: int) -> None:
    quarters = [warmup + 100 * n // 4 for n in range(4)]
    factors = [schedule_factor(settings(schedule, warmup), step, steps) for step in quarters]
    assert factors == pytest.approx(QUARTERS[schedule], abs=1e-12)


@pytest.mark.parametrize("schedule", QUARTERS)
def test_the_warm_up_rises_in_a_line_whatever_comes_after(schedule: str) -> None:
    factors = [schedule_factor(settings(schedule, 3), step, 10) for step in range(4)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_falling_schedules_end_at_zero_and_never_rise() -> None:
    for schedule in ("linear", "cosine"):
        factors = [schedule_factor(settings(schedule), step, 50) for step in range(51)]
        assert factors[-1] == pytest.approx(0.0, abs=1e-12)
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
