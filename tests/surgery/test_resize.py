"""Resizing: equal to the truncated SVD of the full update, in every format and number format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import kinds
from formats.adapters import file_of

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.errors import ConfigError, OutputError
from sdlora.formats.adapter_files import read_adapter
from sdlora.surgery.resize import resize_adapter
from surgery.adapters import exact, mixed_adapter, rank_for, relative_errors, saved, truncated


def test_a_rank_gives_the_truncated_svd_of_every_update(tmp_path: Path) -> None:
    weights = mixed_adapter()
    report = resize_adapter(saved(tmp_path, "big", weights), tmp_path / "small.safetensors", rank=2)
    wanted = {module: truncated(exact(pair), 2) for module, pair in weights.items()}
    weights_read = read_adapter(tmp_path / "small.safetensors").weights
    assert len(wanted) > 40
    assert {len(pair.down.shape) for pair in weights_read.pairs.values()} == {2, 4}
    assert max(relative_errors(weights_read, wanted).values()) < 3e-7
    assert {(pair.rank, pair.alpha) for pair in weights_read.pairs.values()} == {(2, 2.0)}
    assert report.to_dict()["ranks_after"] == {"2": len(wanted)}


def test_an_energy_share_gives_each_module_the_fewest_ranks_that_hold_it(tmp_path: Path) -> None:
    weights = mixed_adapter(1)
    report = resize_adapter(
        saved(tmp_path, "big", weights), tmp_path / "small.safetensors", energy=0.8, report=True
    )
    weights_read = read_adapter(tmp_path / "small.safetensors").weights
    for module, pair in weights.items():
        rank = rank_for(exact(pair), 0.8)
        assert weights_read.pairs[module].rank == rank, module
        expected = truncated(exact(pair), rank)
        assert float((exact(weights_read.pairs[module]) - expected).norm()) < 3e-7 * float(expected.norm())
    assert len(set(weights_read.ranks())) > 1
    # diffusers takes one alpha a component, so files with mixed ranks have just one
    for component in weights_read.components():
        alphas = {pair.alpha for pair in weights_read.component(component).values()}
        assert alphas == {max(pair.rank for pair in weights_read.component(component).values())}
    assert report.total_error is not None and report.total_error**2 < 0.2


def test_the_reported_errors_are_those_of_the_written_file(tmp_path: Path) -> None:
    weights = mixed_adapter(2)
    report = resize_adapter(
        saved(tmp_path, "big", weights), tmp_path / "small.safetensors", rank=2, dtype="fp16", report=True
    )
    weights_read = read_adapter(tmp_path / "small.safetensors").weights
    measured = relative_errors(weights_read, {module: exact(pair) for module, pair in weights.items()})
    assert {change.module for change in report.changes} == set(measured)
    for change in report.changes:
        assert change.error == pytest.approx(measured[change.module], rel=1e-4)
    entries = report.to_dict()["modules"]
    assert len(entries) == len(weights)
    assert "relative error" in report.render()


@pytest.mark.parametrize("error", [0.5, 0.3])
def test_an_error_bound_holds_in_every_module(tmp_path: Path, error: float) -> None:
    weights = mixed_adapter(3)
    resize_adapter(saved(tmp_path, "big", weights), tmp_path / "small.safetensors", error=error)
    weights_read = read_adapter(tmp_path / "small.safetensors").weights
    errors = relative_errors(weights_read, {module: exact(pair) for module, pair in weights.items()})
    assert max(errors.values()) <= error * (1 + 1e-6)
    assert sum(p.rank for p in weights_read.pairs.values()) < sum(p.rank for p in weights.pairs.values())


@pytest.mark.parametrize("format", ["webui", "diffusers", "peft"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_all_formats_hold_the_result_within_the_rounding_of_their_numbers(
    tmp_path: Path, format: str, dtype: str
) -> None:
    weights = mixed_adapter(4)
    target = tmp_path / ("small" if format == "peft" else "small.safetensors")
    source = saved(tmp_path, "big", weights)
    report = resize_adapter(source, target, energy=0.9, format=format, dtype=dtype, report=True)  # type: ignore[arg-type]
    wanted = {m: truncated(exact(pair), rank_for(exact(pair), 0.9)) for m, pair in weights.items()}
    tolerance = {"fp32": 3e-7, "fp16": 1e-3, "bf16": 8e-3}[dtype]
    assert max(relative_errors(read_adapter(target).weights, wanted).values()) < tolerance
    assert report.proof is not None and "read back by sdlora" in report.proof


def test_a_module_without_any_update_keeps_rank_one(tmp_path: Path) -> None:
    module = ModuleKey("unet", "mid_block.attentions.0.proj_in")
    pair = LowRankPair(torch.randn(4, 8), torch.zeros(8, 4), 4.0)
    source = saved(tmp_path, "empty", AdapterWeights({module: pair}))
    report = resize_adapter(source, tmp_path / "small.safetensors", energy=0.9, report=True)
    pair_read = read_adapter(tmp_path / "small.safetensors").weights.pairs[module]
    assert pair_read.rank == 1 and not bool(pair_read.delta().any())
    assert report.total_error == 0.0


def test_the_header_keeps_the_training_and_says_what_was_done(tmp_path: Path) -> None:
    source = saved(tmp_path, "big", mixed_adapter())
    resize_adapter(source, tmp_path / "once.safetensors", rank=3)
    resize_adapter(tmp_path / "once.safetensors", tmp_path / "twice.safetensors", rank=2)
    info = read_adapter(tmp_path / "twice.safetensors").info
    assert info.trigger_words == file_of(mixed_adapter()).info.trigger_words
    assert info.name == "twice"
    first, second = json.loads(info.metadata["sdlora.surgery"])
    assert (first["operation"], first["rank"], second["rank"]) == ("resize", 3, 2)
    assert first["sources"][0]["file"] == "big.safetensors"
    assert info.metadata["ss_network_dim"] == "2"


def test_a_loha_is_resized_as_the_plain_lora_it_is(tmp_path: Path) -> None:
    module = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    loha = kinds.loha((16, 16), rank=3)
    source = saved(tmp_path, "loha", AdapterWeights({module: loha}))
    report = resize_adapter(source, tmp_path / "small.safetensors", rank=4)
    weights_read = read_adapter(tmp_path / "small.safetensors").weights
    wanted = truncated(loha.delta().double(), 4)
    assert relative_errors(weights_read, {module: wanted})[module] < 1e-6
    assert any("LoHa" in note for note in report.notes)


def test_a_rank_that_cuts_nothing_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "big", mixed_adapter())
    with pytest.raises(ConfigError, match="no more than rank 6"):
        resize_adapter(source, tmp_path / "small.safetensors", rank=6)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = saved(tmp_path, "big", mixed_adapter())
    before = source.read_bytes()
    with pytest.raises(OutputError, match="one of the inputs"):
        resize_adapter(source, source, rank=2, overwrite=True)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="--overwrite"):
        resize_adapter(source, tmp_path / "there.safetensors", rank=2)
    with pytest.raises(OutputError, match=r"ending in \.safetensors"):
        resize_adapter(source, tmp_path / "small", rank=2)
    assert source.read_bytes() == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    resize_adapter(source, tmp_path / "there.safetensors", rank=2, overwrite=True)
    assert read_adapter(tmp_path / "there.safetensors").weights.ranks() == [2]
