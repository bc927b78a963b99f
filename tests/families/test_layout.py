"""A denoiser's layout is set for all convolutions of the base, and for no memory that somebody looks into."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sdlora.families.layout import LAYOUTS, Layout, set_layout, usual_layout


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(24, 2))


@pytest.mark.parametrize("layout", get_args(Layout))
def test_every_kernel_has_the_strides_that_torchs_own_module_gets(layout: Layout) -> None:
    before: Layout = "channels-first" if layout == "channels-last" else "channels-last"
    wanted, given = network(), network()
    wanted.to(memory_format=LAYOUTS[before]).to(memory_format=LAYOUTS[layout])
    set_layout(given, before)
    set_layout(given, layout)
    for name, parameter in given.named_parameters():
        other = wanted.get_parameter(name)
        assert torch.equal(parameter, other)
        assert parameter.stride() == other.stride(), name
    assert given.get_parameter("2.weight").stride()[2:] == ((8, 8) if layout == "channels-last" else (1, 1))


def test_an_adapters_weights_stay_where_masters_look() -> None:
    model: Any = network()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), model)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    places = {name: (p.data_ptr(), p.stride()) for name, p in adapters.items()}
    values = copy.deepcopy({name: p.data for name, p in model.named_parameters()})
    set_layout(model, "channels-last")
    assert len(places) == 4
    assert {name: (p.data_ptr(), p.stride()) for name, p in adapters.items()} == places
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert model.get_parameter("2.base_layer.weight").stride() == (8, 1, 8, 8)


def test_only_float32_on_a_cpu_is_computed_with_channels_last() -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert usual_layout(cpu, torch.float32) == "channels-last"
    assert {usual_layout(cpu, torch.bfloat16), usual_layout(card, torch.float32)} == {"channels-first"}
