"""Adapters of every kind in a real small model: alone, several, mixed with plain LoRA, and gone again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.adapters.attach import Merged, attach, detach, set_strengths, target_modules, updates_in
from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey, Update
from sdlora.adapters.strength import Strength, strength_of
from sdlora.config.schema import AdapterConfig
from sdlora.errors import AdapterFileError
from sdlora.families.base import DiffusionModel, SizeHint
from sdlora.families.loading import load_model
from sdlora.generation.generate import GenerateRequest
from sdlora.generation.image_generator import ImageGenerator

from .kinds import dora, every_kind, loha, pair

BOTH = AdapterConfig(targets="all", text_encoder=True, rank=4, alpha=4.0)
SIZE = 0.02


@pytest.fixture(scope="module")
def shared(tiny_base: Path) -> DiffusionModel:
    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    model.prepare(training=False)
    return model


@pytest.fixture
def model(shared: DiffusionModel) -> Iterator[DiffusionModel]:
    """The tiny base; each test must leave it exactly as it was, hooks included."""
    before, layers, base = state(shared), modules(shared), output(shared)
    yield shared
    for name in ("one", "two", "plain"):
        detach(shared, name)
    after = state(shared)
    assert list(after) == list(before) and all(torch.equal(before[n], after[n]) for n in before)
    assert modules(shared) == layers
    assert torch.equal(output(shared), base)


def state(model: DiffusionModel) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": tensor.clone()
        for component, module in model.components().items()
        for name, tensor in module.state_dict().items()
    }


def modules(model: DiffusionModel) -> list[tuple[str, type, int]]:
    return [
        (path, type(layer), len(layer._forward_hooks))
        for module in model.components().values()
        for path, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)  # transformers hooks its own layers
    ]


@torch.no_grad()
def output(model: DiffusionModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn((2, *model.facts.latents.shape(32, 32)), generator=generator)
    hints = [SizeHint((32, 32), (0, 0), (32, 32))] * 2
    text = model.encode_text(["an icon of a cat", "doughnut"])
    return model.predict(noisy, torch.tensor([20, 700]), text, hints)


def weight_of(model: DiffusionModel, key: ModuleKey) -> torch.nn.Parameter:
    root = model.components()[key.component]
    path = key.path if hasattr(root, "text_model") else key.path.removeprefix("text_model.")
    layer: Any = root.get_submodule(path)
    weight = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight


def mixture(model: DiffusionModel, seed: int, with_plain: bool = False) -> AdapterWeights:
    """Every kind in turn over all layers, of a size that shows."""
    updates: dict[ModuleKey, Update] = {}
    seen: Counter[int] = Counter()
    for key in target_modules(model, BOTH):
        weight = weight_of(model, key).detach()
        kinds = [
            (name, update)
            for name, update in every_kind(tuple(weight.shape), weight).items()
            if with_plain or name != "lora"
        ]
        updates[key] = shrunk(kinds[(seen[len(kinds)] + seed) % len(kinds)][1])
        seen[len(kinds)] += 1
    return AdapterWeights(updates)


def shrunk(update: Update) -> Update:
    """The same kind of update at a size of trained ones."""
    if hasattr(update, "direction"):
        return dataclasses.replace(update, direction=shrunk(update.direction))  # type: ignore[type-var]
    first = dataclasses.fields(update)[0].name  # type: ignore[arg-type]
    names = [first] if getattr(update, first) is not None else ["w1_a"]
    changed = {name: SIZE * getattr(update, name) for name in names}
    return dataclasses.replace(update, **changed)  # type: ignore[type-var]


def with_deltas(model: DiffusionModel, adapters: list[tuple[AdapterWeights, Strength]]) -> Tensor:
    """What the base gives with strength * (W' - W) added to its weights."""
    originals: dict[ModuleKey, Tensor] = {}
    for weights, _ in adapters:
        for key in weights.updates:
            originals[key] = weight_of(model, key).detach().clone()
    for weights, strength in adapters:
        for key, update in weights.all_items():
            delta = update.delta(originals[key].double())
            weight_of(model, key).data += (strength_of(strength, key.component) * delta).float()
    result = output(model)
    for key, original in originals.items():
        weight_of(model, key).data.copy_(original)
    return result


def test_every_kind_adds_its_update_at_any_strength(model: DiffusionModel) -> None:
    base = output(model)
    for seed in range(2):
        weights = mixture(model, seed)
        assert set(weights.kinds()) == {"tucker", "loha", "lokr", "dora"} and len(weights) > 60
        for strength in (1.0, -0.6, {"unet": 0.4, "text_encoder": 1.3}):
            wanted = with_deltas(model, [(weights, strength)])
            attach(model, weights, "one")
            set_strengths(model, {"one": strength})
            actual = output(model)
            detach(model, "one")
            assert float((actual - base).abs().max()) > 1e-2
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


def test_several_adapters_of_all_kinds_and_a_plain_one_add_up_in_any_order(model: DiffusionModel) -> None:
    first, second = mixture(model, 0, with_plain=True), mixture(model, 4, with_plain=True)
    keys = target_modules(model, BOTH)
    plain = AdapterWeights({key: shrunk(pair(tuple(weight_of(model, key).shape))) for key in keys})
    assert "lora" in first.kinds() and plain.is_plain
    strengths = {"one": 0.7, "two": -0.4, "plain": 1.2}
    wanted = with_deltas(model, [(first, 0.7), (second, -0.4), (plain, 1.2)])
    collected = {}
    for order in (("one", "two", "plain"), ("plain", "two", "one")):
        for name in order:
            attach(model, {"one": first, "two": second, "plain": plain}[name], name)
        set_strengths(model, strengths)
        collected[order] = output(model)
        torch.testing.assert_close(collected[order], wanted, rtol=1e-3, atol=1e-4)
        for name in order:
            detach(model, name)


def test_strength_zero_is_the_base_bit_for_bit(model: DiffusionModel) -> None:
    base = output(model)
    attach(model, mixture(model, 0, with_plain=True), "one")
    assert not torch.equal(output(model), base)
    for nothing in ({"one": 0.0}, {}, {"one": {"unet": 0.0}}):
        set_strengths(model, nothing)
        assert torch.equal(output(model), base)


def test_an_adapter_at_strength_zero_takes_no_part(model: DiffusionModel) -> None:
    """0 times what overflowed is no number: only what is not computed at all leaves the base alone."""
    whole = mixture(model, 0)
    broken = {
        key: dataclasses.replace(update, alpha=1e300)  # type: ignore[type-var]
        for key, update in whole.all_items()
        if "alpha" in {field.name for field in dataclasses.fields(update)}  # type: ignore[arg-type]
    }
    assert len(broken) > 10
    base = output(model)
    attach(model, AdapterWeights(broken), "one")
    set_strengths(model, {"one": 1.0})
    assert not bool(torch.isfinite(output(model)).all())
    set_strengths(model, {"one": 0.0})
    assert torch.equal(output(model), base)


def test_an_adapter_comes_and_goes_beside_another(model: DiffusionModel) -> None:
    first, second = mixture(model, 0), mixture(model, 1)
    attach(model, first, "one")
    alone = output(model)
    attach(model, second, "two")
    assert [key for key, _ in updates_in(model, "one")] == [key for key, _ in first.all_items()]
    detach(model, "two")
    set_strengths(model, {"one": 1.0})
    assert torch.equal(output(model), alone)


def test_attaching_leaves_only_the_new_adapter_acting(model: DiffusionModel) -> None:
    whole = mixture(model, 0)
    plain = AdapterWeights(
        {key: shrunk(pair(tuple(weight_of(model, key).shape))) for key in target_modules(model, BOTH)}
    )
    for first, second in ((whole, plain), (plain, whole)):
        attach(model, second, "two")
        alone = output(model)
        detach(model, "two")
        attach(model, first, "one")
        assert not torch.equal(output(model), alone)
        attach(model, second, "two")
        assert torch.equal(output(model), alone)
        detach(model, "one")
        detach(model, "two")


def test_merged_equals_beside_and_is_exactly_undone(model: DiffusionModel) -> None:
    base, before = output(model), state(model)
    attach(model, mixture(model, 0, with_plain=True), "one")
    attach(model, mixture(model, 3), "two")
    strengths: dict[str, Strength] = {"one": 0.8, "two": {"unet": -0.5}}
    set_strengths(model, strengths)
    hooked = output(model)
    merged = Merged(model, strengths)
    torch.testing.assert_close(output(model), hooked, rtol=1e-3, atol=1e-4)
    merged.undo()
    assert torch.equal(output(model), base)
    set_strengths(model, strengths)
    assert torch.equal(output(model), hooked)
    detach(model, "one")
    detach(model, "two")
    after = state(model)
    assert len(after) == len(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_dora_at_half_strength_is_half_way_to_its_weight(model: DiffusionModel) -> None:
    key = next(k for k in target_modules(model, BOTH) if k.path.endswith("attn2.to_k"))
    weight = weight_of(model, key)
    original = weight.detach().clone()
    update = dora(pair(tuple(weight.shape)), original)
    attach(model, AdapterWeights({key: update}), "one")
    set_strengths(model, {"one": 0.5})
    actual = output(model)
    detach(model, "one")
    weight.data.copy_((original + update.merged(original)) / 2)
    torch.testing.assert_close(output(model), actual, rtol=1e-4, atol=1e-5)
    weight.data.copy_(original)


def test_a_1x1_convolution_takes_flat_factors_and_other_shapes_are_refused(model: DiffusionModel) -> None:
    pointwise = next(k for k in target_modules(model, BOTH) if weight_of(model, k).shape[2:] == (1, 1))
    shape = tuple(weight_of(model, pointwise).shape)
    flat = AdapterWeights({pointwise: loha(shape[:2])})
    wanted = with_deltas(model, [(flat, 1.0)])
    attach(model, flat, "one")
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)
    detach(model, "one")
    wide = AdapterWeights({pointwise: loha((shape[0], shape[1] + 1))})
    with pytest.raises(AdapterFileError, match=r"in the adapter but .* use the base"):
        attach(model, wide, "one")
    plain = pair(shape)
    linear = AdapterWeights(
        {pointwise: LowRankPair(plain.down[:, :, 0, 0], plain.up[:, :, 0, 0], plain.alpha)}
    )
    wanted = with_deltas(model, [(AdapterWeights({pointwise: plain}), 1.0)])
    attach(model, linear, "one")
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)
    detach(model, "one")


def test_factors_of_a_file_in_half_precision_act_in_a_bf16_base(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.bfloat16, device=torch.device("cpu"))
    model.prepare(training=False)
    base = output(model)
    weights = mixture(model, 0).to(torch.float16)
    attach(model, weights, "one")
    hooked = output(model)
    change = float((hooked - base).abs().mean())
    merged = Merged(model, {"one": 1.0})
    assert change > 0 and float((output(model) - hooked).abs().mean()) < 0.3 * change
    merged.undo()
    set_strengths(model, {})
    assert torch.equal(output(model), base)


def test_images_are_made_with_any_mixture(shared: DiffusionModel) -> None:
    generator = ImageGenerator(shared)
    files = [AdapterFile(mixture(shared, seed), AdapterInfo("sd1", f"style{seed}")) for seed in (0, 1)]
    names = [generator.add_adapter(file) for file in files]
    request = GenerateRequest("cat", height=32, width=32, steps=2, guidance=3.0, sampler="DDIM", seed=1)
    settings: list[dict[str, Strength]] = [{}, {names[0]: 0.0}, {names[0]: 1.0, names[1]: 0.5}]
    requests = [dataclasses.replace(request, strengths=strengths) for strengths in settings]
    nothing, zero, both = (generated.image.tobytes() for generated in generator.generate(requests))
    assert nothing == zero != both
    for name in names:
        generator.remove_adapter(name)
    assert generator.generate(requests[:1])[0].image.tobytes() == nothing
