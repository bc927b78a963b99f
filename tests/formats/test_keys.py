"""Every spelling of keys that is in use is read as the same adapter, and nothing is dropped in silence."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.errors import AdapterFileError
from sdlora.families.facts import FamilyInfo
from sdlora.formats import names
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.formats.clients import CLIENTS
from sdlora.formats.keys import FileKeys, parse_key, parse_name
from sdlora.formats.peft import Alphas
from sdlora.formats.support import client_support
from sdlora.formats.table import FORMATS, written_formats

from .adapters import EVERYTHING, SD1, SD2, SDXL, assert_same, file_of, models_of, random_adapter

FAMILIES = (SD1, SD2, SDXL)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = {
    "sd1": {"text_encoder": "clip_l"},
    "sd2": {"text_encoder": "clip_h"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
}


def underscored(family: FamilyInfo, module: ModuleKey, *, ldm: bool) -> str:
    path: str | None = module.path
    if module.component == "unet" and ldm:
        path = names.to_ldm(module.path)
        if family is not SDXL and path is not None and path.startswith("output_blocks.2.2.conv"):
            path = "output_blocks.2.1.conv"
    assert path is not None
    return f"{family.file_prefixes[module.component]}_{names.to_underscores(path)}"


def comfyui_name(family: FamilyInfo, module: ModuleKey) -> str:
    if module.component == "unet":
        return f"diffusion_model.{names.to_ldm(module.path)}"
    return f"text_encoders.{CLIP[family.name][module.component]}.transformer.{module.path}"


def processor_name(family: FamilyInfo, module: ModuleKey) -> str:
    path = module.path
    if module.component == "unet" and path.endswith(ATTENTION):
        parent, _, last = path.removesuffix(".0").rpartition(".")
        path = f"{parent}.processor.{last}"
    return f"{module.component}.{path}"


def bare_name(family: FamilyInfo, module: ModuleKey) -> str:
    name = processor_name(family, module)
    return name.removeprefix("unet.")


def flat_name(family: FamilyInfo, module: ModuleKey) -> str:
    return f"{module.component}.{module.path.removeprefix('text_model.')}"


NAMES: dict[str, tuple[str, Callable[[FamilyInfo, ModuleKey], str]]] = {
    "kohya, diffusers blocks": ("webui", lambda family, module: underscored(family, module, ldm=False)),
    "kohya, original blocks": ("webui", lambda family, module: underscored(family, module, ldm=True)),
    "diffusers": ("diffusers", lambda family, module: f"{module.component}.{module.path}"),
    "diffusers, flat text encoder": ("diffusers", flat_name),
    "diffusers, attention processors": ("diffusers", processor_name),
    "diffusers, bare": ("diffusers", bare_name),
    "ComfyUI": ("comfyui", comfyui_name),
}
DOWN_UP = {
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "named adapter": (".lora_A.default.weight", ".lora_B.default.weight"),
    "without weight": (".lora_A", ".lora_B"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "_lora.down": ("_lora.down.weight", "_lora.up.weight"),
    "linear layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> FamilyInfo:
    assert isinstance(request.param, FamilyInfo)
    return request.param


def adapter_for(family: FamilyInfo) -> AdapterWeights:
    return _adapters()[family.name]


@functools.cache
def _adapters() -> dict[str, AdapterWeights]:
    return {
        family.name: random_adapter(models_of(family), EVERYTHING, ranks=(4, 1, 3), scales=(0.5, 1.5, 2.0))
        for family in FAMILIES
    }


def spelled(
    weights: AdapterWeights, name_of: Callable[[ModuleKey], str], parts: tuple[str, str]
) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, pair in weights.items():
        name = name_of(module)
        tensors[name + parts[0]] = pair.down
        tensors[name + parts[1]] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors


@pytest.mark.parametrize("parts", DOWN_UP)
@pytest.mark.parametrize("naming", NAMES)
def test_every_combination_of_names_and_parts_is_read(
    naming: str, parts: str, family: FamilyInfo, tmp_path: Path
) -> None:
    format, name_of = NAMES[naming]
    weights = AdapterWeights(dict(list(adapter_for(family).items())[::23]))
    path = tmp_path / "a.safetensors"
    save_file(spelled(weights, lambda module: name_of(family, module), DOWN_UP[parts]), path)
    assert_same(read_adapter(path).weights, weights)
    assert OpenAdapter(path).format == format


def test_every_layer_of_every_family_has_one_meaning_in_every_spelling(family: FamilyInfo) -> None:
    modules = list(adapter_for(family).pairs)
    assert len(modules) > 150
    for naming, (spelling, name_of) in NAMES.items():
        written = [name_of(family, module) for module in modules]
        assert len(set(written)) == len(modules), naming
        for module, name in zip(modules, written, strict=True):
            assert parse_name(name) == (module, spelling), naming


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_spellings_may_be_mixed_key_by_key(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    weights = AdapterWeights(
        dict(data.draw(st.permutations(sorted(adapter_for(family).pairs.items(), key=lambda x: x[0])))[:12])
    )
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in weights.items():
        module_weights = AdapterWeights({module: pair})
        _, name_of = NAMES[data.draw(st.sampled_from(sorted(NAMES)))]
        parts = DOWN_UP[data.draw(st.sampled_from(sorted(DOWN_UP)))]
        name = name_of(family, module)
        tensors |= spelled(module_weights, lambda module, name=name: name, parts)  # type: ignore[misc]
    path = tmp_path_factory.mktemp("mixed") / "a.safetensors"
    save_file(tensors, path)
    assert_same(read_adapter(path).weights, weights)


def test_sdxl_files_may_mix_both_block_namings(tmp_path: Path) -> None:
    weights = adapter_for(SDXL)
    turn = {module: number % 2 == 0 for number, module in enumerate(sorted(weights.pairs))}
    tensors = spelled(weights, lambda m: underscored(SDXL, m, ldm=turn[m]), DOWN_UP["lora_down"])
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert_same(read_adapter(path).weights, weights)
    outline = OpenAdapter(path).outline
    assert outline.info.family == "sdxl"
    support = {client.client: client for client in client_support("webui", "sdxl", outline.weights, tensors)}
    assert not support["diffusers"].full and "both namings are mixed" in str(support["diffusers"].reasons)


def test_lycoris_wrapper_names_are_read(tmp_path: Path) -> None:
    weights = AdapterWeights({m: p for m, p in adapter_for(SD1).items() if m.component == "unet"})
    path = tmp_path / "a.safetensors"
    save_file(
        spelled(weights, lambda m: "lycoris_" + names.to_underscores(m.path), DOWN_UP["lora_down"]), path
    )
    assert OpenAdapter(path).format == "lycoris"
    assert_same(read_adapter(path).weights, weights)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_down_blocks_0_motion_modules_0_to_q.lora_down.weight",
        "lora_te_input_blocks_1_1_proj_in.lora_down.weight",
        "diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.lora_down.weight",
        "unet.lora_A.weight",
        "unet.strange_block.0.lora_A.weight",
        "mid_block.attentions.0.proj_in.lora_C.weight",
        "mid_block.attentions.0.proj_in.lora_A.weight.extra",
    ],
)
def test_a_key_that_means_no_known_layer_is_listed(key: str, tmp_path: Path) -> None:
    assert parse_key(key) is None
    path = tmp_path / "a.safetensors"
    good = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{good}.lora_down.weight": torch.ones(1, 2), f"{good}.lora_up.weight": torch.ones(2, 1)}
    save_file({**tensors, key: torch.ones(1, 2)}, path)
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(path)
    assert "1 keys are unknown" in str(caught.value) and key in str(caught.value)


def test_one_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first = "lora_unet_middle_block_1_proj_in.lora_down.weight"
    second = "diffusion_model.middle_block.1.proj_in.lora_down.weight"
    save_file({first: torch.ones(1, 2), second: torch.ones(1, 2)}, path)
    with pytest.raises(AdapterFileError, match=r"mid_block\.attentions\.0\.proj_in` is there twice"):
        read_adapter(path)


def test_the_order_of_spellings_is_by_number_of_keys() -> None:
    keys = ["unet.mid_block.attentions.0.proj_in.lora_A.weight", "lora_unet_mid_block_x.alpha"]
    assert list(FileKeys(keys).spellings) == ["diffusers"]
    keys += [f"diffusion_model.middle_block.1.proj_in.{part}" for part in ("alpha", "lora_up.weight")]
    assert list(FileKeys(keys).spellings) == ["comfyui", "diffusers"]


def test_who_reads_which_spelling() -> None:
    pair = LowRankPair(torch.ones(2, 3), torch.ones(3, 2), 2.0)
    weights = AdapterWeights({ModuleKey("unet", "mid_block.attentions.0.proj_in"): pair})
    cases = {
        ("comfyui", "diffusion_model.middle_block.1.proj_in.lora_up.weight"): {
            *("ComfyUI", "Forge", "stable-diffusion.cpp")
        },
        ("lycoris", "lycoris_mid_block_attentions_0_proj_in.lora_up.weight"): {
            *("ComfyUI", "Forge", "stable-diffusion.cpp")
        },
        ("webui", "lora_unet_mid_block_attentions_0_proj_in.lora_B.weight"): set(CLIENTS)
        - {"kohya sd-scripts", "diffusers"},
        ("diffusers", "mid_block.attentions.0.proj_in.lora_B.weight"): {
            *("ComfyUI", "Forge", "stable-diffusion.cpp")
        },
    }
    for (format, key), readers in cases.items():
        support = client_support(format, "sd1", weights, [key])
        assert {client.client for client in support if client.full} == readers, format
        assert all(client.reasons for client in support if not client.full)
    keys = [key for _, key in cases]
    mixed = client_support("webui", "sd1", weights, keys)
    assert {client.client for client in mixed if client.full} == {"ComfyUI", "Forge", "stable-diffusion.cpp"}


@pytest.mark.parametrize("format", written_formats())
def test_reading_by_module_and_reading_the_outline_agree_with_reading_all(
    format: str, tmp_path: Path
) -> None:
    weights = adapter_for(SD1)
    target = tmp_path / ("a" if FORMATS[format].is_folder else "a.safetensors")
    write_adapter(file_of(weights), format, target, torch.float32, SD1)
    modules_read = dict(OpenAdapter(target).modules())
    assert_same(AdapterWeights(modules_read), weights)
    outline = OpenAdapter(target).outline
    assert outline.info == read_adapter(target).info
    assert sorted(outline.weights.pairs) == sorted(weights.pairs)
    for module, pair in outline.weights.items():
        assert pair.down.shape == weights.pairs[module].down.shape
        assert pair.up.shape == weights.pairs[module].up.shape
        assert pair.down.device.type == "meta"


def test_alphas_that_would_be_rounded_go_where_diffusers_keeps_them(tmp_path: Path) -> None:
    from sdlora.tensor_file import read_header

    weights = random_adapter(models_of(SDXL), EVERYTHING, ranks=(3, 2), scales=(12.7 / 3, 0.5))
    target = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), "diffusers", target, torch.float32, SDXL)
    settings = json.loads(read_header(target).metadata["lora_adapter_metadata"])
    assert {key.split(".", 1)[0] for key in settings} == {"unet", "text_encoder", "text_encoder_2"}
    assert_same(read_adapter(target).weights, weights)
    support = {
        client.client: client
        for client in client_support(
            "diffusers", "sdxl", OpenAdapter(target).outline.weights, read_header(target).tensors
        )
    }
    assert support["diffusers"].full and "ignores the alphas" in str(support["ComfyUI"].reasons)


def test_a_peft_folder_of_the_second_text_encoder_is_told_by_its_width(tmp_path: Path) -> None:
    for width, component in ((1280, "text_encoder_2"), (768, "text_encoder")):
        folder = tmp_path / str(width)
        folder.mkdir()
        key = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
        tensors = {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(width, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
        assert {module.component for module in read_adapter(folder).weights.pairs} == {component}


def test_two_adapters_in_one_peft_file_are_refused(tmp_path: Path) -> None:
    key = "base_model.model.mid_block.attentions.0.proj_in.lora_A"
    save_file(
        {f"{key}.one.weight": torch.ones(1, 2), f"{key}.two.weight": torch.ones(1, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="has two adapters"):
        read_adapter(tmp_path)


def test_names_of_peft_saved_as_one_file_are_explained(tmp_path: Path) -> None:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    trained = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))
    state = {k: v.contiguous() for k, v in peft.get_peft_model_state_dict(trained).items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: is missing"):
        read_adapter(tmp_path / "a.safetensors")


def test_readers_know_every_spelling_that_keys_can_have() -> None:
    assert {spelling for spelling, _ in NAMES.values()} | {"lycoris", "peft"} == set(FORMATS)


def test_alpha_patterns_mean_what_they_mean_to_peft() -> None:
    patterns = {
        "attn1.to_q": 2,
        "^mid_block.attentions.0.proj_in": 3,
        "proj_in": 4,
        "to_q": 5,
        "^to_k": 6,
        r"down_blocks\.0\.proj_out$": 7,
    }
    paths = [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
        "mid_block.attentions.0.proj_in",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.attentions.0.to_k",
        "down_blocks.0.proj_out",
        "xto_q",
    ]
    alphas = Alphas("here", {"lora_alpha": 1, "alpha_pattern": patterns})
    for path in paths:
        key = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)
        wanted = 1 if key is None else patterns[key]
        assert alphas.of("here", ModuleKey("unet", path), 4) == wanted, path


def test_the_work_of_reading_patterns_grows_with_their_number_not_its_square(tmp_path: Path) -> None:
    pair = LowRankPair(torch.ones(1, 2), torch.ones(2, 1), 1.0)

    def calls(count: int) -> int:
        """Return how many functions reading takes with a pattern for each of so many modules."""
        weights = {
            ModuleKey("unet", f"down_blocks.0.attentions.0.transformer_blocks.{i}.attn1.to_q"): LowRankPair(
                pair.down, pair.up, float(i + 1)
            )
            for i in range(count)
        }
        path = tmp_path / str(count)
        write_adapter(file_of(AdapterWeights(weights)), "peft", path, torch.float32, SD1)
        number = 0

        def counting(_frame: object, event: str, _function: object) -> None:
            nonlocal number
            number += event in ("call", "c_call")

        sys.setprofile(counting)
        try:
            weights_read = read_adapter(path).weights
        finally:
            sys.setprofile(None)
        assert {key: update.alpha for key, update in weights_read.items()} == {
            k: update.alpha for k, update in weights.items()
        }
        return number

    assert calls(800) < 5 * calls(200), "trying each pattern for each module takes 16 times the calls"
