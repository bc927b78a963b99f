"""Attention is chosen once, said, and the same within rounding whichever it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sdlora.errors import ConfigError
from sdlora.families.attention import Attention, choose_attention
from sdlora.families.loading import load_model

from .narrow import States

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_choice_follows_device_and_format() -> None:
    assert choose_attention("auto", CPU, torch.float32, training=True).name == "sdpa"
    assert choose_attention("auto", CPU, torch.bfloat16, training=True).name == "classic"
    assert choose_attention("auto", CPU, torch.bfloat16, training=False).name == "sdpa"
    assert choose_attention("auto", CUDA, torch.bfloat16, training=True).name == "sdpa"
    assert choose_attention("sdpa", CPU, torch.bfloat16, training=True).name == "sdpa"
    for device in (CPU, CUDA):
        assert choose_attention("auto", device, torch.float32, training=True).reason


def test_xformers_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="NVIDIA"):
        choose_attention("xformers", CPU, torch.float32, training=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        choose_attention("xformers", CUDA, torch.float32, training=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ConfigError, match=r"cannot be loaded .*made for this torch"):
        choose_attention("xformers", CUDA, torch.float32, training=True)
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert choose_attention("xformers", CUDA, torch.float32, training=True).name == "xformers"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_all_kinds_agree_within_rounding(family: str, bases: Mapping[str, tuple[Path, States]]) -> None:
    model = load_model(str(bases[family][0]), dtype=torch.float32, device=CPU)
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    from sdlora.families.base import SizeHint

    collected = []
    with torch.no_grad():
        text = model.encode_text(["a cat"])
        for name in ("sdpa", "classic"):
            Attention(name, "").apply(model.unet)  # type: ignore[arg-type]
            collected.append(
                model.predict(noisy, torch.tensor([400]), text, [SizeHint((64, 64), (0, 0), (64, 64))])
            )
    torch.testing.assert_close(collected[0], collected[1], rtol=1e-4, atol=1e-5)
