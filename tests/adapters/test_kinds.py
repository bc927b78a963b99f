"""Updates of every kind against their formulas, written out in float64, and against PEFT's own layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from sdlora.adapters.kinds.dora import DoRA
from sdlora.adapters.kinds.loha import LoHa
from sdlora.adapters.kinds.lokr import LoKr
from sdlora.adapters.kinds.table import KINDS
from sdlora.adapters.kinds.tucker import TuckerPair
from sdlora.adapters.plain import as_plain, to_plain
from sdlora.errors import AdapterFileError

from .kinds import CONVOLUTION, LINEAR, POINTWISE, dora, every_kind, loha, lokr, pair, tucker

SHAPES = [LINEAR, CONVOLUTION, POINTWISE]


def base_weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def with_core(a: Tensor, b: Tensor, core: Tensor) -> Tensor:
    return torch.einsum("ijkl,ip,jr->prkl", core.double(), a.double(), b.double())


def formula(update: Update, weight: Tensor) -> Tensor:
    """The definition of each kind (formats.md 1.1, 3.1, 3.3), in float64."""
    shape = weight.shape
    if isinstance(update, DoRA):
        total = weight.double() + formula(update.direction, weight)
        by_output = update.magnitude.shape[0] == shape[0]
        rows = total if by_output else total.transpose(0, 1)
        length = rows.flatten(1).square().sum(1).sqrt()
        scaled = rows * (update.magnitude.double().flatten() / length).reshape(-1, *[1] * (len(shape) - 1))
        return (scaled if by_output else scaled.transpose(0, 1)) - weight.double()
    if isinstance(update, LowRankPair):
        product = update.up.double().flatten(1) @ update.down.double().flatten(1)
        return (update.alpha / update.down.shape[0] * product).reshape(shape)
    if isinstance(update, TuckerPair):
        up, down = update.up.flatten(1).T, update.down.flatten(1)
        return update.alpha / down.shape[0] * with_core(up, down, update.mid)
    if isinstance(update, LoHa):
        sides = ((update.w1_a, update.w1_b, update.t1), (update.w2_a, update.w2_b, update.t2))
        first, other = (a.double() @ b.double() if t is None else with_core(a, b, t) for a, b, t in sides)
        return (first * other * update.alpha / update.w1_b.shape[0]).reshape(shape)
    assert isinstance(update, LoKr)
    scale = 1.0
    w1, w2 = update.w1, update.w2
    if w1 is None:
        assert update.w1_a is not None and update.w1_b is not None
        w1, scale = update.w1_a.double() @ update.w1_b.double(), update.alpha / update.w1_b.shape[0]
    if w2 is None:
        assert update.w2_a is not None and update.w2_b is not None
        scale = update.alpha / update.w2_b.shape[0]
        a, b = update.w2_a, update.w2_b
        w2 = a.double() @ b.double() if update.t2 is None else with_core(a, b, update.t2)
    rows, columns = shape[0] // w1.shape[0], shape[1] // w1.shape[1]
    w2 = w2.double().reshape(rows, columns, *shape[2:])
    actual = torch.zeros(shape, dtype=torch.float64)
    for i in range(w1.shape[0]):
        for j in range(w1.shape[1]):
            actual[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = w1[i, j].double() * w2
    return scale * actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_is_its_formula(shape: tuple[int, ...]) -> None:
    weight = base_weight(shape)
    updates = every_kind(shape, weight)
    assert len(updates) == (12 if shape == CONVOLUTION else 9)
    assert {update.kind for update in updates.values()} <= set(KINDS)
    for name, update in updates.items():
        wanted = formula(update, weight)
        assert update.shape == shape, name
        for actual in (update.delta(weight), *([] if update.kind == "dora" else [update.delta()])):
            assert actual.dtype == torch.float32 and actual.shape == shape, name
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_half_precision_factors_are_computed_with_in_float32() -> None:
    weight = base_weight(CONVOLUTION)
    updates = every_kind(CONVOLUTION, weight)
    for name, update in updates.items():
        half = update.to(torch.float16)
        dtypes = {name: tensor.dtype for name, tensor in half.tensors().items()}
        assert dtypes.pop("dora_scale", torch.float32) == torch.float32, name
        assert set(dtypes.values()) == {torch.float16}, name
        again = half.to(torch.float32).delta(weight)
        assert torch.equal(half.delta(weight), again) and again.dtype == torch.float32, name


def test_two_full_kronecker_factors_have_scale_one_whatever_alpha_says() -> None:
    update = lokr(LINEAR, form="none", alpha=7.0)
    assert update.scale == 1.0 and lokr(LINEAR, form="first", alpha=7.0).scale == pytest.approx(7 / 3)
    assert update.w1 is not None and update.w2 is not None
    assert torch.equal(update.delta(), torch.kron(update.w1, update.w2))


def test_a_decomposed_second_factor_decides_the_scale_when_both_are() -> None:
    update = lokr(LINEAR, form="both")
    odd = dataclasses.replace(update, w1_a=torch.ones(2, 5), w1_b=torch.ones(5, 4), alpha=6.0)
    assert (odd.rank, odd.scale) == (3, 2.0)


def test_the_norm_of_a_zero_row_does_no_harm() -> None:
    weight = torch.zeros(LINEAR)
    update = DoRA(LowRankPair(torch.zeros(1, 12), torch.zeros(8, 1), 1.0), torch.ones(8, 1))
    assert torch.equal(update.merged(weight), weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TuckerPair(torch.ones(2, 4, 1, 1), torch.ones(2, 3, 3, 3), torch.ones(5, 2, 1, 1), 1.0),
        lambda: LoHa(torch.ones(5, 2), torch.ones(2, 4), torch.ones(5, 2), torch.ones(2, 3), 1.0),
        lambda: LoHa(*[torch.ones(2, 2)] * 4, 1.0, t1=torch.ones(2, 2, 3, 3)),
        lambda: LoHa(*[torch.ones(2, 2)] * 4, float("nan")),
        lambda: LoKr(None, torch.ones(2, 2), 1.0, w1_a=torch.ones(2, 2)),
        lambda: LoKr(torch.ones(2, 2), torch.ones(2, 2), 1.0, w2_a=torch.ones(2, 2)),
        lambda: LoKr(torch.ones(2, 2), None, 1.0, w2_a=torch.ones(2, 3), w2_b=torch.ones(2, 2)),
        lambda: DoRA(pair(LINEAR), torch.ones(7, 1)),
        lambda: DoRA(dora(pair(LINEAR), base_weight(LINEAR)), torch.ones(8, 1)),
    ],
)
def test_factors_that_do_not_fit_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"do not fit|finite"):
        make()


def peft_delta(config: Any, layer: nn.Module, update: Update) -> tuple[nn.Module, Tensor]:
    """Put peft's own layer around a base layer, give it the update's factors, and return what it adds."""
    model = nn.Sequential(layer)
    inject_adapter_in_model(config, model, "a")
    wrapped: Any = model[0]
    for name, tensor in update.tensors().items():
        if name.startswith(("hada_", "lokr_")):
            getattr(wrapped, name)["a"].data.copy_(tensor)
    return wrapped, wrapped.get_delta_weight("a").detach()


@pytest.mark.parametrize(("shape", "core"), [(LINEAR, False), (CONVOLUTION, False), (CONVOLUTION, True)])
def test_loha_is_pefts(shape: tuple[int, ...], core: bool) -> None:
    layer = nn.Linear(12, 8) if shape == LINEAR else nn.Conv2d(12, 8, 3)
    update = loha(shape, core=core)
    config = LoHaConfig(r=3, alpha=1.5, target_modules=["0"], use_effective_conv2d=core)
    _, actual = peft_delta(config, layer, update)
    torch.testing.assert_close(actual, update.delta(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "form"), [(LINEAR, "second"), (LINEAR, "both"), (CONVOLUTION, "core"), (CONVOLUTION, "second")]
)
def test_lokr_is_pefts(shape: tuple[int, ...], form: str) -> None:
    shape = (32, 48, *shape[2:])
    layer = nn.Linear(48, 32) if len(shape) == 2 else nn.Conv2d(48, 32, 3)
    update = lokr(shape, (4, 6), rank=1, alpha=0.5, form=form)
    config = LoKrConfig(
        r=1,
        alpha=0.5,
        target_modules=["0"],
        decompose_both=form == "both",
        use_effective_conv2d=form == "core",
    )
    wrapped, actual = peft_delta(config, layer, update)
    assert sum(len(getattr(wrapped, name)) for name in wrapped.adapter_layer_names) == len(update.tensors())
    torch.testing.assert_close(actual, update.delta(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION], ids=str)
def test_dora_is_pefts(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(12, 8) if shape == LINEAR else nn.Conv2d(12, 8, 3)
    weight = layer.weight.detach().clone()
    direction = pair(shape)
    update = dora(direction, weight)
    model = nn.Sequential(layer)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=1.5, use_dora=True, target_modules=["0"]), model, "a")
    wrapped: Any = model[0]
    wrapped.lora_A["a"].weight.data.copy_(direction.down)
    wrapped.lora_B["a"].weight.data.copy_(direction.up)
    magnitude = wrapped.lora_magnitude_vector["a"].weight
    magnitude.data.copy_(update.magnitude.reshape(magnitude.shape))
    inputs = torch.randn((2, *([12] if shape == LINEAR else [12, 6, 6])))
    wanted = wrapped(inputs).detach()
    layer.weight.data.copy_(update.merged(weight))
    torch.testing.assert_close(layer(inputs).detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_becomes_a_plain_lora_exactly(shape: tuple[int, ...]) -> None:
    weight = base_weight(shape)
    updates = every_kind(shape, weight)
    for name, update in updates.items():
        plain = as_plain(update, weight)
        assert plain.error == 0.0 and plain.pair.rank == update.factors(weight)[1].shape[0], name
        assert plain.pair.shape == shape, name
        torch.testing.assert_close(
            plain.pair.delta().double(), formula(update, weight), rtol=1e-5, atol=1e-5, msg=name
        )


def test_exact_ranks_are_products_where_they_are_below_the_layers_side() -> None:
    large = (40, 60)
    assert as_plain(loha(large, rank=3)).pair.rank == 9
    assert as_plain(loha(LINEAR, rank=3)).pair.rank == 8  # of a layer with 8 outputs
    assert as_plain(lokr(large, (2, 3), rank=3, form="second")).pair.rank == 6
    assert as_plain(lokr(large, (4, 6), rank=2, form="both")).pair.rank == 4
    assert as_plain(tucker(CONVOLUTION, rank=3)).pair.rank == 3
    wide = as_plain(loha(large, rank=3))
    torch.testing.assert_close(wide.pair.delta(), loha(large, rank=3).delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_cut_is_the_closest_of_that_rank_and_its_error_is_told(rank: int) -> None:
    for name, update in every_kind(LINEAR, base_weight(LINEAR)).items():
        weight = base_weight(LINEAR)
        plain = as_plain(update, weight, rank)
        delta = formula(update, weight)
        u, sizes, v = torch.linalg.svd(delta, full_matrices=False)
        closest = (u[:, :rank] * sizes[:rank]) @ v[:rank]
        assert plain.pair.rank <= rank
        torch.testing.assert_close(plain.pair.delta().double(), closest, rtol=1e-4, atol=1e-5, msg=name)
        left_over = torch.linalg.norm(delta - closest) / torch.linalg.norm(delta)
        assert plain.error == pytest.approx(float(left_over), rel=1e-4, abs=1e-6), name


def test_plain_code_refuses_other_kinds_instead_of_leaving_them_out() -> None:
    key, other = ModuleKey("unet", "mid_block.one"), ModuleKey("unet", "mid_block.two")
    plain = AdapterWeights({key: pair(LINEAR)})
    mixed = AdapterWeights({key: pair(LINEAR), other: loha(LINEAR)})
    assert plain.is_plain and not mixed.is_plain
    assert plain.kinds() == {"lora": 1} and mixed.kinds() == {"lora": 1, "loha": 1}
    assert (len(mixed), mixed.components(), mixed.ranks()) == (2, ["unet"], [3])
    assert [actual for actual, _ in mixed.all_items()] == [key, other]
    for read in (lambda: mixed.pairs, lambda: list(mixed.items()), lambda: mixed.component("unet")):
        with pytest.raises(AdapterFileError, match=r"mid_block\.two` holds a loha update"):
            read()


def test_a_whole_adapter_becomes_plain() -> None:
    weight = base_weight(LINEAR)
    keys = {name: ModuleKey("unet", f"mid_block.{name}") for name in every_kind(LINEAR, weight)}
    weights = AdapterWeights({keys[name]: update for name, update in every_kind(LINEAR, weight).items()})
    with pytest.raises(AdapterFileError, match=r"DoRA.*base model"):
        to_plain(weights)
    exact, errors = to_plain(weights, base=lambda key: weight)
    assert exact.is_plain and set(errors) == set(keys.values()) - {keys["lora"]}
    assert set(errors.values()) == {0.0}
    cut, errors = to_plain(weights, base=lambda key: weight, rank=2)
    assert cut.ranks() == [2, 3]  # the pair that was plain already keeps its rank
    assert all(0.01 < error < 1 for error in errors.values())
