"""Comparing adapters, against dense float64 updates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from formats.adapters import SDXL
from PIL import Image

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.errors import AdapterFileError, OutputError
from sdlora.surgery.diff import compared, diff_adapters
from sdlora.surgery.heatmap import draw_heatmap, kind_of
from sdlora.surgery.strengths import block_of
from surgery.adapters import exact, mixed_adapter, saved


def test_modules_and_blocks_have_the_cosine_and_norm_of_their_full_updates(tmp_path: Path) -> None:
    first, other = mixed_adapter(0), mixed_adapter(1, ranks=(5,), scales=(2.0, 0.2))
    difference = diff_adapters(saved(tmp_path, "a", first), saved(tmp_path, "b", other), report=True)
    assert sorted(difference.modules) == sorted(first.pairs)
    vectors: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for module, likeness in difference.modules.items():
        a, b = exact(first.pairs[module]).flatten(), exact(other.pairs[module]).flatten()
        assert likeness.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-9)
        assert likeness.norm == pytest.approx(float(a.norm()), rel=1e-9)
        assert likeness.other_norm == pytest.approx(float(b.norm()), rel=1e-9)
        assert likeness.distance == pytest.approx(float((a - b).norm()), rel=1e-9)
        vectors.setdefault((module.component, block_of(module)), []).append((a, b))
    assert set(difference.blocks()) == set(vectors) and len(vectors) > 10
    for block, likeness in difference.blocks().items():
        a, b = (torch.cat(parts) for parts in zip(*vectors[block], strict=True))
        assert likeness.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-9)
        assert likeness.distance == pytest.approx(float((a - b).norm()), rel=1e-9)
        assert likeness.num_modules == len(vectors[block])


@pytest.mark.parametrize(("factor", "cosine"), [(0.25, 1.0), (-3.0, -1.0)])
def test_a_scaled_adapter_points_the_same_way(tmp_path: Path, factor: float, cosine: float) -> None:
    weights = mixed_adapter()
    other = AdapterWeights({m: LowRankPair(p.down, p.up, p.alpha * factor) for m, p in weights.items()})
    total = diff_adapters(saved(tmp_path, "a", weights), saved(tmp_path, "b", other)).total
    assert total.cosine == pytest.approx(cosine, abs=1e-7)
    assert total.other_norm == pytest.approx(abs(factor) * total.norm, rel=1e-6)
    assert total.distance == pytest.approx(abs(1 - factor) * total.norm, rel=1e-6)


def test_modules_of_one_adapter_alone_count_as_zero_in_the_other(tmp_path: Path) -> None:
    whole = mixed_adapter()
    part = AdapterWeights({m: p for m, p in whole.items() if m.component == "unet"})
    difference = diff_adapters(saved(tmp_path, "a", whole), saved(tmp_path, "b", part), report=True)
    assert difference.only_in == (len(whole) - len(part), 0)
    alone = [likeness for m, likeness in difference.modules.items() if m.component != "unet"]
    assert alone and all(lonely.cosine is None and lonely.distance == lonely.norm for lonely in alone)
    assert difference.total.distance == pytest.approx(math.hypot(*(lonely.norm for lonely in alone)))
    assert "modules are only in A" in difference.render()


def test_the_heat_map_is_an_image_with_a_cell_for_each_block_and_kind(tmp_path: Path) -> None:
    first, other = mixed_adapter(0, family=SDXL), mixed_adapter(1, family=SDXL)
    draw_heatmap(dict(compared(first, other)), ("a$_b", "b"), tmp_path / "heat.png")
    with Image.open(tmp_path / "heat.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.7.attn1.to_out.0", "attn1.to_out"),
        ("mid_block.attentions.0.proj_in", "proj_in"),
        ("up_blocks.2.resnets.1.conv_shortcut", "conv_shortcut"),
        ("up_blocks.2.upsamplers.0.conv", "conv"),
        ("text_model.encoder.layers.11.self_attn.q_proj", "self_attn.q_proj"),
        ("time_embedding.linear_1", "time_embedding.linear_1"),
    ],
)
def test_the_kind_of_a_layer_is_the_same_in_all_blocks(path: str, kind: str) -> None:
    assert kind_of(ModuleKey("unet", path)) == kind


def test_images_are_not_written_over(tmp_path: Path) -> None:
    files = saved(tmp_path, "a", mixed_adapter()), saved(tmp_path, "b", mixed_adapter(1))
    (tmp_path / "heat.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="--overwrite"):
        diff_adapters(*files, image=tmp_path / "heat.png")
    with pytest.raises(OutputError, match=r"\.png"):
        diff_adapters(*files, image=tmp_path / "heat.jpg")
    assert (tmp_path / "heat.png").read_bytes() == b"mine"


def test_adapters_for_other_layers_are_refused(tmp_path: Path) -> None:
    module = ModuleKey("unet", "mid_block.attentions.0.proj_in")
    files = [
        saved(
            tmp_path, str(n), AdapterWeights({module: LowRankPair(torch.ones(2, n), torch.ones(8, 2), 1.0)})
        )
        for n in (8, 9)
    ]
    with pytest.raises(AdapterFileError, match="one layer"):
        diff_adapters(*files)
