"""Where layers start: the alpha a file holds for each, and starts that change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.adapters.initial import file_alpha, low_rank
from sdlora.config.adapter import AdapterConfig


@pytest.mark.parametrize("module_rank", [1, 4, 16])
def test_every_layer_has_the_scale_that_the_settings_mean_whatever_its_rank(module_rank: int) -> None:
    standard = file_alpha(AdapterConfig(rank=4, alpha=6.0), 4, 6.0, module_rank)
    assert standard / module_rank == 6.0 / 4
    config = AdapterConfig(rank=4, alpha=6.0, scaling="rslora")
    assert file_alpha(config, 4, 6.0, module_rank) / module_rank == pytest.approx(
        6.0 / math.sqrt(module_rank)
    )


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 3)])
@pytest.mark.parametrize(("init", "deviation"), [("default", 1 / math.sqrt(3 * 8)), ("gaussian", 1 / 512)])
def test_a_start_changes_nothing_and_its_down_factor_has_the_spread_of_the_papers(
    shape: tuple[int, ...], init: str, deviation: float
) -> None:
    pair = low_rank(init, torch.zeros(shape), 512, 3.0, torch.Generator().manual_seed(0))
    assert not pair.delta().any() and pair.delta().shape == shape and pair.alpha == 3.0
    if init == "default":  # uniform in +-1/sqrt(fan in), whose deviation is that over sqrt(3)
        deviation = 1 / math.sqrt(3 * math.prod(shape[1:]))
    assert float(pair.down.std()) == pytest.approx(deviation, rel=0.05)
