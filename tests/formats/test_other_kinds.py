"""Files of all kinds that others load: read, drawn, baked, merged, converted as float64 arithmetic says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlora.adapters.attach import Merged, attach, detach, set_strengths
from sdlora.adapters.canonical import ModuleKey
from sdlora.errors import AdapterFileError, ConfigError
from sdlora.exporting.export import export_adapter
from sdlora.families.base import DiffusionModel
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import OpenAdapter, read_adapter
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.inspecting.view import render
from sdlora.surgery.bake import bake_checkpoint
from sdlora.surgery.convert import convert_adapter
from sdlora.surgery.merge import merge_adapters
from sdlora.surgery.resize import resize_adapter
from tools import peft_folders
from tools.adapter_references import KINDS

ENTRIES = {"ss_base_model_version": "sd_v1", "ss_output_name": "strange"}
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LAYERS = {
    "linear": f"{BLOCK}.attn1.to_q",
    "context": f"{BLOCK}.attn2.to_k",
    "conv": "mid_block.resnets.0.conv1",
    "pointwise": "mid_block.attentions.0.proj_in",
}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> DiffusionModel:
    loaded = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    loaded.prepare(training=False)
    return loaded


def layer_at(model: DiffusionModel, component: str, path: str) -> Any:
    root = model.components()[component]
    if not hasattr(root, "text_model"):
        path = path.removeprefix("text_model.")
    return root.get_submodule(path)


def file_with(path: Path, modules: dict[tuple[str, str], dict[str, Tensor]], **more: Tensor) -> Path:
    tensors = {}
    for (component, name), parts in modules.items():
        start = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + name.replace(".", "_")
        tensors |= {f"{start}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors | more, path, ENTRIES)
    return path


def made(
    model: DiffusionModel, kind: str, path: Path, alpha: float | None = 1.5
) -> dict[ModuleKey, tuple[Tensor, Tensor]]:
    """Write a file of a kind and return module -> (the base's weight, dW in float64)."""
    places = {("unet", name) for name in LAYERS.values()} | {("text_encoder", TEXT)}
    modules, deltas = {}, {}
    for number, (component, name) in enumerate(sorted(places)):
        weight = layer_at(model, component, name).weight.detach().clone()
        parts, delta = KINDS[kind](tuple(weight.shape), 2, alpha, number, torch.float32)
        modules[component, name] = parts
        deltas[ModuleKey(component, name)] = (weight, delta(weight))
    file_with(path, modules)
    return deltas


def assert_close(actual: Tensor, wanted: Tensor, what: object) -> None:
    torch.testing.assert_close(
        actual.double(), wanted, rtol=2e-4, atol=2e-5, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_read_drawn_with_merged_into_the_model_and_written_again(
    kind: str, model: DiffusionModel, tmp_path: Path
) -> None:
    file = tmp_path / "strange.safetensors"
    wanted = made(model, kind, file)
    adapter = read_adapter(file)
    assert sorted(adapter.weights.updates) == sorted(wanted) and len(wanted) == 5
    for key, (weight, delta) in wanted.items():
        assert_close(adapter.weights.updates[key].delta(weight), delta, key)
    attach(model, adapter.weights, "one")
    set_strengths(model, {"one": 0.5})
    for key, (weight, delta) in wanted.items():
        layer = layer_at(model, *key)
        inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        x = torch.randn(2, weight.shape[1], *[5] * (weight.ndim - 2))
        plain = nn.functional.linear if weight.ndim == 2 else inner._conv_forward
        extra = plain(x, (0.5 * delta).float(), None)
        base = plain(x, weight, inner.bias)
        assert_close(layer(x), (base + extra).double(), key)
    merged = Merged(model, {"one": 0.5})
    for key, (weight, delta) in wanted.items():
        layer = layer_at(model, *key)
        inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        assert_close(inner.weight, weight.double() + 0.5 * delta, key)
    merged.undo()
    detach(model, "one")
    again = tmp_path / "again.safetensors"
    report = convert_adapter(file, again)
    assert report.proof is not None and "5 modules" in report.proof
    for key, (weight, delta) in wanted.items():
        assert_close(read_adapter(again).weights.updates[key].delta(weight), delta, key)
    assert kind == "lora" or set(load_file(again)) >= {k for k in load_file(file) if not k.endswith("alpha")}
    render(inspect_adapter(again))


@pytest.mark.parametrize("kind", ["full", "glora", "ia3 in", "oft", "boft"])
def test_every_kind_is_baked_and_made_a_plain_lora(
    kind: str, model: DiffusionModel, tiny_base: Path, tmp_path: Path
) -> None:
    file, plain, baked = tmp_path / "strange.safetensors", tmp_path / "plain.safetensors", tmp_path / "baked"
    wanted = made(model, kind, file)
    bake_checkpoint(tiny_base, [(file, 0.5)], baked)
    result = load_model(str(baked), dtype=torch.float32, device=torch.device("cpu"))
    for key, (weight, delta) in wanted.items():
        assert_close(layer_at(result, *key).weight, weight.double() + 0.5 * delta, key)
    needs = None if kind == "full" else tiny_base
    size = {} if kind in ("full", "glora") else {"error": 1e-4}
    report = convert_adapter(file, plain, to_lora=True, base=needs, report=True, dtype="fp32", **size)
    pairs = read_adapter(plain).weights.pairs
    assert len(pairs) == 5 and all((change.error or 0.0) < 2e-4 for change in report.changes)
    for key, (_, delta) in wanted.items():
        relative = float((pairs[key].delta().double() - delta).norm() / delta.norm())
        assert relative < 2e-4, key
    merge_adapters(
        [(file, 0.5), (file, -1.25), (plain, 0.25)],
        tmp_path / "sum.safetensors",
        base=needs,
        dtype="fp32",
        **size,
    )
    pairs = read_adapter(tmp_path / "sum.safetensors").weights.pairs
    for key, (_, delta) in wanted.items():
        assert float((pairs[key].delta().double() + 0.5 * delta).norm() / delta.norm()) < 4e-4, key


def test_what_needs_the_base_is_merged_only_on_the_right_base_and_to_a_size(
    model: DiffusionModel, tiny_base: Path, narrow_sdxl: Path, tmp_path: Path
) -> None:
    file, plain, target = (tmp_path / f"{name}.safetensors" for name in ("ia3", "plain", "sum"))
    made(model, "ia3 out", file)
    made(model, "lora", plain)
    with pytest.raises(AdapterFileError, match=r"--base BASE, and a size, e.g. --rank 32"):
        merge_adapters([(file, 1.0)], target)
    with pytest.raises(ConfigError, match=r"IA3.*no exact sum; give --rank, --energy or --error"):
        merge_adapters([(file, 1.0)], target, base=tiny_base)
    with pytest.raises(ConfigError, match=r"no adapter here needs the base's weights"):
        merge_adapters([(plain, 1.0)], target, base=tiny_base)
    with pytest.raises(ConfigError, match=r"is Stable Diffusion XL, but the adapters are"):
        merge_adapters([(file, 1.0)], target, base=narrow_sdxl, rank=4)
    assert not target.exists()


def comfyui_file(model: DiffusionModel, path: Path) -> dict[ModuleKey, tuple[Tensor, Tensor]]:
    """What ComfyUI's extraction writes: factors for matrices, differences for norms and biases."""
    draw = torch.Generator().manual_seed(3)
    names = {
        "mid_block.resnets.0.conv1": ("diffusion_model.middle_block.0.in_layers.2", True),
        "mid_block.resnets.0.norm1": ("diffusion_model.middle_block.0.in_layers.0", True),
        f"{BLOCK}.norm2": ("diffusion_model.middle_block.1.transformer_blocks.0.norm2", True),
        f"{BLOCK}.attn1.to_q": ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", False),
        "conv_norm_out": ("diffusion_model.out.0", True),
        TEXT: (f"text_encoders.clip_l.transformer.{TEXT}", True),
        "text_model.final_layer_norm": ("text_encoders.clip_l.transformer.text_model.final_layer_norm", True),
        "text_model.embeddings.token_embedding": (
            *("text_encoders.clip_l.transformer.text_model.embeddings.token_embedding", False),
        ),
    }
    tensors, wanted = {}, {}
    for name, (key, biased) in names.items():
        component = "text_encoder" if name.startswith("text_model") else "unet"
        layer = layer_at(model, component, name)
        weight = layer.weight.detach().clone()
        if weight.ndim == 1:
            tensors[f"{key}.diff"] = 0.1 * torch.randn(weight.shape, generator=draw)
            delta = tensors[f"{key}.diff"].double()
        else:
            up = 0.1 * torch.randn(weight.shape[0], 3, generator=draw)
            down = 0.1 * torch.randn(3, weight[0].numel(), generator=draw)
            tensors |= {
                f"{key}.lora_up.weight": up,
                f"{key}.lora_down.weight": down.reshape(3, *weight.shape[1:]),
            }
            delta = (up.double() @ down.double()).reshape(weight.shape)
        wanted[ModuleKey(component, name)] = (weight, delta)
        if biased:
            tensors[f"{key}.diff_b"] = 0.1 * torch.randn(layer.bias.shape, generator=draw)
            bias = layer.bias.detach().clone()
            wanted[ModuleKey(component, name).bias] = (bias, tensors[f"{key}.diff_b"].double())
    save_file(tensors, path, ENTRIES)
    return wanted


def test_what_comfyui_extracts_acts_on_norms_biases_and_embeddings(
    model: DiffusionModel, tiny_base: Path, tmp_path: Path
) -> None:
    file, baked = tmp_path / "extracted.safetensors", tmp_path / "baked"
    wanted = comfyui_file(model, file)
    adapter = read_adapter(file)
    assert sorted(adapter.weights.updates) == sorted(wanted) and len(wanted) == 14
    attach(model, adapter.weights, "one")
    hooked = {}
    for (component, path), (weight, _) in wanted.items():
        layer = layer_at(model, component, path.removesuffix(".bias"))
        x = torch.randint(0, weight.shape[0], (2, 3)) if "embedding" in path else None
        side = weight.shape[1] if weight.ndim > 1 else weight.shape[0]
        if x is None and not path.endswith(".bias"):
            flat = weight.ndim == 4 or "norm1" in path or path == "conv_norm_out"
            x = torch.randn(2, side, 4, 4) if flat and ".norm2" not in path else torch.randn(2, 3, side)
        if x is not None:
            hooked[component, path] = (x, layer(x))
    merged = Merged(model, {"one": 1.0})
    for (component, path), (x, output) in hooked.items():
        assert_close(layer_at(model, component, path)(x), output.double(), path)
    merged.undo()
    detach(model, "one")
    bake_checkpoint(tiny_base, [(file, 0.5)], baked)
    result = load_model(str(baked), dtype=torch.float32, device=torch.device("cpu"))
    for key, (value, delta) in wanted.items():
        parameter = getattr(layer_at(result, key.component, key.layer), key.parameter)
        assert_close(parameter, value.double() + 0.5 * delta, key)
    two = tmp_path / "two.safetensors"
    report = merge_adapters([(file, 0.5), (file, 0.25)], two, dtype="fp32")
    assert report.proof is not None and "14 modules" in report.proof
    for key, (value, delta) in wanted.items():
        assert_close(read_adapter(two).weights.updates[key].delta(value), 0.75 * delta, key)
    resize_adapter(file, tmp_path / "small.safetensors", rank=1)
    assert len(read_adapter(tmp_path / "small.safetensors").weights) == 14


def test_what_a_format_has_no_place_for_goes_only_by_name(model: DiffusionModel, tmp_path: Path) -> None:
    file, target = tmp_path / "extracted.safetensors", tmp_path / "out.safetensors"
    comfyui_file(model, file)
    with pytest.raises(AdapterFileError, match=r"LoRA of an embedding.*--drop embedding"):
        convert_adapter(file, target, format="diffusers")
    with pytest.raises(AdapterFileError, match=r"--drop norm"):
        convert_adapter(file, target, format="diffusers", drop=["embedding"])
    with pytest.raises(ConfigError, match="nothing of that kind"):
        convert_adapter(file, target, drop=["boft"])
    with pytest.raises(ConfigError, match="is no kind of layers"):
        convert_adapter(file, target, drop=["nonsense"])
    report = convert_adapter(file, target, format="diffusers", drop=["embedding", "norm"])
    assert len(report.notes) == 2 and "final_layer_norm.bias" in str(report.notes)
    kept = {key: update.delta() for key, update in read_adapter(target).weights.updates.items()}
    source = read_adapter(file).weights.updates
    assert len(kept) == 5 and sum(key.is_bias for key in kept) == 2
    for key, delta in kept.items():
        assert_close(delta, source[key].delta().double(), key)
    convert_adapter(file, target, format="diffusers", drop=["embedding", "norm", "bias"], overwrite=True)
    assert all(update.kind == "lora" for update in read_adapter(target).weights.updates.values())


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("scale", [{}, {"lora_alpha": 4}, {"rank_pattern": {"to_out.0": 2}}])
def test_biases_of_peft_stay_where_there_is_a_place_for_them(
    format: str, scale: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    unet = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu")).components()["unet"]
    config = peft_folders.lora(["to_q", "to_out.0"], lora_bias=True, **scale)
    peft_folders.saved(unet, config, torch.float32, tmp_path / "unet")
    source, target = read_adapter(tmp_path / "unet").weights.updates, tmp_path / "new"
    target = target if format == "peft" else target.with_suffix(".safetensors")
    report = convert_adapter(tmp_path / "unet", target, format=format, family="sd1")
    assert f"sdlora and {format}" in str(report.proof)
    again = read_adapter(target).weights.updates
    assert sorted(again) == sorted(source) and sum(key.is_bias for key in source) * 2 == len(source)
    for key, update in again.items():
        assert_close(update.delta(), source[key].delta().double(), key)


def test_diffusers_has_no_values_for_layers_without_a_bias_beside_some_with(tmp_path: Path) -> None:
    name, tensors = f"unet.{BLOCK}.attn1", {}
    for layer in ("to_q", "to_k"):
        tensors |= {f"{name}.{layer}.lora_A.weight": torch.ones(2, 8)}
        tensors |= {f"{name}.{layer}.lora_B.weight": torch.ones(8, 2)}
    tensors[f"{name}.to_q.lora_B.bias"] = torch.ones(8)
    save_file(tensors, tmp_path / "a.safetensors", ENTRIES)
    (claim,) = (s for s in inspect_adapter(tmp_path / "a.safetensors").clients if s.client == "diffusers")
    assert not claim.full and "without values" in claim.reasons[0]
    tensors[f"{name}.to_k.lora_B.bias"] = torch.zeros(8)
    save_file(tensors, tmp_path / "a.safetensors", ENTRIES)
    (claim,) = (s for s in inspect_adapter(tmp_path / "a.safetensors").clients if s.client == "diffusers")
    assert claim.full and len(read_adapter(tmp_path / "a.safetensors").weights) == 3
    tensors = {
        key.replace("unet.", "lora_unet_").replace(f"{BLOCK}.attn1.", f"{BLOCK}.attn1.".replace(".", "_")): t
        for key, t in tensors.items()
    }
    save_file(tensors, tmp_path / "a.safetensors", ENTRIES)
    for support in inspect_adapter(tmp_path / "a.safetensors").clients:
        assert not support.full, support.client  # none knows `lora_B.bias` behind kohya's names


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_without_attention_is_written_so_that_diffusers_finds_its_layers(
    encoder: str, tmp_path: Path
) -> None:
    name = f"{encoder}.text_model.encoder.layers.0.mlp.fc1"
    sides = (768, 3072) if encoder == "text_encoder" else (1280, 5120)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, sides[0]),
        f"{name}.lora_B.weight": torch.randn(sides[1], 2),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    (claim,) = (s for s in inspect_adapter(tmp_path / "a.safetensors").clients if s.client == "diffusers")
    assert "has no attention layer" in claim.reasons[0]
    report = convert_adapter(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers", family="sdxl"
    )
    assert "read back by sdlora and diffusers, largest delta difference 0.0" in str(report.proof)
    (claim,) = (s for s in inspect_adapter(tmp_path / "b.safetensors").clients if s.client == "diffusers")
    assert claim.full


def plain_file(model: DiffusionModel, path: Path, **more: Tensor) -> dict[ModuleKey, tuple[Tensor, Tensor]]:
    weight = layer_at(model, "unet", LAYERS["linear"]).weight.detach().clone()
    parts, delta = KINDS["lora"](tuple(weight.shape), 2, 1.5, 0, torch.float32)
    file_with(path, {("unet", LAYERS["linear"]): parts}, **more)
    return {ModuleKey("unet", LAYERS["linear"]): (weight, delta(weight))}


def test_bundled_embeddings_stay_where_there_is_a_place_for_them(
    model: DiffusionModel, tmp_path: Path
) -> None:
    file, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    embedding = {"bundle_emb.ink.string_to_param.*": torch.randn(2, 768)}
    plain_file(model, file, **embedding)
    convert_adapter(file, target)
    assert torch.equal(load_file(target)[next(iter(embedding))], next(iter(embedding.values())))
    with pytest.raises(AdapterFileError, match=r"embedding `ink`.*--drop embedding"):
        export_adapter(file, "diffusers", tmp_path / "out")
    report = export_adapter(file, "diffusers", tmp_path / "out", drop=["embedding"])
    assert "ink" in report.notes[0]
    with pytest.warns(UserWarning, match="no change of the model's weights"):
        from sdlora.generation.image_generator import ImageGenerator

        ImageGenerator(model).add_adapter(file)
    detach(model, "a")


def test_keys_without_weights_are_told_and_go_no_further(model: DiffusionModel, tmp_path: Path) -> None:
    file, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plain_file(model, file, **{"lora_te_text_model_embeddings.position_ids": torch.arange(77)[None]})
    report = convert_adapter(file, target)
    assert "position_ids" in report.notes[0] and len(load_file(target)) == 3
    assert OpenAdapter(file).keys.stray == ("lora_te_text_model_embeddings.position_ids",)


def test_an_alpha_without_a_layer_is_told_and_changes_nothing(model: DiffusionModel, tmp_path: Path) -> None:
    file, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lone = "lora_unet_" + LAYERS["context"].replace(".", "_") + ".alpha"
    plain_file(model, file, **{lone: torch.tensor(2.0)})
    assert list(read_adapter(file).weights.updates) == [ModuleKey("unet", LAYERS["linear"])]
    full = {support.client for support in inspect_adapter(file).clients if support.full}
    assert full == {"Forge", "ComfyUI", "kohya sd-scripts", "stable-diffusion.cpp"}
    assert lone in convert_adapter(file, target).notes[0] and lone not in load_file(target)
    save_file({lone: torch.tensor(2.0)}, file)
    with pytest.raises(AdapterFileError):
        read_adapter(file)


@pytest.mark.parametrize("adapter", ["default", "default_0", "my-style", "1", "old style"])
def test_whatever_peft_calls_the_adapter_its_layers_are_read(adapter: str, tmp_path: Path) -> None:
    down, up, size = torch.randn(2, 8), torch.randn(8, 2), torch.rand(8) + 1
    name = f"unet.{LAYERS['linear']}"
    parts = {f"lora_A.{adapter}.weight": down, f"lora_B.{adapter}.weight": up}
    parts |= {f"lora_magnitude_vector.{adapter}.weight": size, f"lora_B.{adapter}.bias": torch.randn(8)}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    updates = read_adapter(tmp_path / "a.safetensors").weights.updates
    assert sorted(update.kind for update in updates.values()) == ["dora", "full"]
    assert not any(support.full for support in inspect_adapter(tmp_path / "a.safetensors").clients)
    both = {f"{name}.lora_{x}.{which}.weight": torch.ones(2, 2) for x in "AB" for which in (adapter, "other")}
    save_file(both, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"is there twice.*two adapters, save one of them alone"):
        read_adapter(tmp_path / "a.safetensors")


def test_pefts_ia3_scales_the_bias_too(model: DiffusionModel, tiny_base: Path, tmp_path: Path) -> None:
    import peft

    unet = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu")).components()["unet"]
    before = {name: value.detach().clone().double() for name, value in unet.state_dict().items()}
    config = peft.IA3Config(
        target_modules=["to_q", "to_out.0"], feedforward_modules=[], init_ia3_weights=False
    )
    saved: Any = peft_folders.saved(unet, lambda: config, torch.float32, tmp_path / "unet")
    merged = saved.merge_and_unload().state_dict()
    updates = read_adapter(tmp_path / "unet").weights.updates
    assert sum(key.is_bias for key in updates) == sum(key.path.endswith("to_out.0") for key in updates) > 1
    for key, update in updates.items():
        name = f"{key.layer}.{key.parameter}"
        assert_close(update.delta(before[name].float()), merged[name].double() - before[name], key)
    attach(model, read_adapter(tmp_path / "unet").weights, "ia3")
    detach(model, "ia3")
    with pytest.raises(AdapterFileError, match=r"IA3 of a bias.*--drop bias"):
        convert_adapter(tmp_path / "unet", tmp_path / "new.safetensors", family="sd1")
    merge_adapters(
        [(tmp_path / "unet", 0.5)],
        tmp_path / "sum.safetensors",
        base=tiny_base,
        error=1e-4,
        family="sd1",
        dtype="fp32",
    )
    for key, update in read_adapter(tmp_path / "sum.safetensors").weights.updates.items():
        name = f"{key.layer}.{key.parameter}"
        delta = 0.5 * (merged[name].double() - before[name])
        assert float((update.delta().double() - delta).norm() / delta.norm()) < 2e-4, key


@pytest.mark.parametrize("more", [{"modules_to_save": ["conv_out"]}, {"bias": "lora_only"}])
def test_what_peft_saves_beside_the_factors_is_refused_by_name(
    more: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    unet = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu")).components()["unet"]
    peft_folders.saved(unet, peft_folders.lora(["to_out.0"], **more), torch.float32, tmp_path / "unet")
    with pytest.raises(AdapterFileError, match=r"whole layers or biases saved beside.*PEFT can merge it"):
        read_adapter(tmp_path / "unet")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_files_are_read_with_their_scales(dtype: torch.dtype, scaled: bool, tmp_path: Path) -> None:
    name = "lora_unet_" + LAYERS["linear"].replace(".", "_")
    down, up = torch.randn(4, 8).to(dtype), torch.randn(8, 4).to(dtype)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
    }
    if scaled:
        tensors |= {
            f"{name}.lora_up.scale_weight": torch.tensor(0.37),
            "scaled_fp8": torch.empty(0).to(dtype),
        }
    save_file(tensors, tmp_path / "a.safetensors", ENTRIES)
    (update,) = read_adapter(tmp_path / "a.safetensors").weights.updates.values()
    wanted = up.double() @ down.double() * 0.5 * (0.37 if scaled else 1.0)
    torch.testing.assert_close(update.delta().double(), wanted, rtol=1e-5, atol=1e-6)
    assert "F8_E" in render(inspect_adapter(tmp_path / "a.safetensors"))
    report = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert report.details["dtype"] == "fp16"


def test_alpha_0_switches_a_layer_off_and_is_written_so_that_all_programs_agree(tmp_path: Path) -> None:
    name = "lora_unet_" + LAYERS["linear"].replace(".", "_")
    parts = {
        "lora_down.weight": torch.ones(2, 8),
        "lora_up.weight": torch.ones(8, 2),
        "alpha": torch.tensor(0.0),
    }
    other = {f"{name[:-1]}k.{part}": tensor.clone() for part, tensor in parts.items()}
    other[f"{name[:-1]}k.alpha"] = torch.tensor(2.0)
    save_file({f"{name}.{part}": t for part, t in parts.items()} | other, tmp_path / "a.safetensors", ENTRIES)
    updates = read_adapter(tmp_path / "a.safetensors").weights.updates
    off = updates[ModuleKey("unet", LAYERS["linear"])]
    assert off.alpha == 0.0 and not off.delta().any() and len(updates) == 2
    claims = {support.client: support for support in inspect_adapter(tmp_path / "a.safetensors").clients}
    assert "alpha 0" in str(claims["kohya sd-scripts"].reasons)
    for format in ("webui", "diffusers"):
        target = tmp_path / f"{format}.safetensors"
        convert_adapter(tmp_path / "a.safetensors", target, format=format)
        assert not read_adapter(target).weights.updates[ModuleKey("unet", LAYERS["linear"])].delta().any()
        assert all(alpha > 0 for alpha in inspect_adapter(target).alphas)


def test_peft_biases_and_the_advanced_scripts_dora_are_read(tmp_path: Path) -> None:
    name = LAYERS["linear"]
    down, up, bias = torch.randn(2, 8), torch.randn(8, 2), torch.randn(8)
    save_file(
        {
            f"unet.{name}.lora_A.weight": down,
            f"unet.{name}.lora_B.weight": up,
            f"unet.{name}.lora_B.bias": bias,
        },
        tmp_path / "a.safetensors",
        ENTRIES,
    )
    updates = read_adapter(tmp_path / "a.safetensors").weights.updates
    assert torch.equal(updates[ModuleKey("unet", f"{name}.bias")].delta(), bias)
    (tmp_path / "unet").mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(
        tensors | {f"base_model.model.{name}.lora_B.bias": bias},
        tmp_path / "unet" / "adapter_model.safetensors",
    )
    (tmp_path / "unet" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1}')
    updates = read_adapter(tmp_path / "unet").weights.updates
    assert torch.equal(updates[ModuleKey("unet", f"{name}.bias")].delta(), bias * 0.5)
    # convert_state_dict_to_kohya leaves the last two dots of what it does not know
    spelled = "lora_unet_" + name.replace(".", "_")
    script = {
        f"{spelled}.lora_down.weight": down,
        f"{spelled}.lora_up.weight": up,
        f"{spelled}.alpha": torch.tensor(2.0),
        f"{spelled.rpartition('_to_')[0]}.to_q.lora_magnitude_vector": torch.rand(8) + 1,
    }
    save_file(script, tmp_path / "b.safetensors", ENTRIES)
    (update,) = read_adapter(tmp_path / "b.safetensors").weights.updates.values()
    assert update.kind == "dora" and update.delta(torch.randn(8, 8)).shape == (8, 8)


@pytest.mark.parametrize(
    ("key", "program"),
    [
        (f"base_model.model.{LAYERS['linear']}.oft_R.weight", "PEFT can merge it"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "ComfyUI, Forge and diffusers"),
        (f"base_model.model.{LAYERS['linear']}.modules_to_save.weight", "PEFT can merge it"),
        ("lora_controlnet", "ControlNet load it"),
    ],
)
def test_what_is_refused_says_which_program_can_do_it(key: str, program: str, tmp_path: Path) -> None:
    save_file(
        {key: torch.ones(4, 4), f"unet.{LAYERS['linear']}.lora_A.weight": torch.ones(2, 4)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(AdapterFileError, match=program):
        read_adapter(tmp_path / "a.safetensors")
