"""Settings become final once, before a weight is read; nothing that takes time is done twice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, ModelError
from sdlora.events import Decided, Emitter, Event, Sampled, StepDone, Validated
from sdlora.families import attention, compute, loading
from sdlora.training import memory_phases, planning, run, settings
from sdlora.training.finish import adapter_file
from sdlora.training.train import train

Make = Callable[..., Config]


@pytest.fixture
def config(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Make:
    folder = image_folder()

    def make(*overrides: str, base: Path = tiny_base) -> Config:
        values = {
            "data.folder": folder,
            "model.base": str(base),
            "output.folder": tmp_path / "run",
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, ["training.batch_size=2", *overrides], values)

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what takes time is done from here on, by what it is done for."""
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[label(*args, **kwargs)] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    def of_model(*args: Any, device: torch.device, **kwargs: Any) -> str:
        return f"base on {device.type}"

    def of_adapter(*args: Any) -> str:
        return f"adapter on {args[0].facts.device.type}"

    counted(planning, "load_model", of_model)
    counted(run, "create_adapter", of_adapter)
    counted(memory_phases, "create_adapter", of_adapter)
    counted(settings, "finalise", lambda *args, **options: "finalised")
    counted(run, "finalise", lambda *args, **options: "finalised")
    for module in (compute, loading):
        counted(module, "choose_attentions", lambda *args: "attention")
    original = attention.choose_attention

    def choose(*args: Any, training: bool) -> Any:
        counts["attention in training" if training else "attention in drawing"] += 1
        return original(*args, training=training)

    monkeypatch.setattr(attention, "choose_attention", choose)

    def validated(kind: type[Config], *args: Any, validate: Any, **kwargs: Any) -> Any:
        counts["settings validated"] += 1
        return validate(*args, **kwargs)

    monkeypatch.setattr(
        Config, "model_validate", classmethod(partial(validated, validate=Config.model_validate))
    )
    return counts


def test_everything_is_made_once_in_a_run_and_once_as_a_blueprint(config: Make, calls: Counter[str]) -> None:
    # a rank that no other test has: the memory of equal steps is counted once for all runs of a process
    given = config(
        *("training.steps=2", "data.validation=2", "training.validate_every=1", "sample.every=1"),
        "adapter.rank=11",
    )
    calls.clear()
    events: list[Event] = []
    train(given, listeners=[events.append])
    kinds = Counter(type(event) for event in events)
    assert (kinds[StepDone], kinds[Validated], kinds[Sampled]) == (2, 3, 3)
    assert calls == {
        # the settings follow the base, so it is looked at before a weight is read; so does the memory plan
        "base on meta": 1,
        "base on cpu": 1,
        "adapter on meta": 1,
        "adapter on cpu": 1,
        "attention": 1,
        "attention in training": 1,
        "attention in drawing": 1,
        "settings validated": 1,
        "finalised": 1,
    }


def test_a_run_has_the_settings_it_wrote_and_all_that_was_decided_is_told(
    config: Make, tmp_path: Path
) -> None:
    events: list[Event] = []
    given = config("data.shuffle_tags=true", "data.validation=2", "adapter.text_encoder=false")
    prepared = run.prepare_run(given, resume=False, emit=Emitter((events.append,)))
    decided = {event.key: event.value for event in events if isinstance(event, Decided)}
    assert len(decided) > 12 and decided["data.encode_captions"] == "before"
    assert load_config(tmp_path / "run" / "config.toml") == prepared.config
    changed = {
        key
        for section in Config.model_fields
        for name in type(getattr(given, section)).model_fields
        if given.get(key := f"{section}.{name}") != prepared.config.get(key)
    }
    assert changed == set(decided) - {"training.attention"}


def test_what_a_base_recommends_is_checked_and_named(config: Make, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "sdlora.json").write_text(json.dumps({"recommended": {"adapter.rank": "many"}}), encoding="utf-8")
    with pytest.raises(
        ModelError, match=r"base.*recommends `adapter\.rank=many`, which is impossible.*integer"
    ):
        run.prepare_run(config(base=base), resume=False, emit=Emitter(()))
    prepared = run.prepare_run(config("adapter.rank=3", base=base), resume=False, emit=Emitter(()))
    assert prepared.config.adapter.rank == 3


def test_a_resolution_the_base_cannot_work_at_is_refused_before_weights_are_read(
    config: Make, calls: Counter[str]
) -> None:
    given = config().with_values({"data.resolution": 32})
    given = given.model_copy(update={"data": given.data.model_copy(update={"resolution": 4})})
    with pytest.raises(ConfigError, match=r"data\.resolution=4`: the base needs at least 8 px"):
        run.prepare_run(given, resume=False, emit=Emitter(()))
    assert calls["base on meta"] == 1 and calls["base on cpu"] == 0


def test_a_warm_up_longer_than_the_run_is_refused_however_the_length_was_given(config: Make) -> None:
    def problem(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            run.prepare_run(config("sample.prompts=[]", *overrides), resume=False, emit=Emitter(()))
        return str(caught.value)

    by_epochs = problem("training.epochs=2", "optimizer.warmup_steps=200")
    assert "`optimizer.warmup_steps=200` must be below the run's" in by_epochs
    assert by_epochs.endswith("(`training.epochs=2`), or the full learning rate is never reached")
    by_default = problem("optimizer.warmup_steps=5000")
    assert "`optimizer.warmup_steps=5000` must be below the run's 800 steps, or" in by_default
    assert "`optimizer.warmup_share=0.99` must be below the run's" in problem(
        "training.epochs=1", "optimizer.warmup_share=0.99"
    )


def test_a_warm_up_given_as_a_share_stays_one_and_the_schedule_is_decided(config: Make) -> None:
    given = config("sample.prompts=[]", "training.steps=40", "optimizer.warmup_share=0.1")
    prepared = run.prepare_run(given, resume=False, emit=Emitter(()))
    optimizer = prepared.config.optimizer
    assert (optimizer.warmup_share, optimizer.warmup_steps, optimizer.schedule) == (0.1, None, "cosine")
    assert optimizer.warmup(prepared.steps) == 4
    assert adapter_file(prepared).info.metadata["ss_lr_warmup_steps"] == "4"
    assert load_config(prepared.folder.config_file) == prepared.config
