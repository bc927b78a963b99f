"""Files of LoHa, LoKr, LoCon with Tucker factors and DoRA: read, written, refused, and who computes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.kinds import dora, every_kind, loha, lokr, pair, tucker
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, ModuleKey, Update
from sdlora.adapters.kinds.dora import DoRA
from sdlora.adapters.kinds.table import KINDS
from sdlora.adapters.plain import to_plain
from sdlora.config.schema import AdapterConfig
from sdlora.errors import AdapterFileError
from sdlora.exporting.export import export_adapter
from sdlora.families.facts import FamilyInfo
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.formats.proof import compare, prove
from sdlora.formats.support import client_support
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.inspecting.view import render

from .adapters import ATTENTION, EVERYTHING, SD1, SD2, SDXL, TEXT, canonical, models_of
from .test_clients import make_pipeline, models_in

FAMILIES = [SD1, SD2, SDXL]


def weight_of(family: FamilyInfo, key: ModuleKey) -> Tensor:
    root = models_of(family)[key.component]
    path = key.path if hasattr(root, "text_model") else key.path.removeprefix("text_model.")
    weight = root.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def mixture(family: FamilyInfo, dtype: torch.dtype = torch.float32, kinds: str = "") -> AdapterWeights:
    """Every kind (or those starting with ``kinds``) in turn over all layers of a family."""
    updates: dict[ModuleKey, Update] = {}
    seen = 0
    for component, model in models_of(family).items():
        chosen = EVERYTHING if component == "unet" else TEXT
        for path, layer in model.named_modules():
            if path.endswith(chosen) and isinstance(layer, nn.Linear | nn.Conv2d):
                weight = layer.weight.detach()
                kinds_made = {n: u for n, u in every_kind(tuple(weight.shape), weight).items() if kinds in n}
                updates[canonical(component, path)] = list(kinds_made.values())[seen % len(kinds_made)].to(
                    dtype
                )
                seen += 1
    return AdapterWeights(updates)


def file_of(weights: AdapterWeights, family: FamilyInfo) -> AdapterFile:
    entries = {"ss_base_model_version": family.header.version}
    return AdapterFile(weights, AdapterInfo(name="mixture", metadata=entries))


def assert_same(actual: AdapterWeights, wanted: AdapterWeights) -> None:
    assert sorted(actual.updates) == sorted(wanted.updates) and len(actual) > 0
    for key, update in wanted.all_items():
        other = actual.updates[key]
        assert (other.kind, other.alpha, other.shape) == (update.kind, update.alpha, update.shape), key
        mine, theirs = update.tensors(), other.tensors()
        assert mine.keys() == theirs.keys(), key
        for name in mine:
            assert theirs[name].dtype == mine[name].dtype and torch.equal(theirs[name], mine[name]), (
                key,
                name,
            )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((SD1, torch.float16), (SDXL, torch.float32)),
        *(pytest.param(family, torch.bfloat16, marks=SLOW) for family in FAMILIES),
        *(pytest.param(family, torch.float16, marks=SLOW) for family in (SD2, SDXL)),
        *(pytest.param(family, torch.float32, marks=SLOW) for family in (SD1, SD2)),
    ],
)
def test_webui_files_hold_every_kind_without_loss(
    family: FamilyInfo, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = mixture(family, dtype)
    assert set(weights.kinds()) == {"lora", "tucker", "loha", "lokr", "dora"} and len(weights) > 100
    target = tmp_path / "mixture.safetensors"
    write_adapter(file_of(weights, family), "webui", target, dtype, family)
    back = read_adapter(target)
    assert_same(back.weights, weights)
    assert back.info.metadata["ss_network_module"] == "lycoris.kohya"
    for key, update in weights.all_items():
        weight = weight_of(family, key)
        assert torch.equal(back.weights.updates[key].delta(weight), update.delta(weight)), key
    outline = OpenAdapter(target).outline.weights
    assert {k: (u.kind, u.shape) for k, u in outline.all_items()} == {
        k: (u.kind, u.shape) for k, u in weights.all_items()
    }
    again = tmp_path / "again.safetensors"
    write_adapter(back, "webui", again, dtype, family)
    assert again.read_bytes() == target.read_bytes()


def test_a_file_is_proven_factor_by_factor_and_a_wrong_unit_is_seen(tmp_path: Path) -> None:
    weights = mixture(SD1)
    target = tmp_path / "mixture.safetensors"
    write_adapter(file_of(weights, SD1), "webui", target, torch.float16, SD1)
    proof, _ = prove(weights, OpenAdapter(target), torch.float16, SD1)
    assert proof.num_modules == len(weights)
    assert 0 < proof.relative_difference <= proof.tolerance
    tensors = load_file(target)
    for name in ("hada_w2_b", "lokr_w1", "dora_scale", "lora_mid.weight"):
        key = next(key for key in tensors if key.endswith(name))
        changed = tensors[key].clone()
        changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0].float() * 1.01, torch.tensor(9.0)).half()
        save_file(
            tensors | {key: changed}, tmp_path / "wrong.safetensors", {"ss_base_model_version": "sd_v1"}
        )
        with pytest.raises(AdapterFileError, match="differs by"):
            compare(weights, read_adapter(tmp_path / "wrong.safetensors").weights, torch.float16, "here")


def lycoris_keys(path: Path, target: Path) -> Path:
    """Respell a WebUI file's U-Net as LyCORIS' wrapper does."""
    tensors = {key.replace("lora_unet_", "lycoris_"): value for key, value in load_file(path).items()}
    save_file(tensors, target, OpenAdapter(path).headers[0].metadata)
    return target


@pytest.mark.parametrize("family", [SD1, pytest.param(SD2, marks=SLOW)])
def test_wrapper_keys_are_read(family: FamilyInfo, tmp_path: Path) -> None:
    weights = mixture(family)
    unet = AdapterWeights({k: u for k, u in weights.all_items() if k.component == "unet"})
    target = tmp_path / "mixture.safetensors"
    write_adapter(file_of(unet, family), "webui", target, torch.float32, family)
    respelled = lycoris_keys(target, tmp_path / "wrapper.safetensors")
    assert_same(read_adapter(respelled).weights, unet)
    support = {client.client: client.full for client in inspect_adapter(respelled).clients}
    assert not support["kohya sd-scripts"] and not support["diffusers"]


def test_missing_alphas_mean_the_rank_and_scale_takes_their_place(tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    update = loha((8, 12), rank=3, alpha=1.5)
    tensors = {f"{key}.{name}": tensor for name, tensor in update.tensors().items()}
    for more, scale in (({}, 1.0), ({"scale": 0.25}, 0.25), ({"alpha": 1.5}, 0.5)):
        extra = {f"{key}.{name}": torch.tensor(value) for name, value in more.items()}
        save_file(tensors | extra, tmp_path / "a.safetensors")
        (actual,) = read_adapter(tmp_path / "a.safetensors").weights.updates.values()
        assert (actual.kind, actual.scale) == ("loha", scale)


def test_dora_goes_to_diffusers_and_back(tmp_path: Path) -> None:
    pipeline = make_pipeline(SD1)
    updates: dict[ModuleKey, Update] = {}
    originals: dict[ModuleKey, Tensor] = {}
    layers: dict[ModuleKey, Any] = {}
    for component, model in models_in(pipeline).items():
        for path, layer in model.named_modules():
            if path.endswith((*ATTENTION, ".proj_in", ".conv1", *TEXT)) and hasattr(layer, "weight"):
                key = canonical(component, path)
                originals[key], layers[key] = layer.weight.detach().clone(), (model, path)
                updates[key] = dora(pair(tuple(layer.weight.shape)), originals[key])
    weights = AdapterWeights(updates)
    assert len(weights) > 50
    target = tmp_path / "dora.safetensors"
    write_adapter(file_of(weights, SD1), "diffusers", target, torch.float32, SD1)
    assert_same(read_adapter(target).weights, weights)
    proof, clients = prove(weights, OpenAdapter(target), torch.float32, SD1)
    assert proof.read_by == ("sdlora", "diffusers")
    assert {support.client for support in clients if support.full} == {"diffusers"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pipeline.load_lora_weights(str(target))
    for key, update in updates.items():
        model, path = layers[key]
        layer = model.get_submodule(path)
        layer.merge()
        actual, wanted = layer.get_base_layer().weight.detach(), update.delta(originals[key]) + originals[key]
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5, msg=str(key))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_dora_goes_to_peft_and_back(component: str, tmp_path: Path) -> None:
    import copy

    models = models_of(SD1)
    weights = AdapterWeights(
        {
            key: dora(pair(tuple(weight_of(SD1, key).shape)), weight_of(SD1, key))
            for key in mixture(SD1).updates
        }
    )
    write_adapter(file_of(weights, SD1), "peft", tmp_path / "dora", torch.float32, SD1)
    assert_same(read_adapter(tmp_path / "dora").weights, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded: Any = peft.PeftModel.from_pretrained(
            copy.deepcopy(models[component]), str(tmp_path / "dora" / component)
        )
    checked = 0
    for path, layer in loaded.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            key = canonical(component, path.removeprefix("base_model.model."))
            layer.merge()
            wanted = weights.updates[key].delta(weight_of(SD1, key)) + weight_of(SD1, key)
            torch.testing.assert_close(layer.get_base_layer().weight.detach(), wanted, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked == len(weights.updates_of(component)) > 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_is_trained_as_loha_or_lokr_goes_to_peft_and_back(kind: str, tmp_path: Path) -> None:
    import copy

    model = models_of(SD2)["unet"]
    settings = AdapterConfig.model_validate({"kind": kind, "rank": 3, "alpha": 1.5})
    generator = torch.Generator().manual_seed(2)
    updates: dict[ModuleKey, Update] = {}
    for path, layer in model.named_modules():
        if path.endswith(EVERYTHING) and isinstance(layer, nn.Linear | nn.Conv2d):
            make = KINDS[settings.kind].start
            assert make is not None
            start: Update = make(settings, layer.weight, 3, 1.5, generator)
            moved = {name: 0.1 + tensor for name, tensor in start.tensors().items()}
            updates[ModuleKey("unet", path)] = start.with_tensors(moved)
    weights = AdapterWeights(updates)
    assert len(weights) > 100 and len({len(update.tensors()) for update in updates.values()}) == (
        2 if kind == "lokr" else 1
    )
    write_adapter(file_of(weights, SD2), "peft", tmp_path / "out", torch.float32, SD2)
    proof, _ = prove(weights, OpenAdapter(tmp_path / "out"), torch.float32, SD2)
    assert proof.read_by == ("sdlora", "peft") and proof.largest_difference == 0.0
    back = read_adapter(tmp_path / "out").weights
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "out" / "unet"))
    checked = 0
    for path, layer in loaded.named_modules():
        if isinstance(layer, peft.tuners.lycoris_utils.LycorisLayer):
            key = ModuleKey("unet", path.removeprefix("base_model.model."))
            wanted = weights.updates[key].delta()
            torch.testing.assert_close(
                layer.get_delta_weight("default").detach(), wanted, rtol=1e-5, atol=1e-6
            )
            assert torch.equal(back.updates[key].delta(), wanted)
            checked += 1
    assert checked == len(weights)


def test_peft_refuses_lycoris_factors_that_its_settings_cannot_make(tmp_path: Path) -> None:
    refused: dict[str, dict[ModuleKey, Update]] = {
        "mixes kinds": {KEY: loha((8, 12)), CONVOLUTION: lokr((8, 12, 3, 3))},
        "only some convolutions": {
            CONVOLUTION: loha((8, 12, 3, 3)),
            ModuleKey("unet", "mid_block.resnets.0.conv2"): loha((8, 12, 3, 3), core=True),
        },
        "first factor decomposed": {KEY: lokr((8, 12), form="both")},
        "is not split as PEFT would": {KEY: lokr((8, 12), (4, 3))},
        "keeps the whole factor": {KEY: lokr((8, 12), (2, 3), rank=3)},
    }
    for reason, updates in refused.items():
        with pytest.raises(AdapterFileError, match=reason):
            write_adapter(file_of(AdapterWeights(updates), SD1), "peft", tmp_path / "x", torch.float32, SD1)
    assert not list(tmp_path.iterdir())


KEY = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
CONVOLUTION = ModuleKey("unet", "mid_block.resnets.0.conv1")
WEIGHT = torch.randn((8, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_formats_refuse_what_they_cannot_hold_with_the_reason(format: str, tmp_path: Path) -> None:
    refused = {
        **(
            {}
            if format == "peft"
            else {
                "is LoHa, which .* no place": {KEY: loha((8, 12))},
                "is LoKr, which .* no place": {KEY: lokr((8, 12))},
            }
        ),
        "is LoCon with Tucker factors": {CONVOLUTION: tucker((8, 12, 3, 3))},
        "is a DoRA by input column": {KEY: dora(pair((8, 12)), WEIGHT, by_output=False)},
        "is a plain LoRA beside DoRA": {
            KEY: dora(pair((8, 12)), WEIGHT),
            ModuleKey("unet", KEY.path.replace("to_q", "to_k")): pair((8, 12)),
        },
    }
    for reason, updates in refused.items():
        file = file_of(AdapterWeights(updates), SD1)
        with pytest.raises(AdapterFileError, match=reason):
            write_adapter(file, format, tmp_path / "out", torch.float32, SD1)
        assert not list(tmp_path.iterdir())


def readers(updates: dict[ModuleKey, Update], tmp_path: Path) -> dict[str, tuple[str, ...]]:
    """What keeps each client from computing a WebUI file with these updates."""
    target = tmp_path / "one.safetensors"
    write_adapter(file_of(AdapterWeights(updates), SD1), "webui", target, torch.float32, SD1)
    outline = OpenAdapter(target).outline
    keys = list(OpenAdapter(target).headers[0].tensors)
    return {
        support.client: support.reasons for support in client_support("webui", "sd1", outline.weights, keys)
    }


def test_each_client_is_told_which_kinds_it_computes(tmp_path: Path) -> None:
    lycoris = {"WebUI", "Forge", "ComfyUI", "stable-diffusion.cpp"}
    kinds = {
        "loha": ({KEY: loha((8, 12))}, lycoris),
        "lokr": ({KEY: lokr((8, 12))}, lycoris),
        "lokr of rank 1": ({KEY: lokr((8, 12), rank=1)}, lycoris - {"stable-diffusion.cpp"}),
        "tucker": ({CONVOLUTION: tucker((8, 12, 3, 3))}, lycoris),
        "dora by column": (
            {KEY: dora(pair((8, 12)), WEIGHT, by_output=False)},
            {"WebUI", "Forge", "ComfyUI"},
        ),
        "dora by row": ({KEY: dora(pair((8, 12)), WEIGHT)}, set()),
    }
    for name, (updates, full) in kinds.items():
        reasons_by_client = readers(updates, tmp_path)
        assert {client for client, reasons in reasons_by_client.items() if not reasons} == full, name
    reasons = readers({KEY: dora(pair((8, 12)), WEIGHT)}, tmp_path)
    assert "wrongly" in reasons["WebUI"][0] and "differently" in reasons["ComfyUI"][0]
    assert "plain LoRA" in reasons["kohya sd-scripts"][0] and "export as diffusers" in reasons["diffusers"][0]
    assert "convert it to a plain LoRA" in readers({KEY: loha((8, 12))}, tmp_path)["diffusers"][0]


def test_a_converted_adapter_is_an_ordinary_kohya_file(tmp_path: Path) -> None:
    weights = mixture(SD1)
    plain, _ = to_plain(weights, base=lambda key: weight_of(SD1, key))
    target = tmp_path / "plain.safetensors"
    file = AdapterFile(plain, AdapterInfo(metadata={"ss_network_module": "lycoris.kohya"}))
    write_adapter(file, "webui", target, torch.float32, SD1)
    assert {key.partition(".")[2] for key in load_file(target)} == {
        *("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert read_adapter(target).info.metadata["ss_network_module"] == "networks.lora"
    back = read_adapter(target).weights
    for key, update in weights.all_items():
        delta = back.updates[key].delta()
        torch.testing.assert_close(delta, update.delta(weight_of(SD1, key)), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_inspect_and_export_name_the_kinds_and_who_computes_them(tmp_path: Path) -> None:
    source = tmp_path / "mixture.safetensors"
    weights = mixture(SD1)
    write_adapter(file_of(weights, SD1), "webui", source, torch.float32, SD1)
    summary = inspect_adapter(source)
    assert dict(summary.kinds) == weights.kinds()
    text = render(summary)
    assert "LoHa" in text and "LoKr" in text and "DoRA" in text and "Tucker" in text
    squares = 0.0
    for update in weights.updates.values():
        of = update.direction if isinstance(update, DoRA) else update
        squares += float(of.delta().double().square().sum())
    assert sum(block.norm**2 for block in summary.blocks) == pytest.approx(squares, rel=1e-5)
    assert json.loads(json.dumps(summary.to_dict()))["kinds"] == weights.kinds()
    report = export_adapter(source, "webui", tmp_path / "out", dtype="fp16")
    refusing = {support.client: support.reasons for support in report.clients}
    assert any("LoHa" in reason for reason in refusing["kohya sd-scripts"])
    with pytest.raises(AdapterFileError, match="no place"):
        export_adapter(source, "diffusers", tmp_path / "other")
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())
