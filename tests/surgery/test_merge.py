"""Merging: exact sums, and TIES and DARE as the papers define them, against dense float64 matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.errors import AdapterFileError, ConfigError
from sdlora.formats.adapter_files import read_adapter
from sdlora.surgery.factors import factors_of
from sdlora.surgery.merge import MergeMethod, merge_adapters, merged
from sdlora.surgery.methods import dropped, elected, layer_seed, trimmed
from sdlora.surgery.result import finish
from sdlora.surgery.strengths import ModuleStrength
from surgery.adapters import dense, exact, mixed_adapter, relative_errors, saved, truncated


def total(
    adapters: list[tuple[AdapterWeights, ModuleStrength]],
) -> dict[ModuleKey, Tensor]:
    """The weighted sum of the dense updates in float64."""
    collected: dict[ModuleKey, Tensor] = {}
    for weights, strength in adapters:
        for module, pair in weights.items():
            term = strength.of(module) * exact(pair)
            collected[module] = collected[module] + term if module in collected else term
    return collected


def test_the_sum_of_three_adapters_of_mixed_ranks_is_exact(tmp_path: Path) -> None:
    adapters = [mixed_adapter(0), mixed_adapter(1, ranks=(2, 5), scales=(2.0, 0.7)), mixed_adapter(2)]
    files = [saved(tmp_path, f"a{i}", weights) for i, weights in enumerate(adapters)]
    strengths = [0.8, -1.3, {"unet": 0.5, "text_encoder": 0.25}]
    report = merge_adapters(
        list(zip(files, strengths, strict=True)), tmp_path / "sum.safetensors", report=True
    )
    weights_read = read_adapter(tmp_path / "sum.safetensors").weights
    wanted = total([(w, ModuleStrength(s)) for w, s in zip(adapters, strengths, strict=True)])  # type: ignore[arg-type]
    assert max(relative_errors(weights_read, wanted).values()) < 2e-7
    for module, pair in weights_read.items():
        assert pair.rank == sum(weights.pairs[module].rank for weights in adapters)
    assert report.total_error is not None and report.total_error < 2e-7


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.floats(-3, 3, allow_subnormal=False), st.floats(0.1, 40)),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_any_ranks_weights_and_alphas_sum_exactly(terms: list[tuple[int, float, float]], conv: bool) -> None:
    module, generator = ModuleKey("unet", "conv_in"), torch.Generator().manual_seed(len(terms))
    shape, ones = ((4, 3, 3), (1, 1)) if conv else ((4,), ())
    given_adapters, wanted = [], torch.zeros(6, 36 if conv else 4, dtype=torch.float64)
    for rank, weight, alpha in terms:
        pair = LowRankPair(
            torch.randn(rank, *shape, generator=generator),
            torch.randn(6, rank, *ones, generator=generator),
            alpha,
        )
        given_adapters.append((AdapterWeights({module: pair}), ModuleStrength(weight)))
        wanted += weight * exact(pair)
    if all(weight == 0.0 for _, weight, _ in terms):
        with pytest.raises(ConfigError, match="every weight is 0"):
            list(merged(given_adapters, MergeMethod()))
        return
    weights, [change] = finish(
        merged(given_adapters, MergeMethod()), "webui", torch.float32, with_errors=True
    )
    pair = weights.pairs[module]
    sizes = sum(
        abs(w) * float(exact(a.pairs[module]).norm())
        for (a, _), (_, w, _) in zip(given_adapters, terms, strict=True)
    )
    assert float((exact(pair) - wanted).norm()) <= 3e-7 * sizes + 1e-30
    assert change.norm == pytest.approx(float(wanted.norm()), rel=1e-6, abs=1e-7 * sizes)


def test_a_modules_weight_of_zero_takes_it_out(tmp_path: Path) -> None:
    weights = mixed_adapter()
    source = saved(tmp_path, "one", weights)
    report = merge_adapters([(source, {"unet": 0.5})], tmp_path / "half.safetensors")
    weights_read = read_adapter(tmp_path / "half.safetensors").weights
    assert weights_read.components() == ["unet"]
    assert any("weight 0" in note for note in report.notes)
    wanted = {m: 0.5 * exact(pair) for m, pair in weights.items() if m.component == "unet"}
    assert max(relative_errors(weights_read, wanted).values()) < 2e-7


def test_adapters_with_different_modules_are_all_there(tmp_path: Path) -> None:
    weights = mixed_adapter()
    unet = AdapterWeights({m: p for m, p in weights.items() if m.component == "unet"})
    text = AdapterWeights({m: p for m, p in mixed_adapter(5).items() if m.component != "unet"})
    files = [(saved(tmp_path, "unet", unet), 1.0), (saved(tmp_path, "text", text), -0.5)]
    merge_adapters(files, tmp_path / "both.safetensors")
    wanted = {m: exact(p) for m, p in unet.items()} | {m: -0.5 * exact(p) for m, p in text.items()}
    assert max(relative_errors(read_adapter(tmp_path / "both.safetensors").weights, wanted).values()) < 2e-7


def test_block_weights_multiply_the_adapters_own(tmp_path: Path) -> None:
    weights = mixed_adapter()
    source = saved(tmp_path, "one", weights)
    blocks = {"up_blocks": 0.5, "up_blocks.1": 2.0, "text_encoder": -1.0}
    merge_adapters([(source, 0.5)], tmp_path / "out.safetensors", blocks=[blocks])
    wanted = {}
    for module, pair in weights.items():
        factor = -1.0 if module.component == "text_encoder" else 1.0
        if module.path.startswith("up_blocks."):
            factor = 2.0 if module.path.startswith("up_blocks.1.") else 0.5
        wanted[module] = 0.5 * factor * exact(pair)
    assert max(relative_errors(read_adapter(tmp_path / "out.safetensors").weights, wanted).values()) < 2e-7


def test_a_cut_sum_is_the_truncated_svd_of_the_sum(tmp_path: Path) -> None:
    adapters = [mixed_adapter(0), mixed_adapter(1)]
    files = [(saved(tmp_path, "a", adapters[0]), 1.0), (saved(tmp_path, "b", adapters[1]), -0.7)]
    report = merge_adapters(files, tmp_path / "out.safetensors", rank=3, report=True)
    dense = total([(adapters[0], ModuleStrength(1.0)), (adapters[1], ModuleStrength(-0.7))])
    weights_read = read_adapter(tmp_path / "out.safetensors").weights
    cut = {module: truncated(matrix, 3) for module, matrix in dense.items()}
    assert max(relative_errors(weights_read, cut).values()) < 3e-7
    measured = relative_errors(weights_read, dense)
    assert max(measured.values()) > 0.1
    for change in report.changes:
        assert change.error == pytest.approx(measured[change.module], rel=1e-4)


def test_half_precision_adapters_merge_within_their_rounding(tmp_path: Path) -> None:
    adapters = [mixed_adapter(i, scales=(1 / 32,), dtype=torch.float16) for i in range(2)]
    files = [saved(tmp_path, f"a{i}", weights, torch.float16) for i, weights in enumerate(adapters)]
    merge_adapters([(files[0], 0.3), (files[1], -0.6)], tmp_path / "sum.safetensors")
    weights_read = read_adapter(tmp_path / "sum.safetensors").weights
    assert {pair.up.dtype for pair in weights_read.pairs.values()} == {torch.float16}
    wanted = total([(adapters[0], ModuleStrength(0.3)), (adapters[1], ModuleStrength(-0.6))])
    assert max(relative_errors(weights_read, wanted).values()) < 6e-4


def test_trimming_keeps_the_largest_share() -> None:
    delta = torch.tensor([[0.1, -5.0, 2.0], [-0.3, 4.0, 0.0]])
    assert torch.equal(trimmed(delta, 0.5), torch.tensor([[0.0, -5.0, 2.0], [0.0, 4.0, 0.0]]))
    assert torch.equal(trimmed(delta, 1.0), delta)


def test_election_takes_the_mean_of_those_that_agree_with_the_larger_side() -> None:
    deltas = [
        torch.tensor([3.0, 1.0, 0.0, 2.0]),
        torch.tensor([1.0, -4.0, 0.0, -2.0]),
        torch.tensor([-2.0, -2.0, 5.0, 0.0]),
    ]
    # first: 3 + 1 - 2 > 0, the mean of 3 and 1; second: -4 and -2; third: 5 alone; last: a draw gives nothing
    assert torch.equal(elected(deltas), torch.tensor([2.0, -3.0, 5.0, 0.0]))


def test_dropping_keeps_the_expectation_and_repeats_with_its_seed() -> None:
    delta = torch.ones(400, 400)
    draws = [dropped(delta, 0.25, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert set(draws[0].unique().tolist()) == {0.0, 4.0}
    assert float(draws[0].mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_the_methods_work_on_the_updates_and_cut_the_result(tmp_path: Path, method: str) -> None:
    adapters = [mixed_adapter(0), mixed_adapter(1)]
    files = [(saved(tmp_path, "a", adapters[0]), 1.0), (saved(tmp_path, "b", adapters[1]), -0.5)]
    seed = None if method == "ties" else 7
    report = merge_adapters(
        files, tmp_path / "out.safetensors", method=method, density=0.4, seed=seed, rank=4, report=True
    )
    weights_read = read_adapter(tmp_path / "out.safetensors").weights
    wanted, cut = {}, {}
    for module in adapters[0].pairs:
        deltas = [
            weight * exact(weights.pairs[module]).float()
            for weights, weight in zip(adapters, (1.0, -0.5), strict=True)
        ]
        if method == "ties":
            matrix = elected([trimmed(delta, 0.4) for delta in deltas])
        else:
            thin = [
                dropped(delta, 0.4, torch.Generator().manual_seed(layer_seed(7, module, place)))
                for place, delta in enumerate(deltas)
            ]
            matrix = elected(thin) if method == "dare-ties" else thin[0] + thin[1]
        wanted[module] = matrix.double()
        cut[module] = truncated(matrix.double(), 4)
    assert max(relative_errors(weights_read, cut).values()) < 1e-5
    measured = relative_errors(weights_read, wanted)
    for change in report.changes:
        assert change.error == pytest.approx(measured[change.module], rel=1e-3, abs=1e-6)


def test_the_result_does_not_depend_on_how_an_adapter_is_written(tmp_path: Path) -> None:
    module = ModuleKey("unet", "mid_block.attentions.0.proj_in")
    pair = mixed_adapter().pairs.get(module) or LowRankPair(torch.randn(3, 8), torch.randn(8, 3), 1.5)
    mixing = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, 1.0]])
    other = LowRankPair(
        torch.linalg.solve(mixing, pair.down.flatten(1)).reshape(pair.down.shape),
        (pair.up.flatten(1) @ mixing).reshape(pair.up.shape),
        pair.alpha,
    )
    torch.testing.assert_close(dense(factors_of(other)), dense(factors_of(pair)), rtol=1e-4, atol=1e-5)
    results = []
    for number, update in enumerate((pair, other)):
        file = saved(tmp_path, f"a{number}", AdapterWeights({module: update}))
        target = tmp_path / f"out{number}.safetensors"
        merge_adapters([(file, 1.0)], target, method="ties", density=0.3, rank=3)
        results.append(exact(read_adapter(target).weights.pairs[module]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_the_header_names_the_sources_without_folders(tmp_path: Path) -> None:
    files = [saved(tmp_path, name, mixed_adapter(i)) for i, name in enumerate(("ink", "oil"))]
    merge_adapters([(files[0], 0.5), (files[1], {"unet": 0.2})], tmp_path / "mix.safetensors")
    info = read_adapter(tmp_path / "mix.safetensors").info
    [record] = json.loads(info.metadata["sdlora.surgery"])
    assert [source["file"] for source in record["sources"]] == ["ink.safetensors", "oil.safetensors"]
    assert record["sources"][1]["strength"] == {"unet": 0.2, "text_encoder": 0.0, "text_encoder_2": 0.0}
    assert str(tmp_path) not in json.dumps(dict(info.metadata))
    assert info.trigger_words == ("inkstyle", "ink, thick")
    assert info.metadata["ss_base_model_version"] == "sd_v1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sum"}, "--method sum"),
        ({"density": 0.5}, "no effect with --method linear"),
        ({"seed": 1}, "--seed 1"),
        ({"method": "ties", "rank": 4}, "needs --density"),
        ({"method": "ties", "density": 0.2}, "give --rank"),
        ({"method": "dare", "density": 1.5, "rank": 4}, "--density 1.5"),
        ({"method": "ties", "density": 0.2, "rank": 4, "seed": 3}, "--seed 3"),
        ({"blocks": [{"IN04": 0.5, "OUT99": 1.0}]}, "--block OUT99"),
    ],
)
def test_settings_without_effect_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    source = saved(tmp_path, "one", mixed_adapter())
    with pytest.raises(ConfigError, match=message):
        merge_adapters([(source, 1.0)], tmp_path / "out.safetensors", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out.safetensors").exists()


def test_layers_of_different_shapes_are_refused(tmp_path: Path) -> None:
    module = ModuleKey("unet", "mid_block.attentions.0.proj_in")
    files = [
        saved(
            tmp_path,
            str(width),
            AdapterWeights({module: LowRankPair(torch.ones(2, width), torch.ones(8, 2), 2.0)}),
        )
        for width in (8, 9)
    ]
    with pytest.raises(AdapterFileError, match=r"mid_block\.attentions\.0\.proj_in"):
        merge_adapters([(file, 1.0) for file in files], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_other_kinds_are_taken_as_the_plain_lora_they_are_equal_to(tmp_path: Path) -> None:
    module = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    loha, pair = kinds.loha((16, 16), rank=2), kinds.pair((16, 16), seed=4)
    files = [saved(tmp_path, n, AdapterWeights({module: u})) for n, u in (("loha", loha), ("lora", pair))]
    report = merge_adapters([(files[0], 0.5), (files[1], 2.0)], tmp_path / "out.safetensors", report=True)
    weights_read = read_adapter(tmp_path / "out.safetensors").weights
    wanted = {module: 0.5 * loha.delta().double() + 2.0 * exact(pair)}
    assert max(relative_errors(weights_read, wanted).values()) < 1e-6
    assert weights_read.pairs[module].rank == 4 + pair.rank
    assert any("LoHa modules were taken as plain LoRA of rank up to 4" in note for note in report.notes)


def test_a_dora_is_refused_with_the_way_out(tmp_path: Path) -> None:
    module = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    dora = kinds.dora(kinds.pair((16, 16)), torch.randn(16, 16))
    source = saved(tmp_path, "dora", AdapterWeights({module: dora}))
    with pytest.raises(AdapterFileError, match=r"is a DoRA.*give the base it was trained on, --base BASE"):
        merge_adapters([(source, 1.0)], tmp_path / "out.safetensors")
