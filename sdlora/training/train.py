"""The training loop, to be read from top to bottom.

Make a step (:mod:`.step`) and tell what it did; then checkpoint, validate and preview when they are due; then
stop if asked to. Nothing that is only looked at ends a run. Everything random follows from the seed and the
visits, so a resumed run repeats the uninterrupted one exactly, and the number of processes does not matter.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from ..config.schema import Config
from ..devices import release_unused
from ..errors import TrainingError
from ..events import (
    CheckpointSaved,
    Control,
    Emitter,
    Event,
    Journal,
    Listener,
    Notice,
    RunFinished,
    RunStarted,
    StepDone,
    read_events,
)
from ..judging.held_out import Losses, mean_loss
from ..judging.verdict import Verdict
from ..run_folder import SAMPLE, SAVE, STOP, list_checkpoints
from . import checkpoint
from .cost import measure_cost
from .extras import attempt, reason
from .finish import finish_run, write_checkpoint_adapter
from .judge import make_judge
from .optimizers import optimizer_kind
from .previews import draw, draw_loss_curve, preview
from .processes import Processes
from .report import write_report
from .rescue import rescued
from .run import prepare_run
from .shown_weights import putting_back
from .state import Run, refuse_unchanged, run_folder, run_state
from .step import finished_steps, launch_step
from .trackers import tracking
from .validation import cost_notice, measure, validate

_PATIENT_STEPS = 20  # a process that takes as long as this many usual steps is believed to be gone


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        adapter_file: the exported adapter, or None if the run was stopped before its end.
        step: optimizer steps done.
        stopped: whether it was asked to stop early.
        stop_asked: whether it was asked to stop when all steps were made: the adapter is written, and what
            else would have followed is left out.
        loss: mean over the last 20 steps; None if no step was made.
        validation_loss: the last one measured.
        seconds: wall time of this call.
        data_wait_share: share of the steps' time spent waiting for data.
    """

    folder: Path
    adapter_file: Path | None
    step: int
    stopped: bool
    loss: float | None
    validation_loss: float | None
    seconds: float
    data_wait_share: float
    stop_asked: bool = False


def train(
    config: Config,
    *,
    resume: bool = False,
    continue_for: int | None = None,
    listeners: Sequence[Listener] = (),
    control: Control | None = None,
) -> TrainResult:
    """Train a LoRA and export it in WebUI format.

    Args:
        config: settings; those left open follow the data.
        resume: continue from the newest checkpoint in the run folder.
        continue_for: make that many steps more than the run in the folder has made; the learning rate
            follows the schedule of a run that long from there on.
        listeners: receive every :class:`sdlora.events.Event`.
        control: asks the run to stop, save or preview; by default files in the run folder do.

    Raises:
        SdloraError: for anything the user can correct.
    """
    control = control or Control(run_folder(config).path)
    processes = Processes.join(config.training.device)
    try:
        if continue_for is not None:
            config = _longer(config, processes, continue_for)
        resume, longer = resume or continue_for is not None, continue_for is not None
        result = _train(config, processes, resume, longer, listeners, control)
        processes.exchange("all is written")
    except BaseException as error:
        processes.fail(error)
        raise
    finally:
        release_unused()
    processes.leave()
    return result


def _longer(config: Config, processes: Processes, more: int) -> Config:
    """Return the settings of a run that makes ``more`` steps than it has made.

    Raises:
        TrainingError: if there is no checkpoint to continue from.
    """
    folder = run_folder(config)
    saved = list_checkpoints(folder.checkpoints) if processes.is_main else []
    before = processes.exchange(saved[-1].step if saved else 0)[0]
    if not before:
        raise TrainingError(f"{folder.path}: has no checkpoint to continue from; train it to one first")
    return config.with_values({"training.steps": before + more, "training.epochs": None})


def _train(
    config: Config,
    processes: Processes,
    resume: bool,
    longer: bool,
    listeners: Sequence[Listener],
    control: Control,
) -> TrainResult:
    begun = time.monotonic()
    early: list[Event] = []
    emit = _BeforeTheFirstStep((early.append, *listeners), control)
    run = prepare_run(config, resume=resume, emit=emit, processes=processes, longer=longer)
    with run.held, _journal(run, early) as journal, tracking(run) as trackers, run.loader:
        run.emit, run.stopping = Emitter((journal, *listeners, *trackers)), control.asked_to_stop
        losses, validation_loss, stopped = _loop(run, control)
        refuse_unchanged(run)
        verdict = _judged(run) if not stopped else None
        waited = run.loader.waited / max(run.step_seconds, 1e-9)
        adapter_file = None
        if processes.is_main:
            adapter_file = None if stopped else _finish(run, losses, verdict)
            attempt(run, "the loss curve", draw_loss_curve)
            if verdict is not None:
                attempt(run, "the report", partial(write_report, verdict=verdict))
        seconds = time.monotonic() - begun
        run.emit(RunFinished(run.step, stopped, seconds, adapter_file, waited))
    loss = sum(losses) / len(losses) if losses else None
    late = not stopped and (run.stop_asked or control.asked_to_stop())
    return TrainResult(
        run.folder.path, adapter_file, run.step, stopped, loss, validation_loss, seconds, waited, late
    )


class _BeforeTheFirstStep(Emitter):
    """Ends a run at once that is asked to stop while images are encoded: there is no step to finish yet."""

    def __init__(self, listeners: tuple[Listener, ...], control: Control) -> None:
        super().__init__(listeners)
        self._control = control

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if self._control.stopping:
            raise TrainingError(
                "stopped before the first step, so there was nothing to save; what was encoded is kept, and "
                "the same command continues from there"
            )


@contextmanager
def _journal(run: Run, early: Sequence[Event]) -> Iterator[Listener]:
    """Give a listener that appends to the run's ``events.jsonl``, and hand it the earlier events."""
    if not run.processes.is_main:
        yield lambda event: None
        return
    with suppress(OSError):  # each event is tried by itself
        run.folder.path.mkdir(parents=True, exist_ok=True)
    journal = Journal(run.folder.events_file)
    for event in early:
        journal(event)
    yield journal
    if journal.problem:
        run.emit(Notice(journal.problem))


def _loop(run: Run, control: Control) -> tuple[list[float], float | None, bool]:
    """Make all remaining steps; return (recent losses, last validation loss, whether stopped)."""
    settings = run.config.training
    _start(run)
    told = _Told(run)
    validation_loss: float | None = None
    start = [group.master.flat.data.to("cpu", copy=True) for group in run.groups] if run.step == 0 else None
    if run.step:  # saving comes before showing: a run that was killed in between shows now
        validation_loss = _show(run, *_not_shown(run))
        if run.judge is not None and run.judge.missing(run.step):
            attempt(run, "judging", _judge)
    while run.step < run.steps:
        began, waited = time.perf_counter(), run.loader.waited
        step = launch_step(run)
        step.seconds = time.perf_counter() - began + told.waiting()
        step.waiting_share = (run.loader.waited - waited) / step.seconds
        run.step_seconds, run.steps_here = run.step_seconds + step.seconds, run.steps_here + 1
        told.tell()
        if start is not None:
            told.tell(everything=True)
            validation_loss = _look_at_the_start(run, start)
            start = None
        requests = _agreed(run, control.take())
        last, stopping = run.step == run.steps, STOP in requests
        shows = not (last and stopping and _leave_out(run))
        validating = shows and (last or _due(run.step, settings.validate_every))
        previewing = shows and (last or SAMPLE in requests or _due(run.step, run.config.sample.every))
        # saving comes before showing: whatever goes wrong with an image, the steps are kept
        judging = not stopping and run.judge is not None and run.judge.due(run.step)
        saving = last or judging or requests & {SAVE, STOP} or _due(run.step, settings.checkpoint_every)
        if requests or saving or validating or previewing:
            told.tell(everything=True)
        problem = save(run) if saving else None
        validation_loss = _show(run, validating, previewing) or validation_loss
        if last and judging and STOP in _agreed(run, control.take()):
            judging = not _leave_out(run)
        if judging:
            attempt(run, "judging", _judge)
        if judging and _enough(run):
            return list(told.losses), _show(run, not validating, not previewing) or validation_loss, False
        if stopping and not last:
            if problem is not None:
                raise rescued(run, problem)
            return list(told.losses), validation_loss, True
    return list(told.losses), validation_loss, False


class _Told:
    """Tells what steps did, in their order.

    Attributes:
        losses: of the last 20 steps that were not left out.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.losses: deque[float] = deque(maxlen=20)
        self._times: deque[float] = deque(maxlen=20)
        self._waiting = 0.0

    def waiting(self) -> float:
        """Return the seconds that a card was waited for since this was asked: they belong to the steps."""
        seconds, self._waiting = self._waiting, 0.0
        return seconds

    def tell(self, *, everything: bool = False) -> None:
        """Emit what is known, or wait for all that was begun."""
        run, steps = self._run, finished_steps(self._run, everything=everything)
        while True:
            began = time.perf_counter()
            done = next(steps, None)
            self._waiting += time.perf_counter() - began
            if done is None:
                return
            self._times.append(done.seconds)
            if math.isfinite(done.loss):  # not that of a step left out
                self.losses.append(done.loss)
            run.emit(
                StepDone(
                    step=done.step,
                    steps=run.steps,
                    epoch=run.order.epoch_of(done.step - 1),
                    loss=done.loss,
                    learning_rate=done.rate,
                    grad_norm=done.norm,
                    num_images=done.images,
                    images_per_second=done.images / done.seconds,
                    seconds_left=(run.steps - done.step) * sum(self._times) / len(self._times),
                    data_wait_share=done.waiting_share,
                    rates=dict(done.rates),
                    found_rate=found_rate(run),
                )
            )


def _leave_out(run: Run) -> bool:
    """Say that a stop was asked for after the last step, where only the adapter is still to be written."""
    run.stop_asked = True
    text = "asked to stop in the last step: the adapter is written; what else would follow is left out"
    run.emit(Notice(f"step {run.step}: {text}"))
    return True


def _enough(run: Run) -> bool:
    """Return whether the run ends here because it gets no better; say so."""
    if run.judge is None or run.step == run.steps or not run.judge.enough:
        return False
    patience = run.config.judge.patience
    text = f"the last {patience} judged checkpoints were not better than the best one before by the interval"
    run.emit(Notice(f"step {run.step}: {text}, so the run ends here (judge.patience={patience})"))
    return True


def _show(run: Run, validating: bool, previewing: bool) -> float | None:
    """Measure and draw what is due; return the loss on the held-out images, if there is one."""
    if not validating and not previewing:
        return None
    run.loader.settle()  # both move the model and switch its modes
    return _look(run, validating, previewing, run.shown.in_model())


def _not_shown(run: Run) -> tuple[bool, bool]:
    """Return whether the step a resumed run begins at was to be validated, and previewed, but was not."""
    last = run.step == run.steps
    missing = False, False
    if run.processes.is_main:
        validated = {
            event.get("step") for event in read_events(run.folder.path) if event.get("event") == "Validated"
        }
        drawn = {preview.number for preview in run.folder.list_previews() if preview.step == run.step}
        prompts = len(run.config.sample.prompts or ())
        missing = run.step not in validated, not drawn >= set(range(1, prompts + 1))
    not_validated, not_drawn = run.processes.exchange(list(missing))[0]
    validating = not_validated and (last or _due(run.step, run.config.training.validate_every))
    return validating, not_drawn and (last or _due(run.step, run.config.sample.every))


def _look_at_the_start(run: Run, start: Sequence[Tensor]) -> float | None:
    """Validate and preview with the values before the first step, which need not wait for that."""
    run.loader.settle()
    now, run.step = run.step, 0
    try:
        with putting_back(run.groups):
            for group, values in zip(run.groups, start, strict=True):
                group.master.load(values)
            return _look(run, True, True, nullcontext())
    finally:
        run.step = now


def _look(run: Run, validating: bool, previewing: bool, shown: AbstractContextManager[None]) -> float | None:
    """Measure and draw with the values to show, and with the learned ones, too, if these are an average.

    Args:
        run: its model holds the learned values.
        validating: measure the held-out images.
        previewing: draw the previews.
        shown: has the model hold the values to show.
    """
    losses: Losses | None = None
    images, loss = None, None
    if run.shows_both:
        losses = attempt(run, "validation", measure) if validating else None
        images = attempt(run, "the previews", draw) if previewing else None
    learned = mean_loss(losses) if losses else None
    with shown:
        if validating:
            loss = attempt(run, "validation", partial(validate, learned=learned))
        if previewing:
            attempt(run, "the previews", partial(preview, learned=images))
    return loss


def _judged(run: Run) -> Verdict | None:
    """Return what judging says of the whole run, in the main process; None where nothing was judged."""
    judge = run.judge
    return None if judge is None else attempt(run, "the judging's result", lambda run: judge.conclude())


def _judge(run: Run) -> None:
    assert run.judge is not None
    run.judge.look()
    if run.processes.is_main:
        _prune(run)


def _prune(run: Run) -> None:
    keep, root = run.config.training.keep_checkpoints, run.folder.checkpoints
    if run.judge is None:
        checkpoint.prune_checkpoints(root, keep)
    else:
        checkpoint.prune_checkpoints(root, min(keep, 2), run.judge.kept_steps())


def _finish(run: Run, losses: Sequence[float], verdict: Verdict | None) -> Path:
    """Write the adapter.

    Raises:
        SdloraError: if it could not be written as planned; it says where it is instead.
    """
    try:
        return finish_run(run, losses, verdict)
    except Exception as error:
        raise rescued(run, error) from error


def found_rate(run: Run) -> float | None:
    """Return the rate that the optimizer works out by itself, if it does."""
    find = optimizer_kind(run.config.optimizer).found_rate
    return None if find is None else find(run.optimizer)


def save(run: Run) -> Exception | None:
    """Write a checkpoint of the current step and prune old ones; return why it could not be written, if so.

    A disk that is full now may have room at the next checkpoint, and stopping would lose the steps, too.
    """
    problem: Exception | None = None
    if run.processes.is_main:
        root = run.folder.checkpoints
        try:
            folder = checkpoint.save_checkpoint(
                root,
                run.step,
                *run_state(run),
                lambda path: write_checkpoint_adapter(run, path),
            )
            _prune(run)
        except Exception as error:
            problem = error
            text = f"step {run.step}: no checkpoint was saved ({reason(error)}); training continues"
            run.emit(Notice(text))
        else:
            run.emit(CheckpointSaved(run.step, folder))
    run.processes.exchange("saved")
    return problem


def _start(run: Run) -> None:
    cost = measure_cost(run)
    run.judge = make_judge(run, cost.seconds_per_step)
    run.processes.patience = max(run.processes.patience, _PATIENT_STEPS * cost.seconds_per_step)
    if notice := cost_notice(run):
        run.emit(Notice(notice))
    run.processes.exchange("ready")
    left = run.steps - run.step
    run.emit(
        RunStarted(
            name=run.config.output.name,
            steps=run.steps,
            first_step=run.step,
            num_images=len(run.training.items),
            num_parameters=sum(group.master.flat.numel() for group in run.groups),
            expected_seconds=left * cost.seconds_per_step,
            expected_bytes=cost.bytes,
            expected_phases=run.memory.phases,
        )
    )


def _agreed(run: Run, requests: frozenset[str]) -> frozenset[str]:
    """Return what any of the processes was asked for, so that all of them stop after the same step."""
    shares = run.processes.exchange(sorted(requests), at_once=True)
    return frozenset(request for share in shares for request in share)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
