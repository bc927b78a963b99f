"""Baking: equal to the float64 sum rounded once, in both layouts of every family; and taking it out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from adapters import kinds
from families.narrow import States, as_ldm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, ModuleKey
from sdlora.errors import AdapterFileError, ConfigError, ModelError, OutputError
from sdlora.families.table import family_info
from sdlora.formats.adapter_files import write_adapter
from sdlora.surgery.bake import bake_checkpoint
from sdlora.tensor_file import read_header
from surgery.checkpoints import adapter_for, added, diffusers_folder, layers, ldm_file, saved_for
from surgery.conftest import Bases

ONE = {"unet": 1.0, "text_encoder": 1.0, "text_encoder_2": 1.0}
_BESIDE = ("position_ids", "model_ema.", "logit_scale")
"""What single files hold beside the modules."""
FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def steps(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Distance to the next number of a format at each value."""
    exponent = torch.frexp(tensor.double().abs().clamp(min=torch.finfo(dtype).tiny)).exponent - 1
    return torch.exp2(exponent.double()) * torch.finfo(dtype).eps


def assert_rounded_once(
    actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Every value within half a step of the exact sum, and what float32 cannot tell from half."""
    wanted = {key: tensor for key, tensor in wanted.items() if ".resblocks.3." not in key}
    assert set(actual) == set(wanted) and len(actual) > 100
    for key, tensor in wanted.items():
        if any(part in key for part in _BESIDE):
            continue
        assert actual[key].dtype == dtype and actual[key].shape == tensor.shape, key
        off = (actual[key].double() - tensor).abs()
        slack = 1e-6 * tensor.abs().max() if dtype == torch.float32 else 1e-7
        assert bool((off <= 0.5 * steps(dtype, tensor) + slack).all()), key


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("sd1", "bf16"),
        ("sd2", "fp16"),
        ("sdxl", "fp16"),
        pytest.param("sd1", "fp16", marks=pytest.mark.slow),
        pytest.param("sd2", "bf16", marks=pytest.mark.slow),
        pytest.param("sdxl", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_single_file_gets_the_sum_rounded_once_and_nothing_else_changes(
    family: str, dtype: str, bases: Bases, tmp_path: Path
) -> None:
    _, states = bases[family]
    weights, number = adapter_for(family, states), FORMATS[dtype]
    source = ldm_file(tmp_path, family, states, number)
    adapter = saved_for(tmp_path, family, "ink", weights)
    report = bake_checkpoint(source, [(adapter, 0.7)], tmp_path / "baked.safetensors", report=True)
    tensors_read, before = load_file(tmp_path / "baked.safetensors"), load_file(source)
    strengths = {name: 0.7 for name in ONE}
    wanted = as_ldm(family, added(family, states, number, [(weights, strengths)]))
    changed = {key for key in tensors_read if not torch.equal(tensors_read[key], before[key])}
    assert_rounded_once(tensors_read, wanted, number)
    exact_before = as_ldm(family, added(family, states, number, []))
    expected = {key for key in tensors_read if not torch.equal(wanted[key], exact_before[key])}
    expected = {key for key in expected if not any(part in key for part in _BESIDE)}
    assert changed == expected and len(changed) > 50
    assert len(report.changes) == len(weights)
    assert report.total_error is not None and 0 < report.total_error < (0.02 if dtype == "fp16" else 0.2)


@pytest.mark.parametrize("family", [pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_a_folder_gets_the_sum_and_stays_a_folder(family: str, bases: Bases, tmp_path: Path) -> None:
    base, states = bases[family]
    folder = diffusers_folder(base, tmp_path / "model", states, torch.float16)
    first, second = adapter_for(family, states), adapter_for(family, states, seed=1, every=2)
    files = [saved_for(tmp_path, family, f"a{n}", weights) for n, weights in enumerate((first, second))]
    separate = {"unet": -0.5, "text_encoder": 0.25, "text_encoder_2": 0.25}
    bake_checkpoint(folder, [(files[0], 1.0), (files[1], separate)], tmp_path / "baked")
    wanted = added(family, states, torch.float16, [(first, ONE), (second, separate)])
    for component in [name for name in ONE if name in states]:
        [file] = (tmp_path / "baked" / component).glob("*.safetensors")
        stored = load_file(file)
        assert_found = {key: wanted[component][key] for key in stored}
        for key, tensor in assert_found.items():
            off = (stored[key].double() - tensor).abs()
            assert bool((off <= 0.5 * steps(torch.float16, tensor) + 1e-7).all()), key
        with safe_open(file, "pt") as handle:
            assert handle.metadata()["format"] == "pt"
    assert (tmp_path / "baked" / "vae").is_dir()
    names = [{str(p.relative_to(root)) for p in root.rglob("*")} for root in (folder, tmp_path / "baked")]
    assert names[0] == names[1]


def test_fp8_checkpoints_are_rounded_to_the_nearest_and_the_loss_is_told(
    bases: Bases, tmp_path: Path
) -> None:
    _, states = bases["sd1"]
    coarse = torch.float8_e4m3fn
    weights = adapter_for("sd1", states)
    source = ldm_file(tmp_path, "sd1", states, coarse)
    adapter = saved_for(tmp_path, "sd1", "ink", weights)
    report = bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "baked.safetensors", report=True)
    tensors_read = load_file(tmp_path / "baked.safetensors")
    wanted = as_ldm("sd1", added("sd1", states, coarse, [(weights, ONE)]))
    compared = 0
    for key, tensor in wanted.items():
        if tensors_read[key].dtype == coarse:
            off = (tensors_read[key].double() - tensor).abs()
            # below 2^-6 all numbers of the format are 2^-9 apart
            allowed = 0.5 * torch.maximum(steps(coarse, tensor), torch.tensor(2.0**-9)) + 1e-6
            assert bool((off <= allowed).all()), key
            compared += 1
    assert compared > 100
    assert report.total_error is not None and report.total_error > 0.1
    assert any("fp8" in note for note in report.notes)


def test_scaled_fp8_checkpoints_are_refused(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd1"]
    tensors = as_ldm("sd1", states)
    tensors["model.diffusion_model.input_blocks.0.0.scale_weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "scaled.safetensors")
    adapter = saved_for(tmp_path, "sd1", "ink", adapter_for("sd1", states))
    with pytest.raises(ModelError, match="scaled fp8"):
        bake_checkpoint(tmp_path / "scaled.safetensors", [(adapter, 1.0)], tmp_path / "baked.safetensors")


def test_float32_checkpoints_are_exact_to_float32(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd1"]
    weights = adapter_for("sd1", states)
    source = ldm_file(tmp_path, "sd1", states, torch.float32)
    adapter = saved_for(tmp_path, "sd1", "ink", weights)
    report = bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "baked.safetensors", report=True)
    wanted = as_ldm("sd1", added("sd1", states, torch.float32, [(weights, ONE)]))
    assert_rounded_once(load_file(tmp_path / "baked.safetensors"), wanted, torch.float32)
    assert report.total_error is not None and 0 < report.total_error < 1e-5


def test_keys_order_layout_and_entries_stay(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sdxl"]
    tensors = as_ldm("sdxl", states)
    source = tmp_path / "odd.safetensors"  # in the order of neither name nor format
    _write_in_order(source, {key: tensors[key] for key in sorted(tensors, key=lambda k: k[::-1])})
    adapter = saved_for(tmp_path, "sdxl", "ink", adapter_for("sdxl", states))
    bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "baked.safetensors")
    before, after = read_header(source), read_header(tmp_path / "baked.safetensors")
    assert list(before.tensors) == list(after.tensors)
    assert before.tensors == after.tensors
    entries = dict(after.metadata)
    [record] = json.loads(entries.pop("sdlora.baked"))
    assert record["file"] == "ink.safetensors" and record["strength"]["unet"] == 1.0
    assert entries == {"modelspec.title": "odd", "modelspec.merged_from": "other, ink"}
    again = tmp_path / "again.safetensors"
    bake_checkpoint(source, [(adapter, 1.0)], again)
    assert again.read_bytes() == (tmp_path / "baked.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_the_inverse_restores_the_weights_within_the_rounding_of_both_steps(
    dtype: str, bases: Bases, tmp_path: Path
) -> None:
    _, states = bases["sdxl"]
    number = FORMATS[dtype]
    source = ldm_file(tmp_path, "sdxl", states, number)
    adapter = saved_for(tmp_path, "sdxl", "ink", adapter_for("sdxl", states))
    bake_checkpoint(source, [(adapter, 0.8)], tmp_path / "baked.safetensors")
    report = bake_checkpoint(
        tmp_path / "baked.safetensors", [(adapter, 0.8)], tmp_path / "back.safetensors", inverse=True
    )
    before, baked, back = (load_file(tmp_path / f"{n}.safetensors") for n in ("model", "baked", "back"))
    differing = 0
    for key, tensor in before.items():
        if tensor.is_floating_point() and tensor.dtype == number:
            allowed = 0.5 * steps(number, baked[key]) + 0.5 * steps(number, tensor) + 1e-6
            assert bool(((back[key].double() - tensor.double()).abs() <= allowed).all()), key
            differing += not torch.equal(baked[key], tensor)
    assert differing > 50
    with safe_open(tmp_path / "back.safetensors", "pt") as handle:
        assert "sdlora.baked" not in handle.metadata()
    assert any("not bit for bit" in note for note in report.notes)
    other = bake_checkpoint(source, [(adapter, 0.8)], tmp_path / "under.safetensors", inverse=True)
    assert any("does not say" in note for note in other.notes)


def test_several_variants_of_a_folders_weights_are_all_baked(bases: Bases, tmp_path: Path) -> None:
    base, states = bases["sd1"]
    folder = diffusers_folder(base, tmp_path / "model", states, torch.float32)
    [file] = (folder / "unet").glob("*.safetensors")
    half = {key: tensor.half() for key, tensor in load_file(file).items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "model.ckpt").write_bytes(b"pickle")
    weights = AdapterWeights({m: p for m, p in adapter_for("sd1", states).items() if m.component == "unet"})
    adapter = saved_for(tmp_path, "sd1", "ink", weights)
    report = bake_checkpoint(folder, [(adapter, 1.0)], tmp_path / "baked")
    wanted = added("sd1", states, torch.float32, [(weights, ONE)])["unet"]
    for name, number in (("", torch.float32), (".fp16", torch.float16)):
        stored = load_file(tmp_path / "baked" / "unet" / f"diffusion_pytorch_model{name}.safetensors")
        for key, tensor in stored.items():
            assert tensor.dtype == number
            torch.testing.assert_close(tensor.double(), wanted[key], rtol=2e-3, atol=1e-4)
    assert not list((tmp_path / "baked").rglob("*.bin")) and not list((tmp_path / "baked").rglob("*.ckpt"))
    assert any("diffusion_pytorch_model.bin" in note and "model.ckpt" in note for note in report.notes)


def test_every_kind_of_adapter_is_baked(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd1"]
    known = layers("sd1", states)
    module = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    _, weight = known[module]
    shape = tuple(weight.shape)
    pair = kinds.pair(shape)
    source = ldm_file(tmp_path, "sd1", states, torch.float32)
    for name, update in (
        ("loha", kinds.loha(shape)),
        ("lokr", kinds.lokr(shape)),
        ("dora", kinds.dora(pair, weight)),
    ):
        file = tmp_path / f"{name}.safetensors"
        info = AdapterInfo(family="sd1", name=name)
        write_adapter(
            AdapterFile(AdapterWeights({module: update}), info),
            "webui",
            file,
            torch.float32,
            family_info("sd1"),
        )
        bake_checkpoint(source, [(file, 0.5)], tmp_path / f"baked-{name}.safetensors")
        tensors_read = load_file(tmp_path / f"baked-{name}.safetensors")
        wanted = weight + 0.5 * update.delta(weight)
        [ldm_key] = [k for k, t in as_ldm("sd1", states).items() if t is weight or torch.equal(t, weight)]
        torch.testing.assert_close(tensors_read[ldm_key], wanted, rtol=1e-5, atol=1e-6)


def test_strength_zero_leaves_a_component_alone(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sdxl"]
    tensors = {k: t for k, t in as_ldm("sdxl", states).items() if not k.startswith("conditioner.embedders.1")}
    source = tmp_path / "pruned.safetensors"
    save_file(tensors, source)
    adapter = saved_for(tmp_path, "sdxl", "ink", adapter_for("sdxl", states))
    with pytest.raises(ModelError, match=r"has no text_encoder_2.*STRENGTH:0"):
        bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "baked.safetensors")
    bake_checkpoint(source, [(adapter, {"unet": 1.0, "text_encoder": 0.0})], tmp_path / "baked.safetensors")
    tensors_read = load_file(tmp_path / "baked.safetensors")
    same = [key for key in tensors if key.startswith("conditioner.")]
    assert same and all(torch.equal(tensors_read[key], tensors[key]) for key in same)


def test_the_input_is_never_written_over(bases: Bases, tmp_path: Path) -> None:
    base, states = bases["sd1"]
    source = ldm_file(tmp_path, "sd1", states, torch.float16)
    adapter = saved_for(tmp_path, "sd1", "ink", adapter_for("sd1", states))
    before = source.read_bytes()
    link = tmp_path / "link.safetensors"
    link.hardlink_to(source)
    for target in (source, tmp_path / "sub" / ".." / source.name, link, adapter):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="one of the inputs"):
            bake_checkpoint(source, [(adapter, 1.0)], target, overwrite=True)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="--overwrite"):
        bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "there.safetensors")
    with pytest.raises(OutputError, match="new folder"):
        bake_checkpoint(base, [(adapter, 1.0)], tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="inside the model"):
        bake_checkpoint(base, [(adapter, 1.0)], base / "unet" / "baked")
    assert source.read_bytes() == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_adapters_for_other_models_are_refused(bases: Bases, tmp_path: Path) -> None:
    source = ldm_file(tmp_path, "sd1", bases["sd1"][1], torch.float16)
    for family in ("sd2", "sdxl"):
        adapter = saved_for(tmp_path, family, family, adapter_for(family, bases[family][1]))
        with pytest.raises((ModelError, AdapterFileError), match=r"the base it was trained on|has no"):
            bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "baked.safetensors")
    fitting = saved_for(tmp_path, "sd1", "own", adapter_for("sd1", bases["sd1"][1]))
    with pytest.raises(ConfigError, match="every strength is 0"):
        bake_checkpoint(source, [(fitting, 0.0)], tmp_path / "baked.safetensors")
    with pytest.raises(ModelError, match="no such checkpoint"):
        bake_checkpoint(tmp_path / "none.safetensors", [(fitting, 1.0)], tmp_path / "baked.safetensors")
    with pytest.raises(ModelError, match="not a Stable Diffusion checkpoint"):
        bake_checkpoint(fitting, [(source, 1.0)], tmp_path / "baked.safetensors")
    assert not (tmp_path / "baked.safetensors").exists()


def test_values_too_large_for_the_format_are_refused_and_nothing_is_left(
    bases: Bases, tmp_path: Path
) -> None:
    _, states = bases["sd1"]
    source = ldm_file(tmp_path, "sd1", states, torch.float16)
    adapter = saved_for(tmp_path, "sd1", "ink", adapter_for("sd1", states))
    with pytest.raises(ModelError, match="too large for its number format"):
        bake_checkpoint(source, [(adapter, 1e9)], tmp_path / "out" / "baked.safetensors")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_bake_leaves_nothing(bases: Bases, tmp_path: Path) -> None:
    base, states = bases["sd1"]
    adapter = saved_for(tmp_path, "sd1", "ink", adapter_for("sd1", states))

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for source, target in ((ldm_file(tmp_path, "sd1", states, torch.float16), "x.safetensors"), (base, "x")):
        with pytest.raises(KeyboardInterrupt):
            bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "out" / target, progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_too_full_is_told_before_anything_is_written(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, states = bases["sd1"]
    source = ldm_file(tmp_path, "sd1", states, torch.float16)
    adapter = saved_for(tmp_path, "sd1", "ink", adapter_for("sd1", states))
    usage = shutil.disk_usage(tmp_path)._replace(free=source.stat().st_size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="MiB free"):
        bake_checkpoint(source, [(adapter, 1.0)], tmp_path / "baked.safetensors")
    assert not (tmp_path / "baked.safetensors").exists()


def _write_in_order(path: Path, tensors: States | dict[str, Tensor]) -> None:
    """Write a file whose header and data keep the order of the mapping, as some programs do."""
    import struct

    tree: dict[str, object] = {
        "__metadata__": {
            "modelspec.title": "odd",
            "modelspec.merged_from": "other",
            "modelspec.hash_sha256": "0x12",
        }
    }
    position, data = 0, b""
    for key, tensor in tensors.items():
        assert isinstance(tensor, Tensor)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        name = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        tree[key] = {
            "dtype": name,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(raw)],
        }
        position, data = position + len(raw), data + raw
    text = json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
