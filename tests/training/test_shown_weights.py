"""Validation, previews, checkpoints and export use the values to show, training the learned ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sdlora.config.schema import Config, OptimizerConfig, TrainingConfig
from sdlora.config.toml import load_config
from sdlora.events import Control, Event, Sampled, StepDone, Validated
from sdlora.run_folder import list_checkpoints
from sdlora.training import run as run_module
from sdlora.training.masters import MasterWeights, ParameterGroup
from sdlora.training.optimizers import OPTIMIZERS, OptimizerGroup, OptimizerKind
from sdlora.training.shown_weights import AsLearned, Averaged, averaged, publish, putting_back
from sdlora.training.train import TrainResult, train


class Average:
    """A running average of the masters: each step moves it by ``share`` of the way."""

    def __init__(self, groups: Sequence[ParameterGroup], share: float) -> None:
        self._groups, self._share = groups, share
        self._means = [group.master.flat.data.clone() for group in groups]

    def step_done(self) -> None:
        for mean, group in zip(self._means, self._groups, strict=True):
            mean.lerp_(group.master.flat.data, self._share)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        with putting_back(self._groups):
            for mean, group in zip(self._means, self._groups, strict=True):
                group.master.flat.data.copy_(mean)
            publish(self._groups)
            yield

    def tensors(self) -> dict[str, Tensor]:
        return {group.name: mean for group, mean in zip(self._groups, self._means, strict=True)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        assert len(tensors) == len(self._means)
        self._means = [tensors[group.name].clone() for group in self._groups]


class Anchored(torch.optim.SGD):
    """A test's optimizer whose values to use lie between those it steps and their start."""

    def __init__(self, groups: Sequence[OptimizerGroup]) -> None:
        super().__init__(groups, lr=0.1)  # type: ignore[arg-type]
        self.modes: list[str] = []

    def train(self) -> None:
        self.modes.append("train")

    def eval(self) -> None:
        self.modes.append("eval")
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.0)


Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder()

    def make(run: str, *overrides: str) -> Config:
        usual = (
            *("adapter.rank=2", "training.batch_size=2", "data.validation=2", "optimizer.learning_rate=0.05"),
            *(
                "training.device=cpu",
                "training.precision=fp32",
                "training.steps=3",
                "optimizer.warmup_steps=0",
            ),
            *("training.validate_every=1", "training.checkpoint_every=1", "training.keep_checkpoints=9"),
            *("sample.every=1", "sample.steps=2", 'sample.prompts=["a cat"]', "output.dtype=fp32"),
        )
        values = {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / run,
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*usual, *overrides], values)

    return make


def trained(
    config: Config, *, stop_at: int = 0, resume: bool = False
) -> tuple[TrainResult, list[Validated], list[bytes]]:
    """Return the result, what was validated and the pixels of the previews."""
    control = Control()
    events: list[Event] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == stop_at:
            control.stop()

    result = train(config, resume=resume, listeners=[hear], control=control)
    images = [
        Image.open(file).tobytes() for event in events if isinstance(event, Sampled) for file in event.files
    ]
    return result, [event for event in events if isinstance(event, Validated)], images


def masters(result: TrainResult) -> list[Tensor]:
    """Return the learned values at each step."""
    folders = list_checkpoints(result.folder / "checkpoints")
    return [load_file(folder.optimizer_file)["unet.master"] for folder in folders]


def adapters(result: TrainResult) -> list[Tensor]:
    """Return all values of the adapter in each checkpoint, and of the exported file."""
    folders = list_checkpoints(result.folder / "checkpoints")
    assert result.adapter_file is not None
    files = [*(folder.adapter_file for folder in folders), result.adapter_file]
    return [
        torch.cat([t.flatten() for name, t in sorted(load_file(file).items()) if "alpha" not in name])
        for file in files
    ]


def show(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    def average(kind: OptimizerKind, optimizer: Any, groups: Sequence[ParameterGroup]) -> Average:
        return Average(groups, share)

    monkeypatch.setattr(run_module, "weights_to_show", average)


@pytest.mark.long
def test_an_average_is_validated_previewed_kept_and_exported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, losses, images = trained(settings("plain"))
    show(monkeypatch, 0.0)  # an average that never moves: the start, at which the adapter changes nothing
    shown, still_losses, still_images = trained(settings("shown"))
    assert len(masters(plain)) == 3 and len(images) == len(losses) == 4
    assert all(
        torch.equal(first, second) for first, second in zip(masters(plain), masters(shown), strict=True)
    )
    assert len({event.loss for event in losses}) == 4 and len(set(images)) > 1
    assert {event.loss for event in still_losses} == {losses[0].loss}
    assert set(still_images) == {images[0]} and len(still_images) == 4
    learned, kept = adapters(plain), adapters(shown)
    assert len(kept) == 4
    assert all(torch.equal(tensor, kept[0]) for tensor in kept)
    assert not any(torch.equal(tensor, kept[0]) for tensor in learned)


@pytest.mark.long
def test_an_average_is_of_the_steps_and_resumes_exactly(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(monkeypatch, 0.5)
    whole, _, _ = trained(settings("whole"))
    trained(settings("halves"), stop_at=2)
    halves, _, _ = trained(settings("halves"), resume=True)
    first, other = adapters(whole), adapters(halves)
    assert len(first) == 4 and all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    learned = masters(whole)
    folders = list_checkpoints(whole.folder / "checkpoints")
    means = [load_file(folder.optimizer_file)["shown.unet"] for folder in folders]
    for step in (1, 2):
        torch.testing.assert_close(means[step], (means[step - 1] + learned[step]) / 2)
    assert torch.equal(first[2].sort().values, means[2].sort().values)  # the file orders them by layer


def test_an_optimizer_with_an_eval_mode_is_shown_in_it_and_stepped_out_of_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers: list[Anchored] = []

    def make(groups: Sequence[OptimizerGroup], options: OptimizerConfig) -> Anchored:
        optimizers.append(Anchored(groups))
        return optimizers[-1]

    plain = OptimizerKind(make, lambda options: "Anchored", bytes_per_value=0)
    monkeypatch.setitem(OPTIMIZERS, "adamw", plain)
    reference, losses, _ = trained(settings("reference"))
    assert optimizers[-1].modes == []
    monkeypatch.setitem(OPTIMIZERS, "adamw", OptimizerKind(make, plain.header, 0, has_eval_mode=True))
    result, shown_losses, images = trained(settings("run"))
    assert optimizers[-1].modes[0] == "train" and optimizers[-1].modes.count("eval") >= 4
    assert all(
        torch.equal(first, second) for first, second in zip(masters(reference), masters(result), strict=True)
    )
    assert len({event.loss for event in losses}) == 4
    assert {event.loss for event in shown_losses} == {losses[0].loss}
    assert len(images) == 4 and len(set(images)) == 1
    assert all(not tensor.any() for tensor in adapters(result))


def test_averages_are_those_of_their_formulae() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    groups = [ParameterGroup("unet", MasterWeights([parameter], [torch.zeros(3)]), 1.0)]
    values = [torch.full((3,), float(number**2)) for number in range(1, 21)]

    def means(average: Averaged) -> list[float]:
        shown = []
        for value in values:
            groups[0].master.load(value)
            average.step_done()
            with average.in_model():
                shown.append(float(parameter.detach()[0]))
            assert torch.equal(groups[0].master.flat.data, value)
        return shown

    learned = [float(value[0]) for value in values]
    tail_average = Averaged(groups, first=15)
    tail = means(tail_average)
    assert tail[:16] == learned[:16]
    assert tail[16:] == pytest.approx([sum(learned[15:end]) / (end - 15) for end in range(17, 21)])
    groups[0].master.load(torch.zeros(3))
    mean, wanted = 0.0, []
    for number, value in enumerate(learned, 1):
        decay = min(0.5, (1 + number) / (10 + number))
        mean = decay * mean + (1 - decay) * value
        wanted.append(mean)
    assert means(Averaged(groups, decay=0.5)) == pytest.approx(wanted)
    resumed = Averaged(groups, first=15)
    resumed.restore({name: tensor.clone() for name, tensor in tail_average.tensors().items()})
    assert means(resumed) == means(tail_average)


def test_settings_say_which_average_and_over_which_steps() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    groups = [ParameterGroup("unet", MasterWeights([parameter], [torch.zeros(3)]), 1.0)]

    def shown(steps: int, **values: Any) -> Any:
        return averaged(TrainingConfig(**values), AsLearned(), groups, steps)

    assert isinstance(shown(100), AsLearned)
    assert shown(100, average="ema", ema_decay=0.9).decay == 0.9
    assert shown(100, average="tail").first == 75 and shown(100, average="tail", average_share=1).first == 0
    assert shown(1, average="tail", average_share=0.01).first == 0


def test_an_average_asked_for_is_shown_beside_what_was_learned_and_exported(settings: Settings) -> None:
    more = ("training.average=ema", "sample.steps=1", "training.steps=2", "training.export_weights=learned")
    result, losses, images = trained(settings("run", *more))
    state = load_file(list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file)
    assert not torch.equal(state["shown.unet"], state["unet.master"]) and int(state["shown.steps"]) == 2
    assert len(losses) == 3 and len(images) == 6  # one prompt, both ways
    assert losses[0].loss == losses[0].learned_loss and losses[-1].loss != losses[-1].learned_loss
    assert images[0] == images[1]
    assert torch.equal(adapters(result)[-1].sort().values, state["unet.master"].sort().values)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["ema", "tail"])
def test_the_average_of_a_run_resumes_exactly_and_is_what_files_hold(
    average: str, settings: Settings
) -> None:
    share = ["training.average_share=0.9"] if average == "tail" else []
    overrides = [f"training.average={average}", "sample.steps=1", *share]
    whole, losses, images = trained(settings("whole", *overrides))
    trained(settings("halves", *overrides), stop_at=2)
    halves, _, _ = trained(settings("halves", *overrides), resume=True)
    folders = [list_checkpoints(result.folder / "checkpoints")[-1] for result in (whole, halves)]
    assert folders[0].optimizer_file.read_bytes() == folders[1].optimizer_file.read_bytes()
    state = load_file(folders[0].optimizer_file)
    assert not torch.equal(state["shown.unet"], state["unet.master"]) and int(state["shown.steps"]) == 3
    assert len(losses) == 4 and len(images) == 8
    assert torch.equal(adapters(whole)[-1].sort().values, state["shown.unet"].sort().values)
