"""Comparing a written adapter with its source: nothing is added by the comparison itself."""

from __future__ import annotations

import pytest
import torch

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.errors import AdapterFileError
from sdlora.formats.proof import compare


def test_a_scale_that_moved_into_a_factor_differs_by_exactly_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 768), (640, 4)))
    key = ModuleKey("unet", "mid_block.attentions.0.proj_in")
    trained = AdapterWeights({key: LowRankPair(down, up, 2.0)})
    folded = AdapterWeights({key: LowRankPair(down, up * 0.5, 4.0)})
    assert compare(trained, folded, torch.float32, "here") == (0.0, 0.0)
    wrong = up * 0.5
    wrong[3, 1] *= 1 + 2**-16
    with pytest.raises(AdapterFileError, match="rounding allows"):
        compare(trained, AdapterWeights({key: LowRankPair(down, wrong, 4.0)}), torch.float32, "here")
