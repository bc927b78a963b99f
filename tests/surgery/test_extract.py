"""Extracting: the truncated SVD of the difference of two checkpoints; bake and extract undo each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.adapters.canonical import AdapterWeights
from sdlora.config.schema import Targets
from sdlora.errors import ConfigError, ModelError, OutputError
from sdlora.formats.adapter_files import read_adapter
from sdlora.surgery.bake import bake_checkpoint
from sdlora.surgery.checkpoints import open_checkpoint
from sdlora.surgery.dense import cut_matrix
from sdlora.surgery.extract import extract_adapter, extracted_modules
from sdlora.surgery.factors import Cut
from surgery.adapters import dense, exact, rank_for, relative_errors, truncated
from surgery.checkpoints import adapter_for, added, diffusers_folder, layers, ldm_file, saved_for
from surgery.conftest import Bases

ONE = {"unet": 1.0, "text_encoder": 1.0, "text_encoder_2": 1.0}


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.slow), "sd2", "sdxl"])
def test_extracting_after_baking_gives_the_adapter_back(family: str, bases: Bases, tmp_path: Path) -> None:
    _, states = bases[family]
    weights = adapter_for(family, states)
    source = ldm_file(tmp_path, family, states, torch.float32)
    adapter = saved_for(tmp_path, family, "ink", weights)
    bake_checkpoint(source, [(adapter, 0.5)], tmp_path / "tuned.safetensors")
    report = extract_adapter(
        source,
        tmp_path / "tuned.safetensors",
        tmp_path / "out.safetensors",
        rank=4,
        targets="all",
        report=True,
    )
    adapter_read = read_adapter(tmp_path / "out.safetensors")
    assert adapter_read.info.family == family
    wanted = {module: 0.5 * exact(pair) for module, pair in weights.items()}
    assert max(relative_errors(adapter_read.weights, wanted).values()) < 1e-4
    assert report.total_error is not None and report.total_error < 1e-4
    details = report.to_dict()
    assert details["covered_share"] == pytest.approx(1.0)
    assert details["unchanged_modules"] == len(layers(family, states)) - len(weights)


@pytest.mark.parametrize(
    "layouts", [("file", "folder"), pytest.param(("folder", "folder"), marks=pytest.mark.slow)]
)
def test_layouts_may_be_mixed(layouts: tuple[str, str], bases: Bases, tmp_path: Path) -> None:
    base, states = bases["sdxl"]
    weights = adapter_for("sdxl", states)
    tuned = added("sdxl", states, torch.float32, [(weights, ONE)])
    paths = []
    for name, layout, checkpoint in zip(("base", "tuned"), layouts, (states, tuned), strict=True):
        if layout == "file":
            paths.append(ldm_file(tmp_path, "sdxl", checkpoint, torch.float32, name))
        else:
            paths.append(diffusers_folder(base, tmp_path / name, checkpoint, torch.float32))
    report = extract_adapter(*paths, tmp_path / "out.safetensors", rank=4, targets="all")
    weights_read = read_adapter(tmp_path / "out.safetensors").weights
    assert max(relative_errors(weights_read, {m: exact(p) for m, p in weights.items()}).values()) < 1e-4
    assert (report.to_dict()["covered_share"] is None) == (layouts[0] != layouts[1])


def test_an_energy_share_takes_each_modules_own_rank(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd1"]
    weights = adapter_for("sd1", states, rank=5, every=12)
    tuned = added("sd1", states, torch.float32, [(weights, ONE)])
    files = [
        ldm_file(tmp_path, "sd1", checkpoint, torch.float32, name)
        for name, checkpoint in (("a", states), ("b", tuned))
    ]
    extract_adapter(*files, tmp_path / "out.safetensors", energy=0.7, targets="all")
    weights_read = read_adapter(tmp_path / "out.safetensors").weights
    known = layers("sd1", states)
    for module, pair in weights_read.items():
        key, weight = known[module]
        delta = (tuned[module.component][key].float() - weight).double().flatten(1)
        assert pair.rank == rank_for(delta, 0.7), module
        wanted = truncated(delta, pair.rank)
        assert float((exact(pair) - wanted).norm()) < 1e-4 * float(wanted.norm()), module
    assert len(weights_read.ranks()) > 1


@pytest.mark.parametrize("preset", ["attention", "linear", "all"])
@pytest.mark.parametrize("text", [True, False])
def test_targets_and_text_encoders_choose_the_layers(
    preset: Targets, text: bool, bases: Bases, tmp_path: Path
) -> None:
    folder, states = bases["sdxl"]
    file = ldm_file(tmp_path, "sdxl", states, torch.float16)
    wanted = {m for m in layers("sdxl", states, preset) if text or m.component == "unet"}
    for path in (folder, file):
        model = open_checkpoint(path)
        assert set(extracted_modules(model, model, preset, text)) == wanted
    assert len(wanted) > 50


def test_changes_that_the_lora_does_not_hold_are_measured(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd1"]
    generator = torch.Generator().manual_seed(3)
    changed = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", "conv_in.bias")
    tuned = {part: dict(state) for part, state in states.items()}
    squares = []
    for key in changed:
        change = 0.01 * torch.randn(states["unet"][key].shape, generator=generator)
        tuned["unet"][key] = states["unet"][key] + change
        squares.append(float((tuned["unet"][key] - states["unet"][key]).double().square().sum()))
    tuned["vae"] = {key: tensor + 1 for key, tensor in states["vae"].items()}
    files = [
        ldm_file(tmp_path, "sd1", checkpoint, torch.float32, name)
        for name, checkpoint in (("a", states), ("b", tuned))
    ]
    report = extract_adapter(*files, tmp_path / "out.safetensors", rank=2, targets="attention")
    assert len(read_adapter(tmp_path / "out.safetensors").weights) == 1
    details = report.to_dict()
    assert details["covered_share"] == pytest.approx(squares[0] / sum(squares), rel=1e-4)
    [[key, norm]] = details["left_out"]
    assert key == "model.diffusion_model.input_blocks.0.0.bias"
    assert norm == pytest.approx(squares[1] ** 0.5, rel=1e-4)
    assert any("1 other tensors differ" in note and key in note for note in report.notes)


def test_fused_projections_come_out_as_three_modules(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd2"]
    text = AdapterWeights(
        {m: p for m, p in adapter_for("sd2", states).items() if m.path.endswith((".q_proj", ".v_proj"))}
    )
    tuned = added("sd2", states, torch.float32, [(text, ONE)])
    files = [
        ldm_file(tmp_path, "sd2", checkpoint, torch.float32, name)
        for name, checkpoint in (("a", states), ("b", tuned))
    ]
    extract_adapter(*files, tmp_path / "out.safetensors", rank=4)
    weights_read = read_adapter(tmp_path / "out.safetensors").weights
    assert len(text) == 6
    assert max(relative_errors(weights_read, {m: exact(p) for m, p in text.items()}).values()) < 1e-4


def test_equal_checkpoints_give_nothing(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd1"]
    files = [ldm_file(tmp_path, "sd1", states, torch.float16, name) for name in "ab"]
    with pytest.raises(ConfigError, match="nothing to extract"):
        extract_adapter(*files, tmp_path / "out.safetensors", rank=2)
    with pytest.raises(ConfigError, match="give --rank"):
        extract_adapter(*files, tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match="one of the inputs"):
        extract_adapter(*files, files[0], rank=2, overwrite=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_checkpoints_of_other_families_or_shapes_are_refused(bases: Bases, tmp_path: Path) -> None:
    first = ldm_file(tmp_path, "sd1", bases["sd1"][1], torch.float16, "a")
    other = ldm_file(tmp_path, "sdxl", bases["sdxl"][1], torch.float16, "b")
    with pytest.raises(ModelError, match="two checkpoints of one family"):
        extract_adapter(first, other, tmp_path / "out.safetensors", rank=2)
    tensors = load_file(first)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match="two checkpoints of one model"):
        extract_adapter(first, tmp_path / "cut.safetensors", tmp_path / "out.safetensors", rank=2)
    tensors[key] = torch.full_like(load_file(first)[key], torch.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(ModelError, match="holds NaN"):
        extract_adapter(first, tmp_path / "nan.safetensors", tmp_path / "out.safetensors", rank=2)


@pytest.mark.parametrize("shape", [(150, 400), (400, 150), (300, 300)])
@pytest.mark.parametrize("cut", [Cut(rank=6), Cut(energy=0.999), Cut(error=0.3, rank=40)])
def test_large_matrices_are_cut_nearly_as_well_as_by_the_full_svd(shape: tuple[int, int], cut: Cut) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(shape[0], 150, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 150, generator=generator)).Q
    values = torch.exp(-torch.arange(150) / 12.0)
    matrix = (left * values) @ right.T
    factors, norm, lost = cut_matrix(matrix, shape, cut, seed=0)
    whole = torch.linalg.svdvals(matrix.double())
    best = float(whole[factors.rank :].norm())
    assert factors.rank == cut.choose(whole)
    assert norm == pytest.approx(float(whole.norm()), rel=1e-5)
    assert float((dense(factors) - matrix.double()).norm()) == pytest.approx(lost, rel=1e-3)
    assert lost <= 1.001 * best + 1e-5 * norm


def test_the_cut_of_a_matrix_repeats_bit_for_bit() -> None:
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    first, other = (cut_matrix(matrix, (200, 300), Cut(rank=8), seed=3)[0] for _ in range(2))
    assert torch.equal(first.up, other.up) and torch.equal(first.down, other.down)
