"""A base kept in 8 or 4 bits: its numbers, its gradients, what is kept for them, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora.config.schema import Quantisation
from sdlora.errors import ConfigError
from sdlora.families.components import load_parts
from sdlora.families.layout import set_layout
from sdlora.families.loading import load_model
from sdlora.families.quantised import (
    QuantisedConv2d,
    QuantisedLayer,
    QuantisedLinear,
    Quantising,
    decode_fp8,
    encode_fp8,
    quantisation_of,
    quantise,
    refuse_to_change,
)
from sdlora.families.recognition import recognise
from sdlora.training.memory_count import MemoryCount, counting_memory

from .narrow import States, as_ldm, copy_configs

CPU = torch.device("cpu")
FORMATS = get_args(Quantisation)


def e4m3_values() -> Tensor:
    """Return all positive numbers by their definition: exponent of 4 bits, bias 7, fraction of 3."""
    small = [fraction / 8 * 2.0**-6 for fraction in range(8)]
    large = [(1 + fraction / 8) * 2.0 ** (e - 7) for e in range(1, 16) for fraction in range(8)]
    return torch.tensor((small + large)[:-1], dtype=torch.float64)  # the last code is "not a number"


@pytest.mark.parametrize("shape", [(24, 40), (16, 8, 3, 3)])
def test_fp8_is_the_nearest_multiple_of_each_rows_scale(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(
        -6, 3, shape[0]
    ).view(-1, *[1] * (len(shape) - 1))
    weight[3] = 0.0
    codes, scales = encode_fp8(weight)
    assert codes.shape == weight.shape and codes.dtype == torch.uint8
    rows = weight.double().flatten(1)
    wanted_scales = (rows.abs().amax(1) / 448).float()
    assert torch.equal(scales.flatten()[wanted_scales > 0], wanted_scales[wanted_scales > 0])
    values = e4m3_values()
    levels = torch.cat([-values.flip(0), values])  # (254,)
    scaled = (weight.flatten(1) / scales.flatten()[:, None]).double()
    distance = (scaled[..., None] - levels).abs()
    decoded = decode_fp8(codes, scales, torch.float64).flatten(1)
    taken = (decoded / scales.flatten()[:, None].double() - scaled).abs()
    assert torch.allclose(taken, distance.amin(-1), rtol=1e-9, atol=1e-9)
    assert not decoded[3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_is_decoded_as_torch_casts_it_and_rounded_once(dtype: torch.dtype) -> None:
    codes = torch.arange(254, dtype=torch.uint8).repeat(3, 1)
    codes = codes[:, (codes[0] & 127) != 127]
    scales = torch.tensor([[0.37], [1.0], [2.2e-4]])
    wanted = (codes.view(torch.float8_e4m3fn).double() * scales.double()).to(dtype)
    assert torch.equal(decode_fp8(codes, scales, dtype), wanted)


def test_codes_looked_up_are_those_that_torch_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(4))
    codes, scales = encode_fp8(weight)
    wanted = decode_fp8(codes, scales, torch.bfloat16)
    monkeypatch.setattr("sdlora.families.quantised.WITHOUT_FP8", ("cpu",))
    assert torch.equal(decode_fp8(codes, scales, torch.bfloat16), wanted)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (nn.Linear(96, 40), (2, 7, 96)),
    "without bias": (nn.Linear(64, 32, bias=False), (3, 64)),
    "convolution": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 5)),
    "stride": (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 7, 6)),
    "1x1": (nn.Conv2d(48, 24, 1), (2, 48, 4, 4)),
}


def quantised(name: str, quantisation: Quantisation, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    """Return a quantised layer, torch's own with the decoded weight, and an input."""
    kind, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = type(kind)(**arguments(kind))
    whole = type(kind)(**arguments(kind)).to(dtype)
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    quantise(model, quantisation, dtype)
    taken: Any = model[0]
    taken.take(weight, CPU)
    model.to(dtype)
    whole.weight.data = taken.weight.clone()
    if whole.bias is not None:
        whole.bias.data = taken.bias.detach().clone()
    return taken.requires_grad_(False), whole.requires_grad_(False), torch.randn(shape, dtype=dtype)


def arguments(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    return {name: getattr(layer, name) for name in names}


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("quantisation", FORMATS)
def test_output_and_gradient_are_those_of_the_decoded_weight_and_nothing_is_kept(
    name: str, layout: Any, quantisation: Quantisation
) -> None:
    layer, whole, x = quantised(name, quantisation, torch.float64)
    for each in (layer, whole):
        set_layout(nn.Sequential(each), layout)
    assert layer.weight.stride() == whole.weight.stride()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    gradients = []
    for each in (layer, whole):
        given = x.clone().requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = each(given)
        if each is layer:
            assert not kept, [tensor.shape for tensor in kept]
        (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output)).sum().backward()
        assert given.grad is not None
        gradients.append((output.detach(), given.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_small_and_sensitive_layers_stay_whole(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.float32, device=CPU, base_format="fp8")
    layers = {
        name: layer
        for name, layer in model.components()["unet"].named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    whole = {name for name, layer in layers.items() if not isinstance(layer, QuantisedLayer)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} < whole
    assert len(layers) - len(whole) > 40
    assert {name.rsplit(".", 1)[-1] for name in whole if "." in name} <= {
        "linear_1",
        "linear_2",
        "time_emb_proj",
        "proj_in",
        "proj_out",
        "conv_shortcut",
    }
    assert {"proj_in", "conv_shortcut"} <= {name.rsplit(".", 1)[-1] for name in whole}
    assert not any(
        isinstance(layer, QuantisedLayer)
        for name, part in model.components().items()
        for layer in part.modules()
        if name != "unet"
    )


def test_only_linear_layers_are_kept_in_4_bits(tiny_base: Path) -> None:
    """Most of a large base are linear layers; what convolutions lose in 4 bits all that follows has, too."""
    model = load_model(str(tiny_base), dtype=torch.float32, device=CPU, base_format="nf4")
    kept = [
        (layer.quantisation, isinstance(layer, nn.Conv2d))
        for layer in model.components()["unet"].modules()
        if isinstance(layer, QuantisedLayer)
    ]
    assert set(kept) == {("nf4", False), ("fp8", True)}


@pytest.mark.parametrize("quantisation", FORMATS)
def test_a_file_and_a_folder_give_the_same_codes_of_what_is_stored(
    quantisation: Quantisation, bases: Mapping[str, tuple[Path, States]], tmp_path: Path
) -> None:
    folder, states = bases["sdxl"]
    file = tmp_path / "narrow.safetensors"
    save_file(as_ldm("sdxl", states), file)
    configs = copy_configs(folder, tmp_path / "configs")
    how = Quantising(quantisation, CPU)
    first = load_parts(recognise(folder), dtype=torch.bfloat16, device=CPU, quantising=how)
    second = load_parts(recognise(file), dtype=torch.bfloat16, device=CPU, quantising=how, configs=configs)
    ours, theirs = first.denoiser.state_dict(), second.denoiser.state_dict()
    assert ours.keys() == theirs.keys() and sum(name.endswith(".codes") for name in ours) > 100
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    bound = {"fp8": 0.03, "nf4": 0.12}[quantisation]
    for name, layer in first.denoiser.named_modules():
        if isinstance(layer, QuantisedLayer):
            stored = states["unet"][f"{name}.weight"].float()
            assert layer.weight.dtype == torch.bfloat16
            assert float((layer.weight.float() - stored).norm() / stored.norm()) < bound, name


@pytest.mark.parametrize("quantisation", FORMATS)
def test_the_full_weights_are_never_alive(
    quantisation: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, see = TestedFile(), MemoryCount.see

    def see_what_takes_memory(count: MemoryCount, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            see(count, tensor)

    monkeypatch.setattr(MemoryCount, "see", see_what_takes_memory)
    with counting_memory() as count:
        model = load_model("mini", dtype=torch.float32, device=CPU, base_format=quantisation)
    unet = model.components()["unet"]
    parts = [*unet.parameters(), *unet.buffers()]
    assert quantisation_of(unet) == quantisation
    kept = sum(tensor.numel() * tensor.element_size() for tensor in parts)
    others = sum(
        tensor.numel() * tensor.element_size()
        for name, part in model.components().items()
        if name != "unet"
        for tensor in (*part.parameters(), *part.buffers())
    )
    assert kept < file.full * {"fp8": 0.4, "nf4": 0.36}[quantisation]
    assert count.alive <= 1.02 * (kept + others)
    assert count.peak < 1.02 * (kept + others) + 6 * file.largest < file.full + others


class TestedFile:
    """Sizes of the mini base's U-Net in float32."""

    __test__ = False

    def __init__(self) -> None:
        unet = load_model("mini", dtype=torch.float32, device=torch.device("meta")).components()["unet"]
        sizes = [tensor.numel() * 4 for tensor in unet.parameters()]
        self.full, self.largest = sum(sizes), max(sizes)


@pytest.mark.parametrize("quantisation", FORMATS)
def test_a_blueprint_has_the_sizes_of_the_loaded_base(quantisation: Quantisation, tiny_base: Path) -> None:
    def sizes(device: str) -> dict[str, tuple[Any, ...]]:
        model = load_model(
            str(tiny_base), dtype=torch.bfloat16, device=torch.device(device), base_format=quantisation
        )
        return {
            name: (tuple(tensor.shape), tensor.dtype)
            for name, tensor in model.components()["unet"].state_dict().items()
        }

    assert sizes("meta") == sizes("cpu")


def test_another_number_format_is_the_weights_not_that_of_its_parts() -> None:
    layer, _, x = quantised("linear", "nf4", torch.float32)
    codes, scales, weight = layer.codes.clone(), layer.scales.clone(), layer.weight
    layer.to(torch.bfloat16)
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scales, scales)
    assert torch.equal(layer.weight, weight.bfloat16()) and layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_quantised_weight_is_not_replaced_or_changed_silently() -> None:
    layer, whole, _ = quantised("linear", "fp8", torch.float32)
    assert isinstance(layer, QuantisedLinear) and not isinstance(layer, QuantisedConv2d)
    with pytest.raises((KeyError, AttributeError, TypeError)):
        setattr(layer, "weight", nn.Parameter(whole.weight))  # noqa: B010
    with pytest.raises(ConfigError, match=r"kept in fp8.*training.base_format=full.*sdlora bake"):
        refuse_to_change(layer, "mid_block.x")
    refuse_to_change(whole, "mid_block.x")
