"""Converting: to any format and number format, and from other kinds to plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import kinds

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, ModuleKey
from sdlora.errors import AdapterFileError, ConfigError
from sdlora.exporting.export import export_adapter
from sdlora.families.table import family_info
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.inspecting.inspection import edit_adapter
from sdlora.surgery.convert import convert_adapter, plain_parts
from sdlora.surgery.factors import Cut
from sdlora.surgery.result import finish
from surgery.adapters import exact, mixed_adapter, relative_errors, saved, truncated
from surgery.checkpoints import layers, ldm_file
from surgery.conftest import Bases

LINEAR = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = ModuleKey("unet", "mid_block.resnets.0.conv1")
OTHER_KINDS = {
    "tucker": (CONV, kinds.tucker((12, 10, 3, 3))),
    "loha": (LINEAR, kinds.loha((12, 20), rank=2)),
    "loha of a convolution": (CONV, kinds.loha((12, 10, 3, 3), rank=3)),
    "lokr": (LINEAR, kinds.lokr((12, 20))),
}


@pytest.mark.parametrize("format", ["webui", "diffusers", "peft"])
def test_a_conversion_keeps_every_update(tmp_path: Path, format: str) -> None:
    weights = mixed_adapter(scales=(0.5, 1.0, 2.0))
    target = tmp_path / ("new" if format == "peft" else "new.safetensors")
    report = convert_adapter(saved(tmp_path, "old", weights), target, format=format, report=True)
    assert OpenAdapter(target).format == format
    weights_read = read_adapter(target).weights
    assert max(relative_errors(weights_read, {m: exact(p) for m, p in weights.items()}).values()) < 2e-7
    assert report.total_error is not None and report.total_error < 2e-7
    assert len(report.changes) == len(weights)


def test_a_new_file_has_its_own_alias_and_a_title_that_somebody_wrote_stays(tmp_path: Path) -> None:
    source = saved(tmp_path, "old", mixed_adapter())
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    convert_adapter(source, first)
    entries = OpenAdapter(first).headers[0].metadata
    assert (entries["ss_output_name"], entries["modelspec.title"]) == ("first", "first")
    assert entries["sshs_model_hash"] == OpenAdapter(first).data_hash()
    edit_adapter(first, ["modelspec.title=Ink by Ann"], [])
    convert_adapter(first, second, dtype="fp16")
    entries = OpenAdapter(second).headers[0].metadata
    assert (entries["ss_output_name"], entries["modelspec.title"]) == ("second", "Ink by Ann")
    report = export_adapter(second, "webui", tmp_path / "third.safetensors")
    assert OpenAdapter(report.adapter).headers[0].metadata["ss_output_name"] == "third"


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("bf16", 8e-3)])
def test_the_reported_error_is_the_rounding(tmp_path: Path, dtype: str, tolerance: float) -> None:
    weights = mixed_adapter()
    report = convert_adapter(
        saved(tmp_path, "old", weights),
        tmp_path / "new.safetensors",
        dtype=dtype,
        report=True,  # type: ignore[arg-type]
    )
    measured = relative_errors(
        read_adapter(tmp_path / "new.safetensors").weights, {m: exact(p) for m, p in weights.items()}
    )
    assert 0 < max(measured.values()) < tolerance
    for change in report.changes:
        assert change.error == pytest.approx(measured[change.module], rel=1e-6)


@pytest.mark.parametrize("kind", list(OTHER_KINDS))
def test_other_kinds_become_plain_without_loss(kind: str) -> None:
    module, update = OTHER_KINDS[kind]
    weights, [change] = finish(
        plain_parts(AdapterWeights({module: update}), None, None), "webui", torch.float32, with_errors=True
    )
    torch.testing.assert_close(weights.pairs[module].delta(), update.delta(), rtol=1e-5, atol=1e-6)
    assert change.error is not None and change.error < 1e-6


@pytest.mark.parametrize("kind", list(OTHER_KINDS))
def test_other_kinds_are_cut_to_their_truncated_svd(kind: str) -> None:
    module, update = OTHER_KINDS[kind]
    weights, [change] = finish(
        plain_parts(AdapterWeights({module: update}), Cut(rank=2), None),
        "webui",
        torch.float32,
        with_errors=True,
    )
    delta = update.delta().flatten(1).double()
    wanted = truncated(delta, 2)
    assert float((exact(weights.pairs[module]) - wanted).norm()) < 1e-5 * float(delta.norm())
    assert change.error == pytest.approx(float((wanted - delta).norm() / delta.norm()), rel=1e-3)


def test_a_dora_needs_its_base_and_a_size() -> None:
    base = torch.randn(12, 20, generator=torch.Generator().manual_seed(5))
    update = kinds.dora(kinds.pair((12, 20)), base)
    weights = AdapterWeights({LINEAR: update})
    with pytest.raises(AdapterFileError, match="give --base"):
        list(plain_parts(weights, Cut(rank=2), None))
    with pytest.raises(AdapterFileError, match="give --rank"):
        list(plain_parts(weights, None, lambda _: base))
    actual, _ = finish(
        plain_parts(weights, Cut(rank=4), lambda _: base), "webui", torch.float32, with_errors=False
    )
    delta = update.delta(base).double()
    assert float((exact(actual.pairs[LINEAR]) - truncated(delta, 4)).norm()) < 1e-5 * float(delta.norm())


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "plain", mixed_adapter())
    target = tmp_path / "new.safetensors"
    with pytest.raises(ConfigError, match="--to-lora only"):
        convert_adapter(source, target, rank=2)
    with pytest.raises(ConfigError, match="plain LoRA already"):
        convert_adapter(source, target, to_lora=True)
    assert not target.exists()


def test_a_dora_file_becomes_a_plain_lora_with_its_base(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sdxl"]
    known = layers("sdxl", states)
    text = ModuleKey("text_encoder_2", "text_model.encoder.layers.0.self_attn.k_proj")
    linear = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    updates = {
        m: kinds.dora(kinds.pair(tuple(known[m][1].shape)), known[m][1], seed=n)
        for n, m in enumerate((text, linear))
    }
    source, target = tmp_path / "dora.safetensors", tmp_path / "plain.safetensors"
    info = AdapterInfo(family="sdxl", name="dora")
    write_adapter(
        AdapterFile(AdapterWeights(updates), info), "webui", source, torch.float32, family_info("sdxl")
    )
    base = ldm_file(tmp_path, "sdxl", states, torch.float32)
    report = convert_adapter(source, target, to_lora=True, base=base, energy=0.9, report=True)
    weights_read = read_adapter(target).weights
    assert sorted(weights_read.pairs) == sorted(updates)
    for change in report.changes:
        delta = updates[change.module].delta(known[change.module][1]).double()
        error = float((exact(weights_read.pairs[change.module]) - delta).norm() / delta.norm())
        assert change.error == pytest.approx(error, rel=1e-3) and error**2 <= 0.1 + 1e-6


def test_other_kinds_keep_their_kind_in_another_number_format(tmp_path: Path) -> None:
    weights = AdapterWeights({LINEAR: kinds.loha((12, 20), rank=2), CONV: kinds.tucker((12, 10, 3, 3))})
    source, target = saved(tmp_path, "old", weights), tmp_path / "new.safetensors"
    report = convert_adapter(source, target, dtype="fp16", report=True)
    weights_read = read_adapter(target).weights
    assert weights_read.kinds() == weights.kinds()
    for change in report.changes:
        delta = weights.updates[change.module].delta().double()
        error = float((weights_read.updates[change.module].delta().double() - delta).norm() / delta.norm())
        assert change.error == pytest.approx(error, rel=1e-3) and 0 < error < 2e-3
