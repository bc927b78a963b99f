"""Every optimizer of the table: trains, stops and resumes exactly, says what it is, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from sdlora.config.defaults import BaseFacts, DataFacts, OpenSettings, fill_training
from sdlora.config.schema import Config, OptimizerConfig, OptimizerName
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.events import Control, Emitter, Event, StepDone, Validated, read_events
from sdlora.formats.adapter_files import read_adapter
from sdlora.run_folder import list_checkpoints
from sdlora.training import optimizer_state
from sdlora.training.masters import MasterWeights, ParameterGroup
from sdlora.training.optimizers import (
    OPTIMIZERS,
    header_of,
    make_optimizer,
    optimizer_kind,
    parameter_names,
)
from sdlora.training.run import prepare_run
from sdlora.training.train import TrainResult, train
from sdlora.training.validation import validate

NAMES = get_args(OptimizerName)
Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder()

    def make(run: str, *overrides: str) -> Config:
        usual = (
            *("adapter.rank=4", "training.batch_size=2", "data.validation=0", "sample.prompts=[]"),
            *("training.device=cpu", "training.precision=fp32", "training.steps=4"),
        )
        values = {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / run,
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*usual, *overrides], values)

    return make


def trained(config: Config, *, stop_at: int = 0, resume: bool = False) -> tuple[TrainResult, list[Event]]:
    control = Control()
    events: list[Event] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == stop_at:
            control.stop()

    return train(config, resume=resume, listeners=[hear], control=control), events


def values_of(file: Path) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": tensor
        for key, update in read_adapter(file).weights.updates.items()
        for name, tensor in update.tensors().items()
    }


def state_file(result: TrainResult) -> bytes:
    return list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file.read_bytes()


def groups(seed: int = 3, rate: float = 1.0) -> list[ParameterGroup]:
    """Return masters of two components and of magnitudes, as a run has them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"unet": ((4, 64), (96, 4), (4, 48), (4, 1250)), "text_encoder": ((4, 32), (32, 4))}
    shapes["unet magnitude"] = ((64,), (96,))
    parts = []
    for name, sizes in shapes.items():
        values = [torch.randn(size, generator=generator) for size in sizes]
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        master = MasterWeights(parameters, values)
        parts.append(ParameterGroup(name, master, rate, decays=not name.endswith("magnitude")))
    return parts


def step(optimizer: torch.optim.Optimizer, parts: Sequence[ParameterGroup], number: int) -> None:
    for index, group in enumerate(parts):
        noise = torch.Generator().manual_seed(100 * number + index)
        gradient = group.master.flat.detach() - torch.randn(group.master.flat.shape, generator=noise)
        group.master.collect(lambda total, _, gradient=gradient: total.copy_(gradient))  # type: ignore[misc]
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_its_whole_state_goes_to_a_checkpoint_and_back(name: str) -> None:
    more = {"d_coef": 1e5} if name == "prodigy" else {}  # or so few steps would not move its estimate
    options = OptimizerConfig.model_validate({"name": name, **more})
    whole, first, second = groups(), groups(), groups(4)
    straight = make_optimizer(options, whole)
    before, after = make_optimizer(options, first), make_optimizer(options, second)
    for number in range(8):
        step(straight, whole, number)
        step(before, first, number)
    names = parameter_names(options, first)
    tensors, values = optimizer_state.pack(before, names)
    optimizer_state.unpack(after, names, tensors, json.loads(json.dumps(values)))
    for group, kept in zip(second, first, strict=True):
        group.master.load(kept.master.flat.data)
    for number in range(8, 16):
        step(straight, whole, number)
        step(after, second, number)
    ends = [[group.master.flat.detach() for group in parts] for parts in (whole, second, groups())]
    assert all(torch.equal(first_end, other) for first_end, other in zip(ends[0], ends[1], strict=True))
    assert not any(torch.equal(end, start) for end, start in zip(ends[0], ends[2], strict=True))
    if find := OPTIMIZERS[name].found_rate:
        assert find(after) == find(straight) > find(make_optimizer(options, groups()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stopped_in_mid_run_and_resumed_it_ends_bit_identical(name: str, settings: Settings) -> None:
    more = (f"optimizer.name={name}", "adapter.kind=dora", "adapter.text_encoder=true")
    whole, _ = trained(settings("whole", *more))
    stopped, _ = trained(settings("halves", *more), stop_at=2)
    assert stopped.stopped and stopped.adapter_file is None
    halves, _ = trained(settings("halves", *more), resume=True)
    assert state_file(whole) == state_file(halves)
    assert whole.adapter_file is not None and halves.adapter_file is not None
    ours, theirs = values_of(whole.adapter_file), values_of(halves.adapter_file)
    assert len(ours) > 20 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


HEADERS = {
    "adamw": "torch.optim.adamw.AdamW(betas=(0.9,0.99),weight_decay=0.01)",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit(betas=(0.9,0.99),weight_decay=0.01)",
    "adafactor": "transformers.optimization.Adafactor"
    "(weight_decay=0.01,scale_parameter=False,relative_step=False,warmup_init=False)",
    "lion": "pytorch_optimizer.optimizer.lion.Lion(betas=(0.9,0.99),weight_decay=0.01)",
    "prodigy": "prodigyopt.prodigy.Prodigy"
    "(weight_decay=0.01,d_coef=1.0,d0=2e-05,use_bias_correction=True,safeguard_warmup=True)",
    "adamw_schedulefree": "schedulefree.adamw_schedulefree.AdamWScheduleFree"
    "(betas=(0.9,0.99),weight_decay=0.01)",
    "came": "pytorch_optimizer.optimizer.came.CAME(weight_decay=0.01)",
}


def test_the_header_names_the_8_bit_optimizer_that_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.training.optimizers.is_there", lambda package: False)
    options = OptimizerConfig.model_validate({"name": "adamw8bit"})
    optimizer = make_optimizer(options, groups())
    assert type(optimizer).__module__ == "sdlora.training.adamw_8bit"
    assert header_of(optimizer, options) == (
        "sdlora.training.adamw_8bit.AdamW8bit(betas=(0.9,0.99),weight_decay=0.01)"
    )


RATES = {"lion": 6e-5, "prodigy": 1.0}  # for a scale of 1/2; all others AdamW's 2e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_header_tells_what_the_optimizer_really_is(name: str) -> None:
    options = OptimizerConfig.model_validate({"name": name} | ({"d0": 2e-5} if name == "prodigy" else {}))
    optimizer = make_optimizer(options, groups())
    header = header_of(optimizer, options)
    assert header == HEADERS[name]
    module, _, cls = header.partition("(")[0].rpartition(".")
    assert type(optimizer).__name__ == cls and type(optimizer).__module__ == module
    for group in optimizer.param_groups:
        shown = {key: f"{value}".replace(" ", "") for key, value in group.items()}
        keys = (
            "betas",
            "weight_decay",
            "d_coef",
            "d0",
            "scale_parameter",
            "relative_step",
            "safeguard_warmup",
        )
        told = [f"{key}={shown[key]}" for key in keys if f"{key}=" in header]
        decays = group is not optimizer.param_groups[2]  # magnitudes are not pulled to zero
        true = {part for part in told if f"{part}," in header or f"{part})" in header}
        assert told and set(told) - true == (set() if decays else {"weight_decay=0.0"})


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_the_record_says(name: str) -> None:
    parts = groups()
    optimizer = make_optimizer(OptimizerConfig.model_validate({"name": name}), parts)
    step(optimizer, parts, 0)
    kept: dict[int, int] = {}
    for state in optimizer.state.values():
        kept |= {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors_in(state)}
    count = sum(group.master.flat.numel() for group in parts)
    small = name == "adamw8bit"  # bitsandbytes keeps tensors below 4096 values in fp32; and two maps
    allowed = 8 * 672 + 2 * 1024 if small else 0.7 * count if OPTIMIZERS[name].looks_at_shapes else 64
    assert sum(kept.values()) == pytest.approx(OPTIMIZERS[name].bytes_per_value * count, abs=allowed)


@pytest.mark.parametrize("name", NAMES)
def test_rate_and_schedule_left_open_are_the_optimizers_own(name: str) -> None:
    given = Config().with_values({"optimizer.name": name, "adapter.rank": 4, "adapter.alpha": 2.0})
    open_settings = OpenSettings(given, BaseFacts("a base", {}, 512, "cpu"))
    fill_training(open_settings, DataFacts(10, 10), OPTIMIZERS[name].rate)
    final = open_settings.final().optimizer
    assert final.learning_rate == RATES.get(name, 2e-4)
    assert final.schedule == ("constant" if name == "adamw_schedulefree" else "cosine")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, 2e-3) for name in ("adamw", "adamw8bit", "adafactor", "adamw_schedulefree")),
        *(("lion", 6e-4), ("came", 1e-4), ("prodigy", 1.0)),
    ],
)
def test_what_a_base_recommends_for_adamw_is_not_lost_on_the_others(name: str, expected: float) -> None:
    """At 1e-4, a twentieth of what the mini base needs, none of them had learned a style."""
    facts = BaseFacts("mini", {"optimizer.learning_rate": 2e-3}, 64, "cpu")
    open_settings = OpenSettings(Config().with_values({"optimizer.name": name}), facts)
    fill_training(open_settings, DataFacts(10, 10), OPTIMIZERS[name].rate)
    assert open_settings.final().optimizer.learning_rate == expected
    (default,) = (filled for filled in open_settings.defaults if filled.key == "optimizer.learning_rate")
    assert name == "prodigy" or "recommend" in default.reason
    assert open_settings.final().optimizer.d0 == (2e-4 if name == "prodigy" else None)


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [tensor for part in value.values() for tensor in tensors_in(part)] if isinstance(value, dict) else []
    )


@pytest.mark.slow
def test_prodigys_estimate_is_told_and_goes_on_after_a_stop(settings: Settings) -> None:
    more = ("optimizer.name=prodigy", "training.steps=4", "optimizer.d_coef=1000")
    _, events = trained(settings("whole", *more))
    estimates = [event.found_rate for event in events if isinstance(event, StepDone)]
    assert len(estimates) == 4 and all(rate is not None for rate in estimates)
    assert estimates[-1] != estimates[0]
    trained(settings("halves", *more), stop_at=2)
    halves, later = trained(settings("halves", *more), resume=True)
    assert [event.found_rate for event in later if isinstance(event, StepDone)] == estimates[2:]
    journal = [event["found_rate"] for event in read_events(halves.folder) if event["event"] == "StepDone"]
    assert journal == estimates


@pytest.mark.slow
def test_schedule_frees_average_is_what_is_validated_kept_and_exported(settings: Settings) -> None:
    more = (
        *("optimizer.name=adamw_schedulefree", "optimizer.learning_rate=0.01", "data.validation=2"),
        *("training.steps=5", "training.validate_every=5", "output.dtype=fp32", "optimizer.betas=[0.5, 0.9]"),
    )
    result, events = trained(settings("run", *more))
    run = prepare_run(settings("run", *more), resume=True, emit=Emitter(()))
    (parameter,) = run.optimizer.param_groups[0]["params"]
    learned, z = parameter.detach().clone(), run.optimizer.state[parameter]["z"]
    average = (learned - 0.5 * z) / 0.5  # y = beta1 x + (1 - beta1) z
    with run.shown.in_model():
        torch.testing.assert_close(parameter.detach(), average, rtol=1e-5, atol=1e-7)
        assert validate(run) == [event.loss for event in events if isinstance(event, Validated)][-1]
    assert torch.equal(parameter.detach(), learned) and not torch.allclose(learned, average)
    assert result.adapter_file is not None
    exported = torch.cat([tensor.flatten() for tensor in values_of(result.adapter_file).values()])
    torch.testing.assert_close(exported.sort().values, average.sort().values, rtol=1e-5, atol=1e-7)


def test_a_schedule_over_the_schedule_free_optimizer_is_a_contradiction(settings: Settings) -> None:
    settings("run", "optimizer.name=adamw_schedulefree", "optimizer.schedule=constant")
    with pytest.raises(ConfigError, match=r"schedule=cosine` works against `optimizer\.name=adamw_schedule"):
        settings("run", "optimizer.name=adamw_schedulefree", "optimizer.schedule=cosine")


def test_settings_of_one_optimizer_are_contradictions_with_another(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"`optimizer\.d_coef` has no effect with `optimizer\.name=lion`"):
        settings("run", "optimizer.name=lion", "optimizer.betas=[0.95, 0.98]", "optimizer.d_coef=2")
    with pytest.raises(ConfigError, match=r"`optimizer\.betas` has no effect with `optimizer\.name=came`"):
        settings("run", "optimizer.name=came", "optimizer.betas=[0.95, 0.98]")


PACKAGES = [name for name in NAMES if OPTIMIZERS[name].package]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_one_line_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = OPTIMIZERS[name].package or ""
    find = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more)
    )
    with pytest.raises(ConfigError) as caught:
        optimizer_kind(OptimizerConfig.model_validate({"name": name}))
    shown = package.replace("_", "-")
    assert str(caught.value) == (
        f"`optimizer.name={name}`: the package {shown} is not installed; run: pip install {shown}"
    )
    assert optimizer_kind(OptimizerConfig()).package is None


def test_an_unknown_optimizer_is_refused_with_those_there_are(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name=adam`: must be one of adamw, adamw8bit, .*came"):
        settings("run", "optimizer.name=adam")
