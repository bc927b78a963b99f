"""What is compared: runs of ours and of diffusers' script, adapter files, folders of images.

A run is made once, below the output folder, under a name that tells what it was made from; a half-made
one is made again from its start, so that its wall time is one process's from start to end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlora.config.schema import USUAL_SCHEDULE, Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.families.fingerprint import file_digest
from sdlora.files import write_json

from ..trainers import BenchmarkError, Measured, Settings, measured, prepare_images, run
from .gallery import Say, slug
from .styles import ROOT, Style

MINI = ROOT / "sdlora" / "assets" / "mini"


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        name: for tables.
        adapter: adapter file or PEFT folder, drawn at every strength; None for images.
        images: folder of already made images; None for adapters.
        steps: of its training, where it was trained here.
        seconds: wall time of the training process, from start to end.
        settings: what it was trained with, in words.
    """

    name: str
    adapter: Path | None = None
    images: Path | None = None
    steps: int | None = None
    seconds: float | None = None
    settings: str = ""


@dataclass(frozen=True)
class Workshop:
    """Trains entries of one style on one base.

    Attributes:
        base: as in ``model.base``.
        style: what is learned.
        folder: runs are kept here.
        seed: of the trainings.
        say: called with the progress.
    """

    base: str
    style: Style
    folder: Path
    seed: int
    say: Say

    def ours(self, name: str, settings: Sequence[str]) -> tuple[Entry, Config]:
        """Train with sdlora and the given ``key=value`` texts; all else as the base and data recommend."""
        base = str(Path(self.base).resolve()) if Path(self.base).is_dir() else self.base
        given = [f"training.seed={self.seed}", "sample.prompts=[]", "judge.every=0", *settings]
        place, known = self._place(name, [base, *given, _code()])
        if known is None:
            self.say(f"{name}: training with sdlora {' '.join(settings)}".rstrip())
            command = [sys.executable, "-m", "sdlora", "train", str(self.style.training.resolve())]
            command += ["--base", base, "--name", "style", "--output", str(place / "run")]
            if self.style.trigger_word is not None:
                given.append(f"data.trigger_word={json.dumps(self.style.trigger_word)}")
            given.append(f"data.cache_folder={json.dumps(str(place / 'cache'))}")
            known = self._measure(name, [*command, *given], place, place / "run" / "style.safetensors")
        config = load_config(place / "run" / "config.toml")
        assert config.training.steps is not None
        entry = Entry(
            name,
            place / "run" / "style.safetensors",
            steps=config.training.steps,
            seconds=known["seconds"],
            settings=_in_words(config),
        )
        return entry, config

    def peer(self, name: str, script: Path, config: Config, steps: int, rate: float | None = None) -> Entry:
        """Train with diffusers' script and what it can take of a run of ours."""
        settings = peer_settings(self.base, script, config)
        settings = settings if rate is None else replace(settings, learning_rate=rate)
        place, known = self._place(
            name, [file_digest(script), str(steps), str(self.seed), repr(settings), _weights(settings.base)]
        )
        if known is None:
            self.say(f"{name}: {steps} steps of diffusers' script")
            run_measured = run(
                "diffusers",
                settings,
                prepare_images(self.style.training, place / "images", settings.batch_size),
                place / "run",
                steps=steps,
                seed=self.seed,
            )
            known = _kept(place, run_measured)
        words = (
            f"attention, rank {settings.rank}, rate {settings.learning_rate:g}, batch {settings.batch_size}"
        )
        return Entry(
            name,
            place / "run" / "run" / "pytorch_lora_weights.safetensors",
            steps=steps,
            seconds=known["seconds"],
            settings=f"{words}, {settings.schedule}",
        )

    def _place(self, name: str, made_of: Sequence[str]) -> tuple[Path, dict[str, Any] | None]:
        """Return the run's folder, and what is known of it if it is finished; else it is emptied."""
        weights = _weights(MINI if self.base == "mini" else Path(self.base))
        images = [f"{i.path.name} {i.digest} {i.caption}" for i in self.style.training_items()]
        text = json.dumps([*made_of, weights, *images])
        place = self.folder / f"{slug(name)}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        facts = place / "training.json"
        if facts.is_file():
            return place, json.loads(facts.read_text(encoding="utf-8"))
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place, None

    def _measure(self, name: str, command: list[str], place: Path, adapter: Path) -> dict[str, Any]:
        threads = os.cpu_count() or 1
        try:
            wall, cpu, peak = measured(name, command, place, adapter, threads)
        except BenchmarkError as error:
            raise ConfigError(str(error)) from error
        return _kept(place, Measured(0, wall, cpu, peak, adapter))


def _kept(place: Path, run_measured: Measured) -> dict[str, Any]:
    """Write down that a run is finished, and what it took."""
    known = {
        "seconds": run_measured.wall_s,
        "cpu_seconds": run_measured.cpu_s,
        "peak_bytes": run_measured.peak_bytes,
    }
    write_json(place / "training.json", known)
    return known


def peer_settings(base: str, script: Path, config: Config) -> Settings:
    """Return what diffusers' script can be given of the settings that a run of ours ended up with.

    Raises:
        ConfigError: for a base that its script cannot read.
    """
    folder = MINI if base == "mini" else Path(base)
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"base `{base}`: diffusers' script needs a diffusers folder; give one with --base")
    precision = config.training.precision
    assert precision != "fp16"
    rate, rank, batch = config.optimizer.learning_rate, config.adapter.rank, config.training.batch_size
    resolution = config.data.resolution
    assert rate is not None and rank is not None and batch is not None and isinstance(resolution, int)
    return Settings(
        base=folder.resolve(),
        peer_script=script.resolve(),
        batch_size=batch,
        rank=rank,
        precision=precision or "fp32",
        learning_rate=rate,
        resolution=resolution,
        min_snr_gamma=config.training.min_snr_gamma,
        threads=os.cpu_count() or 1,
        peer_workers=0,
        schedule=config.optimizer.schedule or USUAL_SCHEDULE,
        warmup_steps=config.optimizer.warmup_steps or 0,
    )


def equal_time_steps(ours: float, one_step: float, all_steps: float, steps: int) -> int:
    """Return how many steps a trainer makes in ``ours`` seconds.

    Args:
        ours: seconds to fill, start-up included.
        one_step: seconds of its run of one step.
        all_steps: seconds of its run of ``steps`` steps.
        steps: more than one.

    Raises:
        BenchmarkError: when the longer run was not longer.
    """
    per_step = (all_steps - one_step) / (steps - 1)
    if per_step <= 0:
        raise BenchmarkError(
            f"{steps} steps took {all_steps:.1f} s and one step {one_step:.1f} s: the machine was too busy"
        )
    return max(1, 1 + round((ours - one_step) / per_step))


def peers(
    workshop: Workshop, script: Path, ours: Entry, config: Config, rates: Sequence[float] = ()
) -> list[Entry]:
    """Train the peer at the steps of a run of ours, at its wall time, and at further rates if asked to.

    Raises:
        ConfigError: when the script cannot be used; its own error is in the message.
    """
    if not script.is_file():
        raise ConfigError(f"{script}: no such script; take train_text_to_image_lora.py from diffusers")
    assert ours.steps is not None and ours.seconds is not None
    try:
        start = workshop.peer("diffusers, one step", script, config, 1)
        equal = workshop.peer("diffusers, equal steps", script, config, ours.steps)
        assert start.seconds is not None and equal.seconds is not None
        steps = equal_time_steps(ours.seconds, start.seconds, equal.seconds, ours.steps)
        timed = workshop.peer("diffusers, equal time", script, config, steps)
        more = [
            workshop.peer(f"diffusers, equal steps, rate {rate:g}", script, config, ours.steps, rate)
            for rate in rates
        ]
    except BenchmarkError as error:
        raise ConfigError(str(error)) from error
    return [equal, timed, *more]


def _in_words(config: Config) -> str:
    adapter, rate = config.adapter, config.optimizer.learning_rate
    parts = [adapter.targets, f"rank {adapter.rank}", f"rate {rate:g}", f"batch {config.training.batch_size}"]
    kind = [] if adapter.kind == "lora" else [adapter.kind]
    return ", ".join([*kind, *map(str, parts), config.optimizer.schedule or USUAL_SCHEDULE])


def _weights(base: Path) -> str:
    """Return a digest of a base and what it recommends, so that runs on another are never taken for these."""
    names = sorted(base.rglob("*")) if base.is_dir() else [base]
    files = [file for file in names if file.suffix in (".safetensors", ".json") and file.is_file()]
    return " ".join(file_digest(file) for file in files)


def _code() -> str:
    """Return a digest of sdlora's code: what an older one trained is not a result of this one."""
    files = sorted((ROOT / "sdlora").rglob("*.py"))
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


def named(texts: Sequence[str], option: str) -> Mapping[str, str]:
    """Return NAME -> VALUE of texts ``NAME=VALUE``.

    Raises:
        ConfigError: for a text without a name, or a name given twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise ConfigError(f"{option} {text}: give NAME=VALUE, e.g. {option} theirs=path/to/it")
        if name.strip() in values:
            raise ConfigError(f"{option}: `{name.strip()}` is given twice; entries need names of their own")
        values[name.strip()] = value.strip()
    return values
