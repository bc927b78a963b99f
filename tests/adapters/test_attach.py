"""LoRA layers in a real small model: what they add, at which strength, and that they leave no trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdlora.adapters.attach import (
    Merged,
    attach,
    attached_layers,
    create_adapter,
    detach,
    set_strengths,
    target_modules,
    updates_in,
)
from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.adapters.strength import Strength, strength_of
from sdlora.config.schema import AdapterConfig, Targets
from sdlora.errors import AdapterFileError
from sdlora.families.base import DiffusionModel, SizeHint
from sdlora.families.loading import load_model

BOTH = AdapterConfig(targets="all", text_encoder=True, rank=4, alpha=4.0)


@pytest.fixture(scope="module")
def shared(tiny_base: Path) -> DiffusionModel:
    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    model.prepare(training=False)
    return model


@pytest.fixture
def model(shared: DiffusionModel) -> Iterator[DiffusionModel]:
    """The tiny base; each test must leave it exactly as it was."""
    before = state(shared)
    yield shared
    for name in ("one", "two", "lora", "v1.5_style"):
        detach(shared, name)
    after = state(shared)
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def state(model: DiffusionModel) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": tensor.clone()
        for component, module in model.components().items()
        for name, tensor in module.state_dict().items()
    }


@torch.no_grad()
def output(model: DiffusionModel) -> Tensor:
    """Text encoder and U-Net together, on fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn((2, *model.facts.latents.shape(32, 32)), generator=generator)
    hints = [SizeHint((32, 32), (0, 0), (32, 32))] * 2
    text = model.encode_text(["an icon of a cat", "doughnut"])
    return model.predict(noisy, torch.tensor([20, 700]), text, hints)


def trained(
    model: DiffusionModel, config: AdapterConfig = BOTH, seed: int = 0, size: float = 0.05
) -> AdapterWeights:
    """A fresh adapter with up factors as training would leave them: not zero."""
    fresh = create_adapter(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            key: LowRankPair(pair.down, size * torch.randn(pair.up.shape, generator=generator), pair.alpha)
            for key, pair in fresh.items()
        }
    )


def with_deltas(model: DiffusionModel, adapters: list[tuple[AdapterWeights, Strength]]) -> Tensor:
    """What the base gives with alpha / rank * up @ down added to its weights, worked out here in float64."""
    originals: list[tuple[torch.nn.Parameter, Tensor]] = []
    for weights, strength in adapters:
        for key, pair in weights.items():
            root = model.components()[key.component]
            path = key.path if hasattr(root, "text_model") else key.path.removeprefix("text_model.")
            weight = root.get_submodule(path).weight
            assert isinstance(weight, torch.nn.Parameter)
            originals.append((weight, weight.detach().clone()))
            product = pair.up.double().flatten(1) @ pair.down.double().flatten(1)
            delta = (pair.alpha / pair.down.shape[0] * product).reshape(weight.shape)
            weight.data += (strength_of(strength, key.component) * delta).float()
    result = output(model)
    for weight, original in reversed(originals):
        weight.data.copy_(original)
    return result


def test_a_fresh_adapter_changes_nothing(model: DiffusionModel) -> None:
    base = output(model)
    attach(model, create_adapter(model, BOTH, 0), "one")
    assert torch.equal(output(model), base)


def test_a_fresh_adapter_depends_on_seed_and_layer_only(model: DiffusionModel) -> None:
    first, again = create_adapter(model, BOTH, 5), create_adapter(model, BOTH, 5)
    unet_only = create_adapter(model, BOTH.model_copy(update={"text_encoder": False}), 5)
    other = create_adapter(model, BOTH, 6)
    assert len(unet_only) < len(first) == len(again)
    for key, pair in first.items():
        assert torch.equal(pair.down, again.pairs[key].down)
        assert not torch.equal(pair.down, other.pairs[key].down)
        assert not pair.up.any()
        bound = pair.down[0].numel() ** -0.5
        assert 0.5 * bound < float(pair.down.abs().max()) <= bound
    for key, pair in unet_only.items():
        assert torch.equal(pair.down, first.pairs[key].down)


@pytest.mark.parametrize(("targets", "least"), [("attention", 16), ("linear", 24), ("all", 40)])
def test_presets_grow_and_name_real_layers(model: DiffusionModel, targets: Targets, least: int) -> None:
    keys = target_modules(model, AdapterConfig(targets=targets, rank=1))
    assert len(keys) == len(set(keys)) >= least
    unet = model.components()["unet"]
    assert all(isinstance(unet.get_submodule(key.path), torch.nn.Linear | torch.nn.Conv2d) for key in keys)


@pytest.mark.parametrize("strength", [-0.5, 0.25, 1.0, 1.5])
def test_strength_scales_the_added_weights(model: DiffusionModel, strength: float) -> None:
    weights = trained(model)
    expected = with_deltas(model, [(weights, strength)])
    base = output(model)
    attach(model, weights, "one")
    set_strengths(model, {"one": strength})
    changed = output(model)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    assert float((changed - base).abs().max()) > 1e-2


def test_strength_zero_is_the_base_bit_for_bit(model: DiffusionModel) -> None:
    base = output(model)
    attach(model, trained(model), "one")
    assert not torch.equal(output(model), base)
    set_strengths(model, {"one": 0.0})
    assert torch.equal(output(model), base)
    set_strengths(model, {})
    assert torch.equal(output(model), base)


def test_an_adapter_at_strength_zero_takes_no_part(model: DiffusionModel) -> None:
    """0 times what overflowed is no number: only what is not computed at all leaves the others alone."""
    broken = AdapterWeights(
        {
            key: LowRankPair(pair.down, torch.full_like(pair.up, torch.inf), pair.alpha)
            for key, pair in trained(model).items()
        }
    )
    base = output(model)
    attach(model, broken, "one")
    set_strengths(model, {"one": 0.0})
    assert torch.equal(output(model), base)
    attach(model, trained(model, seed=1), "two")
    set_strengths(model, {"two": 0.7})
    alone = output(model)
    set_strengths(model, {"one": 0.0, "two": 0.7})
    assert torch.equal(output(model), alone)
    merged = Merged(model, {"one": 0.0, "two": 0.7})
    assert bool(torch.isfinite(output(model)).all())
    merged.undo()


def test_strengths_change_back_and_forth_exactly(model: DiffusionModel) -> None:
    attach(model, trained(model), "one")
    set_strengths(model, {"one": 0.7})
    first = output(model)
    set_strengths(model, {"one": 1.3})
    output(model)
    set_strengths(model, {"one": 0.7})
    assert torch.equal(output(model), first)


@pytest.mark.parametrize(
    "strength",
    [
        {"unet": 0.8},
        {"text_encoder": 1.2},
        {"unet": 0.3, "text_encoder": 0.9},
        {"unet": 1.0, "text_encoder": 0.0},
    ],
)
def test_components_have_their_own_strength(model: DiffusionModel, strength: dict[str, float]) -> None:
    weights = trained(model)
    expected = with_deltas(model, [(weights, strength)])
    attach(model, weights, "one")
    set_strengths(model, {"one": strength})
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_two_adapters_add_up_without_a_warning(model: DiffusionModel) -> None:
    first = trained(model, seed=1)
    second = trained(model, AdapterConfig(targets="attention", rank=3, alpha=1.5), seed=2, size=0.2)
    expected = with_deltas(model, [(first, 0.6), (second, 1.1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(model, first, "one")
        attach(model, second, "two")
    set_strengths(model, {"one": 0.6, "two": 1.1})
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    set_strengths(model, {"two": 1.1})
    torch.testing.assert_close(output(model), with_deltas_unwrapped(model, second, 1.1), rtol=1e-4, atol=1e-5)


def with_deltas_unwrapped(model: DiffusionModel, weights: AdapterWeights, strength: float) -> Tensor:
    detach(model, "one")
    detach(model, "two")
    return with_deltas(model, [(weights, strength)])


def test_attaching_leaves_only_the_new_adapter_acting(model: DiffusionModel) -> None:
    second = trained(model, seed=2)
    expected = with_deltas(model, [(second, 1.0)])
    attach(model, trained(model, seed=1), "one")
    attach(model, second, "two")
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_is_the_same_beside_one_that_is_attached(model: DiffusionModel) -> None:
    alone = create_adapter(model, BOTH, 4)
    attach(model, trained(model), "one")
    second = create_adapter(model, BOTH, 4)
    assert list(second.pairs) == list(alone.pairs)
    assert all(torch.equal(second.pairs[key].down, pair.down) for key, pair in alone.items())


def test_ranks_and_alphas_may_differ_from_layer_to_layer(model: DiffusionModel) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs: dict[ModuleKey, LowRankPair] = {}
    for i, (key, pair) in enumerate(trained(model).items()):
        rank, alpha = 1 + i % 5, 0.5 + 0.75 * (i % 7)
        down = 0.1 * torch.randn((rank, *pair.down.shape[1:]), generator=generator)
        up = 0.3 * torch.randn((pair.up.shape[0], rank, *pair.up.shape[2:]), generator=generator)
        pairs[key] = LowRankPair(down, up, alpha)
    weights = AdapterWeights(pairs)
    kinds = {(pair.rank, pair.alpha, pair.down.ndim) for _, pair in weights.items()}
    assert len(kinds) > 20 and {kind[2] for kind in kinds} == {2, 4}
    expected = with_deltas(model, [(weights, 0.9)])
    layers = attach(model, weights, "one")
    assert {layer.key: layer.alpha for layer in layers} == {key: pair.alpha for key, pair in weights.items()}
    set_strengths(model, {"one": 0.9})
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_a_path_that_ends_like_another_keeps_its_own_rank(model: DiffusionModel) -> None:
    fresh = create_adapter(model, AdapterConfig(targets="attention", rank=6, alpha=6.0), 0)
    keys = [key for key in fresh.pairs if key.path.endswith(".to_q")]
    odd = create_adapter(model, AdapterConfig(targets="attention", rank=2, alpha=1.0), 0)
    weights = AdapterWeights({**fresh.pairs, keys[0]: odd.pairs[keys[0]]})
    layers = attach(model, weights, "one")
    assert {layer.key for layer in layers if layer.down.shape[0] == 2} == {keys[0]}


def test_what_is_attached_can_be_read_back(model: DiffusionModel) -> None:
    weights = trained(model)
    attach(model, weights, "one")
    back = AdapterWeights(dict(updates_in(model, "one")))
    assert list(back.pairs) == [key for key, _ in weights.items()]
    for key, pair in weights.items():
        assert torch.equal(back.pairs[key].down, pair.down)
        assert torch.equal(back.pairs[key].up, pair.up)
        assert back.pairs[key].alpha == pair.alpha


@pytest.mark.parametrize("name", ["lora", "v1.5_style"])
def test_any_file_name_is_a_name(model: DiffusionModel, name: str) -> None:
    weights = trained(model)
    expected = with_deltas(model, [(weights, 1.0)])
    attach(model, weights, name)
    assert len(list(attached_layers(model, name))) == len(weights)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_detaching_restores_the_model(model: DiffusionModel) -> None:
    base, before = output(model), state(model)
    kinds = {name: type(layer) for name, layer in model.components()["unet"].named_modules()}
    attach(model, trained(model, seed=1), "one")
    attach(model, trained(model, seed=2), "two")
    detach(model, "one")
    assert not list(attached_layers(model, "one"))
    assert len(list(attached_layers(model, "two"))) > 0
    detach(model, "two")
    after = state(model)
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert {name: type(layer) for name, layer in model.components()["unet"].named_modules()} == kinds
    assert torch.equal(output(model), base)
    assert not any(hasattr(module, "peft_config") for module in model.components().values())


@pytest.mark.parametrize("strength", [0.75, {"unet": 0.5, "text_encoder": 1.0}])
def test_merged_equals_unmerged_and_is_exactly_undone(model: DiffusionModel, strength: Strength) -> None:
    base, before = output(model), state(model)
    attach(model, trained(model, seed=1), "one")
    attach(model, trained(model, AdapterConfig(targets="attention", rank=2, alpha=1.0), seed=2), "two")
    strengths: dict[str, Strength] = {"one": strength, "two": -0.4}
    set_strengths(model, strengths)
    unmerged = output(model)
    assert not torch.equal(unmerged, base)
    merged = Merged(model, strengths)
    torch.testing.assert_close(output(model), unmerged, rtol=1e-4, atol=1e-5)
    merged.undo()
    assert torch.equal(output(model), base)
    set_strengths(model, strengths)
    assert torch.equal(output(model), unmerged)
    detach(model, "one")
    detach(model, "two")
    after = state(model)
    assert len(after) == len(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_merging_at_zero_touches_no_weight(model: DiffusionModel) -> None:
    base = output(model)
    attach(model, trained(model), "one")
    merged = Merged(model, {"one": 0.0})
    assert torch.equal(output(model), base)
    merged.undo()


def test_a_bf16_base_rounds_a_merge_once_and_undoes_it(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.bfloat16, device=torch.device("cpu"))
    model.prepare(training=False)
    before, base = state(model), output(model)
    weights = trained(model)
    layers = attach(model, weights, "one")
    assert {layer.down.dtype for layer in layers} == {torch.bfloat16}
    unmerged = output(model)
    merged = Merged(model, {"one": 1.0})
    change = float((unmerged - base).abs().mean())
    assert float((output(model) - unmerged).abs().mean()) < 0.3 * change
    merged.undo()
    detach(model, "one")
    after = state(model)
    assert len(after) == len(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_a_merge_of_two_into_a_bf16_base_is_the_rounded_sum(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.bfloat16, device=torch.device("cpu"))
    unet = model.components()["unet"]
    strengths: dict[str, Strength] = {"one": 0.7, "two": -0.4}
    originals = {name: value.detach().double() for name, value in unet.named_parameters()}
    adapters = {"one": trained(model, seed=1), "two": trained(model, seed=2)}
    wanted = {}
    for name, strength in strengths.items():
        for key, pair in adapters[name].items():
            if key.component == "unet":
                weight = f"{key.path}.weight"
                product = pair.up.bfloat16().double().flatten(1) @ pair.down.bfloat16().double().flatten(1)
                delta = (pair.alpha / pair.down.shape[0] * product).reshape(originals[weight].shape)
                wanted[weight] = wanted.get(weight, originals[weight]) + float(strength) * delta  # type: ignore[arg-type]
        attach(model, adapters[name], name)
    merged = Merged(model, strengths)
    values = {name.replace(".base_layer.", "."): value for name, value in unet.named_parameters()}
    differing = sum(int((values[name] != wanted[name].bfloat16()).sum()) for name in wanted)
    # a sum in float32 may lie on the other side of a rounding boundary, here and there
    assert differing < 1e-3 * sum(value.numel() for value in wanted.values())
    merged.undo()


def test_an_adapter_for_another_shape_is_refused_by_layer(model: DiffusionModel) -> None:
    weights = trained(model, AdapterConfig(targets="attention", rank=2, alpha=2.0))
    key = next(iter(weights.pairs))
    wide = LowRankPair(torch.zeros(2, 999), weights.pairs[key].up, 2.0)
    with pytest.raises(AdapterFileError, match=r"one: .*999.* in the adapter but .* use the base"):
        attach(model, AdapterWeights({**weights.pairs, key: wide}), "one")
    missing = AdapterWeights({ModuleKey("unet", "down_blocks.9.attentions.0.proj_in"): wide})
    with pytest.raises(AdapterFileError, match=r"down_blocks\.9"):
        attach(model, missing, "one")
    second = AdapterWeights({ModuleKey("text_encoder_2", "text_model.encoder"): wide})
    with pytest.raises(AdapterFileError, match="text_encoder_2"):
        attach(model, second, "one")
    assert not list(attached_layers(model, "one"))
