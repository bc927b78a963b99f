"""Settings left open follow the data, and what the user and the base ask for goes first."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sdlora.config.defaults import BaseFacts, OpenSettings, fill_data, fill_training
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.data.batching.prepare import data_facts
from sdlora.data.reading.folder import Dataset, ImageItem
from sdlora.errors import ModelError


def dataset(count: int) -> Dataset:
    items = [
        ImageItem(Path(f"{n}.png"), f"picture {n}", 64, 64, 1, f"{n:064x}", f"{n}.png") for n in range(count)
    ]
    return Dataset(Path("folder"), tuple(items))


def facts(**recommended: object) -> BaseFacts:
    return BaseFacts("x", recommended, 512, "cuda")


def resolved(*overrides: str, count: int = 20, held: int = 0, base: BaseFacts | None = None) -> Config:
    base = base or facts()
    return filled(load_config(None, overrides), base, count, held).final()


def filled(config: Config, base: BaseFacts, count: int, held: int) -> OpenSettings:
    settings = OpenSettings(config, base)
    fill_data(settings, count)
    fill_training(settings, data_facts(settings.config, dataset(count - held), dataset(held)))
    return settings


def test_nothing_that_training_needs_stays_open() -> None:
    config = resolved()
    needed = [
        "data.resolution",
        "data.validation",
        "adapter.rank",
        "adapter.alpha",
        "optimizer.learning_rate",
        "optimizer.warmup_steps",
        "training.steps",
        "training.batch_size",
        "training.checkpoint_every",
        "sample.prompts",
    ]
    assert [key for key in needed if config.get(key) is None] == []


def test_every_choice_comes_with_a_reason() -> None:
    defaults = filled(Config(), facts(), 20, 2).defaults
    assert len(defaults) >= 10
    assert all(default.reason for default in defaults)


def test_the_user_wins_over_the_base_and_the_base_over_the_rule() -> None:
    base = facts(**{"optimizer.learning_rate": 2e-3, "training.batch_size": 8})
    assert resolved(base=base).optimizer.learning_rate == 2e-3
    assert resolved("optimizer.learning_rate=5e-5", base=base).optimizer.learning_rate == 5e-5
    assert resolved().optimizer.learning_rate == 1e-4


def test_a_base_may_recommend_how_to_learn_where_the_user_left_a_default_alone() -> None:
    base = facts(
        **{
            "adapter.targets": "all",
            "optimizer.lora_plus_ratio": 4,
            "output.dtype": "fp32",
            "adapter.dropout": 1,
        }
    )
    settings = OpenSettings(Config(), base)
    settings.take_recommended()
    config = settings.final()
    assert config.adapter.targets == "all" and config.optimizer.lora_plus_ratio == 4.0
    assert [default.key for default in settings.defaults] == ["adapter.targets", "optimizer.lora_plus_ratio"]
    assert {default.reason for default in settings.defaults} == {"recommended by the base x"}
    # nothing but how it learns is theirs to say
    assert config.output == Config().output and config.adapter.dropout == 0

    given = OpenSettings(load_config(None, ["adapter.targets=attention"]), base)
    given.take_recommended()
    assert given.final().adapter.targets == "attention"
    continued = OpenSettings(load_config(None, ["adapter.from_file=style.safetensors"]), base)
    continued.take_recommended()
    assert continued.final().adapter.targets == Config().adapter.targets


def test_an_impossible_recommendation_names_the_base_and_the_setting() -> None:
    settings = OpenSettings(Config(), facts(**{"adapter.targets": "everything"}))
    with pytest.raises(ModelError, match=r"x: its sdlora.json recommends `adapter.targets=everything`"):
        settings.take_recommended()


def test_few_images_limit_the_batch() -> None:
    assert resolved(count=3, base=facts(**{"training.batch_size": 8})).training.batch_size == 3


@pytest.mark.parametrize(("alpha", "rate"), [(16.0, 1e-4), (1.0, 1.6e-3), (8.0, 2e-4)])
def test_the_rate_makes_up_for_alpha_over_rank(alpha: float, rate: float) -> None:
    config = resolved("adapter.rank=16", f"adapter.alpha={alpha}")
    assert config.optimizer.learning_rate == pytest.approx(rate)


def test_more_images_mean_more_steps_up_to_a_limit() -> None:
    steps = [resolved(count=count).training.steps for count in (5, 20, 100, 1000, 5000)]
    assert steps == [400, 400, 2000, 3000, 3000]


def test_epochs_fix_the_length_instead_of_steps() -> None:
    config = resolved("training.epochs=3")
    assert config.training.steps is None
    assert config.total_steps(steps_per_epoch=7) == 21


def test_small_sets_hold_nothing_out() -> None:
    assert [resolved(count=count).data.validation for count in (5, 19, 20, 45, 500)] == [0, 0, 2, 4, 8]


def test_previews_show_held_out_captions_first() -> None:
    config = resolved(count=30, held=3)
    assert config.sample.prompts == ("picture 0", "picture 1", "picture 2", "picture 3")


def test_length_warm_up_and_intervals_count_processes() -> None:
    alone = resolved(count=100)
    four = resolved(count=100, base=dataclasses.replace(facts(), num_processes=4))
    assert four.training.batch_size == alone.training.batch_size == 4
    assert alone.training.steps == 2000 and four.training.steps == 500
    assert alone.optimizer.warmup_steps == 100 and four.optimizer.warmup_steps == 25
    assert alone.training.checkpoint_every == 250 and four.training.checkpoint_every == 100
    recommended = dataclasses.replace(facts(**{"training.steps": 401}), num_processes=2)
    assert resolved(base=recommended).training.steps == 201


def test_few_images_are_divided_over_the_processes() -> None:
    two = dataclasses.replace(facts(), num_processes=2)
    assert resolved(count=6, base=two).training.batch_size == 3
    assert resolved(count=1, base=two).training.batch_size == 1
