"""Loading bases from a folder, a single LDM-layout file and the hub's cache, and refusing what is neither."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.config.schema import ModelConfig
from sdlora.errors import ConfigError, ModelError
from sdlora.families.components import load_parts
from sdlora.families.loading import load_model
from sdlora.families.locating import wanted_files
from sdlora.families.recognition import recognise
from sdlora.families.unet_model import UNetModel
from sdlora.files import ASSETS
from sdlora.tensor_file import CONVERT
from tools.measure_step import most_allocated

from .narrow import FAMILY_NAMES, States, as_ldm, as_openclip, copy_configs, in_form

CPU = torch.device("cpu")
Bases = Mapping[str, tuple[Path, States]]


def load(source: Path | str) -> UNetModel:
    return load_model(str(source), dtype=torch.float32, device=CPU)


def states_of(model_parts: object) -> dict[str, dict[str, Tensor]]:
    parts = {"unet": model_parts.denoiser, "vae": model_parts.vae, **model_parts.text_encoders}  # type: ignore[attr-defined]
    return {name: dict(part.state_dict()) for name, part in parts.items()}


def differing(actual: States, wanted: States) -> list[str]:
    assert actual.keys() == wanted.keys()
    assert sum(len(state) for state in wanted.values()) > 300
    different = []
    for part, state in wanted.items():
        assert actual[part].keys() == state.keys()
        different += [f"{part}.{key}" for key in state if not torch.equal(actual[part][key], state[key])]
    return different


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_single_file_equals_folder_tensor_for_tensor(family: str, bases: Bases, tmp_path: Path) -> None:
    folder, states = bases[family]
    file = tmp_path / "narrow.safetensors"
    save_file(as_ldm(family, states), file)
    configs = copy_configs(folder, tmp_path / "configs")
    from_folder = load_parts(recognise(folder), dtype=torch.float32, device=CPU)
    assert recognise(file).family == recognise(folder).family == family
    from_file = load_parts(recognise(file), dtype=torch.float32, device=CPU, configs=configs)
    assert differing(states_of(from_folder), states) == []
    assert differing(states_of(from_file), states) == []
    for name, tokenizer in from_folder.tokenizers.items():
        assert tokenizer.get_vocab() == from_file.tokenizers[name].get_vocab()
        assert tokenizer.pad_token_id == from_file.tokenizers[name].pad_token_id
    assert not any(t.requires_grad for t in from_file.denoiser.parameters())


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        ("sd1", torch.float16),
        ("sd2", torch.bfloat16),
        ("sdxl", torch.float16),
        ("sdxl", torch.float8_e4m3fn),
    ],
)
def test_files_of_few_bits_and_targets_round_once(
    family: str, stored: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    folder, states = bases[family]
    file = tmp_path / "half.safetensors"
    whole = as_ldm(family, states)
    save_file({key: t.to(stored) if t.is_floating_point() else t for key, t in whole.items()}, file)
    configs = copy_configs(folder, tmp_path / "configs")
    parts = load_parts(recognise(file), dtype=torch.bfloat16, device=CPU, configs=configs)
    assert recognise(file).formats == {str(stored).removeprefix("torch."): 1.0}
    for name, state in states_of(parts).items():
        for key, tensor in state.items():
            dtype = torch.float32 if name == "vae" else torch.bfloat16
            assert tensor.dtype == dtype
            assert torch.equal(tensor, states[name][key].to(stored).to(dtype)), (name, key)


def test_a_third_of_a_fused_matrix_keeps_no_more_memory_than_itself(bases: Bases, tmp_path: Path) -> None:
    folder, states = bases["sdxl"]
    file = tmp_path / "narrow.safetensors"
    save_file(as_ldm("sdxl", states), file)
    parts = load_parts(
        recognise(file), dtype=torch.float32, device=CPU, configs=copy_configs(folder, tmp_path / "configs")
    )
    checked = 0
    for module in (parts.denoiser, parts.vae, *parts.text_encoders.values()):
        for tensor in module.state_dict().values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            checked += 1
    assert checked > 900


def test_shipped_tokenizer_gives_clips_own_ids() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "sd1" / "tokenizer")
    ids = tokenizer("a photo of an astronaut riding a horse").input_ids
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert (len(tokenizer), tokenizer.pad_token_id) == (49408, 49407)


def test_folder_loads_frozen_with_its_own_sizes(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.float32, device=CPU)
    assert (model.facts.native_resolution, model.facts.size_multiple, model.facts.latents.shape(32, 64)) == (
        32,
        8,
        (4, 8, 16),
    )
    assert model.process.prediction.name == "epsilon"
    parameters = [p for module in model.components().values() for p in module.parameters()]
    assert len(parameters) > 50
    assert not any(parameter.requires_grad for parameter in parameters)


def test_mini_base_is_small_and_complete() -> None:
    size = sum(path.stat().st_size for path in (ASSETS / "mini").rglob("*") if path.is_file())
    assert size <= 32 * 2**20
    model = load_model("mini", dtype=torch.float32, device=CPU)
    assert model.facts.native_resolution >= 64
    assert {path.name for path in (ASSETS / "mini").iterdir()} >= {"README.md", "LICENSE", "model_index.json"}


@pytest.mark.parametrize("spelling", ["old attention names", "no text_model", "shards", "fp16 variant"])
def test_older_spellings_of_folders_load_alike(spelling: str, bases: Bases, tmp_path: Path) -> None:
    source, states = bases["sd1"]
    folder = tmp_path / "old"
    shutil.copytree(source, folder)
    vae, text = folder / "vae", folder / "text_encoder"
    if spelling == "old attention names":
        words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = {}
        for name, tensor in states["vae"].items():
            for new, old in words.items():
                name = name.replace(f".{new}.", f".{old}.")
            state[name] = tensor
        assert sum(".query." in name for name in state) > 2
        save_file(state, vae / "diffusion_pytorch_model.safetensors")
    elif spelling == "no text_model":
        flipped = {
            name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}": t
            for name, t in states["text_encoder"].items()
        }
        save_file(
            flipped | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
            text / "model.safetensors",
        )
    elif spelling == "shards":
        whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
        whole.unlink()
        names = sorted(states["unet"])
        placed = {}
        for number, part in enumerate((names[::2], names[1::2])):
            shard = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
            save_file({n: states["unet"][n].contiguous() for n in part}, folder / "unet" / shard)
            placed |= dict.fromkeys(part, shard)
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8"
        )
    else:
        (text / "model.safetensors").rename(text / "model.fp16.safetensors")
    parts = load_parts(recognise(folder), dtype=torch.float32, device=CPU)
    assert differing(states_of(parts), states) == []


def test_another_vae_comes_from_a_file_a_folder_or_a_checkpoint(bases: Bases, tmp_path: Path) -> None:
    folder, states = bases["sd1"]
    other = {name: tensor + 0.25 for name, tensor in states["vae"].items()}
    ldm = {
        key.removeprefix("first_stage_model."): tensor
        for key, tensor in as_ldm("sd1", {**states, "vae": other}).items()
        if key.startswith("first_stage_model.")
    }
    places = {name: tmp_path / f"{name}.safetensors" for name in ("diffusers", "ldm", "checkpoint")}
    save_file(other, places["diffusers"])
    save_file(ldm, places["ldm"])
    save_file(as_ldm("sd1", {**states, "vae": other}), places["checkpoint"])
    shutil.copytree(folder / "vae", tmp_path / "vae")
    save_file(other, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    for place in (*places.values(), tmp_path / "vae"):
        parts = load_parts(
            recognise(folder), dtype=torch.float32, device=CPU, vae=str(place)
        ).vae.state_dict()
        assert [key for key in other if not torch.equal(parts[key], other[key])] == [], place
    with pytest.raises(ModelError, match="holds no VAE"):
        save_file({"x": torch.zeros(2)}, tmp_path / "not.safetensors")
        load_parts(recognise(folder), dtype=torch.float32, device=CPU, vae=str(tmp_path / "not.safetensors"))


def test_a_checkpoint_without_vae_loads_only_with_another_one(bases: Bases, tmp_path: Path) -> None:
    folder, states = bases["sd1"]
    file = tmp_path / "pruned.safetensors"
    whole = as_ldm("sd1", states)
    save_file({k: t for k, t in whole.items() if not k.startswith("first_stage_model.")}, file)
    assert recognise(file).missing == ("vae",)
    configs = copy_configs(folder, tmp_path / "configs")
    with pytest.raises(ModelError, match=r"has no vae.*model\.vae"):
        load_parts(recognise(file), dtype=torch.float32, device=CPU, configs=configs)
    parts = load_parts(
        recognise(file), dtype=torch.float32, device=CPU, configs=configs, vae=str(folder / "vae")
    )
    assert differing(states_of(parts), states) == []


def test_missing_and_misshapen_tensors_are_named(bases: Bases, tmp_path: Path) -> None:
    folder, states = bases["sd1"]
    configs = copy_configs(folder, tmp_path / "configs")
    whole = as_ldm("sd1", states)
    cut = dict(whole)
    del cut["model.diffusion_model.middle_block.1.norm.weight"]
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match=r"1 of \d+ tensors of the U-Net.*middle_block\.1\.norm\.weight"):
        load_parts(recognise(tmp_path / "cut.safetensors"), dtype=torch.float32, device=CPU, configs=configs)
    whole["model.diffusion_model.middle_block.1.norm.weight"] = torch.zeros(5)
    save_file(whole, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=r"middle_block\.1\.norm\.weight` has shape \(5,\), not \(32,\)"):
        load_parts(recognise(tmp_path / "odd.safetensors"), dtype=torch.float32, device=CPU, configs=configs)


def test_old_single_files_may_leave_text_model_out(bases: Bases, tmp_path: Path) -> None:
    folder, states = bases["sd1"]
    file = tmp_path / "old.safetensors"
    save_file(
        {k.replace("transformer.text_model.", "transformer."): t for k, t in as_ldm("sd1", states).items()},
        file,
    )
    parts = load_parts(
        recognise(file), dtype=torch.float32, device=CPU, configs=copy_configs(folder, tmp_path / "configs")
    )
    assert differing(states_of(parts), states) == []


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_files_that_can_run_code_are_refused_with_the_way_out(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{ending}"
    file.write_bytes(b"\x80\x04")
    with pytest.raises(
        ModelError, match=r"convert it in your WebUI.*torch\.load\('IN', 'cpu', weights_only=True"
    ):
        load(file)


def test_the_line_that_converts_a_pickled_checkpoint_works(bases: Bases, tmp_path: Path) -> None:
    _, states = bases["sd1"]
    whole = as_ldm("sd1", states)
    torch.save(
        {"state_dict": whole | {"same again": whole["model.diffusion_model.out.2.bias"]}, "epoch": 3},
        tmp_path / "IN",
    )
    (line,) = re.findall(r'python -c "(.*)"', CONVERT)
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, check=True)
    tensors_read = load_file(tmp_path / "OUT.safetensors")
    assert set(tensors_read) == {*whole, "same again"}
    assert [key for key, tensor in whole.items() if not torch.equal(tensors_read[key], tensor)] == []


def test_damaged_missing_and_wrong_places_are_named(tmp_path: Path, tiny_base: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ModelError, match="damaged"):
        load(broken)
    with pytest.raises(ModelError, match="no such base model"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load(tmp_path)
    cut = tmp_path / "cut"
    shutil.copytree(tiny_base, cut)
    shutil.rmtree(cut / "unet")
    with pytest.raises(ModelError, match=r"unet/config\.json"):
        load(cut)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_base, pickled)
    weights = pickled / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="can run code"):
        load(pickled)


def test_clip_skip_is_refused_where_it_has_no_meaning(bases: Bases) -> None:
    with pytest.raises(ConfigError, match="clip_skip"):
        load_model(ModelConfig(base=str(bases["sdxl"][0]), clip_skip=2), dtype=torch.float32, device=CPU)


def test_hub_id_without_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="somebody/some-model"):
        load("somebody/some-model")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_hub_id_in_the_cache_loads_offline(
    family: str, bases: Bases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, states = bases[family]
    model = load(in_form("hub cache", family, bases[family], tmp_path, monkeypatch))
    assert model.info.name == family
    assert all(torch.equal(t, states["unet"][name]) for name, t in model.unet.state_dict().items())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_single_file_needs_no_network_at_all(
    family: str, bases: Bases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"asked the network for {arguments}")

    source = in_form("file", family, bases[family], tmp_path, monkeypatch)
    # as on a fresh machine: tokenizers are the shipped ones, too
    shutil.copytree(
        ASSETS / "sd1" / "tokenizer", tmp_path / "assets" / "sd1" / "tokenizer", dirs_exist_ok=True
    )
    for folder in (tmp_path / "assets" / family).glob("tokenizer*"):
        if family != "sd1":
            shutil.rmtree(folder)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    model = load(source)
    assert model.info.name == family
    with torch.no_grad():
        assert bool(torch.isfinite(model.encode_text(["a cat"])["states"]).all())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_diffusers_own_reader_of_single_files_finds_the_same_tensors(
    family: str, bases: Bases, tmp_path: Path
) -> None:
    """An independent converter: what reads our LDM layout, and what ours reads, are not the same code."""
    folder, states = bases[family]
    file = tmp_path / "narrow.safetensors"
    save_file(as_ldm(family, states), file)
    checkpoint = load_file(file)
    where = {"config": str(folder), "local_files_only": True}
    collected: dict[str, dict[str, Tensor]] = {
        "unet": UNet2DConditionModel.from_single_file(str(file), subfolder="unet", **where).state_dict(),
        "vae": AutoencoderKL.from_single_file(str(file), subfolder="vae", **where).state_dict(),
    }
    for name in [name for name in states if name.startswith("text_encoder")]:
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        collected[name] = create_diffusers_clip_model_from_ldm(
            kind,
            checkpoint=dict(checkpoint),
            config=str(folder),
            subfolder=name,
            local_files_only=True,
        ).state_dict()
    assert differing(collected, states) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loading_allocates_the_finished_weights_and_one_buffer(
    dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    folder, states = bases["sdxl"]
    file = tmp_path / "narrow.safetensors"
    save_file(as_ldm("sdxl", states), file)
    configs, recognised = copy_configs(folder, tmp_path / "configs"), recognise(file)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        parts = load_parts(recognised, dtype=dtype, device=CPU, configs=configs)
    modules = (parts.denoiser, parts.vae, *parts.text_encoders.values())
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    largest = max(t.numel() * t.element_size() for t in load_file(file).values())
    assert weights < most_allocated(record) < weights + 1.1 * largest


def test_only_the_files_that_are_read_are_fetched_from_the_hub() -> None:
    names = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.safetensors",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert set(wanted_files(names)) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_openclip_writer_of_these_tests_packs_what_it_should(bases: Bases) -> None:
    _, states = bases["sdxl"]
    packed = as_openclip("", states["text_encoder_2"])
    assert packed["transformer.resblocks.0.attn.in_proj_weight"].shape == (72, 24)
    assert packed["text_projection"].shape == (24, 20)


def with_setting(folder: Path, file: str, key: str, value: Any) -> None:
    place = folder / file
    tree = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    place.write_text(json.dumps(tree | {key: value}), encoding="utf-8")


HARMFUL_SETTINGS = [
    ("unet/config.json", "layers_per_block", 10**9),
    ("unet/config.json", "transformer_layers_per_block", [1, 10**7]),
    ("unet/config.json", "block_out_channels", [8] * 5000),
    ("unet/config.json", "in_channels", [4]),
    ("unet/config.json", "cross_attention_dim", 10**30),
    ("text_encoder/config.json", "num_hidden_layers", 10**8),
    ("vae/config.json", "layers_per_block", 10**8),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
    ("scheduler/scheduler_config.json", "beta_start", "x"),
    ("scheduler/scheduler_config.json", "beta_end", 5),
    ("scheduler/scheduler_config.json", "beta_schedule", []),
    ("unet/diffusion_pytorch_model.safetensors.index.json", "weight_map", []),
    ("unet/diffusion_pytorch_model.safetensors.index.json", "weight_map", {"a": 1}),
    ("unet/diffusion_pytorch_model.safetensors.index.json", "weight_map", {"a": "../../vae/x.safetensors"}),
]


@pytest.mark.parametrize(("file", "key", "value"), HARMFUL_SETTINGS)
def test_settings_that_no_base_has_are_refused_at_once(
    file: str, key: str, value: Any, tiny_base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    with_setting(folder, file, key, value)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "{", "{} {}", '{"a":1,"a":1}', "\0", "null"])
def test_json_files_of_a_base_that_are_none_are_named(text: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    names = ["model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))]
    for name in [*names, "scheduler/scheduler_config.json", "sdlora.json"]:
        before = (folder / name).read_bytes() if (folder / name).is_file() else b"{}"
        (folder / name).write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=name):
            load(folder)
        (folder / name).write_bytes(before)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "quantization_config", "auto_map"]
)
def test_a_base_does_not_decide_what_computes_it(key: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    for part in ("unet", "vae", "text_encoder"):
        value = {"AutoModel": "a.b"} if key in ("auto_map", "quantization_config") else "stranger/kernel"
        with_setting(folder, f"{part}/config.json", key, value)
    changed, plain = load(folder), load(tiny_base)
    assert changed.text_encoders["text_encoder"].config._attn_implementation == "sdpa"
    for name, module in plain.components().items():
        other = changed.components()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items())
