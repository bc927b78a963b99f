"""A run made ready: settings resolved, images encoded, adapter attached, state restored.

:func:`prepare_run` does everything before the first step, cheapest checks first; :mod:`sdlora.training.train`
holds the loop.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..adapters.attach import create_adapter
from ..config.schema import Config
from ..config.toml import save_config
from ..data.batching.batches import make_batch
from ..data.batching.loader import BatchLoader
from ..data.batching.order import MicroBatch
from ..data.batching.prepare import PreparedData, prepare_data
from ..data.reading.cache_folder import default_cache_folder, refuse_links_away
from ..errors import ConfigError, OutputError, TrainingError
from ..events import Decided, Emitter, Notice
from ..families.base import DiffusionModel
from ..families.compute import Compute
from ..families.latent_model import LatentModel
from ..families.parallel import SplitPredictor
from ..files import refuse_used_folder, write_problem
from ..run_folder import RunFolder, list_checkpoints
from .fast import FastStep, recompute_of
from .inputs import Ready, Sender
from .masters import ParameterGroup
from .memory import MemoryPlan, refuse_what_cannot_fit
from .objective import inputs_of
from .optimizers import make_optimizer, optimizer_kind
from .planning import META, Planner, kept_rungs, make_base, save_memory
from .preview_prompts import find_preview_adapters, preview_text
from .processes import Processes
from .reports import Reports
from .schedules import schedule_factor
from .settings import Final, Images, finalise
from .shown_weights import ShownWeights, averaged, weights_to_show
from .state import Run, check_alike, check_same, masters_digest, restore, run_folder
from .trackers import check_trackers
from .trainable import make_trainable


def prepare_run(
    config: Config,
    *,
    resume: bool,
    emit: Emitter,
    processes: Processes | None = None,
    longer: bool = False,
) -> Run:
    """Make a run ready to step; ``processes`` says which ones train together, by default one alone.

    Args:
        config: as given.
        resume: continue from the newest checkpoint.
        emit: gets notices and progress.
        processes: those that train together.
        longer: the run that is continued may have had another length; its folder's settings get the new one.

    Raises:
        SdloraError: for anything the user can correct; nothing has been overwritten then.
    """
    folder = run_folder(config)
    if config.data.folder is None and not config.data.sources:
        raise ConfigError("no folder of images given: sdlora train FOLDER, or data.folder in the settings")
    check_trackers(config.output)
    refuse_links_away(config.data.cache_folder or default_cache_folder())
    processes = processes or Processes()
    if processes.is_main:  # the run folder is only looked at here: other machines need not have it
        _check_folder(folder, emit, resume=resume)
    images, settings = Images.of(config), config.training
    compute = Compute.choose(processes.device or settings.device, settings.precision, settings.attention)
    if compute.idle_card:
        emit(Notice(compute.idle_card))
    blueprint = make_base(config, compute, META)

    planner = Planner(compute, blueprint, config)
    kept = kept_rungs(folder) if resume else None
    final = finalise(
        *(config, compute, blueprint, images, processes.count),
        save_memory=lambda open_settings: save_memory(open_settings, planner, kept, processes),
    )
    for note in final.training.notes:
        emit(Notice(note))
    for default in final.defaults:
        emit(Decided(default.key, default.value, default.reason))
    if resume and processes.is_main:
        check_same(final.config, folder, processes.count, longer=longer)
    check_alike(final.config, final.training, blueprint, processes)
    preview_adapters = find_preview_adapters(final.config, blueprint, folder)
    try:
        plan = _plan_memory(final.config, planner, emit)
    except TrainingError as error:
        if not resume:
            raise
        raise TrainingError(f"{error}; a resumed run keeps its settings: start another for that") from None
    model = make_base(final.config, compute, compute.device)
    run = _assemble(final, folder, model, plan, preview_adapters, processes, emit, resume=resume)
    if longer and processes.is_main:
        save_config(run.config, folder.config_file)
    return run


def _check_folder(folder: RunFolder, emit: Emitter, *, resume: bool) -> None:
    saved = bool(list_checkpoints(folder.checkpoints))
    if resume and not saved and not folder.exists():
        raise TrainingError(
            f"{folder.path}: holds no run to continue; check --output, or start without --resume"
        )
    if resume and not saved:
        emit(Notice(f"{folder.path}: ended before its first checkpoint, so it starts again"))
    if resume:
        return
    if saved or folder.exists():
        raise OutputError(
            f"{folder.path}: already holds a run; add --resume to continue it, or choose another --output"
        )
    refuse_used_folder(folder.path, "a training run")


def _plan_memory(config: Config, planner: Planner, emit: Emitter) -> MemoryPlan:
    """Return the memory that a run will take; warn or refuse if the device does not have that much."""
    memory = planner(config)
    warning = refuse_what_cannot_fit(memory, config, planner.device, planner)
    emit(Notice(warning or f"memory: about {memory.render()}"))
    return memory


def _assemble(
    final: Final,
    folder: RunFolder,
    model: LatentModel,
    plan: MemoryPlan,
    preview_adapters: Mapping[str, Path],
    processes: Processes,
    emit: Emitter,
    *,
    resume: bool,
) -> Run:
    config, settings = final.config, final.config.training
    share = processes.rank, processes.count
    outline, held_out, meet = final.outline, final.validation, processes.exchange
    encoded = preview_text(config, model)  # text first: its encoders leave before images are encoded
    data = prepare_data(config, outline, held_out, model, emit, share=share, meet=meet)
    _place(model, config, data)
    base = _digests(model, data)  # before the adapter is in it
    start = final.start or create_adapter(model, config.adapter, settings.seed)
    trainable = make_trainable(model, config, start)
    optimizer = make_optimizer(config.optimizer, trainable.groups)
    run = Run(
        config=config,
        folder=folder,
        model=model,
        base=base,
        dataset=final.training,
        training=data.training,
        validation=data.validation,
        order=data.order,
        steps=data.steps,
        memory=plan,
        trainable=trainable,
        optimizer=optimizer,
        shown=_shown(config, optimizer, trainable.groups, data.steps),
        scaler=torch.amp.GradScaler(model.facts.device.type, enabled=settings.precision == "fp16"),
        processes=processes,
        emit=emit,
        started_at=time.time(),
        splitter=None,
        made_splitter=_splitter(config, model),
        fast=FastStep(model, trainable, None, recompute_of(config, model)),
        loader=_loader(config, data, model, processes.rank, [g.learning_rate for g in trainable.groups]),
        reports=_reports(config, model, processes),
        preview_text=encoded,
        preview_adapters=preview_adapters,
    )
    run.start = masters_digest(run)
    with ExitStack() as held:
        if processes.is_main:
            held.enter_context(_alone_in(folder))
        if resume:
            restore(run)
        elif processes.is_main:
            _check_folder(folder, emit, resume=False)  # another run may have begun here meanwhile
            save_config(config, folder.config_file)
        run.ready_to_train()
        run.held = held.pop_all()
    return run


def _place(model: LatentModel, config: Config, data: PreparedData) -> None:
    """Bring the denoiser to the device: the adapter's flat buffers must lie where it stays."""
    if config.training.offload_blocks:
        model.offload_blocks(config.training.offload_blocks)
    keep_text = config.adapter.adapts_text or config.data.encode_captions == "in loop"
    model.prepare(training=True, keep_text=keep_text, keep_images=data.training.views.in_loop)


def _digests(model: DiffusionModel, data: PreparedData) -> dict[str, str]:
    """Return what says whether the base is another one when the run is resumed."""
    captions = data.prints.captions or model.encoder_fingerprint("captions")
    return {"denoiser": model.base.digest, "autoencoder": data.prints.images, "text encoder": captions}


@contextmanager
def _alone_in(folder: RunFolder) -> Iterator[None]:
    """Hold a run folder, so that no other process writes there; the system lets go of it when this one ends.

    Raises:
        OutputError: when another process trains there, or the folder cannot be written.
    """
    lock = FileLock(folder.lock_file, timeout=0)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{folder.path}: another process is training there; wait for it, or choose another --output"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise OutputError(f"{folder.path}: {write_problem(error)}") from error
        # a file system without locks: nobody can be kept out
    try:
        yield
    finally:
        lock.release()


def _shown(
    config: Config, optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], steps: int
) -> ShownWeights:
    plain = weights_to_show(optimizer_kind(config.optimizer), optimizer, groups)
    return averaged(config.training, plain, groups, steps)


def _splitter(config: Config, model: DiffusionModel) -> SplitPredictor | None:
    """Return how batches can be split over a CPU's cores, or None where they must stay whole.

    A trained text encoder is one graph that all parts would walk through; dropout draws from the
    global generator, which threads would share, and so does diffusers' way to compute blocks again, which is
    the reference of all that is.
    """
    adapter = config.adapter
    dropout = adapter.dropout > 0 or adapter.rank_dropout > 0 or adapter.module_dropout > 0
    whole = adapter.adapts_text or dropout or config.training.rung != "nothing"
    return SplitPredictor(model) if model.facts.device.type == "cpu" and not whole else None


def _reports(config: Config, model: DiffusionModel, processes: Processes) -> Reports:
    deferred = model.facts.device.type == "cuda" and optimizer_kind(config.optimizer).heeds_found_inf
    return Reports(deferred=deferred, together=processes.count > 1)


def _loader(
    config: Config, data: PreparedData, model: DiffusionModel, rank: int, peaks: Sequence[float]
) -> BatchLoader[Ready]:
    settings, device = config.training, model.facts.device
    ahead = device.type == "cuda" and config.data.prior_preservation == 0
    sender = Sender(device, model.facts.dtype) if ahead else None

    def make(step: int, micro: int, visits: MicroBatch) -> Ready:
        batch = make_batch(
            data.training,
            model,
            visits,
            seed=settings.seed,
            caption_dropout=config.data.caption_dropout,
            unmasked_weight=config.data.unmasked_weight,
        )
        if sender is None:
            return Ready(batch)
        factor = schedule_factor(config.optimizer, step, data.steps)
        inputs = inputs_of(model.process, batch, settings)
        return Ready(batch, sender.send(inputs, [peak * factor for peak in peaks]))

    return BatchLoader(data.order, rank, data.steps, make, single_threaded=device.type == "cpu")
