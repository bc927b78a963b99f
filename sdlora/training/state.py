"""A run: its parts, what a checkpoint holds of it, restoring that, and what must not change in between."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..adapters.canonical import AdapterWeights
from ..config.schema import Config
from ..config.toml import load_config
from ..data.batching.batches import Batch
from ..data.batching.cache import EncodedDataset
from ..data.batching.loader import BatchLoader
from ..data.batching.order import Order
from ..data.reading.items import Dataset, ImageItem
from ..errors import ConfigError, TrainingError
from ..events import Emitter, Notice
from ..families.base import Conditioning, DiffusionModel
from ..families.parallel import SplitPredictor
from ..judging.held_out import Measured
from ..judging.panel import Panel
from ..judging.verdict import Verdict
from ..machine import version
from ..run_folder import RunFolder, list_checkpoints
from . import checkpoint, optimizer_state
from .fast import Choice, FastStep
from .inputs import Ready
from .masters import ParameterGroup
from .memory import MemoryPlan
from .objective import predicts_blank
from .optimizers import parameter_names
from .processes import Processes
from .reports import Reports
from .shown_weights import ShownWeights
from .trainable import TrainableAdapter
from .warm_start import digest_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Judge(Protocol):
    """Judges checkpoints of a run; :class:`sdlora.training.judge.RunJudge`."""

    @property
    def panel(self) -> Panel:
        """The prompts, once something was judged."""

    @property
    def share(self) -> float:
        """What judging took so far, as a share of the training's time."""

    def images(self) -> Mapping[tuple[str, float], Sequence[Image]]:
        """Return the panel's images by (``step 20``, strength), and the base's under ``("base", 0)``."""

    @property
    def enough(self) -> bool:
        """Whether the run has gone on for as long without getting better as the settings allow."""

    def due(self, step: int) -> bool:
        """Return whether this step's checkpoint is to be judged, the same in all processes."""

    def missing(self, step: int) -> bool:
        """Return whether the step that a resumed run begins at was to be judged, but was not."""

    def look(self) -> None:
        """Draw and judge the run as it is now."""

    def conclude(self) -> Verdict | None:
        """Return what everything judged says, in the main process."""

    def kept_steps(self) -> frozenset[int]:
        """Return the steps whose checkpoints are kept."""


# what a resumed run may change, as none of it alters the numbers of the adapter
_WHOLE_BLOCKS = (
    "it needs the fast path `blocks`, torch's own fused attention, and from `projections` on an adapter "
    "without dropout; whole blocks are computed again instead, which takes less memory and more time"
)
_FREE_ON_RESUME = (
    "sample.",
    "judge.",
    "output.",
    "data.folder",
    "data.cache_folder",
    "data.encode_captions",
    "training.fast",  # but by rounding, which is said
    "training.recompute",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.validate_every",
    "training.average_views",
    "training.export_weights",
)


@dataclass
class Run:
    """Everything the loop needs.

    Attributes:
        base: digests of the base's components.
        step: optimizer steps done.
        step_seconds: seconds that the steps of this process took.
        steps_here: how many these are.
        reports: of steps, not known or not told yet.
        start: digest of the masters before the first step.
        learned: some step had a gradient.
        skipped: steps in a row whose fp16 gradients overflowed.
        overflowed: how often the loss of each image was not finite, by its name.
        told: what failed beside the training, as the user was told.
        held: what is given back when the run ends: the run folder.
        made_splitter: how a batch can be computed in parts; ``splitter`` if it is.
        choice: the way to compute; None for the usual one.
        fast_before: the fast paths that the checkpoint was made with, if the run was resumed.
        measured: what validation measured so far; None before the first time.
        judge: what judges checkpoints, if the settings ask for it.
        stopping: tells whether a stop is asked for now; what takes long looks at it, in the main process.
        stop_asked: a stop was asked for when all steps were made.
    """

    config: Config
    folder: RunFolder
    model: DiffusionModel
    base: Mapping[str, str]
    dataset: Dataset
    training: EncodedDataset
    validation: EncodedDataset
    order: Order
    steps: int
    memory: MemoryPlan
    trainable: TrainableAdapter
    optimizer: torch.optim.Optimizer
    shown: ShownWeights
    scaler: torch.amp.GradScaler
    processes: Processes
    emit: Emitter
    started_at: float
    splitter: SplitPredictor | None
    fast: FastStep
    loader: BatchLoader[Ready]
    reports: Reports
    preview_text: Mapping[str, Conditioning]
    preview_adapters: Mapping[str, Path]
    step: int = 0
    step_seconds: float = 0.0
    steps_here: int = 0
    start: str = ""
    learned: bool = False
    skipped: int = 0
    overflowed: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)
    held: ExitStack = field(default_factory=ExitStack)
    made_splitter: SplitPredictor | None = None
    choice: Choice | None = None
    fast_before: tuple[str, ...] | None = None
    measured: Measured | None = None
    judge: Judge | None = None
    stopping: Callable[[], bool] = field(default=lambda: False)
    stop_asked: bool = False

    @property
    def images_per_step(self) -> int:
        """Images of a full optimizer step: micro-batch x accumulation x processes."""
        settings = self.config.training
        assert settings.batch_size is not None
        return settings.batch_size * settings.gradient_accumulation * self.processes.count

    @property
    def groups(self) -> list[ParameterGroup]:
        """The masters by learning rate."""
        return self.trainable.groups

    @property
    def keep_text(self) -> bool:
        """Whether the text encoder is needed while training."""
        return self.config.adapter.adapts_text or self.config.data.encode_captions == "in loop"

    @property
    def shows_both(self) -> bool:
        """Whether validation and previews show the learned values beside an average of them."""
        return self.config.training.average != "none" and self.config.training.average_views == "both"

    @property
    def exports_learned(self) -> bool:
        """Whether files hold the learned values although an average of them is kept."""
        settings = self.config.training
        return settings.average != "none" and settings.export_weights == "learned"

    @property
    def asks_which_is_better(self) -> bool:
        """Whether judging says if the file holds an average or the learned values."""
        settings = self.config.training
        return settings.average != "none" and settings.export_weights == "better"

    def to_export(self) -> AbstractContextManager[None]:
        """Have the masters hold what files hold unless judging says otherwise; afterwards the learned."""
        return nullcontext() if self.exports_learned else self.shown.in_model()

    def leave_out_parts(self, batch: Batch) -> None:
        """Draw the ranks and layers that each image of a batch does without, if settings ask for it."""
        if self.trainable.random_parts is not None:
            times = 2 if predicts_blank(self.config) else 1
            self.trainable.random_parts.draw(batch.generators("parts"), times=times)

    def ready_to_train(self) -> None:
        """Set the modules' modes and devices as training steps need them."""
        self.model.prepare(
            training=True,
            gradient_checkpointing=self.config.training.rung != "nothing" and not self.fast.recomputes,
            keep_text=self.keep_text,
            keep_images=self.training.views.in_loop,
        )

    def parameters(self) -> list[Tensor]:
        """Return the adapter's parameters inside the model, in the order of the masters."""
        return self.trainable.parameters()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        loss.backward()
        if self.splitter:
            self.splitter.backward(self.parameters())
        self.fast.gather()

    def paths(self) -> tuple[str, ...]:
        """Return the fast paths to use: those the settings allow, and a resumed run had before."""
        setting, before = self.config.training.fast, self.fast_before
        names = self.fast.possible(setting)
        if (rung := self.config.training.rung) not in ("nothing", "blocks") and "recompute" not in names:
            self.emit(Notice(f"training.recompute={rung} is not possible here: {_WHOLE_BLOCKS}"))
        if before is None:
            return names
        # what is made again has the same bits, so it is no matter whether it was before
        names = tuple(n for n in names if n in {*before, "recompute"}) if setting == "auto" else names
        if {*names, "recompute"} != {*before, "recompute"}:
            now, then = (", ".join(paths) or "none" for paths in (names, before))
            text = f"{self.folder.path}: continues with other fast paths ({now}) than before ({then}); the"
            self.emit(Notice(f"{text} numbers differ by rounding from those of an uninterrupted run"))
        return names

    @property
    def parameter_names(self) -> list[str]:
        """Names of the optimizer's parameters, in its order; checkpoints hold its state by them."""
        return parameter_names(self.config.optimizer, self.groups)

    def masters(self) -> AdapterWeights:
        """Return the adapter's fp32 master weights as copies on the CPU."""
        return self.trainable.masters()


def run_folder(config: Config) -> RunFolder:
    """Return where a run is kept."""
    return RunFolder(config.output.folder or Path("runs") / config.output.name)


def run_state(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything that the next steps depend on: tensors by name, and the rest as JSON values."""
    tensors, optimizer = optimizer_state.pack(run.optimizer, run.parameter_names)
    masters = {f"{group.name}.master": group.master.flat.data for group in run.groups}
    shown = {f"shown.{name}": tensor for name, tensor in run.shown.tensors().items()}
    parts = (tensors, masters, run.trainable.tensors(), shown)
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(joined) == sum(map(len, parts)), "two tensors of a checkpoint have one name"
    return joined, {
        "run_id": dataset_digest(run.dataset.items),
        "optimizer": optimizer,
        "scaler": run.scaler.state_dict(),
        "started_at": run.started_at,
        "from_file": _origin(run),
        "base": dict(run.base),
        "micro_batches": run.processes.count * run.config.training.gradient_accumulation,
        "learned": run.learned,
        "fast": list(run.fast.names),
        "choice": None if run.choice is None else asdict(run.choice),
    }


def restore(run: Run) -> None:
    """Bring a run to its newest checkpoint; a run without checkpoints stays at its beginning.

    Raises:
        TrainingError: if there are some but none is whole, or if it belongs to other images.
    """
    saved = _newest(run)
    if saved is None:
        return
    if saved.state["run_id"] != dataset_digest(run.dataset.items):
        raise TrainingError(
            f"{run.config.data.folder}: the images or captions changed since {saved.folder.name}; put them "
            "back, or start a new run in another --output"
        )
    if saved.state.get("from_file") != _origin(run):
        raise TrainingError(
            f"{run.config.adapter.from_file}: changed since {saved.folder.name}; put the file back, or start "
            "a new run in another --output"
        )
    stored = saved.state.get("base", run.base)  # checkpoints of earlier versions do not say
    if changed := [part for part, digest in run.base.items() if stored.get(part) != digest]:
        raise TrainingError(
            f"{run.config.model.base}: its {' and '.join(changed)} changed since {saved.folder.name}; put "
            "the base back, or start a new run in another --output"
        )
    run.step, run.started_at = saved.step, float(saved.state["started_at"])
    run.learned = bool(saved.state.get("learned", True))
    if (choice := saved.state.get("choice")) is not None:
        run.choice = Choice.of(choice)
    run.fast_before = tuple(saved.state.get("fast", ()))  # before there were any, none was used
    starts = {group.name: f"{group.name}.start" for group in run.groups}
    run.trainable.restore_start(
        run.model, {name: saved.tensors[key] for name, key in starts.items() if key in saved.tensors}
    )
    for group in run.groups:
        group.master.load(saved.tensors[f"{group.name}.master"])
    _restore_optimizer(run, saved)
    run.shown.restore(_below("shown.", saved.tensors))
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(saved.state["scaler"])


def _newest(run: Run) -> checkpoint.Checkpoint | None:
    """Return the newest checkpoint on the main process's disk, in every process; None if there is none."""
    root = run.folder.checkpoints

    def load() -> checkpoint.Checkpoint | None:
        if not list_checkpoints(root):
            return None
        return checkpoint.load_newest(root, lambda text: run.emit(Notice(text)))

    def packed() -> bytes:
        saved = load()
        return checkpoint.packed(saved) if saved is not None else b""

    if run.processes.count == 1:
        return load()
    sent = run.processes.from_main(packed)
    return checkpoint.unpacked(sent) if sent else None


def _restore_optimizer(run: Run, saved: checkpoint.Checkpoint) -> None:
    names, values = run.parameter_names, saved.state.get("optimizer")
    if values is None:  # written before whole states were kept, when AdamW was the only optimizer
        kept = {
            name: tensor for name, tensor in saved.tensors.items() if not name.endswith((".master", ".start"))
        }
        values = optimizer_state.of_plain_tensors(run.optimizer, names, kept)
    optimizer_state.unpack(run.optimizer, names, saved.tensors, values)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _origin(run: Run) -> str | None:
    file = run.config.adapter.from_file
    return digest_of(file) if file is not None else None


def dataset_digest(items: Iterable[ImageItem]) -> str:
    """Return a digest of the images and captions trained on, in order."""
    digest = hashlib.sha256()
    for item in items:
        parts = (
            *(item.digest, item.repeats, item.caption, item.lines, item.trigger_word),
            *(item.focus, item.weight, item.regularisation, item.mask_digest),
        )
        digest.update(f"{parts!r}\n".encode())
    return digest.hexdigest()


def masters_digest(run: Run) -> str:
    """Return a digest of the masters' bits."""
    digest = hashlib.sha256()
    for group in run.groups:
        digest.update(group.master.flat.data.cpu().numpy().tobytes())
    return digest.hexdigest()


def refuse_unchanged(run: Run) -> None:
    """Refuse a run that made steps but learned nothing, whatever the reason.

    Raises:
        TrainingError: if no step had a gradient, or the adapter is bit for bit what it was.
    """
    if run.step == 0 or (run.learned and masters_digest(run) != run.start):
        return
    what = "no step had a gradient" if not run.learned else "no value of the adapter changed"
    raise TrainingError(
        f"{run.folder.path}: in {run.step} steps {what}, so nothing was learned and no adapter is written; "
        f"raise optimizer.learning_rate (now {run.config.optimizer.learning_rate:g}), look whether masks or "
        "weights of 0 leave anything to learn from, or report this with the run's config.toml"
    )


def check_alike(config: Config, dataset: Dataset, base: DiffusionModel, processes: Processes) -> None:
    """Refuse processes that would train on different things: their machines may hold different files.

    Raises:
        ConfigError: naming what differs from the main process.
    """
    settings = json.dumps(_settings_that_count(config), sort_keys=True, default=str)
    traits = {
        "images or captions": dataset_digest(dataset.items),
        "base model": base.base.digest,
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "version of sdlora": version(),
    }
    first, *others = processes.exchange(traits)
    for number, other in enumerate(others, start=2):
        if different := [what for what, value in first.items() if other[what] != value]:
            raise ConfigError(
                f"process {number} of {processes.count} has other {' and other '.join(different)} than "
                "process 1; all machines need the same images, captions, base, settings and version"
            )


def _settings_that_count(config: Config) -> dict[str, Any]:
    """Return the settings that affect the numbers, by their dotted keys."""
    tree = config.model_dump(mode="json")
    keys = {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}
    return {key: value for key, value in keys.items() if not key.startswith(_FREE_ON_RESUME)}


def check_same(config: Config, folder: RunFolder, num_processes: int = 1, *, longer: bool = False) -> None:
    """Refuse to resume under settings that would change the numbers.

    Another number of processes gives the same numbers if the micro-batches of a step stay the same.

    Args:
        config: final settings.
        folder: of the run.
        num_processes: processes that train together now.
        longer: another length is wanted.

    Raises:
        ConfigError: naming each such setting, as it was and as it is.
    """
    stored = _settings_that_count(load_config(folder.config_file, schema=type(config)))
    current = _settings_that_count(config)
    if longer:
        for values in (stored, current):
            del values["training.steps"], values["training.epochs"]
    if (
        stored["optimizer.d0"] is None
    ):  # a run from before that setting: its checkpoint says where Prodigy began
        stored["optimizer.d0"] = current["optimizer.d0"]
    key = "training.gradient_accumulation"
    kept, accumulation = stored.pop(key), current.pop(key)
    was, now = checkpoint.micro_batches(folder.checkpoints) or kept, num_processes * accumulation
    changed = [f"{k}: was {stored[k]}, now {value}" for k, value in current.items() if stored[k] != value]
    if was != now:
        text = f"micro-batches of a step: were {was}, now {now} = {num_processes} process(es) x {key}"
        changed.append(
            text + (f"; {key}={was // num_processes} keeps them" if was % num_processes == 0 else "")
        )
    if changed:
        raise ConfigError(
            f"{folder.path}: cannot resume with other settings ({'; '.join(changed)}); leave them as they "
            "were, or start a new run in another --output"
        )
