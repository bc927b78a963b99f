"""Drawing with the lean forward passes: the same bits, and a text is projected once while it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from sdlora.families.base import SizeHint
from sdlora.families.lean import is_lean, make_lean, undo_lean
from sdlora.families.lean_drawing import drawing_lean
from sdlora.families.loading import load_model


@torch.no_grad()
def test_the_text_is_projected_once_and_anew_when_it_changes(narrow_sdxl: Path) -> None:
    model = load_model(str(narrow_sdxl), dtype=torch.float32, device=torch.device("cpu"))
    unet: Any = model.components()["unet"]
    cross = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = [model.encode_text(prompts) for prompts in (["a cat", ""], ["a dog", ""])]
    sizes = [SizeHint((64, 64), (0, 0), (64, 64))] * 2
    calls = [(900, 0), (600, 0), (300, 1), (3, 0)]

    def predicted() -> list[Tensor]:
        return [
            model.predict(noisy, torch.tensor([time, time]), texts[which], sizes) for time, which in calls
        ]

    wanted, projected = predicted(), []
    handle = cross[0].to_k.register_forward_hook(lambda *_: projected.append(1))
    with drawing_lean(unet):
        assert is_lean(unet)
        given = predicted()
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert not torch.equal(wanted[2], wanted[0])
    assert len(projected) == 3, "of four calls the second had the text of the first"
    assert not is_lean(unet)


def test_nothing_is_kept_where_gradients_are_made_and_what_is_in_place_stays(narrow_sdxl: Path) -> None:
    model = load_model(str(narrow_sdxl), dtype=torch.float32, device=torch.device("cpu"))
    unet: Any = model.components()["unet"]
    attentions = make_lean(unet)
    with drawing_lean(unet):
        assert not any(attention.remembers_text for attention in attentions)
    assert is_lean(unet)
    undo_lean(unet)
    with torch.no_grad():
        text = model.encode_text(["a cat"])
    noisy, sizes = torch.zeros(1, 4, 16, 16), [SizeHint((64, 64), (0, 0), (64, 64))]
    first = next(m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention)
    first.to_k.weight.requires_grad_(True)
    for _ in range(2):
        with drawing_lean(unet):
            model.predict(noisy, torch.tensor([5]), text, sizes).sum().backward()  # type: ignore[no-untyped-call]
            model.predict(noisy, torch.tensor([5]), text, sizes).sum().backward()  # type: ignore[no-untyped-call]
    assert first.to_k.weight.grad is not None
