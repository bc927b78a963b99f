"""What a base is, from its header or configs alone."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdlora.config.schema import ModelConfig
from sdlora.errors import ModelError
from sdlora.families.loading import load_model
from sdlora.families.recognition import recognise
from sdlora.families.table import FAMILIES
from sdlora.files import ASSETS
from tools.true_sizes import checkpoint_shapes

from .narrow import FAMILY_NAMES, States, as_ldm, make_base

Shapes = dict[str, tuple[int, ...]]
Bases = Mapping[str, tuple[Path, States]]
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
PROBE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def checkpoint(
    file: Path, tensors: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None
) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file, metadata)
    return file


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_files_and_folders_of_each_family_are_told_apart(family: str, bases: Bases, tmp_path: Path) -> None:
    folder, states = bases[family]
    file = tmp_path / "some-name.safetensors"
    save_file(as_ldm(family, states), file)
    recognised = recognise(file)
    assert (recognised.family, recognised.layout, recognised.title, recognised.missing) == (
        family,
        "file",
        "some-name",
        (),
    )
    assert recognised.has_ema
    assert recognised.formats == {"float32": 1.0}
    assert recognise(folder).family == family
    assert recognise(folder).layout == "folder"


def test_every_family_declares_what_recognition_needs() -> None:
    assert set(FAMILIES) == set(FAMILY_NAMES)
    for name, family in FAMILIES.items():
        assert family.info.name == name
        assert (ASSETS / family.info.assets / "unet" / "config.json").is_file()
    prefixes = [e.checkpoint_prefix for f in FAMILIES.values() for e in f.info.text_encoders]
    assert len(set(prefixes)) == len(prefixes) == 4


KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "SDXL refiner": {FIRST: (4, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (4,)},
    "SD3": {"model.diffusion_model.joint_blocks.0.x.weight": (4,)},
    "Flux": {"double_blocks.0.img_attn.weight": (4,)},
    "adapter file": {"lora_unet_x.lora_down.weight": (4, 4)},
    "VAE alone": {"decoder.conv_in.weight": (4,)},
    "inpainting": {FIRST: (8, 9, 3, 3)},
    "instruct-pix2pix": {FIRST: (8, 8, 3, 3)},
    "depth-to-image": {FIRST: (8, 5, 3, 3)},
    "video": {FIRST: (8, 4, 3, 3), "model.diffusion_model.input_blocks.1.0.time_stack.x": (2,)},
    "Hunyuan": {"double_blocks.0.img_attn_qkv.weight": (4, 4)},
    "a video model": {FIRST: (8, 4, 3, 3), "blocks.0.conv.weight": (2, 2, 3, 3, 3)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "EDM": {FIRST: (8, 4, 3, 3), "edm_mean": (4,)},
    "textual-inversion": {"emb_params": (2, 8)},
    "fits no known family": {FIRST: (8, 4, 3, 3)},
    "U-Net of a diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": (2,)},
    "no Stable Diffusion U-Net": {"something.weight": (2,)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "model.safetensors", KINDS[kind])
    with pytest.raises(ModelError, match=kind):
        recognise(file)
    with pytest.raises(ModelError, match=kind):
        load_model(str(file), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl")])
def test_a_file_without_text_encoder_is_told_by_its_cross_attention(
    width: int, family: str, tmp_path: Path
) -> None:
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    recognised = recognise(checkpoint(tmp_path / "m.safetensors", {FIRST: (8, 4, 3, 3), key: (8, width)}))
    assert (recognised.family, recognised.missing) == (family, ("vae", "text_encoder"))


FOLDERS = {
    "StableDiffusion3Pipeline": ({"_class_name": "StableDiffusion3Pipeline", "transformer": []}, {}),
    "inpainting": ({}, {"in_channels": 9}),
    "video": ({}, {"_class_name": "UNetSpatioTemporalConditionModel"}),
    "refiner": ({"text_encoder_2": []}, {"addition_embed_type": "text_time"}),
    "IFPipeline": ({"_class_name": "IFPipeline"}, {"addition_embed_type": "text"}),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_kinds_of_folders_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    index, unet = FOLDERS[kind]
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"in_channels": 4} | unet), encoding="utf-8")
    with pytest.raises(ModelError, match=kind):
        recognise(tmp_path)


def sd1_keys() -> Shapes:
    text = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    return {FIRST: (8, 4, 3, 3), "first_stage_model.quant_conv.bias": (8,), text: (8,)}


def sd2_keys() -> Shapes:
    text = "cond_stage_model.model.ln_final.weight"
    return {FIRST: (8, 4, 3, 3), "first_stage_model.quant_conv.bias": (8,), text: (8,)}


def test_prediction_type_is_read_from_markers_header_or_the_trained_weights(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    assert recognise(checkpoint(file, sd1_keys())).prediction_type() == "epsilon"
    assert recognise(checkpoint(file, sd1_keys() | {"v_pred": (1,)})).prediction_type() == "v_prediction"
    stated = {"modelspec.prediction_type": "v", "modelspec.title": "A title"}
    recognised = recognise(checkpoint(file, sd1_keys(), stated))
    assert (recognised.prediction_type(), recognised.title) == ("v_prediction", "A title")
    for spread, expected in ((0.2, "v_prediction"), (0.01, "epsilon")):
        tensors = {name: torch.zeros(shape) for name, shape in sd2_keys().items()}
        tensors[PROBE] = torch.linspace(-1, 1, 320) * spread * 3**0.5
        save_file(tensors, file)
        assert recognise(file).prediction_type() == expected


def test_marks_of_a_schedule_that_ends_in_noise_are_read(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    recognised = recognise(checkpoint(file, sd1_keys() | {"v_pred": (1,), "ztsnr": (1,)}))
    assert (recognised.prediction_type(), recognised.zero_terminal_snr()) == ("v_prediction", True)
    assert not recognise(checkpoint(file, sd1_keys())).zero_terminal_snr()
    assert not recognised.zero_terminal_snr(False)


def test_a_contradiction_names_both_sides_and_the_user_may_decide(tmp_path: Path) -> None:
    file = checkpoint(
        tmp_path / "m.safetensors", sd1_keys() | {"v_pred": (1,)}, {"modelspec.prediction_type": "epsilon"}
    )
    recognised = recognise(file)
    with pytest.raises(ModelError, match=r"prediction_type says epsilon.*`v_pred` says v_prediction"):
        recognised.prediction_type()
    assert recognised.prediction_type("epsilon") == "epsilon"


def test_a_header_that_names_another_family_than_the_weights_is_refused(tmp_path: Path) -> None:
    for stated in ("stable-diffusion-v1", "stable-diffusion-v1/lora", "some-other-thing", ""):
        file = checkpoint(tmp_path / "m.safetensors", sd1_keys(), {"modelspec.architecture": stated})
        recognise(file).check_family()
    file = checkpoint(
        tmp_path / "m.safetensors", sd1_keys(), {"modelspec.architecture": "stable-diffusion-xl-v1-base"}
    )
    recognised = recognise(file)
    assert recognised.family == "sd1"
    with pytest.raises(ModelError, match=r"keys says sd1.*architecture says sdxl.*model\.family"):
        recognised.check_family()
    with pytest.raises(ModelError, match=r"architecture says sdxl"):
        load_model(str(file), dtype=torch.float32, device=torch.device("cpu"))
    recognised.check_family("sd1")
    with pytest.raises(ModelError, match=r"model\.family=sdxl, but .* keys says sd1"):
        recognised.check_family("sdxl")


@pytest.mark.parametrize(("prediction", "side"), [("epsilon", 512), ("v_prediction", 768)])
def test_a_single_file_of_sd2_has_the_resolution_of_its_kind(
    prediction: str, side: int, tmp_path: Path
) -> None:
    shapes = checkpoint_shapes("sd2")
    file = checkpoint(tmp_path / "m.safetensors", sd2_keys() | {PROBE: shapes[PROBE]})
    meta = torch.device("meta")
    model = load_model(
        ModelConfig(base=str(file), prediction_type=prediction),  # type: ignore[arg-type]
        dtype=torch.float32,
        device=meta,
    )
    assert model.facts.native_resolution == side


def test_zero_terminal_snr_with_epsilon_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "sd1", rescale_betas_zero_snr=True)
    with pytest.raises(ModelError, match="needs v-prediction"):
        load_model(str(tmp_path / "base"), dtype=torch.float32, device=torch.device("cpu"))
    base = ModelConfig(base=str(tmp_path / "base"), prediction_type="v_prediction")
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    assert model.process.ends_in_noise
    assert float(model.process.alphas_cumprod[-1]) == 0.0


def test_the_folders_scheduler_says_what_is_predicted(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "sd2", prediction_type="v_prediction")
    model = load_model(str(tmp_path / "base"), dtype=torch.float32, device=torch.device("cpu"))
    assert model.process.prediction.name == "v_prediction"


def test_the_short_hash_is_the_old_webuis(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in sd1_keys().items()}
    tensors["first_stage_model.extra"] = torch.randn(400_000)
    file = tmp_path / "m.safetensors"
    save_file(tensors, file)
    window = file.read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert len(window) == 0x10000
    assert recognise(file).short_hash == hashlib.sha256(window).hexdigest()[:8]


class CountingFile(io.FileIO):
    """A file that counts the bytes read from all files of its kind."""

    num_read = 0

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        CountingFile.num_read += count or 0
        return count


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_file_of_the_true_size_is_recognised_from_a_megabyte(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "big.safetensors"
    position, header = 0, {}
    for name, shape in checkpoint_shapes(family).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)  # a hole: takes no room on the disk
    monkeypatch.setattr(CountingFile, "num_read", 0)
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(CountingFile(self, mode)))
    recognised = recognise(file)
    assert (recognised.family, recognised.missing) == (family, ())
    assert recognised.num_bytes > {"sd2": 2, "sdxl": 6}[family] * 2**30
    assert 2**16 < CountingFile.num_read < 2**20
