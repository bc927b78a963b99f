"""The whole program on a pretended CUDA device (tools/pretend_cuda): all scenarios if slow, else a few."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tools.pretend_cuda.build import Unavailable, built
from tools.pretend_cuda.command import play
from tools.pretend_cuda.scenarios import SCENARIOS

USUAL = ("refusals",)  # ``.ci/run`` runs more of them
"""Those of every test run; the others take ten minutes."""

Play = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def scenario(request: pytest.FixtureRequest) -> Play:
    """A function that plays a scenario in a process of its own."""
    assert request.config.cache is not None
    os.environ.setdefault("PRETEND_CUDA_CACHE", str(request.config.cache.mkdir("pretend-cuda")))
    try:
        libraries = built()
    except Unavailable as error:
        pytest.skip(str(error))
    return lambda name: play(name, libraries)


def names() -> list[Any]:
    assert set(USUAL) < set(SCENARIOS) and len(SCENARIOS) > 30
    return [pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow]) for name in SCENARIOS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", names())
def test_a_scenario_runs_on_the_pretended_device(name: str, scenario: Play) -> None:
    answer = scenario(name)
    assert answer["outcome"] == "ok", f"{answer['where']}\n{answer['trace']}"
    assert answer["launches"] > 0 and answer["peak"] > 0
