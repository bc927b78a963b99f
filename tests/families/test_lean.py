"""The lean forward passes give diffusers' results bit for bit, and leave blocks of other forms alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from sdlora.families.attention import Attention as Chosen
from sdlora.families.base import SizeHint
from sdlora.families.lean import LeanAttention, LeanGatedGelu, LeanResidual, make_lean, undo_lean
from sdlora.families.loading import load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "dtype"), [("sdpa", torch.float32), ("classic", torch.bfloat16)])
def test_results_and_gradients_are_bit_for_bit_those_of_diffusers(
    kind: Any, dtype: torch.dtype, narrow_sdxl: Path
) -> None:
    model = load_model(str(narrow_sdxl), dtype=dtype, device=CPU)
    unet = model.components()["unet"].train()
    Chosen(kind, "").apply(unet)
    for parameter in unet.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        text = model.encode_text(["a cat", "a dog"])
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def computed() -> tuple[Tensor, list[Tensor]]:
        unet.zero_grad()
        output = model.predict(
            noisy, torch.tensor([3, 900]), text, [SizeHint((64, 64), (0, 0), (64, 64))] * 2
        )
        output.square().sum().backward()  # type: ignore[no-untyped-call]
        return output.detach(), [p.grad for p in unet.parameters() if p.grad is not None]

    wanted, gradients = computed()
    attentions = make_lean(unet)
    counts = [sum(isinstance(m, kind) for m in unet.modules()) for kind in (Attention, ResnetBlock2D, GEGLU)]
    replaced = [m.__dict__.get("forward") for m in unet.modules() if "forward" in m.__dict__]
    assert len(attentions) == counts[0] > 4 and counts[1] > 4
    assert sum(isinstance(forward, LeanAttention) for forward in replaced) == counts[0]
    assert sum(isinstance(forward, LeanResidual) for forward in replaced) == counts[1]
    assert sum(isinstance(forward, LeanGatedGelu) for forward in replaced) == counts[2] > 4
    lean, lean_gradients = computed()
    assert torch.equal(lean, wanted) and len(gradients) == len(lean_gradients) > 100
    assert all(torch.equal(a, b) for a, b in zip(gradients, lean_gradients, strict=True))
    undo_lean(unet)
    assert not any("forward" in module.__dict__ for module in unet.modules())


def test_blocks_that_do_more_keep_their_own_forward_pass() -> None:
    divides = Attention(query_dim=8, heads=2, dim_head=4, rescale_output_factor=2.0)
    normed = Attention(query_dim=8, heads=2, dim_head=4, norm_num_groups=4)
    drops = Attention(query_dim=8, heads=2, dim_head=4, dropout=0.1)
    plain = Attention(query_dim=8, heads=2, dim_head=4)
    blocks = [
        ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, output_scale_factor=2.0),
        ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, time_embedding_norm="scale_shift"),
        ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, up=True),
        ResnetBlock2D(in_channels=8, temb_channels=None, groups=4),
        ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, dropout=0.5),
    ]
    model = torch.nn.ModuleList([divides, normed, drops, plain, *blocks])
    assert [attention.module for attention in make_lean(model)] == [plain]
    assert [module for module in model.modules() if "forward" in module.__dict__] == [plain]


def test_a_mask_goes_to_diffusers_own_forward_pass() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4)
    x, mask = torch.randn(1, 6, 8), torch.zeros(1, 1, 6)
    mask[..., 3:] = -1e9
    with torch.no_grad():
        wanted = attention(x, attention_mask=mask)
        make_lean(attention)
        assert torch.equal(attention(x, attention_mask=mask), wanted)
        assert not torch.equal(attention(x), wanted)
