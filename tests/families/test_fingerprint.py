"""A fingerprint follows the numbers of a module, not how they lie in memory."""

from __future__ import annotations

import torch
from torch import nn

from sdlora.families.fingerprint import module_fingerprint


def test_the_layout_in_memory_does_not_matter_and_every_number_does() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    plain = module_fingerprint(module)
    assert module_fingerprint(module.to(memory_format=torch.channels_last)) == plain
    with torch.no_grad():
        module[0].weight[3, 2] += 1e-6
    assert module_fingerprint(module) != plain
    assert module_fingerprint(module, extra="x") != module_fingerprint(module)
