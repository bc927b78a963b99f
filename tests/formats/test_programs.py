"""What is said of each program follows from its record: named cases, and every spelling in diffusers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora.adapters.canonical import AdapterWeights, ModuleKey
from sdlora.families.facts import FamilyInfo, is_text_encoder
from sdlora.formats import names
from sdlora.formats.adapter_files import read_adapter
from sdlora.formats.clients import CLIENTS, Support
from sdlora.formats.programs import PROGRAMS
from sdlora.inspecting.inspection import inspect_adapter

from .adapters import SD1, SDXL, canonical, random_pair
from .test_clients import assert_deltas, deltas_in, make_pipeline, models_in

UNET = (
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "mid_block.attentions.0.proj_in",
    "mid_block.resnets.0.conv1",
)
TEXT = tuple(
    f"text_model.encoder.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")
)
CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def spelled(style: str, family: FamilyInfo, module: ModuleKey) -> str:
    """Return a module's name in a spelling."""
    component, path = module
    text = is_text_encoder(component)
    if style in ("kohya", "kohya other blocks", "kohya flat text", "kohya te1 and te swapped"):
        original = (family is SDXL) == (style != "kohya other blocks")
        if not text:
            return "lora_unet_" + names.to_underscores(names.to_ldm(path) or "" if original else path)
        prefix = family.file_prefixes[component]
        if style == "kohya te1 and te swapped":
            prefix = {"lora_te": "lora_te1", "lora_te1": "lora_te"}.get(prefix, prefix)
        flat = path.removeprefix("text_model.") if style == "kohya flat text" else path
        return f"{prefix}_{names.to_underscores(flat)}"
    if style == "lycoris":
        return spelled("kohya", family, module) if text else "lycoris_" + names.to_underscores(path)
    if style == "comfyui":
        if text:
            return f"text_encoders.{CLIP[component]}.transformer.{path}"
        return f"diffusion_model.{names.to_ldm(path)}"
    if style == "processor" and not text and path.endswith((".to_q", ".to_out.0")):
        parent, _, last = path.removesuffix(".0").rpartition(".")
        return f"{component}.{parent}.processor.{last}"
    if style == "flat":
        return f"{component}.{path.removeprefix('text_model.')}"
    return f"{component}.{path}"


STYLES = {
    "kohya": ".lora_down.weight",
    "kohya other blocks": ".lora_down.weight",
    "kohya flat text": ".lora_down.weight",
    "kohya te1 and te swapped": ".lora_down.weight",
    "lycoris": ".lora_down.weight",
    "comfyui": ".lora_down.weight",
    "diffusers": ".lora_A.weight",
    "flat": ".lora_A.weight",
    "processor": "_lora.down.weight",
}
PARTS = (
    ".lora_linear_layer.down.weight",
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
)
_UP = {"lora_down": "lora_up", "lora_A": "lora_B", ".down": ".up"}


def up_of(part: str) -> str:
    down, up = next((down, up) for down, up in _UP.items() if down in part)
    return part.replace(down, up)


def tensors_of(
    style: str, part: str, alpha: bool, dims: bool, family: FamilyInfo, weights: AdapterWeights
) -> dict[str, Tensor]:
    tensors = {}
    for module, pair in weights.items():
        name, ending = spelled(style, family, module), part
        if style == "processor" and ".processor." not in name:
            ending = (
                ".lora_linear_layer.down.weight" if is_text_encoder(module.component) else ".lora.down.weight"
            )
        factors = (pair.down, pair.up if alpha else pair.up * pair.scale)
        if dims:
            factors = tuple(f[:, :, None, None] if f.ndim == 2 else f for f in factors)  # type: ignore[assignment]
        tensors |= {name + ending: factors[0].contiguous(), name + up_of(ending): factors[1].contiguous()}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def some_weights(models: Mapping[str, nn.Module]) -> AdapterWeights:
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for component, model in models.items():
        for path, layer in model.named_modules():
            module = canonical(component, path)
            if module.path in (*UNET, *TEXT):
                pairs[module] = random_pair(layer, 4, 2.0, generator)
    return AdapterWeights(pairs)


CASES = [
    (family, style, part, alpha, dims)
    for family, (style, usual), alpha, dims in itertools.product(
        (SD1, SDXL), STYLES.items(), (False, True), (False, True)
    )
    for part in ((usual,) if style == "processor" else dict.fromkeys((usual, *PARTS)))
]
FAST = [case for number, case in enumerate(CASES) if number % 31 == 0]


def check_diffusers(
    family: FamilyInfo, style: str, part: str, alpha: bool, dims: bool, folder: Path
) -> tuple[bool, Support]:
    """Return whether diffusers really loads such a file fully, and what is said of it."""
    pipeline = make_pipeline(family, shallow=family is SD1)
    models = models_in(pipeline)
    weights = some_weights(models)
    path = folder / "file.safetensors"
    save_file(
        tensors_of(style, part, alpha, dims, family, weights),
        path,
        {"ss_base_model_version": family.header.version},
    )
    assert_deltas({key: pair.delta() for key, pair in read_adapter(path).weights.items()}, weights)
    try:
        pipeline.load_lora_weights(str(path))
        loaded: dict[ModuleKey, Tensor] = {}
        for component, model in models.items():
            loaded |= deltas_in(model, component)
        assert_deltas(loaded, weights)
        works = True
    except (AssertionError, ValueError, LookupError, RuntimeError, TypeError, AttributeError):
        works = False
    return works, next(s for s in inspect_adapter(path).clients if s.client == "diffusers")


def test_there_are_files_of_every_spelling_and_every_client_has_its_source() -> None:
    assert len(CASES) > 200 and len(FAST) > 6
    assert set(PROGRAMS) == set(CLIENTS) and all(len(p.source) > 30 for p in PROGRAMS.values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("family", "style", "part", "alpha", "dims"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_is_said_of_diffusers_is_what_it_does_with_every_spelling(
    family: FamilyInfo, style: str, part: str, alpha: bool, dims: bool, tmp_path: Path
) -> None:
    works, support = check_diffusers(family, style, part, alpha, dims, tmp_path)
    assert works == support.full, support.reasons


def supports(tensors: dict[str, Tensor], family: FamilyInfo, folder: Path) -> dict[str, Support]:
    save_file(tensors, folder / "f.safetensors", {"ss_base_model_version": family.header.version})
    return {support.client: support for support in inspect_adapter(folder / "f.safetensors").clients}


def full(claims: dict[str, Support]) -> set[str]:
    return {client for client, support in claims.items() if support.full}


@pytest.mark.parametrize(
    ("family", "style", "part", "alpha", "readers"),
    [
        (SD1, "kohya", ".lora_down.weight", True, set(CLIENTS)),
        (SDXL, "kohya", ".lora_down.weight", True, set(CLIENTS)),
        # A1111 drops the alpha of lora_A; Forge and ComfyUI take it
        (SD1, "kohya", ".lora_A.weight", True, {"Forge", "ComfyUI", "stable-diffusion.cpp"}),
        (SD1, "kohya", ".lora_A.weight", False, {"WebUI", "Forge", "ComfyUI", "stable-diffusion.cpp"}),
        (SD1, "kohya", ".lora_A.default.weight", False, {"ComfyUI", "stable-diffusion.cpp"}),
        (
            SD1,
            "kohya other blocks",
            ".lora_down.weight",
            True,
            set(CLIENTS) - {"kohya sd-scripts", "diffusers"},
        ),
        (SD1, "comfyui", ".lora_down.weight", True, {"ComfyUI"}),
        (SDXL, "comfyui", ".lora_down.weight", True, {"ComfyUI"}),
        (SD1, "processor", "_lora.down.weight", False, {"ComfyUI", "Forge", "diffusers"}),
        (SD1, "diffusers", ".lora_A.weight", False, {"diffusers"}),
        (SD1, "diffusers", ".lora_A.default.weight", False, set()),
    ],
    # the order of a set's text differs from worker to worker
    ids=lambda value: (
        "+".join(sorted(value)) if isinstance(value, set) else getattr(value, "name", str(value))
    ),
)
def test_who_reads_what(
    family: FamilyInfo, style: str, part: str, alpha: bool, readers: set[str], tmp_path: Path
) -> None:
    weights = some_weights(models_in(make_pipeline(family)))
    claims = supports(tensors_of(style, part, alpha, False, family, weights), family, tmp_path)
    assert full(claims) == readers, {c: s.reasons for c, s in claims.items()}


def test_forge_refuses_a_file_with_more_than_twelve_keys_it_does_not_know(tmp_path: Path) -> None:
    weights = some_weights(models_in(make_pipeline(SDXL)))
    tensors = tensors_of("comfyui", ".lora_down.weight", True, False, SDXL, weights)
    claims = supports(tensors, SDXL, tmp_path)
    assert "refuses the file for more than 12" in claims["Forge"].reasons[0]
    few = {key: t for key, t in tensors.items() if "text_encoders" not in key or "layers.0.mlp" in key}
    assert "leaves them out" in supports(few, SDXL, tmp_path)["Forge"].reasons[0]


def test_kohya_loses_an_sdxl_file_with_both_namings_of_the_blocks(tmp_path: Path) -> None:
    weights = some_weights(models_in(make_pipeline(SDXL)))
    both = tensors_of("kohya", ".lora_down.weight", True, False, SDXL, weights)
    conv = [key for key in both if "middle_block_0" in key]
    assert len(conv) == 3
    for key in conv:
        both[key.replace("middle_block_0_in_layers_2", "down_blocks_0_resnets_0_conv1")] = both.pop(key)
    claims = supports(both, SDXL, tmp_path)
    assert "whole file" in str(claims["kohya sd-scripts"].reasons)
    assert not claims["diffusers"].full and claims["ComfyUI"].full


def test_a_kind_that_a_program_does_not_compute_is_not_said_to_load_in_dotted_names(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    claims = supports(
        {f"{name}.weight": torch.ones(1280), f"{name}.on_input": torch.tensor(0)}, SD1, tmp_path
    )
    for client in ("ComfyUI", "Forge", "stable-diffusion.cpp"):
        assert "does not read IA3" in str(claims[client].reasons), client


def test_stable_diffusion_cpp_takes_each_name_by_itself(tmp_path: Path) -> None:
    weights = some_weights(models_in(make_pipeline(SD1)))
    lycoris = tensors_of("lycoris", ".lora_down.weight", True, False, SD1, weights)
    assert supports(lycoris, SD1, tmp_path)["stable-diffusion.cpp"].full
    dotted = tensors_of("diffusers", ".lora_down.weight", True, False, SD1, weights)
    text = {key: tensor for key, tensor in dotted.items() if key.startswith("text_encoder")}
    unet = {key: tensor for key, tensor in lycoris.items() if key.startswith("lycoris")}
    claims = supports(unet | text, SD1, tmp_path)
    assert "leaves out text encoders in diffusers keys" in str(claims["stable-diffusion.cpp"].reasons)
    outer = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(320, 2, 1, 1),
    }
    assert "leaves out `conv_in`" in str(supports(outer, SD1, tmp_path)["stable-diffusion.cpp"].reasons)
