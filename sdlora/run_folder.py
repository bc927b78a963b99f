"""A run folder: every name and path in it, defined here alone for trainer, export, demo and web UI.

Names are read strictly: a copy called ``step-000020 copy``, a ``step-000040-best.png`` or anything else that
a person or a sync program left there is neither checkpoint nor preview, and is skipped.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STOP, SAVE, SAMPLE = "STOP", "SAVE", "SAMPLE"
REQUESTS = (STOP, SAVE, SAMPLE)
"""Files with these names ask a run to stop, to save or to draw previews; it removes each when it reads it."""

LOCK = ".lock"
ADAPTER_SUFFIX = ".safetensors"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the preview images that can lie beside an adapter."""
_CHECKPOINT = re.compile(r"step-(\d{6,18})", re.ASCII)
_PREVIEW = re.compile(r"step-(\d{6,18})-([1-9]\d{0,8})\.png", re.ASCII)


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; none of them has to exist.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """All final settings of the run."""
        return self.path / "config.toml"

    @property
    def events_file(self) -> Path:
        """The events of the run, one JSON object per line."""
        return self.path / "events.jsonl"

    @property
    def loss_curve(self) -> Path:
        """The image of the loss curve."""
        return self.path / "loss.png"

    @property
    def samples(self) -> Path:
        """The folder of previews."""
        return self.path / "samples"

    @property
    def grid(self) -> Path:
        """All previews, steps x prompts."""
        return self.samples / "grid.png"

    @property
    def judging(self) -> Path:
        """The folder of the images that a run judged itself by."""
        return self.path / "judging"

    @property
    def judging_file(self) -> Path:
        """What was judged, and how well it did."""
        return self.judging / "judging.json"

    def judged_images(self, step: int | None, strength: float, *, learned: bool = False) -> Path:
        """Return the file of a judged checkpoint's images at a strength; of the base's for None.

        With ``learned``, those of the weights as learned beside their average.
        """
        name = "base" if step is None else f"{step_name(step)}-at-{strength:g}"
        name += "-as-learned" if learned else ""
        return self.judging / f"{name}.png"

    @property
    def report(self) -> Path:
        """The page that says which step and strength are best."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def lock_file(self) -> Path:
        """Held, by the operating system, by the process that trains here."""
        return self.path / LOCK

    @property
    def trackers(self) -> Path:
        """The folder of TensorBoard's and W&B's own files."""
        return self.path / "trackers"

    def exists(self) -> bool:
        """Return whether a run has begun here: its settings are written."""
        return self.config_file.is_file()

    def adapter_file(self, name: str) -> Path:
        """Return the file of the finished adapter."""
        return self.path / f"{name}{ADAPTER_SUFFIX}"

    def adapter_files(self) -> list[Path]:
        """Return the finished adapters that lie here, by name."""
        files = self.path.glob(f"*{ADAPTER_SUFFIX}")
        return sorted(file for file in files if not file.name.startswith("."))

    def request_file(self, request: str) -> Path:
        """Return the file that asks for one of :data:`REQUESTS`."""
        return self.path / request

    def preview(self, step: int, number: int) -> Path:
        """Return the file of the ``number``-th prompt's preview (from 1) after ``step`` steps."""
        return self.samples / f"{step_name(step)}-{number}.png"

    def list_previews(self) -> list[Preview]:
        """Return the previews that lie here, by step and prompt."""
        previews = []
        for file in self.samples.glob("step-*.png"):
            if match := _PREVIEW.fullmatch(file.name):
                previews.append(Preview(int(match[1]), int(match[2]), file))
        return sorted(previews, key=lambda preview: (preview.step, preview.number))

    def newest_preview(self) -> Path | None:
        """Return the newest image of a run: the last preview of its first prompt, or else any other image."""
        if previews := [preview.file for preview in self.list_previews() if preview.number == 1]:
            return previews[-1]
        for folder, pattern in ((self.samples, "**/*"), (self.path, "*sweep*")):
            dated = []
            for file in folder.glob(pattern):
                # a hidden one is just being written, and is renamed at any moment
                if file.suffix.lower() in IMAGE_ENDINGS and not file.name.startswith("."):
                    with suppress(OSError):  # removed meanwhile
                        if file.is_file():
                            dated.append((file.stat().st_mtime_ns, file.name, file))
            if dated:
                return max(dated)[-1]
        return None


@dataclass(frozen=True)
class Preview:
    """One preview image: drawn after ``step`` steps with the ``number``-th prompt (from 1)."""

    step: int
    number: int
    file: Path


@dataclass(frozen=True)
class CheckpointFolder:
    """The paths of one checkpoint.

    Attributes:
        path: the folder itself.
        step: optimizer steps done.
    """

    path: Path
    step: int

    @property
    def adapter_file(self) -> Path:
        """The adapter in fp32, in WebUI format: usable by itself."""
        return self.path / f"adapter{ADAPTER_SUFFIX}"

    @property
    def optimizer_file(self) -> Path:
        """Masters and the optimizer's state."""
        return self.path / "optimizer.safetensors"

    @property
    def state_file(self) -> Path:
        """The step, the digests of the other two, and what is not a tensor."""
        return self.path / "state.json"


def step_name(step: int) -> str:
    """Return the start of the names of checkpoints and previews: ``step-000040``."""
    return f"step-{step:06d}"


def checkpoint_folder(checkpoints: Path, step: int) -> CheckpointFolder:
    """Return the checkpoint of ``step`` below the folder of checkpoints."""
    return CheckpointFolder(checkpoints / step_name(step), step)


def list_checkpoints(checkpoints: Path) -> list[CheckpointFolder]:
    """Return the checkpoints below the folder of checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    folders = []
    for path in checkpoints.iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            folders.append(CheckpointFolder(path, int(match[1])))
    return sorted(folders, key=lambda folder: folder.step)


def checkpoint_of(adapter_file: Path) -> tuple[RunFolder, CheckpointFolder] | None:
    """Return the run and the checkpoint that an adapter file belongs to; None for any other file."""
    folder = adapter_file.parent
    match = _CHECKPOINT.fullmatch(folder.name)
    run = RunFolder(folder.parent.parent)
    if match is None or folder.parent != run.checkpoints:
        return None
    return run, CheckpointFolder(folder, int(match[1]))


def was_run(path: Path) -> bool:
    """Return whether a folder is that of a run: it has settings, and something else that a run writes."""
    run = RunFolder(path)
    return run.exists() and any(part.exists() for part in (run.checkpoints, run.samples, run.events_file))
