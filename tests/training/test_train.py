"""The training loop on a tiny real base: exact resume, correct weighting, and stopping well."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import signal
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.adapters.canonical import AdapterWeights
from sdlora.commands.cli import main
from sdlora.config.schema import Config
from sdlora.config.toml import load_config, save_config
from sdlora.errors import ConfigError, OutputError, TrainingError
from sdlora.events import (
    Caching,
    Control,
    Decided,
    Emitter,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    Sampled,
    StepDone,
    Validated,
)
from sdlora.families.base import DiffusionModel
from sdlora.formats.adapter_files import read_adapter
from sdlora.machine import Card, MachineFacts, notice_of
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training import planning
from sdlora.training.checkpoint import load_checkpoint
from sdlora.training.masters import clip_
from sdlora.training.objective import loss_of
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.step import train_step
from sdlora.training.train import TrainResult, train

Make = Callable[..., Path]
FAST = (
    "adapter.rank=2",
    "training.batch_size=2",
    "data.validation=0",
    "sample.prompts=[]",
    "training.device=cpu",
    "training.precision=fp32",
)


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Make) -> Callable[..., Config]:
    folder = image_folder()

    def make(run: str, *overrides: str, **values: Any) -> Config:
        return run_settings(run, FAST, overrides, {"data.folder": folder, **values})

    return make


class Recorder:
    """Keeps every event, and stops the run after a given step."""

    def __init__(self, control: Control | None = None, stop_at: int | None = None) -> None:
        self.events: list[Event] = []
        self._control, self._stop_at = control, stop_at

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._control and isinstance(event, StepDone) and event.step == self._stop_at:
            self._control.stop()

    def losses(self) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, StepDone)]


def final_state(result: TrainResult) -> dict[str, torch.Tensor]:
    saved = load_file(list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file)
    return {name: tensor.clone() for name, tensor in saved.items()}  # the file itself may change


def assert_equal_tensors(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert first.keys() == other.keys()
    assert len(first) >= 4
    assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.long
def test_a_stop_in_the_last_step_is_honoured_where_the_adapter_is_written(
    settings: Callable[..., Config],
) -> None:
    """Nobody waits for previews and measurements that were not wanted any more."""
    steps = ("training.steps=3", "training.validate_every=99", "sample.every=99")
    prompts: dict[str, object] = {"sample.prompts": ["a cat"], "data.validation": 2}
    control = Control()
    recorder = Recorder(control, stop_at=3)
    result = train(settings("late", *steps, **prompts), listeners=[recorder], control=control)
    assert (result.stopped, result.stop_asked, result.step) == (False, True, 3)
    assert result.adapter_file is not None and result.adapter_file.is_file()
    shown = {event.step for event in recorder.events if isinstance(event, Validated | Sampled)}
    assert shown == {0}
    assert any(
        "asked to stop in the last step" in e.message for e in recorder.events if isinstance(e, Notice)
    )
    again = Recorder()
    config = settings("late", *steps, **prompts)
    assert not train(config, resume=True, listeners=[again]).stop_asked
    assert {event.step for event in again.events if isinstance(event, Sampled)} == {3}


@pytest.mark.long
def test_a_stop_while_the_adapter_is_written_is_answered(settings: Callable[..., Config]) -> None:
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, Sampled) and event.step == 2:
            control.stop()

    given: dict[str, object] = {"sample.prompts": ["a cat"]}
    result = train(settings("while", "training.steps=2", **given), listeners=[stop], control=control)
    assert (result.stopped, result.stop_asked) == (False, True)
    assert not train(settings("plain", "training.steps=2")).stop_asked


def prepared(config: Config) -> Run:
    return prepare_run(config, resume=False, emit=Emitter(()))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), marks=pytest.mark.long),
        pytest.param(("training.precision=bf16", "training.gradient_accumulation=2"), marks=pytest.mark.long),
        ("adapter.text_encoder=true", "adapter.dropout=0.3", "data.flip=true", "data.caption_dropout=0.5"),
    ],
    ids=["plain", "bf16", "everything-random"],
)
@pytest.mark.usefixtures("two_threads")
def test_stopped_and_resumed_run_ends_bit_identical(
    settings: Callable[..., Config], overrides: tuple[str, ...]
) -> None:
    whole = train(settings("whole", "training.steps=6", *overrides))
    control = Control()
    config = settings("parts", "training.steps=6", *overrides)
    first = train(config, listeners=[Recorder(control, stop_at=3)], control=control)
    assert (first.stopped, first.step, first.adapter_file) == (True, 3, None)
    second = train(config, resume=True)
    assert (second.stopped, second.step) == (False, 6)
    assert_equal_tensors(final_state(whole), final_state(second))
    assert whole.adapter_file is not None and second.adapter_file is not None
    assert_equal_tensors(load_file(whole.adapter_file), load_file(second.adapter_file))


@pytest.mark.long
def test_killed_process_loses_only_the_steps_since_the_last_checkpoint(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    overrides = ("training.steps=7", "training.checkpoint_every=2")
    whole = train(settings("whole", *overrides))
    config = settings("killed", *overrides)
    save_config(config, tmp_path / "run.toml")
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from sdlora.config.toml import load_config\nfrom sdlora.training.train import train\n"
        "hard = getattr(signal, 'SIGKILL', signal.SIGTERM)  # on Windows the latter cannot be caught\n"
        "def kill(event):\n    if getattr(event, 'step', 0) == 5: os.kill(os.getpid(), hard)\n"
        "train(load_config(Path(sys.argv[1])), listeners=[kill])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run.toml")], check=False)
    assert done.returncode != 0
    checkpoints = tmp_path / "killed" / "checkpoints"
    kept = load_checkpoint(list_checkpoints(checkpoints)[-1])
    assert kept.step == 4
    recorder = Recorder()
    resumed = train(config, resume=True, listeners=[recorder])
    started = [event for event in recorder.events if isinstance(event, RunStarted)]
    assert [event.first_step for event in started] == [kept.step]
    assert_equal_tensors(final_state(whole), final_state(resumed))


@pytest.mark.long
def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    overrides = ("training.steps=4", "training.checkpoint_every=4")
    whole = train(settings("whole", *overrides))
    config = settings("killed", *overrides)
    with pytest.raises(KeyboardInterrupt):
        train(config, listeners=[interrupted_at(2)])
    run = RunFolder(tmp_path / "killed")
    assert run.exists() and list_checkpoints(run.checkpoints) == []
    with pytest.raises(OutputError, match="already holds a run; add --resume"):
        train(config)
    recorder = Recorder()
    resumed = train(config, resume=True, listeners=[recorder])
    notices = [event.message for event in recorder.events if isinstance(event, Notice)]
    assert any("ended before its first checkpoint, so it starts again" in notice for notice in notices)
    assert_equal_tensors(final_state(whole), final_state(resumed))


def interrupted_at(step: int) -> Callable[[Event], None]:
    """Return a listener that ends the process's work at a step, as a kill would."""

    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise KeyboardInterrupt

    return hear


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals,
    settings: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C comes in the middle of step 3: while its gradients are summed."""
    taken: list[int] = []

    def interrupted(groups: Any, most: float) -> float:
        taken.append(len(taken) + 1)
        if taken[-1] == 3:
            signal.raise_signal(number)
        return clip_(groups, most)

    monkeypatch.setattr(sys.modules["sdlora.training.step"], "clip_", interrupted)
    before = signal.getsignal(number)
    save_config(settings("run", "training.steps=9"), tmp_path / "run.toml")
    code = main(["train", "--config", str(tmp_path / "run.toml"), "--json"])
    output, errors = capfd.readouterr()
    result = json.loads(output.splitlines()[-1])
    assert (code, result["stopped"], result["step"], taken) == (0, True, 3, [1, 2, 3]), errors
    assert "finishing this step, then saving" in errors
    assert f"sdlora train --resume --output {tmp_path / 'run'}" in output
    saved = [load_checkpoint(folder).step for folder in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == [3]
    assert signal.getsignal(number) is before


def test_asked_to_stop_while_encoding_it_ends_before_the_first_step(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    control, seen = Control(), []

    def stop(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Caching):
            control.stop()

    with pytest.raises(TrainingError, match="before the first step"):
        train(settings("run", "training.steps=9"), listeners=[stop], control=control)
    assert sum(isinstance(event, Caching) for event in seen) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_its_model_in_no_memory(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python frees what holds itself in circles at some time; the next run counts on the memory at once."""
    models = []
    real = planning.load_model

    def load(*arguments: Any, **options: Any) -> DiffusionModel:
        model = real(*arguments, **options)
        models.append(weakref.ref(model.components()["unet"]))
        return model

    monkeypatch.setattr(planning, "load_model", load)
    control = Control()
    with no_collection():
        train(settings("run", "training.steps=3"), listeners=[Recorder(control, 1)], control=control)
        train(settings("run", "training.steps=3"), resume=True)
        assert len(models) >= 2 and [model() for model in models] == [None] * len(models)


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing is collected but by who asks for it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_stop_file_ends_the_run_and_is_removed(settings: Callable[..., Config], tmp_path: Path) -> None:
    class Dropper(Recorder):
        def __call__(self, event: Event) -> None:
            if isinstance(event, StepDone) and event.step == 2:
                (tmp_path / "run" / "STOP").touch()

    result = train(settings("run", "training.steps=9"), listeners=[Dropper()])
    assert (result.stopped, result.step) == (True, 2)
    assert not (tmp_path / "run" / "STOP").exists()


def test_resume_passes_over_a_damaged_checkpoint(settings: Callable[..., Config]) -> None:
    config = settings("run", "training.steps=6", "training.checkpoint_every=2")
    whole = final_state(train(config))
    newest = list_checkpoints(settings("run").output.folder / "checkpoints")[-1]  # type: ignore[operator]
    damaged = bytearray(newest.optimizer_file.read_bytes())
    damaged[-1] ^= 1
    newest.optimizer_file.write_bytes(damaged)
    recorder = Recorder()
    resumed = train(config, resume=True, listeners=[recorder])
    assert [event.step for event in recorder.events if isinstance(event, StepDone)] == [5, 6]
    assert_equal_tensors(whole, final_state(resumed))


def test_resume_with_other_settings_or_images_is_refused(settings: Callable[..., Config]) -> None:
    config = settings("run", "training.steps=4")
    train(config)
    with pytest.raises(ConfigError, match=r"adapter\.rank: was 2, now 3"):
        train(settings("run", "training.steps=4", "adapter.rank=3"), resume=True)
    assert config.data.folder is not None
    next(config.data.folder.glob("*.txt")).write_text("another caption", encoding="utf-8")
    with pytest.raises(TrainingError, match="changed since"):
        train(config, resume=True)


def test_existing_run_is_never_overwritten(settings: Callable[..., Config], tmp_path: Path) -> None:
    result = train(settings("run", "training.steps=1"))
    before = {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()}
    assert len(before) >= 6
    with pytest.raises(OutputError, match="--resume"):
        train(settings("run", "training.steps=1"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        train(settings("other", "training.steps=1"))
    assert {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()} == before


def test_every_image_is_visited_exactly_repeats_times_an_epoch(settings: Callable[..., Config]) -> None:
    run = prepared(settings("run", "training.epochs=2", "data.repeats=3", "training.batch_size=4"))
    assert run.steps == 2 * run.order.steps_per_epoch
    for epoch in range(2):
        steps = range(epoch * run.order.steps_per_epoch, (epoch + 1) * run.order.steps_per_epoch)
        visits = [v for step in steps for rank in run.order.step(step) for micro in rank for v in micro]
        assert Counter(visit.index for visit in visits) == dict.fromkeys(range(6), 3)


@pytest.mark.long
def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an image gets follows from its visit, so 2 x 3 images and 6 x 1 images agree."""
    gradients = []
    square = (
        *("data.buckets=false", "optimizer.max_grad_norm=0", "training.noise_offset=0.1"),
        *("data.flip=true", "data.caption_dropout=0.5", "data.crop=random", "data.variants=0"),
    )
    for name, size, micros in (("large", 6, 1), ("middle", 3, 2), ("small", 1, 6)):
        run = prepared(
            settings(name, f"training.batch_size={size}", f"training.gradient_accumulation={micros}", *square)
        )
        seen: list[torch.Tensor] = []
        grad = run.groups[0].master.flat
        step = run.optimizer.step
        monkeypatch.setattr(
            run.optimizer, "step", lambda *a, g=grad, s=seen, o=step, **k: (s.append(g.grad.clone()), o())[1]
        )
        train_step(run)
        gradients.append(seen[0])
    assert float(gradients[0].norm()) > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_a_lone_image_in_a_short_step_weighs_as_much_as_any_other(
    settings: Callable[..., Config], image_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(count=1, name="lone")
    norms = []
    for size in (1, 4):
        run = prepared(
            settings(
                f"size{size}",
                f"training.batch_size={size}",
                "optimizer.max_grad_norm=0",
                "data.caption_dropout=0",
                **{"data.folder": folder},
            )
        )
        norms.append(train_step(run)[1])
    assert norms[0] == pytest.approx(4 * norms[1], rel=1e-5)


def test_non_finite_loss_stops_before_the_weights_and_names_the_images(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(settings("run", "training.steps=4"))
    before = run.masters()

    def poisoned(model: Any, batch: Any, config: Config, predict: Any) -> tuple[Any, Any]:
        weighted, plain = loss_of(model, batch, config, predict)
        bad = torch.tensor([float("nan"), *[1.0] * (len(plain) - 1)])
        poisoned.name = batch.names[0]  # type: ignore[attr-defined]
        return weighted * bad, plain

    monkeypatch.setattr(sys.modules["sdlora.training.step"], "loss_of", poisoned)
    with pytest.raises(TrainingError, match="not a finite number") as caught:
        train_step(run)
    assert poisoned.name in str(caught.value)  # type: ignore[attr-defined]
    assert same(run.masters(), before)
    assert torch.isfinite(run.groups[0].master.flat).all()


def test_fp16_leaves_out_a_step_that_overflows_and_names_images_only_when_it_comes_again(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(settings("run", "training.steps=9", "training.precision=fp16"))
    recorder = Recorder()
    run.emit = Emitter((recorder,))
    bad: list[str] = []

    def poisoned(model: Any, batch: Any, config: Config, predict: Any) -> tuple[Any, Any]:
        weighted, plain = loss_of(model, batch, config, predict)
        if not bad:
            bad.append(batch.names[0])
        wrong = torch.tensor([float("inf") if name in bad else 1.0 for name in batch.names])
        return weighted * wrong, plain * wrong

    monkeypatch.setattr(sys.modules["sdlora.training.step"], "loss_of", poisoned)
    before, scale = run.masters(), run.scaler.get_scale()
    loss, norm, _, count = train_step(run)
    assert same(run.masters(), before)
    assert (run.step, count) == (1, 2)
    assert math.isfinite(loss) and not math.isfinite(norm)  # that of the other image
    assert run.scaler.get_scale() == scale / 2
    (notice,) = (event for event in recorder.events if isinstance(event, Notice))
    assert "step 1: fp16 overflowed; the step is left out" in notice.message
    assert bad[0] not in notice.message
    with pytest.raises(TrainingError, match="once more") as caught:
        for _ in range(8):
            train_step(run)
    assert bad[0] in str(caught.value)
    assert run.step >= 3
    assert not same(run.masters(), before)


def test_gradients_that_overflow_at_every_scale_end_the_run(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(settings("run", "training.steps=90", "training.precision=fp16"))
    monkeypatch.setattr(sys.modules["sdlora.training.step"], "clip_", lambda groups, most: math.inf)
    with pytest.raises(TrainingError, match="the gradient, 17 steps in a row,"):
        for _ in range(90):
            train_step(run)
    assert run.step == 16


@pytest.mark.parametrize("hindrance", ["no gradient", "no change"])
def test_an_adapter_that_did_not_change_is_an_error(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    config = settings("run", "training.steps=2")
    if hindrance == "no gradient":  # as when the parameters have left the flat buffer: weights only decay

        def detached(model: Any, batch: Any, config: Config, predict: Any) -> tuple[Any, Any]:
            weighted, plain = loss_of(model, batch, config, predict)
            return weighted * 0, plain

        monkeypatch.setattr(sys.modules["sdlora.training.step"], "loss_of", detached)
        reason = "in 2 steps no step had a gradient"
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
        reason = "in 2 steps no value of the adapter changed"
    with pytest.raises(TrainingError, match=f"{reason}.*raise optimizer.learning_rate"):
        train(config)
    assert config.output.folder is not None
    assert list(config.output.folder.glob("*.safetensors")) == []


def test_a_card_left_idle_is_told_and_the_cpu_is_not_called_the_fastest(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card("NVIDIA GeForce RTX 3060", (8, 6), 12 * 2**30)
    facts = MachineFacts("Windows", "python.exe", "2.13.0+cpu", driver="591.44", present=(card,))
    monkeypatch.setattr("sdlora.families.compute.idle_card_notice", lambda: notice_of(facts))
    recorder = Recorder()
    config = settings("run").with_values({"training.device": None})
    run = prepare_run(config, resume=False, emit=Emitter((recorder,)))
    if run.model.facts.device.type != "cpu":
        pytest.skip("this machine's card works")
    (notice,) = (e for e in recorder.events if isinstance(e, Notice) and "LIES IDLE" in e.message)
    assert "python.exe -m pip uninstall -y torch" in notice.message
    (chosen,) = (e for e in recorder.events if isinstance(e, Decided) and e.key == "training.device")
    assert (chosen.value, chosen.reason) == ("cpu", "torch cannot use the card that is here")


@pytest.mark.long
def test_loss_falls_on_an_image_it_can_learn(settings: Callable[..., Config], image_folder: Make) -> None:
    folder = image_folder(count=2, name="two")
    recorder = Recorder()
    train(
        settings(
            "run",
            "training.steps=60",
            "optimizer.learning_rate=0.02",
            "adapter.targets=all",
            "adapter.rank=8",
            "training.min_snr_gamma=0",
            **{"data.folder": folder},
        ),
        listeners=[recorder],
    )
    losses = recorder.losses()
    assert len(losses) == 60
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_only_the_adapter_changes(settings: Callable[..., Config]) -> None:
    run = prepared(settings("run", "adapter.text_encoder=true", "adapter.targets=all"))
    frozen = {
        (component, name): tensor.clone()
        for component, module in run.model.components().items()
        for name, tensor in module.named_parameters()
        if "lora_" not in name
    }
    assert len(frozen) > 50
    before = run.masters()
    for _ in range(2):
        train_step(run)
    for component, module in run.model.components().items():
        for name, tensor in module.named_parameters():
            if "lora_" not in name:
                assert torch.equal(tensor, frozen[component, name]), name
                assert tensor.grad is None, name
    after = run.masters()
    changed = {key.component for key, pair in after.items() if not torch.equal(pair.up, before.pairs[key].up)}
    assert changed == {"unet", "text_encoder"}


@pytest.mark.long
def test_the_old_switch_for_recomputed_blocks_gives_the_same_step(settings: Callable[..., Config]) -> None:
    results = []
    for flag in ("false", "true"):
        run = prepared(
            settings(f"run-{flag}", f"training.gradient_checkpointing={flag}", "adapter.text_encoder=true")
        )
        assert run.config.training.recompute == ("blocks" if flag == "true" else "nothing")
        results.append((train_step(run)[1], run.masters()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for key, pair in results[0][1].items():
        torch.testing.assert_close(pair.up, results[1][1].pairs[key].up, rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_run_folder_holds_what_the_documentation_promises(settings: Callable[..., Config]) -> None:
    config = settings(
        "run",
        "training.steps=4",
        "sample.prompts=['a cat','a dog']",
        "sample.every=2",
        "sample.steps=2",
        "data.validation=2",
        "training.checkpoint_every=1",
        "training.keep_checkpoints=2",
        "output.name=style",
        "data.trigger_word=zork",
    )
    recorder = Recorder()
    result = train(config, listeners=[recorder])
    names = {
        path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*") if path.is_file()
    }
    expected = {"config.toml", "events.jsonl", "loss.png", "style.safetensors", "style.png", "style.json"}
    expected |= {f"samples/step-{step:06d}-{n}.png" for step in (0, 2, 4) for n in (1, 2)} | {
        "samples/grid.png"
    }
    assert expected <= names
    assert [folder.step for folder in list_checkpoints(result.folder / "checkpoints")] == [3, 4]
    with Image.open(result.folder / "samples" / "grid.png") as grid:
        assert grid.width > 2 * 32 and grid.height > 3 * 32
    validations = [event for event in recorder.events if isinstance(event, Validated)]
    assert validations[0].step == 0
    assert validations[-1].num_images == 2
    lines = (result.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == [type(e).__name__ for e in recorder.events]
    assert result.adapter_file is not None
    adapter = read_adapter(result.adapter_file)
    assert (adapter.info.trigger_words, adapter.info.family) == (("zork",), "sd1")
    assert load_config(result.folder / "config.toml").training.steps == 4


@pytest.mark.long
def test_validation_repeats_exactly(settings: Callable[..., Config]) -> None:
    """Noise and times are fixed by the image, so equal weights give an equal loss at any step."""
    losses = []
    for name in ("one", "two"):
        recorder = Recorder()
        # at a rate of almost zero the adapter stays at dW = 0 in effect
        overrides = (
            "training.steps=2",
            "data.validation=1",
            "optimizer.learning_rate=1e-30",
            "optimizer.weight_decay=0",
        )
        train(settings(name, *overrides), listeners=[recorder])
        losses.append([event.loss for event in recorder.events if isinstance(event, Validated)])
    assert len(losses[0]) == 2
    assert losses[0][0] == losses[0][1] > 0
    assert losses[0] == losses[1]


@pytest.mark.long
def test_fp16_on_cpu_trains_with_a_scaler_that_resumes(settings: Callable[..., Config]) -> None:
    config = settings("run", "training.precision=fp16", "training.steps=4")
    control = Control()
    train(config, listeners=[Recorder(control, stop_at=2)], control=control)
    resumed = final_state(train(config, resume=True))
    whole = final_state(train(settings("whole", "training.precision=fp16", "training.steps=4")))
    assert_equal_tensors(whole, resumed)


def test_listener_that_raises_is_dropped_and_the_run_goes_on(settings: Callable[..., Config]) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("display gone")

    with pytest.warns(UserWarning, match="display gone"):
        result = train(settings("run", "training.steps=2"), listeners=[broken])
    assert result.step == 2


def test_events_are_frozen_facts() -> None:
    event = Validated(1, 0.5, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.loss = 0.0  # type: ignore[misc]


def same(first: AdapterWeights, other: AdapterWeights) -> bool:
    return list(first.pairs) == list(other.pairs) and all(
        torch.equal(pair.down, other.pairs[key].down) and torch.equal(pair.up, other.pairs[key].up)
        for key, pair in first.items()
    )


def test_the_share_of_time_spent_waiting_for_data_is_told(settings: Callable[..., Config]) -> None:
    heard: list[Event] = []
    result = train(settings("run", "training.steps=3"), listeners=[heard.append])
    shares = [event.data_wait_share for event in heard if isinstance(event, StepDone)]
    assert len(shares) == 3
    assert all(0 <= share < 1 for share in shares)
    (finished,) = (event for event in heard if isinstance(event, RunFinished))
    assert 0 <= min(shares) <= finished.data_wait_share == result.data_wait_share <= max(shares)
