"""Runs of several processes: the bits of one process, one who writes, and ends that are told once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from patience import PATIENCE, wait_for
from PIL import Image
from safetensors.torch import load_file

from sdlora.config.schema import Config
from sdlora.config.toml import load_config, save_config
from sdlora.errors import ConfigError
from sdlora.events import read_events
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training.train import train

Make = Callable[..., Path]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes as in the processes that a launcher starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tiny_base: Path, image_folder: Make, tmp_path: Path) -> Callable[..., Config]:
    folder = image_folder()

    def make(run: str, *overrides: str) -> Config:
        return load_config(
            None,
            [
                *(
                    "adapter.rank=2",
                    "training.batch_size=1",
                    "training.device=cpu",
                    "training.precision=fp32",
                ),
                *("data.crop=random", "data.variants=0", "data.flip=true", "data.caption_dropout=0.3"),
                *("training.noise_offset=0.1", "training.steps=3", "training.checkpoint_every=2"),
                *overrides,
            ],
            {
                "data.folder": folder,
                "model.base": str(tiny_base),
                "output.folder": tmp_path / run,
                "data.cache_folder": tmp_path / f"cache {run}",
            },
        )

    return make


def start(
    config: Config, *launcher: str, resume: bool = False, options: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start ``sdlora train`` with the settings of ``config`` by a launcher's command line."""
    assert config.output.folder is not None
    file = config.output.folder.with_suffix(".toml")
    save_config(config, file)
    words = ["train", "--config", str(file), "--json", *(["--resume"] if resume else []), *options]
    # not pipes: they would fill while nobody reads
    with file.with_suffix(".out").open("w") as output, file.with_suffix(".err").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "sdlora", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=errors,
        )


def end_of(process: subprocess.Popen[bytes], config: Config) -> tuple[int, str, str]:
    """Return exit code, output and errors."""
    assert config.output.folder is not None
    code = process.wait(PATIENCE)
    output, errors = (
        config.output.folder.with_suffix(ending).read_text("utf-8") for ending in (".out", ".err")
    )
    return code, output, errors


def launched(
    config: Config, *launcher: str, resume: bool = False, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Train in several processes and return the answer, which is the main one's."""
    code, output, errors = end_of(start(config, *launcher, resume=resume, options=options), config)
    assert code == 0, errors[-3000:]
    answers = [line for line in output.splitlines() if line.startswith("{")]
    assert len(answers) == 1, output
    answer: dict[str, Any] = json.loads(answers[0])
    return answer


def facts_of(run: Path) -> list[tuple[object, ...]]:
    """Return what a run told of its steps and its validation, but for the time they took."""
    facts: list[tuple[object, ...]] = []
    for event in read_events(run):
        if event["event"] == "StepDone":
            keys = ("step", "steps", "epoch", "loss", "learning_rate", "grad_norm", "num_images")
            facts.append(tuple(event[key] for key in keys))
        elif event["event"] == "Validated":
            facts.append((event["step"], event["loss"], event["num_images"]))
    return facts


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    (folder,) = (saved for saved in list_checkpoints(run / "checkpoints") if saved.step == step)
    return load_file(folder.optimizer_file)


def assert_same_bits(run: Path, other: Path, step: int) -> None:
    first, second = state_of(run, step), state_of(other, step)
    assert first.keys() == second.keys()
    assert len(first) >= 4
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same_runs(run: Path, other: Path, step: int) -> None:
    assert_same_bits(run, other, step)
    assert len(facts_of(run)) >= step
    assert facts_of(run) == facts_of(other)
    previews = RunFolder(run).list_previews()
    others = RunFolder(other).list_previews()
    assert [preview.file.name for preview in previews] == [preview.file.name for preview in others]
    for preview, twin in zip(previews, others, strict=True):
        # drawn in other batches, whose sums round otherwise
        drawn = [np.asarray(Image.open(file), dtype=int) for file in (preview.file, twin.file)]
        assert np.abs(drawn[0] - drawn[1]).max() <= 2
    names = [
        {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        for folder in (run, other)
    ]
    assert names[0] == names[1]


@pytest.mark.long
def test_two_processes_give_the_bits_of_one_and_either_goes_on_from_the_other(
    settings: Callable[..., Config], tmp_path: Path, one_thread: None
) -> None:
    shown = (
        "data.validation=2",
        "sample.prompts=['a cat','a dog','a bird']",
        "sample.steps=2",
        "sample.every=2",
    )
    answer = launched(settings("two", *shown), options=["--processes", "2"])
    assert (answer["step"], answer["stopped"]) == (3, False)
    train(settings("one", *shown, "training.gradient_accumulation=2"))
    assert_same_runs(tmp_path / "one", tmp_path / "two", 3)
    assert len(RunFolder(tmp_path / "one").list_previews()) == 9

    shutil.copytree(tmp_path / "two", tmp_path / "on")
    shutil.rmtree(tmp_path / "on" / "checkpoints" / "step-000003")
    with pytest.raises(ConfigError, match=r"training\.gradient_accumulation=2 keeps them"):
        train(settings("on", *shown), resume=True)
    train(settings("on", *shown, "training.gradient_accumulation=2"), resume=True)
    assert_same_bits(tmp_path / "on", tmp_path / "one", 3)


@pytest.mark.slow
def test_two_processes_judge_as_one_does(
    settings: Callable[..., Config], tmp_path: Path, one_thread: None
) -> None:
    judged = (
        *("data.validation=1", "sample.prompts=['a cat']", "sample.steps=1", "sample.guidance=1"),
        *("judge.every=2", "judge.share=1000", "judge.images=4", "judge.strengths=[0.5, 1.0]"),
    )
    answer = launched(settings("two", *judged), options=["--processes", "2"])
    assert answer["report"] is not None
    train(settings("one", *judged, "training.gradient_accumulation=2"))
    assert_same_bits(tmp_path / "one", tmp_path / "two", 3)
    cells = [
        json.loads(RunFolder(tmp_path / name).judging_file.read_text(encoding="utf-8"))["cells"]
        for name in ("one", "two")
    ]
    places = [[(cell["step"], cell["strength"]) for cell in each] for each in cells]
    assert places[0] == places[1] == [(2, 0.5), (2, 1.0), (3, 0.5), (3, 1.0)]
    for first, second in zip(*cells, strict=True):  # drawn in other batches, whose sums round otherwise
        assert first["score"] == pytest.approx(second["score"], abs=0.02)


@pytest.mark.slow  # ``.ci/run`` runs it
def test_a_fault_that_all_find_is_told_once_and_is_the_exit_code(settings: Callable[..., Config]) -> None:
    config = settings("run").with_values({"model.base": "/nowhere/base.safetensors"})
    code, _, errors = end_of(start(config, options=["--processes", "2"]), config)
    assert code == 2
    told = [line for line in errors.splitlines() if "/nowhere/base.safetensors" in line]
    assert len(told) == 1, errors
    assert told[0].startswith("sdlora: ")
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("adapter.text_encoder=true", "adapter.dropout=0.2", "adapter.targets=all"),
        ("training.precision=bf16", "data.top_up=true"),
        ("training.precision=fp16", "optimizer.max_grad_norm=0.01"),
    ],
)
def test_four_processes_and_two_with_two_micro_batches_give_the_bits_of_one(
    settings: Callable[..., Config], tmp_path: Path, one_thread: None, overrides: tuple[str, ...]
) -> None:
    launched(settings("four", *overrides), *TORCHRUN, "4")
    launched(settings("two", *overrides, "training.gradient_accumulation=2"), *TORCHRUN, "2")
    train(settings("one", *overrides, "training.gradient_accumulation=4"))
    for run in ("four", "two"):
        assert_same_runs(tmp_path / "one", tmp_path / run, 3)


@pytest.mark.slow
def test_accelerates_launcher_does_the_same(
    settings: Callable[..., Config], tmp_path: Path, one_thread: None
) -> None:
    config = settings("run")
    file = tmp_path / "run.toml"
    save_config(config, file)
    flags = [
        "--multi_gpu",  # with --cpu it starts one process, whatever their number
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    command = [*launcher, "-m", "sdlora", "train", "--config", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    train(settings("one", "training.gradient_accumulation=2"))
    assert_same_runs(tmp_path / "one", tmp_path / "run", 3)


def steps_of(run: Path) -> int:
    return sum(event["event"] == "StepDone" for event in read_events(run))


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the training processes below a launcher, in the order of their ranks."""
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()
    ]
    return sorted(workers, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_all_at_one_step_and_the_run_goes_on_exactly(
    settings: Callable[..., Config], tmp_path: Path, one_thread: None
) -> None:
    config = settings("run", "training.steps=60", "training.checkpoint_every=1000")
    process = start(config, options=["--processes", "2"])
    wait_for(lambda: steps_of(tmp_path / "run") >= 3)
    process.send_signal(signal.SIGINT)
    code, _, errors = end_of(process, config)
    assert code == 128 + signal.SIGINT, errors
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert 3 <= saved.step < 60
    assert steps_of(tmp_path / "run") == saved.step
    launched(config, resume=True, options=["--processes", "2"])
    train(
        settings(
            "one", "training.steps=60", "training.checkpoint_every=1000", "training.gradient_accumulation=2"
        )
    )
    assert_same_bits(tmp_path / "one", tmp_path / "run", 60)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_process_ends_all_within_a_minute(settings: Callable[..., Config], tmp_path: Path) -> None:
    config = settings("run", "training.steps=5000")
    process = start(config, options=["--processes", "2"])
    wait_for(lambda: steps_of(tmp_path / "run") >= 3)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    code, _, errors = end_of(process, config)
    assert (len(gone), alive, code) == (2, [], 2)
    assert "process 2 of 2 was ended by SIGKILL" in errors
    assert "Traceback" not in errors
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
def test_processes_with_other_images_are_refused(settings: Callable[..., Config], tmp_path: Path) -> None:
    """As on two machines, one of which has an older copy."""
    config = settings("run")
    script = tmp_path / "other.py"
    script.write_text(
        "import os, sys\n"
        "from sdlora.commands.cli import main\n"
        "words = ['data.trigger_word=zork'] if os.environ['RANK'] == '1' else []\n"
        "sys.exit(main([*sys.argv[1:], *words]))\n",
        encoding="utf-8",
    )
    file = tmp_path / "run.toml"
    save_config(config, file)
    command = [sys.executable, *TORCHRUN, "2", str(script), "train", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("sdlora: ")]
    assert len(told) == 1
    assert "process 2 of 2 has other images or captions and other settings than process 1" in told[0]
    assert not (tmp_path / "run" / "checkpoints").exists()
