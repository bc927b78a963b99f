"""The contract of all families, on narrow bases of their true build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdlora.adapters.lora import attach, attached_layers, create_adapter, set_strengths, target_modules
from sdlora.config import AdapterConfig
from sdlora.families import FAMILIES
from sdlora.families.base import Conditioning, SizeHint, stack_conditioning
from sdlora.families.loading import load_model
from sdlora.families.unet_model import UNetModel

from .narrow import FAMILY_NAMES, States, as_ldm

Bases = Mapping[str, tuple[Path, States]]
CPU = torch.device("cpu")
SIZE = SizeHint(original=(70, 90), crop=(0, 4), target=(64, 64))


def load(bases: Bases, family: str, dtype: torch.dtype = torch.float32) -> UNetModel:
    return load_model(str(bases[family][0]), dtype=dtype, device=CPU)


def inputs(model: UNetModel, count: int = 2) -> tuple[Tensor, Tensor, Conditioning, list[SizeHint]]:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn((count, *model.latent_shape(128, 128)), generator=generator)
    with torch.no_grad():
        text = model.encode_text(["a cat"] * count)
    return noisy, torch.tensor([500] * count), text, [SIZE] * count


@pytest.fixture(params=FAMILY_NAMES)
def model(request: pytest.FixtureRequest, bases: Bases) -> UNetModel:
    return load(bases, request.param)


def test_the_table_holds_every_family() -> None:
    assert tuple(FAMILIES) == FAMILY_NAMES


def test_sizes_follow_the_components(model: UNetModel) -> None:
    assert model.native_resolution == 64
    assert model.latent_shape(64, 128) == (4, 8, 16)
    assert model.size_multiple == 8 * 2 ** (len(model.unet.config.block_out_channels) - 1)


@pytest.mark.parametrize("targets", ["attention", "linear", "all"])
def test_a_fresh_adapter_changes_nothing_and_strength_zero_is_the_base(
    model: UNetModel, targets: str
) -> None:
    given = inputs(model)
    with torch.no_grad():
        before, text_before = model.predict(*given), model.encode_text(["a dog"])
        config = AdapterConfig(targets=targets, rank=2, alpha=2.0, text_encoder=True)  # type: ignore[arg-type]
        attach(model, create_adapter(model, config, 1), "new")
        assert torch.equal(model.predict(*given), before)
        for name, tensor in model.encode_text(["a dog"]).items():
            assert torch.equal(tensor, text_before[name])
        for layer in attached_layers(model, "new"):
            layer.up.normal_(0, 0.1)
        assert not torch.equal(model.predict(*given), before)
        assert any(not torch.equal(t, text_before[n]) for n, t in model.encode_text(["a dog"]).items())
        set_strengths(model, {"new": 0.0})
        assert torch.equal(model.predict(*given), before)


def test_only_adapters_get_gradients_and_all_of_them_do(model: UNetModel) -> None:
    config = AdapterConfig(targets="all", rank=2, alpha=2.0, text_encoder=True)
    layers = attach(model, create_adapter(model, config, 1), "new")
    adapted = {id(p) for one in layers for p in (one.down, one.up)}
    for one in layers:
        one.down.requires_grad_(True)
        one.up.requires_grad_(True)
        with torch.no_grad():
            one.up.normal_(0, 0.1)
    model.prepare(training=True)
    noisy, timesteps, _, sizes = inputs(model)
    text = model.encode_text(["a cat", "a dog"])
    model.predict(noisy, timesteps, text, sizes).square().mean().backward()
    everything = [p for module in model.components().values() for p in module.parameters()]
    assert len(everything) > len(adapted) > 100
    assert [p.shape for p in everything if p.grad is not None and id(p) not in adapted] == []
    silent = [one.key for one in layers if one.down.grad is None or not bool(one.down.grad.any())]
    # SDXL reads its first text encoder at the last layer but one: the last one has no say
    last = f".layers.{model.text_encoders['text_encoder'].config.num_hidden_layers - 1}."
    keys = target_modules(model, config)
    unread = [key for key in keys if key.component == "text_encoder" and last in key.path]
    assert silent == (unread if model.info.name == "sdxl" else [])


def test_the_loss_is_finite_at_every_timestep(model: UNetModel) -> None:
    _, _, text, sizes = inputs(model, 1)
    clean = torch.randn((1, *model.latent_shape(64, 64)), generator=torch.Generator().manual_seed(1))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    weights = model.process.loss_weights(torch.arange(1000), 5.0)
    assert bool(torch.isfinite(weights).all())
    for step in range(0, 1000, 111):
        timesteps = torch.tensor([step])
        corrupted = model.process.corrupt(clean, noise, timesteps)
        with torch.no_grad():
            prediction = model.predict(corrupted.noisy, timesteps, text, sizes)
        assert bool(torch.isfinite((prediction - corrupted.target).square()).all())


def test_pure_bf16_stays_near_fp32(bases: Bases) -> None:
    for family in FAMILY_NAMES:
        full, half = load(bases, family), load(bases, family, torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert half.vae.dtype == torch.float32
        given = inputs(full)
        with torch.no_grad():
            wanted, found = full.predict(*given), half.predict(*given)
        assert found.dtype == torch.float32
        assert float((wanted - found).square().mean().sqrt() / wanted.square().mean().sqrt()) < 0.03


def test_adapters_reach_text_encoders_whole(model: UNetModel) -> None:
    config = AdapterConfig(targets="attention", rank=2, alpha=2.0, text_encoder=True)
    keys = target_modules(model, config)
    for component in model.text_encoders:
        own = [key.path for key in keys if key.component == component]
        layers = model.text_encoders[component].config.num_hidden_layers
        assert len(own) == 4 * layers
        assert all(path.startswith("text_model.encoder.layers.") for path in own)


def test_long_captions_are_chunks_and_stack_with_short_ones(model: UNetModel) -> None:
    long, short = " ".join(["cat"] * 80), "a dog"
    with torch.no_grad():
        both = model.encode_text([long, short])
        alone = model.encode_text([short])
        first = model.encode_text([" ".join(["cat"] * 75)])
    assert both["states"].shape[1] == 154
    torch.testing.assert_close(both["states"][1:, :77], alone["states"], rtol=0, atol=2e-6)
    torch.testing.assert_close(both["states"][:1, :77], first["states"], rtol=0, atol=2e-6)
    if "pooled" in both:  # of the first chunk alone
        torch.testing.assert_close(both["pooled"][:1], first["pooled"], rtol=0, atol=2e-6)
    one = {k: t[0] for k, t in both.items()}
    other = {k: t[0] for k, t in alone.items()}
    assert stack_conditioning([one, other])["states"].shape[:2] == (2, 154)


def test_offloading_changes_no_number(bases: Bases, model: UNetModel) -> None:
    other = load_model(str(bases[model.info.name][0]), dtype=torch.float32, device=CPU, offload=True)
    for one in (model, other):
        one.prepare(training=False)
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(other.predict(*given), model.predict(*given))
        assert torch.equal(other.decode_latents(given[0]), model.decode_latents(given[0]))
        assert torch.equal(other.encode_text(["a"])["states"], model.encode_text(["a"])["states"])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_single_file_predicts_as_its_folder(
    family: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, states = bases[family]
    file = tmp_path / "one.safetensors"
    save_file(as_ldm(family, states), file)
    # the shipped configs describe the true sizes; here the narrow base's stand in for them
    (tmp_path / "assets").mkdir()
    from sdlora.families import loading

    (tmp_path / "assets" / family).symlink_to(folder, target_is_directory=True)
    monkeypatch.setattr(loading, "ASSETS", tmp_path / "assets")
    one, two = (load_model(str(p), dtype=torch.float32, device=CPU) for p in (file, folder))
    given = inputs(two)
    with torch.no_grad():
        assert torch.equal(one.predict(*given), two.predict(*given))
        assert torch.equal(one.encode_text(["x"])["states"], two.encode_text(["x"])["states"])
    assert one.base.digest != two.base.digest
