"""Adapters merged by themselves while many images are drawn: the same images, and the base is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from sdlora.adapters.attach import Merged, create_adapter
from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair
from sdlora.adapters.strength import Strength
from sdlora.config.schema import AdapterConfig
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.merging import drawn_in_turn, seconds_to_merge
from sdlora.generation.render import GeneratedImage, GenerateRequest


def request(seed: int, **strengths: Strength) -> GenerateRequest:
    return GenerateRequest(
        "an icon of a cat", height=32, width=32, steps=2, guidance=3.0, sampler="DDIM", seed=seed,
        strengths=strengths,
    )  # fmt: skip


@pytest.fixture(scope="module")
def generator(tiny_base: Path) -> ImageGenerator:
    """The tiny base with two adapters that change what is drawn."""
    generator = ImageGenerator.load(str(tiny_base), device="cpu", precision="fp32")
    for number, name in enumerate("ab"):
        noise = torch.Generator().manual_seed(number)
        config = AdapterConfig(targets="all", rank=4, alpha=4.0, text_encoder=True)
        pairs = create_adapter(generator.model, config, number).items()
        weights = AdapterWeights(
            {
                key: LowRankPair(pair.down, 0.3 * torch.randn(pair.up.shape, generator=noise), pair.alpha)
                for key, pair in pairs
            }
        )
        generator.add_adapter(AdapterFile(weights, AdapterInfo(name=name)))
    return generator


@pytest.fixture
def merges(generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The strengths that were merged; afterwards every weight must be as it was."""
    before, merged, merge = state(generator), [], generator.merge

    def noted(strengths: Mapping[str, Strength]) -> None:
        merged.append(dict(strengths))
        merge(strengths)

    monkeypatch.setattr(generator, "merge", noted)
    yield merged
    after = state(generator)
    assert len(before) > 100 and all(torch.equal(after[name], before[name]) for name in before)


def state(generator: ImageGenerator) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": tensor.clone()
        for component, module in generator.model.components().items()
        for name, tensor in module.state_dict().items()
    }


def at_once(generator: ImageGenerator, strengths: Mapping[str, Strength]) -> float:
    return 0.0


def never(generator: ImageGenerator, strengths: Mapping[str, Strength]) -> float:
    return 1e9


def differ(first: GeneratedImage, second: GeneratedImage) -> int:
    pixels = [numpy.asarray(drawn.image).astype(int) for drawn in (first, second)]
    return int(abs(pixels[0] - pixels[1]).max())


def test_many_images_at_equal_strengths_are_drawn_merged_and_the_same(
    generator: ImageGenerator, merges: list[dict[str, Any]]
) -> None:
    requests = [request(seed, a=0.8, b=-0.3) for seed in range(4)] + [request(9, a=0.8), request(9)]
    told: list[tuple[int, int]] = []
    drawn = list(drawn_in_turn(generator, requests, lambda *done: told.append(done), estimate=at_once))
    assert merges == [{"a": 0.8, "b": -0.3}], "the first is drawn as it is, single ones are, too"
    assert told == [(done, 12) for done in range(1, 13)]
    plain = [generator.generate([asked])[0] for asked in requests]
    assert [image.request for image in drawn] == requests
    assert max(differ(*pair) for pair in zip(drawn, plain, strict=True)) <= 1
    assert differ(drawn[4], drawn[5]) > 3


def test_what_would_cost_more_than_it_saves_is_not_merged(
    generator: ImageGenerator, merges: list[dict[str, Any]]
) -> None:
    list(drawn_in_turn(generator, [request(seed, a=1.0) for seed in range(3)], estimate=never))
    list(drawn_in_turn(generator, [request(1, a=part / 4) for part in range(4)], estimate=at_once))  # a sweep
    assert merges == []


def test_a_drawing_that_is_broken_off_leaves_nothing_merged(
    generator: ImageGenerator, merges: list[dict[str, Any]]
) -> None:
    requests = [request(seed, a=1.0) for seed in range(4)]
    with closing(drawn_in_turn(generator, requests, estimate=at_once)) as drawn:
        next(drawn)
        next(drawn)
    calls = []

    def cancel(done: int, total: int) -> None:
        calls.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(drawn_in_turn(generator, requests, cancel, estimate=at_once))
    assert len(merges) == 2 and calls == [1, 2, 3, 4, 5]
    generator.generate([request(1, b=1.0)])  # would be refused while adapters are merged


def test_the_time_to_merge_is_estimated_from_the_layers_that_act(generator: ImageGenerator) -> None:
    assert 0 < seconds_to_merge(generator, {"a": 1.0}) < 60
    assert seconds_to_merge(generator, {"a": 0.0}) == seconds_to_merge(generator, {}) == float("inf")


def test_weights_of_eight_bits_of_precision_are_left_alone(tiny_base: Path) -> None:
    half = ImageGenerator.load(str(tiny_base), device="cpu", precision="bf16")
    config = AdapterConfig(rank=2, alpha=2.0)
    half.add_adapter(AdapterFile(create_adapter(half.model, config, 1), AdapterInfo(name="a")))
    assert seconds_to_merge(half, {"a": 1.0}) == float("inf")


def test_memory_that_runs_out_while_merging_puts_every_weight_back(
    generator: ImageGenerator, merges: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, calls = LowRankPair.delta, []

    def fails(pair: LowRankPair, *given: Any) -> Tensor:
        calls.append(pair)
        if len(calls) > 5:
            raise MemoryError
        return delta(pair, *given)

    before = state(generator)
    monkeypatch.setattr(LowRankPair, "delta", fails)
    with pytest.raises(MemoryError):
        Merged(generator.model, {"a": 1.0})
    assert len(calls) == 6 and all(torch.equal(now, before[name]) for name, now in state(generator).items())
    calls.clear()
    requests = [request(seed, a=1.0) for seed in range(3)]
    drawn = list(drawn_in_turn(generator, requests, estimate=at_once))
    assert len(drawn) == 3 and differ(drawn[0], generator.generate(requests[:1])[0]) == 0
