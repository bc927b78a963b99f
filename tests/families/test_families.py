"""The contract of all families, on narrow bases of their true build."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.adapters.attach import attach, attached_layers, create_adapter, set_strengths, target_modules
from sdlora.config.schema import AdapterConfig
from sdlora.families.base import Conditioning, SizeHint, stack_conditioning
from sdlora.families.loading import load_model
from sdlora.families.table import FAMILIES
from sdlora.families.unet_model import UNetModel

from .narrow import FAMILY_NAMES, States, in_form

Bases = Mapping[str, tuple[Path, States]]
CPU = torch.device("cpu")
SIZE = SizeHint(original=(70, 90), crop=(0, 4), target=(64, 64))


def load(bases: Bases, family: str, dtype: torch.dtype = torch.float32) -> UNetModel:
    return load_model(str(bases[family][0]), dtype=dtype, device=CPU)


def inputs(model: UNetModel, count: int = 2) -> tuple[Tensor, Tensor, Conditioning, list[SizeHint]]:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn((count, *model.facts.latents.shape(128, 128)), generator=generator)
    with torch.no_grad():
        text = model.encode_text(["a cat"] * count)
    return noisy, torch.tensor([500] * count), text, [SIZE] * count


@pytest.fixture(params=FAMILY_NAMES)
def model(request: pytest.FixtureRequest, bases: Bases) -> UNetModel:
    return load(bases, request.param)


def test_the_table_holds_every_family() -> None:
    assert tuple(FAMILIES) == FAMILY_NAMES


def test_sizes_follow_the_components(model: UNetModel) -> None:
    assert model.facts.native_resolution == 64
    assert model.facts.latents.shape(64, 128) == (4, 8, 16)
    assert model.facts.size_multiple == 8 * 2 ** (len(model.unet.config.block_out_channels) - 1)


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
    adapted = {id(p) for layer in layers for p in (layer.down, layer.up)}
    for layer in layers:
        layer.down.requires_grad_(True)
        layer.up.requires_grad_(True)
        with torch.no_grad():
            layer.up.normal_(0, 0.1)
    model.prepare(training=True)
    noisy, timesteps, _, sizes = inputs(model)
    text = model.encode_text(["a cat", "a dog"])
    model.predict(noisy, timesteps, text, sizes).square().mean().backward()
    everything = [p for module in model.components().values() for p in module.parameters()]
    assert len(everything) > len(adapted) > 100
    assert [p.shape for p in everything if p.grad is not None and id(p) not in adapted] == []
    silent = [layer.key for layer in layers if layer.down.grad is None or not bool(layer.down.grad.any())]
    # SDXL reads its first text encoder at the last layer but one: the last one has no say
    last = f".layers.{model.text_encoders['text_encoder'].config.num_hidden_layers - 1}."
    keys = target_modules(model, config)
    unread = [key for key in keys if key.component == "text_encoder" and last in key.path]
    assert silent == (unread if model.info.name == "sdxl" else [])


@pytest.mark.long
def test_the_loss_is_finite_at_every_timestep(model: UNetModel) -> None:
    _, _, text, sizes = inputs(model, 1)
    shape = model.facts.latents.shape(model.facts.size_multiple, model.facts.size_multiple)
    generator = torch.Generator().manual_seed(1)
    weights = model.process.loss_weights(torch.arange(1000), 5.0)
    assert bool(torch.isfinite(weights).all())
    for timesteps in torch.arange(1000).split(125):
        count = len(timesteps)
        clean, noise = (torch.randn((count, *shape), generator=generator) for _ in range(2))
        corrupted = model.process.corrupt(clean, noise, timesteps)
        repeated = {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in text.items()}
        with torch.no_grad():
            prediction = model.predict(corrupted.noisy, timesteps, repeated, sizes * count)
        assert bool(torch.isfinite((prediction - corrupted.target).square()).all())


def test_pure_bf16_stays_near_fp32(bases: Bases) -> None:
    for family in FAMILY_NAMES:
        full, half = load(bases, family), load(bases, family, torch.bfloat16)
        assert half.facts.dtype == torch.bfloat16
        assert half.vae.dtype == torch.float32
        given = inputs(full)
        with torch.no_grad():
            wanted, actual = full.predict(*given), half.predict(*given)
        assert actual.dtype == torch.float32
        assert float((wanted - actual).square().mean().sqrt() / wanted.square().mean().sqrt()) < 0.03


def test_adapters_reach_text_encoders_whole(model: UNetModel) -> None:
    config = AdapterConfig(targets="attention", rank=2, alpha=2.0, text_encoder=True)
    keys = target_modules(model, config)
    for component in model.text_encoders:
        paths = [key.path for key in keys if key.component == component]
        layers = model.text_encoders[component].config.num_hidden_layers
        assert len(paths) == 4 * layers
        assert all(path.startswith("text_model.encoder.layers.") for path in paths)


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
    long_one = {k: t[0] for k, t in both.items()}
    other = {k: t[0] for k, t in alone.items()}
    assert stack_conditioning([long_one, other])["states"].shape[:2] == (2, 154)


@pytest.mark.long
def test_offloading_decodes_large_images_in_bands(bases: Bases) -> None:
    model = load_model(str(bases["sdxl"][0]), dtype=torch.float32, device=CPU, offload=True)
    sides: list[int] = []
    hook = model.vae.decoder.register_forward_pre_hook(
        lambda module, given: sides.append(max(given[0].shape[2:]))
    )
    latents = torch.randn(1, 4, 128, 96)
    banded = model.decode_latents(latents)
    assert sides == [], "never the whole"
    whole = load(bases, "sdxl").decode_latents(latents)
    assert whole.shape == (1, 3, 1024, 768)
    assert float((banded - whole).abs().max()) <= 2e-5 * float(whole.abs().max())
    model.decode_latents(torch.randn(1, 4, 64, 64))
    assert sides == [64], "512 px at once"
    hook.remove()


def test_decoding_goes_on_in_bands_where_memory_ends(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(bases, "sdxl")
    whole = model.vae.decoder.forward

    def small(latents: Tensor, *rest: object) -> Tensor:
        if latents.shape[-1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        actual: Tensor = whole(latents, *rest)
        return actual

    monkeypatch.setattr(model.vae.decoder, "forward", small)
    with pytest.warns(UserWarning, match="in bands"):
        assert model.decode_latents(torch.randn(1, 4, 96, 96)).shape == (1, 3, 768, 768)


def test_encoders_leave_the_device_for_training_and_come_back_to_previews_only_to_work(
    bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moves are written down, as there need be no other device here to move to."""
    model, moves = load(bases, "sdxl"), list[tuple[str, str]]()
    parts = {"unet": model.unet, "vae": model.vae, **model.text_encoders}
    for name, module in parts.items():
        monkeypatch.setattr(
            module, "to", lambda place, name=name: moves.append((name, torch.device(place).type))
        )
    monkeypatch.setattr(model, "facts", replace(model.facts, device=torch.device("cuda")))
    away_first = [*((name, "cpu") for name in parts if name != "unet"), ("unet", "cuda")]
    model.prepare(training=True, keep_text=False)
    assert moves == away_first, "all is cached"
    moves.clear()
    model.prepare(training=False, keep_text=False, lean=True)
    assert moves == away_first
    moves.clear()
    visits: list[set[str]] = []
    vae: Any = model.vae
    halves = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}

    @contextmanager
    def visiting(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
        assert device.type == "cuda"
        visitors = parts | halves
        visits.append({name for name, part in visitors.items() if any(part is module for module in modules)})
        yield

    monkeypatch.setattr("sdlora.families.latent_model.visiting", visiting)
    with torch.no_grad():
        model.encode_text(["a cat"])
        model.decode_latents(torch.zeros(1, 4, 8, 8))
    assert visits == [set(model.text_encoders), set(halves)] and moves == []
    model.prepare(training=False)
    assert {place for _, place in moves} == {"cuda"}


def by_hand(model: UNetModel, prompt: str) -> tuple[Tensor, Tensor | None]:
    """Encode a long prompt of plain words with transformers alone: 75 tokens at a time, side by side."""
    rows, pooled = [], None
    for name, encoder in model.text_encoders.items():
        tokenizer = model.tokenizers[name]
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        states = []
        for start in range(0, len(ids), 75):
            chunk = ids[start : start + 75]
            row = [49406, *chunk, 49407, *[tokenizer.pad_token_id] * (75 - len(chunk))]
            output = encoder(torch.tensor([row]), output_hidden_states=True)
            sdxl = len(model.text_encoders) == 2
            states.append(output.hidden_states[-2] if sdxl else output.last_hidden_state)
            if start == 0 and hasattr(encoder, "text_projection"):
                inner = encoder.text_model
                last = inner(torch.tensor([row])).last_hidden_state
                pooled = last[0, len(chunk) + 1] @ encoder.text_projection.weight.T
        rows.append(torch.cat(states, dim=1))
    return torch.cat(rows, dim=-1), pooled


@pytest.mark.parametrize("words", [60, 100, 170])
def test_prompts_of_any_length_equal_an_independent_computation(model: UNetModel, words: int) -> None:
    names = ("cat", "dog", "tree", "house", "river", "old", "blue", "bright", "stone", "paper")
    prompt = " ".join(names[(7 * n + n // 10) % 10] for n in range(words))
    with torch.no_grad():
        actual, (states, pooled) = model.encode_text([prompt]), by_hand(model, prompt)
    assert actual["states"].shape[1] == 77 * -(-words // 75)
    torch.testing.assert_close(actual["states"], states, rtol=0, atol=2e-6)
    assert ("pooled" in actual) == (pooled is not None)
    if pooled is not None:
        torch.testing.assert_close(actual["pooled"][0], pooled, rtol=0, atol=2e-6)


def test_the_autoencoder_is_safe_where_half_precision_would_overflow(bases: Bases) -> None:
    model = load(bases, "sdxl", torch.float16)
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        for part in (model.vae.encoder, model.vae.decoder):
            part.conv_in.weight.mul_(1e6)  # activations beyond 65504, as in SDXL's own
        posterior = model.encode_images(pixels)
        decoded = model.decode_latents(model.facts.latents.scaled(posterior.mean))
        assert bool(torch.isfinite(posterior.mean).all() and torch.isfinite(decoded).all())
        model.vae.half()
        assert not bool(torch.isfinite(model.encode_images(pixels).mean).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_half_precision_keep_their_statistics_in_fp32(dtype: torch.dtype) -> None:
    """Why the frozen net needs no autocast: a large mean would swallow the spread in the format itself."""
    values = 1000 + torch.randn((2, 32, 16, 16), generator=torch.Generator().manual_seed(0))
    half = values.to(dtype)
    group, layer = torch.nn.GroupNorm(8, 32), torch.nn.LayerNorm(16)
    for norm in (group, layer):
        wanted = norm(half.float())
        actual = copy.deepcopy(norm).to(dtype)(half).float()
        torch.testing.assert_close(actual, wanted, rtol=0.02, atol=0.02)


def test_offloading_changes_no_number(bases: Bases, model: UNetModel) -> None:
    other = load_model(str(bases[model.info.name][0]), dtype=torch.float32, device=CPU, offload=True)
    for moved in (model, other):
        moved.prepare(training=False)
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(other.predict(*given), model.predict(*given))
        assert torch.equal(other.decode_latents(given[0]), model.decode_latents(given[0]))
        assert torch.equal(other.encode_text(["a"])["states"], model.encode_text(["a"])["states"])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_single_file_predicts_as_its_folder(
    family: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = bases[family]
    file = in_form("file", family, bases[family], tmp_path, monkeypatch)
    first, two = (load_model(str(p), dtype=torch.float32, device=CPU) for p in (file, folder))
    given = inputs(two)
    with torch.no_grad():
        assert torch.equal(first.predict(*given), two.predict(*given))
        assert torch.equal(first.encode_text(["x"])["states"], two.encode_text(["x"])["states"])
    assert first.base.digest != two.base.digest
