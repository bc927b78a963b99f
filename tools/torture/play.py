"""What the trials work on: a tiny base, six images, the run they all make; whether two runs are the same."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sdlora.events import read_events
from sdlora.run_folder import RunFolder
from tools.same_bits.artefacts import artefact
from tools.tiny_base import write_tiny_base

from .warm import Ended, Fault, Warm

STEPS = 6
_SETTINGS = (
    *(f"training.steps={STEPS}", "training.batch_size=2", "training.seed=3", "training.checkpoint_every=2"),
    *("training.keep_checkpoints=2", "training.validate_every=3", "training.precision=fp32"),
    *("training.device=cpu", "data.resolution=32", "data.validation=1", "adapter.rank=2", "output.name=ink"),
    *("sample.prompts=['a cat']", "sample.every=3", "sample.steps=1"),
    "optimizer.learning_rate=0.01",
)


@dataclass
class Tally:
    """How many trials were made of something, and what did not hold: each with its seed."""

    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, problems: list[str], seed: str, say: Callable[[str], None], place: Path) -> None:
        """Count a trial; say what did not hold, and how far it is now and then.

        Args:
            problems: none if it held.
            seed: what repeats it.
            say: speaks.
            place: its folder, which stays if it did not hold.
        """
        self.tried += 1
        self.held += not problems
        if problems:
            self.failures.append(f"{seed}: " + "; ".join(problems))
            say(f"FAILED {self.failures[-1]}\n    left in {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)
        if self.tried % 10 == 0:
            say(f"{self.held} of {self.tried} held so far")

    def __iadd__(self, other: Tally) -> Tally:
        self.tried, self.held = self.tried + other.tried, self.held + other.held
        self.failures += other.failures
        return self


class Play:
    """A folder in which runs are made and compared with one that nothing disturbed.

    Attributes:
        seconds: that the undisturbed run took.
        calls: of it that changed something below its folder.
        reference: what came out of it.
    """

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        self.base, self.images = folder / "base", folder / "images"
        write_tiny_base(self.base)
        _draw(self.images)
        whole = self.place("undisturbed")
        self.seconds = self._timed(whole)
        self.calls = warm.seen()
        self.reference = outcome_of(whole.run)
        assert self.reference["adapter"] and len(self.reference["losses"]) == STEPS, self.reference

    def _timed(self, place: Place) -> float:
        begun = time.monotonic()
        ended = self.warm.run(*place.begin(), fault=Fault(place.folder, 10**9, errno.EIO))  # only counted
        if ended.code:
            raise SystemExit(f"an undisturbed run failed: {ended.err}")
        return time.monotonic() - begun

    def place(self, name: str) -> Place:
        """Return a new place for a run of its own, with its own images, base and cache."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.images, folder / "images")
        shutil.copytree(self.base, folder / "base")
        return Place(folder)

    def differing(self, run: Path) -> list[str]:
        """Return in what a finished run is another one than that which nothing disturbed."""
        outcome = outcome_of(run)
        return [f"{key} differ" for key, value in self.reference.items() if outcome[key] != value]

    def carried_on(self, place: Place) -> tuple[list[str], Ended]:
        """Go on with a run as its user would; return what is wrong with how it ends."""
        saved = newest_saved(place.run)
        ended = self.warm.run(*(place.go_on() if RunFolder(place.run).exists() else place.begin()))
        problems = complaints(ended)
        if ended.code:
            problems.append(f"cannot go on (code {ended.code}): {ended.err.strip()[-300:]}")
            return problems, ended
        began = [event for event in read_events(place.run) if event.get("event") == "RunStarted"]
        if began and began[-1]["first_step"] < saved:
            problems.append(f"went on from step {began[-1]['first_step']}, though step {saved} was saved")
        return problems + self.differing(place.run), ended


@dataclass(frozen=True)
class Place:
    """The folder of one trial."""

    folder: Path

    @property
    def run(self) -> Path:
        """Where its run goes."""
        return self.folder / "run"

    @property
    def images(self) -> Path:
        """Its images."""
        return self.folder / "images"

    @property
    def base(self) -> Path:
        """Its base."""
        return self.folder / "base"

    @property
    def cache(self) -> Path:
        """Its cache of encodings."""
        return self.folder / "cache"

    def begin(self) -> list[str]:
        """Return the command line that begins its run."""
        words = [f"data.cache_folder={self.cache}", f"model.base={self.base}", *_SETTINGS]
        return ["train", str(self.images), "--output", str(self.run), *words]

    def go_on(self) -> list[str]:
        """Return the command line that goes on with it."""
        return ["train", "--resume", "--output", str(self.run)]

    def clear(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def complaints(ended: Ended) -> list[str]:
    """Return what no command may say or do, however it ended."""
    problems = []
    if "Traceback" in ended.err:
        problems.append(f"a traceback: {ended.err.strip()[-400:]}")
    if ended.code == 2 and not any(line.startswith("sdlora: ") for line in ended.err.splitlines()):
        problems.append("refused without a word")
    if ended.code not in (0, 2, 130) and ended.code > 0:
        problems.append(f"exit code {ended.code}")
    return problems


def newest_saved(run: Path) -> int:
    """Return the last step that a run says it has saved."""
    saved = [event["step"] for event in read_events(run) if event.get("event") == "CheckpointSaved"]
    return max(saved, default=0)


def outcome_of(run: Path) -> dict[str, Any]:
    """Return what must be the same of two runs: tensors, losses, previews; nothing that has a time in it."""
    folder = RunFolder(run)
    losses: dict[int, Any] = {}
    validation: dict[int, Any] = {}
    for event in read_events(run):
        if event.get("event") == "StepDone":
            losses[event["step"]] = (event["loss"], event["learning_rate"], event["grad_norm"])
        elif event.get("event") == "Validated":
            validation[event["step"]] = event["loss"]
    return {
        "adapter": {file.name: _tensors(file) for file in folder.adapter_files()},
        "losses": losses,
        "validation losses": validation,
        "previews": {preview.file.name: _pixels(preview.file) for preview in folder.list_previews()},
    }


def _tensors(file: Path) -> Any:
    with suppress(Exception):  # damaged: not the same as anything
        return artefact(file, {})["tensors"]
    return "damaged"


def _pixels(file: Path) -> str:
    with suppress(Exception), Image.open(file) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
    return "damaged"


def _draw(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(6):
        width, height = ((40, 40), (64, 32), (32, 64))[number % 3]
        image = Image.new("RGB", (width, height), (40 * number, 90, 200 - 20 * number))
        ImageDraw.Draw(image).ellipse((4 + number, 4, width - 8, height - 5), fill=(250, 40 * number, 10))
        image.save(folder / f"thing{number}.png")
        (folder / f"thing{number}.txt").write_text(f"a cat {number}", encoding="utf-8")


def changed_byte(file: Path, rng: random.Random) -> None:
    """Damage a file in place."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def json_of(value: Mapping[str, Any]) -> str:
    """Return a value for a log."""
    return json.dumps(value, default=str)
