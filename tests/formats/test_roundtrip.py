"""Every format gives back what was written, for every family's layers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlora.adapters.canonical import AdapterFile, AdapterWeights, LowRankPair, ModuleKey
from sdlora.errors import AdapterFileError, OutputError
from sdlora.families.facts import FamilyInfo
from sdlora.formats import names
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.formats.folding import alpha_value, own_dtype, stored_alpha
from sdlora.formats.proof import compare, prove
from sdlora.formats.table import FORMATS, written_formats

from .adapters import (
    EVERYTHING,
    LINEAR,
    SD1,
    SD2,
    SDXL,
    TEXT,
    assert_same,
    canonical,
    file_of,
    models_of,
    random_adapter,
    random_pair,
    tiny_text_encoder,
    tiny_unet,
)


def target_in(folder: Path, format: str) -> Path:
    return folder / ("adapter" if FORMATS[format].is_folder else "adapter.safetensors")


@pytest.fixture(scope="module")
def sd1_adapter() -> AdapterWeights:
    return random_adapter(models_of(SD1), EVERYTHING, ranks=(4, 2), scales=(1.0, 0.5))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        (SD1, torch.float32),
        (SD1, torch.float16),
        (SD2, torch.bfloat16),
        (SDXL, torch.float16),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("format", written_formats())
def test_mixed_ranks_alphas_and_convolutions_come_back_bit_for_bit(
    format: str, family: FamilyInfo, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = random_adapter(
        models_of(family), EVERYTHING, ranks=(4, 1, 2), scales=(1.0, 0.5, 2.0, 0.25), dtype=dtype
    )
    assert len(weights) > 150
    target = target_in(tmp_path, format)
    files = write_adapter(file_of(weights), format, target, dtype, family)
    assert all(file.is_file() for file in files)
    adapter_read = read_adapter(target)
    assert_same(adapter_read.weights, weights)
    assert OpenAdapter(target).format == format
    assert adapter_read.info.family == family.name
    assert adapter_read.info.name == "test style"
    assert adapter_read.info.trigger_words == ("inkstyle", "ink, thick")


@pytest.mark.parametrize("format", written_formats())
def test_an_alpha_that_is_no_power_of_two_of_the_rank_comes_back(format: str, tmp_path: Path) -> None:
    weights = random_adapter(models_of(SD1), LINEAR, ranks=(3,), scales=(12.7 / 3,))
    target = target_in(tmp_path, format)
    write_adapter(file_of(weights), format, target, torch.float32, SD1)
    weights_read = read_adapter(target).weights
    assert_same(weights_read, weights)


def test_scaling_down_in_fp16_stays_within_rounding(tmp_path: Path) -> None:
    weights = random_adapter(models_of(SD1), LINEAR, ranks=(16,), scales=(1 / 16,))
    target = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), "diffusers", target, torch.float16, SD1)
    weights_read = read_adapter(target).weights
    assert {pair.alpha for pair in weights_read.pairs.values()} == {1.0}
    largest, relative = compare(weights, weights_read, torch.float16, "here")
    assert largest > 0 and 0 < relative < 2e-3


@pytest.mark.parametrize("second", written_formats())
@pytest.mark.parametrize("first", written_formats())
def test_converting_through_another_format_changes_nothing(
    first: str, second: str, sd1_adapter: AdapterWeights, tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()
    between, last = target_in(tmp_path / "first", first), target_in(tmp_path, second)
    write_adapter(file_of(sd1_adapter), first, between, torch.float32, SD1)
    write_adapter(read_adapter(between), second, last, torch.float32, SD1)
    assert_same(read_adapter(last).weights, sd1_adapter)


@pytest.mark.parametrize("format", written_formats())
def test_equal_adapters_give_equal_bytes(format: str, sd1_adapter: AdapterWeights, tmp_path: Path) -> None:
    reversed_order = AdapterWeights(dict(reversed(list(sd1_adapter.pairs.items()))))
    contents = []
    for number, weights in enumerate((sd1_adapter, reversed_order)):
        target = target_in(tmp_path / str(number), format)
        files = write_adapter(file_of(weights), format, target, torch.float16, SD1)
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1] and len(contents[0]) > 0


def test_webui_keys_are_those_of_kohya(sd1_adapter: AdapterWeights, tmp_path: Path) -> None:
    from safetensors import safe_open

    target = tmp_path / "a.safetensors"
    write_adapter(file_of(sd1_adapter), "webui", target, torch.float16, SD1)
    with safe_open(target, "pt") as file:
        keys = set(file.keys())
        assert len(keys) == 3 * len(sd1_adapter)
        assert {key.split("_")[1] for key in keys} == {"unet", "te"}
        assert all("_text_model_encoder_layers_" in key for key in keys if key.startswith("lora_te"))
        base = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
        assert file.get_tensor(f"{base}.lora_down.weight").dtype == torch.float16
        alpha = file.get_tensor(f"{base}.alpha")
        assert alpha.shape == () and alpha.dtype == torch.float32
        assert file.get_tensor("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight").ndim == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_webui_gives_one_alpha_a_component_where_that_is_exact(
    dtype: torch.dtype, sd1_adapter: AdapterWeights, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    assert len({pair.alpha for pair in sd1_adapter.component("unet").values()}) > 1
    target = tmp_path / "a.safetensors"
    write_adapter(file_of(sd1_adapter), "webui", target, dtype, SD1)
    state = load_file(target)
    for prefix in ("lora_unet_", "lora_te_"):
        alphas = {float(v) for k, v in state.items() if k.startswith(prefix) and k.endswith(".alpha")}
        assert len(alphas) == 1


def test_ranks_by_block_load_right_in_every_client_where_values_are_rounded_anyway(tmp_path: Path) -> None:
    # alpha is each module's own rank, as training with adapter.block_ranks leaves it
    weights = random_adapter(models_of(SD1), LINEAR, ranks=(2, 12, 16), scales=(1.0,))
    target = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), "webui", target, torch.float16, SD1)
    proof, clients = prove(weights, OpenAdapter(target), torch.float16, SD1)
    assert proof.read_by == ("sdlora", "diffusers") and all(support.full for support in clients)
    weights_read = read_adapter(target).weights
    assert {support.alpha for support in weights_read.pairs.values()} == {2.0, 12.0, 16.0}
    assert own_dtype(weights_read) == torch.float16
    write_adapter(read_adapter(target), "webui", tmp_path / "again.safetensors", torch.float16, SD1)
    assert (
        compare(weights_read, read_adapter(tmp_path / "again.safetensors").weights, torch.float16, "again")[1]
        < 1e-6
    )


def test_sdxl_unet_keys_use_the_original_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = random_adapter(models_of(SDXL), EVERYTHING)
    target = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), "webui", target, torch.float32, SDXL)
    keys = {key.split(".", 1)[0] for key in load_file(target)}
    unet = {key for key in keys if key.startswith("lora_unet_")}
    assert all(key.startswith(("lora_unet_input", "lora_unet_middle", "lora_unet_output")) for key in unet)
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_2_conv",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_output_blocks_0_0_skip_connection",
        "lora_unet_output_blocks_8_0_emb_layers_1",
    } <= unet
    assert {key.split("_text_model_")[0] for key in keys - unet} == {"lora_te1", "lora_te2"}


@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.name)
def test_every_layer_of_a_unet_has_one_name_both_ways(family: FamilyInfo) -> None:
    layers = [p for p, m in tiny_unet(family).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) > 100
    ldm = [names.to_ldm(path) for path in layers]
    assert None not in ldm and len(set(ldm)) == len(layers)
    for path, original in zip(layers, ldm, strict=True):
        assert original is not None and names.from_ldm(original) == path
        assert names.to_dots(names.to_underscores(path)) == path
        assert names.to_dots(names.to_underscores(original)) == original


def test_sd1_upsamplers_are_found_under_their_original_name() -> None:
    assert names.from_ldm("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"
    assert names.from_ldm("output_blocks.5.2.conv") == "up_blocks.1.upsamplers.0.conv"
    assert names.from_ldm("output_blocks.5.1.proj_in") == "up_blocks.1.attentions.2.proj_in"


@given(st.floats(min_value=1e-4, max_value=1e6), st.integers(min_value=1, max_value=6))
@settings(deadline=None)
def test_alphas_survive_as_typed(value: float, digits: int) -> None:
    typed = float(f"{value:.{digits}g}")
    assert alpha_value("here", stored_alpha("here", typed)) == typed


@given(
    rank=st.integers(1, 6),
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    kernel=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([1.0, 0.5, 2.0, 0.125, 1 / 3, 12.7]),
    seed=st.integers(0, 2**16),
    format=st.sampled_from(written_formats()),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_comes_back(
    rank: int,
    width: int,
    height: int,
    kernel: int | None,
    dtype: torch.dtype,
    scale: float,
    seed: int,
    format: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sides, ones = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    pair = LowRankPair(
        torch.randn(rank, width, *sides, generator=generator),
        torch.randn(height, rank, *ones, generator=generator),
        float(f"{rank * scale:.6g}"),
    )
    layers = {None: "resnets.0.time_emb_proj", 1: "resnets.0.conv_shortcut", 3: "resnets.0.conv1"}
    weights = AdapterWeights({ModuleKey("unet", f"mid_block.{layers[kernel]}"): pair.to(dtype)})
    target = target_in(tmp_path_factory.mktemp("any"), format)
    write_adapter(file_of(weights), format, target, dtype, SD1)
    weights_read = read_adapter(target).weights
    assert_same(weights_read, weights)


def layers_of(family: FamilyInfo) -> list[tuple[ModuleKey, nn.Module]]:
    return _layers()[family.name]


@functools.cache
def _layers() -> dict[str, list[tuple[ModuleKey, nn.Module]]]:
    return {family.name: _listed(family) for family in (SD1, SD2, SDXL)}


def _listed(family: FamilyInfo) -> list[tuple[ModuleKey, nn.Module]]:
    return [
        (canonical(component, path), layer)
        for component, model in models_of(family).items()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and path.endswith(EVERYTHING if component == "unet" else TEXT)
    ]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_of_any_family_comes_back_through_any_two_formats(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family = data.draw(st.sampled_from([SD1, SD2, SDXL]), label="family")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), label="dtype")
    chosen = data.draw(st.lists(st.sampled_from(layers_of(family)), min_size=1, max_size=12, unique_by=id))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    pairs = {}
    for module, layer in chosen:
        rank = data.draw(st.integers(1, 5))
        alpha = data.draw(st.sampled_from([0.5, 1.0, 1.5, 3.0, 12.7, float(rank), 2.0 * rank, -1.0]))
        pairs[module] = random_pair(layer, rank, alpha, generator, dtype)
    weights = AdapterWeights(dict(pairs))
    adapter, folder = file_of(weights), tmp_path_factory.mktemp("two")
    for step in ("first", "second"):
        format = data.draw(st.sampled_from(written_formats()), label=step)
        target = target_in(folder / step, format)
        write_adapter(adapter, format, target, dtype, family)
        adapter = read_adapter(target)
        assert_same(adapter.weights, weights)
        assert OpenAdapter(target).format == format


def test_layers_without_a_webui_name_are_refused(tmp_path: Path) -> None:
    pair = LowRankPair(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    weights = AdapterWeights({ModuleKey("unet", "down_blocks.0.motion_modules.0.to_q"): pair})
    with pytest.raises(AdapterFileError, match=r"motion_modules.*no name in the WebUI format"):
        write_adapter(file_of(weights), "webui", tmp_path / "a.safetensors", torch.float32, SD1)
    assert list(tmp_path.iterdir()) == []


def test_a_second_text_encoder_is_refused_for_a_family_with_one(tmp_path: Path) -> None:
    weights = random_adapter({"text_encoder_2": tiny_text_encoder()}, TEXT)
    with pytest.raises(
        AdapterFileError, match=r"`text_encoder_2`, which Stable Diffusion 1\.x does not have"
    ):
        write_adapter(file_of(weights), "webui", tmp_path / "a.safetensors", torch.float32, SD1)


@pytest.mark.parametrize("format", written_formats())
def test_values_too_large_for_fp16_are_refused(format: str, tmp_path: Path) -> None:
    pair = LowRankPair(torch.full((1, 2), 1e5), torch.ones(2, 1), 1.0)
    weights = AdapterWeights({ModuleKey("unet", "mid_block.attentions.0.proj_in"): pair})
    with pytest.raises(AdapterFileError, match=r"1e\+05 is too large for float16; export with bf16 or fp32"):
        write_adapter(file_of(weights), format, target_in(tmp_path, format), torch.float16, SD1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", written_formats())
def test_an_empty_adapter_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="has no modules"):
        write_adapter(
            AdapterFile(AdapterWeights({})), format, target_in(tmp_path, format), torch.float32, SD1
        )


def test_a_peft_folder_is_replaced_only_if_nothing_else_is_in_it(
    sd1_adapter: AdapterWeights, tmp_path: Path
) -> None:
    target = tmp_path / "adapter"
    write_adapter(file_of(sd1_adapter), "peft", target, torch.float32, SD1)
    unet_only = AdapterWeights({k: p for k, p in sd1_adapter.items() if k.component == "unet"})
    write_adapter(file_of(unet_only), "peft", target, torch.float32, SD1)
    assert_same(read_adapter(target).weights, unet_only)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        write_adapter(file_of(sd1_adapter), "peft", target, torch.float32, SD1)
    assert (target / "notes.txt").read_text() == "mine"
    assert_same(read_adapter(target).weights, unet_only)
