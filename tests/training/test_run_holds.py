"""One process at a time trains in a run folder, and only on the base that the run began with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import OutputError, TrainingError
from sdlora.events import Control, Event, StepDone, read_events
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training.train import train


@pytest.fixture
def config(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Config:
    values = {
        "data.folder": image_folder(),
        "model.base": str(tiny_base),
        "output.folder": tmp_path / "run",
        "data.cache_folder": tmp_path / "cache",
    }
    words = ["training.steps=3", "training.batch_size=2", "data.validation=0", "sample.prompts=[]"]
    return load_config(None, [*words, "training.device=cpu", "training.precision=fp32"], values)


@pytest.mark.long
def test_nobody_else_trains_where_a_run_is_under_way(config: Config) -> None:
    refusals: list[str] = []
    control = Control()

    def intrude(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            for resume in (False, True):
                with pytest.raises(OutputError) as caught:
                    train(config, resume=resume)
                refusals.append(str(caught.value))
            control.stop()

    assert train(config, listeners=[intrude], control=control).stopped
    assert "already holds a run" in refusals[0]
    assert "another process is training there" in refusals[1]
    assert train(config, resume=True).step == 3  # let go of at the end
    assert config.output.folder is not None
    for folder in list_checkpoints(RunFolder(config.output.folder).checkpoints):
        folder.state_file.write_text("{}", encoding="utf-8")
    for _ in range(2):  # and by a run that could not begin
        with pytest.raises(TrainingError, match="no usable checkpoint"):
            train(config, resume=True)


def test_a_run_does_not_go_on_with_another_base(config: Config, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(config.model.base, base)
    config, control = config.with_values({"model.base": str(base)}), Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone):
            control.stop()

    train(config, listeners=[stop], control=control)
    for part, name in (("unet", "denoiser"), ("text_encoder", "text encoder")):
        (file,) = (base / part).glob("*.safetensors")
        sound = file.read_bytes()
        file.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
        with pytest.raises(TrainingError, match=f"its {name} changed since step-000001"):
            train(config, resume=True)
        file.write_bytes(sound)


def test_what_a_killed_run_had_saved_but_not_shown_is_shown_when_it_goes_on(config: Config) -> None:
    changes = {"data.validation": 1, "sample.prompts": ("a cat",), "sample.steps": 1, "training.steps": 2}
    config = config.with_values(changes)
    train(config)
    assert config.output.folder is not None
    run = RunFolder(config.output.folder)
    newest = run.list_previews()[-1]
    pixels, lines = newest.file.read_bytes(), run.events_file.read_text(encoding="utf-8").splitlines()
    newest.file.unlink()
    loss = next(json.loads(line)["loss"] for line in lines if '"Validated"' in line and '"step": 2,' in line)
    run.events_file.write_text(
        "\n".join(line for line in lines if '"Validated"' not in line) + "\n", encoding="utf-8"
    )
    train(config, resume=True)
    events = [event for event in read_events(run.path) if event["event"] == "Validated"]
    assert [(event["step"], event["loss"]) for event in events] == [(2, loss)]
    assert newest.file.read_bytes() == pixels
    train(config, resume=True)  # nothing is shown twice
    assert len([event for event in read_events(run.path) if event["event"] == "Validated"]) == 1
