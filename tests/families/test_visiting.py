"""Modules that come to a device for the time they work; the meta device stands for a card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdlora.families import visiting
from sdlora.families.visiting import Visit

META = torch.device("meta")


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(3.0))
        self.requires_grad_(False)


def test_a_module_is_there_for_a_time_and_then_as_it_was() -> None:
    module = Tied()
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    assert len(before) == 4
    with visiting.visiting([module], META):
        there = module.state_dict(keep_vars=True)
        assert {name: tensor.device for name, tensor in there.items()} == dict.fromkeys(before, META)
        assert module.first.weight is module.second.weight, "what is shared stays shared"
        assert not module.first.weight.requires_grad
    after = module.state_dict(keep_vars=True)
    assert [name for name, (tensor, _) in before.items() if after[name] is not tensor] == []
    assert [name for name, (tensor, values) in before.items() if not torch.equal(tensor, values)] == []


def test_the_module_comes_home_when_its_work_fails() -> None:
    module = Tied()
    with pytest.raises(RuntimeError, match="out of memory"), visiting.visiting([module], META):
        raise RuntimeError("out of memory")
    assert module.table.device.type == module.first.weight.device.type == "cpu"


def test_what_is_changed_or_added_during_a_visit_comes_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are merged into a denoiser, and put into it, while it is on the card."""

    def copy(original: Tensor, device: torch.device) -> Tensor:  # the meta device keeps no numbers
        return nn.Parameter(original.detach().clone(), False)

    monkeypatch.setattr(visiting, "copied_to", copy)
    module = nn.Sequential(nn.Linear(2, 2, bias=False)).requires_grad_(False)
    weight = module[0].weight
    visit = Visit(module, META)
    with torch.no_grad():
        module[0].weight.fill_(7.0)
    module.add_module("adapter", nn.Linear(1, 1))
    visit.end_with_guests()
    assert module[0].weight is weight
    assert torch.equal(weight, torch.full((2, 2), 7.0))
    assert next(module.adapter.parameters()).device.type == "cpu"
