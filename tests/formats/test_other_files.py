"""A part of the matrix of others' files; ``python -m tools.adapter_matrix --part others`` has all of it."""

from __future__ import annotations

import pytest

from sdlora.families.table import FAMILIES
from tools import client_matrix, other_files


def test_the_matrix_has_thousands_of_files() -> None:
    assert len(list(other_files.cases(list(FAMILIES)))) >= 3000


@pytest.mark.long
def test_a_sample_of_the_matrix_equals_float64_arithmetic() -> None:
    counts, failures, _ = other_files.run(list(FAMILIES), step=67)
    assert failures == [] and counts["files"] >= 50
    assert counts["checked read"] == counts["files"] and counts["checked merge"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_whole_matrix_equals_float64_arithmetic(family: str) -> None:
    counts, failures, _ = other_files.run([family])
    assert failures == [] and counts["files"] >= 1000


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("part", "family", "every", "least"),
    [("claims", "sd1", 233, 5), ("written", "sd1", 67, 4), ("peft", "sd1", 31, 2)],
)
def test_a_sample_is_what_diffusers_and_peft_really_do(
    part: str, family: str, every: int, least: int
) -> None:
    tally = client_matrix.Tally()
    client_matrix.PARTS[part](tally, family, every)
    assert tally.failures == [] and sum(tally.counts.values()) >= least


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("part", list(client_matrix.PARTS))
def test_everything_is_what_diffusers_and_peft_really_do(part: str, family: str) -> None:
    tally = client_matrix.Tally()
    client_matrix.PARTS[part](tally, family, 1)
    assert tally.failures == [] and sum(tally.counts.values()) > 80
