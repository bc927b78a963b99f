"""Optimizers: records of other libraries' ones, put into the table from outside, train, stop and resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from prodigyopt import Prodigy
from safetensors.torch import load_file

from sdlora.config.defaults import RateRule
from sdlora.config.schema import Config, OptimizerConfig, OptimizerName
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, TrainingError
from sdlora.events import Control, Emitter, Event, StepDone
from sdlora.formats.adapter_files import read_adapter
from sdlora.run_folder import list_checkpoints
from sdlora.training import optimizer_state
from sdlora.training.finish import adapter_file
from sdlora.training.optimizers import OPTIMIZERS, OptimizerGroup, OptimizerKind
from sdlora.training.run import prepare_run
from sdlora.training.train import TrainResult, train

Name = Literal["adamw", "prodigy", "adafactor"]
NAMES = get_args(Name)


class WiderOptimizer(OptimizerConfig):
    name: Name = "adamw"  # type: ignore[assignment]


class WiderConfig(Config):
    optimizer: WiderOptimizer = WiderOptimizer()


def adafactor(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, weight_decay=settings.weight_decay)


@pytest.fixture(autouse=True)
def more_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    prodigy = OptimizerKind(
        make=lambda groups, settings: Prodigy(groups),
        header=lambda settings: f"prodigyopt.prodigy.Prodigy(weight_decay={settings.weight_decay})",
        bytes_per_value=16,
        rate=RateRule(1.0, "Prodigy finds it", follows_scale=False, one_rate=True),
    )
    factored = OptimizerKind(
        make=adafactor,
        header=lambda settings: "torch.optim.Adafactor()",
        bytes_per_value=1,
        rate=RateRule(1e-3),
        looks_at_shapes=True,
    )
    monkeypatch.setitem(OPTIMIZERS, "prodigy", prodigy)
    monkeypatch.setitem(OPTIMIZERS, "adafactor", factored)


Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder()

    def make(run: str, *overrides: str) -> Config:
        usual = (
            *("adapter.rank=2", "training.batch_size=2", "data.validation=0", "sample.prompts=[]"),
            *("training.device=cpu", "training.precision=fp32", "training.steps=4"),
        )
        values = {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / run,
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*usual, *overrides], values, schema=WiderConfig)

    return make


def trained(config: Config, *, stop_at: int = 0, resume: bool = False) -> TrainResult:
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == stop_at:
            control.stop()

    result = train(config, resume=resume, listeners=[stop], control=control)
    assert result.stopped == bool(stop_at)
    return result


def state_of(result: TrainResult) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors and the optimizer's other values of the newest checkpoint."""
    folder = list_checkpoints(result.folder / "checkpoints")[-1]
    values = json.loads(folder.state_file.read_text(encoding="utf-8"))["optimizer"]
    return load_file(folder.optimizer_file), values


def equal(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


GROUPS = ("adapter.kind=dora", "adapter.text_encoder=true")  # masters of four groups, two of them no matrices


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "prodigy" else [pytest.mark.long]) for name in NAMES]
)
def test_stopped_and_resumed_it_ends_bit_identical(name: str, settings: Settings) -> None:
    whole = trained(settings("whole", f"optimizer.name={name}", *GROUPS))
    trained(settings("halves", f"optimizer.name={name}", *GROUPS), stop_at=2)
    halves = trained(settings("halves", f"optimizer.name={name}", *GROUPS), resume=True)
    (tensors, values), (others, other_values) = state_of(whole), state_of(halves)
    assert len(tensors) > 8 and equal(tensors, others)
    assert len(values["groups"]) == 4 and values == other_values
    assert whole.adapter_file is not None and halves.adapter_file is not None
    ours, theirs = (read_adapter(file).weights for file in (whole.adapter_file, halves.adapter_file))
    assert ours.updates and all(
        equal(update.tensors(), theirs.updates[key].tensors()) for key, update in ours.updates.items()
    )


def test_what_prodigy_keeps_among_its_groups_survives(settings: Settings) -> None:
    trained(settings("run", "optimizer.name=prodigy"), stop_at=3)
    fresh = prepare_run(settings("other", "optimizer.name=prodigy"), resume=False, emit=Emitter(()))
    resumed = prepare_run(settings("run", "optimizer.name=prodigy"), resume=True, emit=Emitter(()))
    (before,), (after,) = fresh.optimizer.param_groups, resumed.optimizer.param_groups
    assert (before["k"], after["k"]) == (0, 3)
    assert after["d"] > before["d"] and after["d_numerator"] != 0.0
    assert after["growth_rate"] == float("inf") and after["betas"] == (0.9, 0.999)


def test_a_run_of_prodigy_from_before_its_first_guess_was_a_setting_goes_on(settings: Settings) -> None:
    trained(settings("run", "optimizer.name=prodigy"), stop_at=3)  # the stand-in here fills in no d0, either
    now = settings("run", "optimizer.name=prodigy", "optimizer.d0=2e-4")
    resumed = prepare_run(now, resume=True, emit=Emitter(()))
    assert resumed.step == 3 and resumed.optimizer.param_groups[0]["k"] == 3


def test_several_rates_are_refused_for_an_optimizer_of_one(settings: Settings) -> None:
    text = ("adapter.text_encoder=true", "optimizer.name=prodigy")
    run = prepare_run(settings("same", *text), resume=False, emit=Emitter(()))
    assert [group.learning_rate for group in run.groups] == [1.0, 1.0]
    for more, key in (
        ("optimizer.text_encoder_learning_rate=0.5", "text_encoder_learning_rate"),
        ("optimizer.lora_plus_ratio=4", "lora_plus_ratio"),
        ('optimizer.block_rates={"mid_block" = 0.5}', "block_rates"),
    ):
        with pytest.raises(ConfigError, match=rf"prodigy` has one learning rate .*`optimizer\.{key}` would"):
            prepare_run(settings("other", *text, more), resume=False, emit=Emitter(()))


def test_the_rate_left_open_and_the_files_header_are_those_of_the_optimizer(settings: Settings) -> None:
    rates, headers = {}, {}
    for name in NAMES:  # of scale 1/2
        config = settings(name, "adapter.alpha=1", f"optimizer.name={name}")
        run = prepare_run(config, resume=False, emit=Emitter(()))
        rates[name] = run.groups[0].learning_rate
        headers[name] = adapter_file(run).info.metadata["ss_optimizer"]
    assert headers == {
        "adamw": "torch.optim.adamw.AdamW(betas=(0.9,0.99),weight_decay=0.01)",
        "prodigy": "prodigyopt.prodigy.Prodigy(weight_decay=0.01)",
        "adafactor": "torch.optim.Adafactor()",
    }
    assert rates == {"adamw": 2e-4, "prodigy": 1.0, "adafactor": 2e-3}


def test_settings_of_another_optimizer_are_contradictions(settings: Settings) -> None:
    settings("run", "optimizer.betas=[0.8, 0.9]", "optimizer.epsilon=1e-6")
    with pytest.raises(ConfigError) as caught:
        settings("run", "optimizer.name=prodigy", "optimizer.betas=[0.8, 0.9]", "optimizer.epsilon=1e-6")
    assert "`optimizer.betas` has no effect with `optimizer.name=prodigy`" in str(caught.value)
    assert "`optimizer.epsilon` has no effect with `optimizer.name=prodigy`" in str(caught.value)


def test_an_optimizer_that_looks_at_shapes_gets_matrices(settings: Settings) -> None:
    tensors, values = state_of(trained(settings("run", "optimizer.name=adafactor", "training.steps=1")))
    rows = {name: tensor for name, tensor in tensors.items() if name.endswith(".row_var")}
    # two factors of the same number of layers: (rank, in) has rank rows, (out, rank) has out
    assert len(rows) == len(values["parameters"]) > 4
    assert {tensor.shape[0] for tensor in rows.values()} == {2, 32, 64}


def test_the_memory_plan_counts_what_the_optimizer_keeps(settings: Settings) -> None:
    runs = [
        prepare_run(settings(name, f"optimizer.name={name}"), resume=False, emit=Emitter(()))
        for name in ("adamw", "prodigy")
    ]
    count = sum(group.master.flat.numel() for group in runs[0].groups)
    assert runs[1].memory.adapter - runs[0].memory.adapter == (16 - 8) * count > 0


def test_checkpoints_from_before_whole_states_were_kept_can_be_resumed(settings: Settings) -> None:
    whole = trained(settings("whole"))
    halves = trained(settings("halves"), stop_at=2)
    file = list_checkpoints(halves.folder / "checkpoints")[-1].state_file
    state = json.loads(file.read_text(encoding="utf-8"))
    del state["optimizer"]
    file.write_text(json.dumps(state), encoding="utf-8")
    resumed = trained(settings("halves"), resume=True)
    (tensors, values), (others, other_values) = state_of(whole), state_of(resumed)
    assert set(tensors) == {"unet.master", "unet.exp_avg", "unet.exp_avg_sq", "unet.step"}
    assert equal(tensors, others) and values == other_values


def test_any_state_goes_to_a_checkpoint_and_back() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [parameter]}], lr=0.5)

    kept = optimizer()
    kept.param_groups[0] |= {"pair": (1, -float("inf")), "none": None, "names": ["a", {"b": torch.ones(2)}]}
    kept.state[parameter] = {"step": 3, "buffers": {0: torch.arange(3.0), 1: [torch.zeros(1)]}, "on": True}
    tensors, values = optimizer_state.pack(kept, ["unet"])
    assert len(tensors) == 3
    restored = optimizer()
    optimizer_state.unpack(restored, ["unet"], tensors, json.loads(json.dumps(values)))
    before, after = (plain(state.state_dict()) for state in (kept, restored))
    assert before == after


def plain(value: Any) -> Any:
    """Return a state with tensors as lists, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def test_what_a_checkpoint_cannot_hold_is_said() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["call"] = dataclasses.field
    with pytest.raises(TrainingError, match=r"keeps a function as group 0\.call.*another optimizer\.name"):
        optimizer_state.pack(optimizer, ["unet"])


def test_a_state_for_other_parameters_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    optimizer.state[parameter] = {"step": 1}
    tensors, values = optimizer_state.pack(optimizer, ["unet x2.0"])
    with pytest.raises(TrainingError, match=r"for other parameters: unet x2\.0"):
        optimizer_state.unpack(optimizer, ["unet"], tensors, values)


def test_settings_name_every_optimizer_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))
