"""Times at which a job may start, as they are typed."""

from __future__ import annotations

from datetime import datetime

import pytest
from sdlora_ui.start_time import start_time

from sdlora.errors import ConfigError

NOW = datetime(2026, 12, 1, 20, 0)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        (" 22:30 ", datetime(2026, 12, 1, 22, 30)),
        ("6:05", datetime(2026, 12, 2, 6, 5)),
        ("2026-12-24 06:00", datetime(2026, 12, 24, 6)),
        ("2026-12-24T06:00", datetime(2026, 12, 24, 6)),
    ],
)
def test_a_time_is_the_next_one_unless_a_date_is_given(text: str, moment: datetime) -> None:
    assert start_time(text, NOW) == moment.timestamp()


def test_without_a_time_there_is_none() -> None:
    assert start_time("  ", NOW) is None


@pytest.mark.parametrize("text", ["tonight", "25:00", "2026-11-30 10:00", "0001-01-01 00:00", "x" * 10_000])
def test_what_is_no_time_to_come_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="start `") as error:
        start_time(text, NOW)
    assert len(str(error.value)) < 200
