"""Our files in the programs that read them: real diffusers pipelines and real PEFT, delta by delta."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sdlora
from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from sdlora.families.facts import FamilyInfo
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.formats.clients import CLIENTS
from sdlora.formats.other_readers import through_diffusers
from sdlora.formats.proof import compare, prove
from sdlora.formats.support import client_support
from sdlora.formats.table import FORMATS
from sdlora.inspecting.inspection import inspect_adapter

from .adapters import (
    ATTENTION,
    EVERYTHING,
    LINEAR,
    SD1,
    SD2,
    SDXL,
    assert_same,
    canonical,
    file_of,
    models_of,
    random_adapter,
    random_pair,
    tiny_text_encoder,
    tiny_unet,
)

MINI = Path(sdlora.__file__).parent / "assets" / "mini"


def make_pipeline(family: FamilyInfo, *, shallow: bool = False) -> diffusers.DiffusionPipeline:
    """``shallow``: with few blocks, for tests that load only some layers."""
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    if family is SDXL:
        return diffusers.StableDiffusionXLPipeline(
            vae=None,
            text_encoder=tiny_text_encoder(),
            text_encoder_2=tiny_text_encoder(projection=True, width=16),
            tokenizer=None,
            tokenizer_2=None,
            unet=tiny_unet(SDXL),
            scheduler=scheduler,
            add_watermarker=False,
        )
    if shallow:
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    else:
        unet = tiny_unet(family, layers_per_block=1)
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=tiny_text_encoder(),
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def models_in(pipeline: diffusers.DiffusionPipeline) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def deltas_in(model: nn.Module, component: str) -> dict[ModuleKey, torch.Tensor]:
    """Return what PEFT's layers in a loaded model add to their weights."""
    collected = {}
    for path, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            (name,) = layer.lora_A
            path = path.removeprefix("base_model.model.")
            collected[canonical(component, path)] = layer.get_delta_weight(name).detach().float()
    return collected


def assert_deltas(actual: dict[ModuleKey, torch.Tensor], weights: AdapterWeights) -> None:
    assert sorted(actual) == sorted(weights.pairs) and len(actual) > 0
    for key, delta in actual.items():
        wanted = weights.pairs[key].delta()
        assert delta.shape == wanted.shape, key
        assert torch.allclose(delta, wanted, rtol=1e-5, atol=1e-7), key


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "family"),
    [("webui", SD1), ("webui", SD2), ("webui", SDXL), ("diffusers", SD1), ("diffusers", SDXL)],
    ids=lambda value: getattr(value, "name", value),
)
def test_diffusers_pipelines_load_the_same_deltas(format: str, family: FamilyInfo, tmp_path: Path) -> None:
    pipeline = make_pipeline(family)
    # alpha differs from rank, and ranks are mixed at one alpha, in layers of every kind
    weights = random_adapter(models_in(pipeline), EVERYTHING, ranks=(4, 2, 8), scales=(0.5, 1.0, 0.25))
    target = tmp_path / "style.safetensors"
    write_adapter(file_of(weights), format, target, torch.float32, family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's word for keys it could not place
        pipeline.load_lora_weights(str(target))
    loaded: dict[ModuleKey, torch.Tensor] = {}
    for component, model in models_in(pipeline).items():
        loaded |= deltas_in(model, component)
    assert_deltas(loaded, weights)


def test_the_mini_base_loads_the_webui_file(tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        str(MINI), safety_checker=None, local_files_only=True
    ).to(torch.float32)
    weights = random_adapter(models_in(pipeline), LINEAR, ranks=(8,), scales=(0.5,))
    assert len(weights) > 60
    target = tmp_path / "style.safetensors"
    write_adapter(file_of(weights), "webui", target, torch.float16, SD1)
    pipeline.load_lora_weights(str(target))
    loaded = deltas_in(pipeline.unet, "unet") | deltas_in(pipeline.text_encoder, "text_encoder")
    stored = AdapterWeights({key: pair.to(torch.float16).to(torch.float32) for key, pair in weights.items()})
    assert_deltas(loaded, stored)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_peft_loads_each_components_folder(component: str, tmp_path: Path) -> None:
    models = models_of(SDXL)
    weights = random_adapter(models, EVERYTHING, ranks=(4, 2, 8), scales=(0.5, 1.0, 3.0))
    write_adapter(file_of(weights), "peft", tmp_path / "style", torch.float32, SDXL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "Found missing adapter keys"
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(models[component]), str(tmp_path / "style" / component)
        )
    component_weights = AdapterWeights(
        {key: pair for key, pair in weights.items() if key.component == component}
    )
    assert_deltas(deltas_in(loaded, component), component_weights)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_read_with_its_own_scale(rslora: bool, tmp_path: Path) -> None:
    model = tiny_unet()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "proj_in"],
        alpha_pattern={} if rslora else {"mid_block.attentions.0.proj_in": 2.0},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    trained = peft.get_peft_model(model, config)
    trained.save_pretrained(str(tmp_path))
    weights_read = read_adapter(tmp_path).weights
    assert {key.component for key in weights_read.pairs} == {"unet"}
    assert_deltas(deltas_in(trained, "unet"), weights_read)
    assert_deltas({k: p.delta() for k, p in weights_read.items()}, weights_read)


def test_a_text_encoder_folder_is_normalised_whatever_transformers_wrote_it(tmp_path: Path) -> None:
    for start in ("", "text_model."):
        folder = tmp_path / (start or "flat") / "text_encoder"
        folder.mkdir(parents=True)
        key = f"base_model.model.{start}encoder.layers.0.mlp.fc1"
        save_file(
            {f"{key}.lora_A.weight": torch.ones(2, 3), f"{key}.lora_B.weight": torch.ones(3, 2)},
            folder / "adapter_model.safetensors",
        )
        (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"encoder.layers.0.mlp.fc1": 8}}'
        )
        pairs_read = read_adapter(folder).weights.pairs
        assert list(pairs_read) == [ModuleKey("text_encoder", "text_model.encoder.layers.0.mlp.fc1")]
        assert next(iter(pairs_read.values())).alpha == 8


def old_spelling(key: str, style: str) -> str:
    """Return a current diffusers key as an older release wrote it."""
    direction = "down" if ".lora_A." in key else "up"
    path = key.split(".lora_")[0]
    parent, _, last = path.removesuffix(".0").rpartition(".")
    if style == "flat":
        return key.replace("text_model.", "")
    if style == "default":
        return key.replace(".weight", ".default.weight")
    if key.startswith("text_encoder"):
        return f"{path}.lora_linear_layer.{direction}.weight"
    if style == "processor" and last in ("to_q", "to_k", "to_v", "to_out"):
        return f"{parent}.processor.{last}_lora.{direction}.weight"
    return f"{path}.lora.{direction}.weight"


@pytest.mark.parametrize("style", ["flat", "default", "lora", "processor"])
def test_older_diffusers_spellings_are_read(style: str, tmp_path: Path) -> None:
    weights = random_adapter(models_in(make_pipeline(SD1)), ATTENTION)
    target, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    write_adapter(file_of(weights), "diffusers", target, torch.float32, SD1)
    renamed = {old_spelling(key, style): tensor for key, tensor in load_file(target).items()}
    assert len(renamed) == 2 * len(weights) and set(renamed) != set(load_file(target))
    save_file(renamed, old)
    assert_same(read_adapter(old).weights, weights)


def test_files_that_diffusers_writes_with_its_settings_are_read(tmp_path: Path) -> None:
    pipeline = make_pipeline(SD1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_v"],
        rank_pattern={"attn2.to_q": 2},
        init_lora_weights=False,
    )
    text_config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "out_proj"], init_lora_weights=False
    )
    pipeline.unet.add_adapter(config)
    pipeline.text_encoder.add_adapter(text_config)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(
            pipeline.text_encoder, adapter_name="default"
        ),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipeline.text_encoder.peft_config["default"].to_dict(),
    )
    weights_read = read_adapter(tmp_path / "pytorch_lora_weights.safetensors").weights
    loaded = deltas_in(pipeline.unet, "unet") | deltas_in(pipeline.text_encoder, "text_encoder")
    assert_deltas(loaded, weights_read)
    assert sorted({pair.scale for pair in weights_read.pairs.values()}) == [0.5, 1.0, 3.0]


def test_kohya_keys_with_peft_suffixes_no_alpha_and_original_sd1_names_are_read(tmp_path: Path) -> None:
    down, up = torch.randn(2, 6), torch.randn(6, 2)
    save_file(
        {
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_A.weight": down,
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_B.weight": up,
            "lora_unet_output_blocks_2_1_conv.lora_down.weight": torch.randn(2, 6, 3, 3),
            "lora_unet_output_blocks_2_1_conv.lora_up.weight": torch.randn(6, 2, 1, 1),
            "lora_unet_output_blocks_2_1_conv.scale": torch.tensor(0.25),
        },
        tmp_path / "a.safetensors",
    )
    pairs_read = read_adapter(tmp_path / "a.safetensors").weights.pairs
    first = pairs_read[ModuleKey("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")]
    assert torch.equal(first.down, down) and torch.equal(first.up, up) and first.alpha == 2.0
    assert pairs_read[ModuleKey("unet", "up_blocks.0.upsamplers.0.conv")].scale == 0.25


@pytest.mark.long
@pytest.mark.parametrize("family", [SD1, SDXL], ids=lambda family: family.name)
@pytest.mark.parametrize("format", ["webui", "diffusers"])
def test_diffusers_own_conversion_agrees_without_a_model(
    format: str, family: FamilyInfo, tmp_path: Path
) -> None:
    weights = random_adapter(models_in(make_pipeline(family)), EVERYTHING, ranks=(4, 2), scales=(0.5, 1.0))
    target = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), format, target, torch.float32, family)
    assert (
        compare(
            weights,
            through_diffusers(target, OpenAdapter(target).outline.weights, family),
            torch.float32,
            "diffusers",
        )[0]
        <= 1e-6
    )


def test_limits_of_clients_are_named(tmp_path: Path) -> None:
    models = models_in(make_pipeline(SD1))
    even = random_adapter(models, ATTENTION)
    uneven = random_adapter(models, ATTENTION, ranks=(3,), scales=(1.0, 1.1))
    queries = AdapterWeights(
        {k: p for k, p in even.items() if k.component == "unet" or k.path.endswith(("q_proj", "fc1"))}
    )
    single = random_adapter(models, ATTENTION, ranks=(1, 2), scales=(0.5, 2.0))
    odd = random_adapter(models, ATTENTION, ranks=(1,), scales=(1.5,))
    expected = {
        ("webui", "even"): set(),
        ("webui", "uneven"): {"diffusers"},
        ("webui", "queries"): {"diffusers"},
        ("webui", "single"): set(),  # alpha 1 for all, and none for rank 1
        ("webui", "odd"): {"stable-diffusion.cpp"},
        ("diffusers", "even"): set(CLIENTS) - {"diffusers"},
        ("peft", "even"): set(CLIENTS),
    }
    adapters = {"even": even, "uneven": uneven, "queries": queries, "single": single, "odd": odd}
    for (format, name), failing in expected.items():
        target = tmp_path / f"{name}-{format}{'' if FORMATS[format].is_folder else '.safetensors'}"
        write_adapter(file_of(adapters[name]), format, target, torch.float32, SD1)
        _, support = prove(adapters[name], OpenAdapter(target), torch.float32, SD1)
        assert {client.client for client in support if not client.full} == failing, (format, name)
        assert all(client.reasons for client in support if not client.full)


def test_webui_needs_whole_attention_blocks_in_open_clip() -> None:
    pair = LowRankPair(torch.ones(2, 3), torch.ones(3, 2), 2.0)
    weights = AdapterWeights(
        {ModuleKey("text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj"): pair}
    )
    support = {
        client.client: client for client in client_support("webui", "sdxl", weights, ["lora_te2_x.alpha"])
    }
    assert not support["WebUI"].full and "q, k, v and out" in support["WebUI"].reasons[0]


MID = "mid_block.attentions.0.transformer_blocks.0"
SOME = (
    *(f"{MID}.attn1.to_q", f"{MID}.attn1.to_out.0", f"{MID}.ff.net.2", "mid_block.attentions.0.proj_in"),
    "mid_block.resnets.0.conv1",
)
SOME_TEXT = tuple(
    f"text_model.encoder.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")
)
Crafted = tuple[dict[str, torch.Tensor], dict[str, str]]


def crafted(case: str, weights: AdapterWeights) -> Crafted:
    """Return tensors and header entries of a file as some program or other writes it, with nothing folded."""
    tensors: dict[str, torch.Tensor] = {}
    for (component, path), pair in weights.items():
        webui = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + path.replace(".", "_")
        down, up = pair.down, pair.up
        if case == "flat projection" and path.endswith("proj_in"):
            down, up = down[:, :, 0, 0], up[:, :, 0, 0]
        if case.startswith("diffusers"):
            old = case == "diffusers, two styles" and ".attn1." in path
            ends = ("lora.down", "lora.up") if old else ("lora_A", "lora_B")
            tensors[f"{component}.{path}.{ends[0]}.weight"] = down
            tensors[f"{component}.{path}.{ends[1]}.weight"] = up * pair.scale
            if case == "diffusers, alphas":
                tensors[f"{component}.{path}.alpha"] = torch.tensor(float(pair.rank))
            continue
        tensors |= {f"{webui}.lora_down.weight": down, f"{webui}.lora_up.weight": up}
        if case == "scales" and path.endswith("proj_in"):
            tensors[f"{webui}.scale"] = torch.tensor(pair.scale)
        if not (case == "no alpha for convolutions" and path.endswith("conv1")):
            tensors[f"{webui}.alpha"] = torch.tensor(pair.alpha)
    if case not in ("settings beside alphas", "diffusers, settings for the unet alone"):
        return tensors, {"ss_base_model_version": "sd_v1"}
    targets = ["to_q", "to_out.0", "net.2", "proj_in", "conv1"]
    settings = {"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": targets}
    return tensors, {"lora_adapter_metadata": json.dumps(settings)}


def alpha_for(case: str, component: str, path: str) -> float:
    special = {
        "convolutions have their own alpha": path.endswith("conv1"),
        "no alpha for convolutions": path.endswith("conv1"),
        "feed-forward has its own alpha": ".ff." in path,
        "attention has its own alpha": ".attn1." in path,
        "text MLP has its own alpha": "mlp" in path,
    }
    return 4.0 if special.get(case) else 2.0


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
@pytest.mark.parametrize(
    ("case", "full"),
    [
        ("plain", True),
        ("convolutions have their own alpha", True),
        ("feed-forward has its own alpha", True),
        ("no alpha for convolutions", False),
        ("attention has its own alpha", False),
        ("text MLP has its own alpha", False),
        ("flat projection", False),
        ("scales", False),
        ("settings beside alphas", False),
        ("no out_proj", False),
        ("text MLP alone", True),
        ("diffusers", True),
        ("diffusers, two styles", False),
        ("diffusers, alphas", False),
        ("diffusers, settings for the unet alone", False),
    ],
)
def test_what_is_said_of_diffusers_is_what_diffusers_does(case: str, full: bool, tmp_path: Path) -> None:
    pipeline = make_pipeline(SD1, shallow=True)
    models = models_in(pipeline)
    generator = torch.Generator().manual_seed(0)
    dropped = {"no out_proj": ("out_proj",), "text MLP alone": ("q_proj", "k_proj", "v_proj", "out_proj")}
    pairs: dict[ModuleKey, Update] = {}
    for component, model in models.items():
        for path, layer in model.named_modules():
            module = canonical(component, path)
            if module.path in (*SOME, *SOME_TEXT) and not path.endswith(dropped.get(case, "none")):
                pairs[module] = random_pair(layer, 4, alpha_for(case, component, path), generator)
    weights = AdapterWeights(pairs)
    path = tmp_path / "a.safetensors"
    tensors, entries = crafted(case, weights)
    save_file(tensors, path, entries)
    assert_deltas({key: pair.delta() for key, pair in read_adapter(path).weights.items()}, weights)
    try:
        pipeline.load_lora_weights(str(path))
        loaded: dict[ModuleKey, torch.Tensor] = {}
        for component, model in models.items():
            loaded |= deltas_in(model, component)
        assert_deltas(loaded, weights)
        works = True
    except (AssertionError, ValueError, KeyError, RuntimeError, TypeError):
        works = False
    support = next(client for client in inspect_adapter(path).clients if client.client == "diffusers")
    assert (works, support.full) == (full, full), support.reasons


def pairs_for(*modules: tuple[str, str], alpha: float = 2.0, rank: int = 2) -> AdapterWeights:
    pair = LowRankPair(torch.ones(rank, 3), torch.ones(3, rank), alpha)
    return AdapterWeights({ModuleKey(component, path): pair for component, path in modules})


LAYER = "text_model.encoder.layers.0.self_attn"
WHOLE = [("text_encoder", f"{LAYER}.{name}") for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
TO_K = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")


def test_open_clips_fused_attention_in_stable_diffusion_cpp() -> None:
    def reasons(family: str, weights: AdapterWeights) -> tuple[str, ...]:
        supports = client_support("webui", family, weights, ["lora_te_x.lora_down.weight"])
        return next(support.reasons for support in supports if support.client == "stable-diffusion.cpp")

    assert reasons("sd1", pairs_for(*WHOLE)) == ()
    assert "leaves out q, k and v" in reasons("sd2", pairs_for(*WHOLE))[0]
    second = [("text_encoder_2", path) for _, path in WHOLE]
    assert reasons("sdxl", pairs_for(*second)) == ()
    assert "needs q, k and v together" in reasons("sdxl", pairs_for(*second[1:]))[0]
    assert reasons("sdxl", pairs_for(*second[3:])) == ()


@pytest.mark.parametrize(
    ("format", "family", "modules", "keys", "entries", "expected"),
    [
        ("webui", "sdxl", [("unet", "conv_in")], ["lora_unet_input_blocks_0_0.x"], {}, {"kohya sd-scripts"}),
        (
            *("webui", "sdxl", [("unet", "time_embedding.linear_1")], ["lora_unet_time_embed_0.x"], {}),
            {"kohya sd-scripts", "stable-diffusion.cpp"},
        ),
        ("webui", "sd1", [TO_K], ["lora_unet_x.scale"], {}, set(CLIENTS) - {"WebUI", "stable-diffusion.cpp"}),
        (
            *("webui", "sdxl", [("text_encoder_2", "text_projection")], ["lora_te2_text_projection.x"], {}),
            set(CLIENTS) - {"ComfyUI", "Forge"},
        ),
        (
            *(
                "diffusers",
                "sd1",
                [TO_K],
                [f"unet.{TO_K[1]}.{end}" for end in ("alpha", "lora_A.weight")],
                {},
            ),
            set(CLIENTS) - {"stable-diffusion.cpp"},
        ),
    ],
)
def test_what_else_clients_leave_out(
    format: str,
    family: str,
    modules: list[tuple[str, str]],
    keys: list[str],
    entries: dict[str, str],
    expected: set[str],
) -> None:
    supports = client_support(format, family, pairs_for(*modules), keys, entries)
    assert {support.client for support in supports if not support.full} == expected


def test_alphas_in_the_header_and_flat_text_encoders_are_lost_on_clients_that_read_keys_alone() -> None:
    keys = ["unet.x.lora_A.weight", "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"]
    weights = pairs_for(("unet", "mid_block.attentions.0.proj_in"), alpha=1.0)
    reasons = {
        support.client: support.reasons for support in client_support("diffusers", "sd1", weights, keys)
    }
    assert any("header only" in reason for reason in reasons["stable-diffusion.cpp"])
    assert any("header only" in reason for reason in reasons["ComfyUI"])
    assert any("lack `text_model.`" in reason for reason in reasons["ComfyUI"])


def test_a_header_by_which_webui_hides_the_file_is_told() -> None:
    def hint(family: str, entries: dict[str, str]) -> str:
        supports = client_support("webui", family, pairs_for(TO_K), ["lora_unet_x.lora_down.weight"], entries)
        assert all(not support.hint for support in supports if support.client != "WebUI")
        return next(support.hint for support in supports if support.client == "WebUI")

    assert hint("sdxl", {"ss_base_model_version": "sdxl_base_v1-0"}) == ""
    assert "takes it for SD1" in hint("sdxl", {"modelspec.title": "x"})
    assert "hides its card beside SD2" in hint("sd2", {"ss_v2": "False"})
    assert hint("sdxl", {}) == ""  # without any entry WebUI shows it everywhere
    assert hint("sd1", {"x": "y"}) == ""
