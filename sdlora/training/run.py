"""A run made ready: settings resolved, images encoded, adapter attached, state restored.

:func:`prepare_run` does everything before the first step, cheapest checks first; :mod:`sdlora.training.train`
holds the loop.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..adapters.attach import create_adapter
from ..adapters.canonical import AdapterWeights
from ..config.defaults import Default, check_components, resolve_data, resolve_training
from ..config.schema import Config
from ..config.toml import load_config, save_config
from ..data.batching.batches import Batch, make_batch
from ..data.batching.cache import EncodedDataset
from ..data.batching.loader import BatchLoader
from ..data.batching.order import MicroBatch, Order
from ..data.batching.prepare import PreparedData, base_facts, data_facts, prepare_data
from ..data.reading.holdout import divide
from ..data.reading.items import Dataset, ImageItem
from ..data.reading.sources import by_role, gather, gather_held_out, joined
from ..data.reading.wording import Wording, reworded
from ..devices import choose_device, choose_dtype
from ..errors import ConfigError, OutputError, TrainingError
from ..events import Decided, Emitter, Notice
from ..families.attention import choose_attention
from ..families.base import DiffusionModel
from ..families.loading import load_model
from ..families.parallel import SplitPredictor
from ..files import refuse_used_folder
from ..machine import idle_card_notice
from ..run_folder import RunFolder, list_checkpoints
from . import checkpoint
from .memory import MemoryPlan, free_memory, plan_memory, refuse_what_cannot_fit
from .optim import ParameterGroup, make_optimizer
from .trainable import TrainableAdapter, make_trainable
from .warm_start import digest_of, warm_start

# what a resumed run may change, as none of it alters the numbers of the adapter
_FREE_ON_RESUME = (
    "sample.",
    "output.",
    "data.folder",
    "data.cache_folder",
    "data.encode_captions",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.validate_every",
)


@dataclass
class Run:
    """Everything the loop needs; ``step`` counts the optimizer steps done."""

    config: Config
    folder: RunFolder
    model: DiffusionModel
    dataset: Dataset
    training: EncodedDataset
    validation: EncodedDataset
    order: Order
    steps: int
    memory: MemoryPlan
    trainable: TrainableAdapter
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    accelerator: Accelerator
    emit: Emitter
    started_at: float
    splitter: SplitPredictor | None
    loader: BatchLoader
    step: int = 0
    step_seconds: float = 0.0

    @property
    def images_per_step(self) -> int:
        """Images of a full optimizer step: micro-batch x accumulation x processes."""
        settings = self.config.training
        assert settings.batch_size is not None
        return settings.batch_size * settings.gradient_accumulation * self.accelerator.num_processes

    @property
    def groups(self) -> list[ParameterGroup]:
        """The masters by learning rate."""
        return self.trainable.groups

    @property
    def keep_text(self) -> bool:
        """Whether the text encoder is needed while training."""
        return self.config.adapter.adapts_text or self.config.data.encode_captions == "in loop"

    def parameters(self) -> list[Tensor]:
        """Return the adapter's parameters inside the model, in the order of the masters."""
        return self.trainable.parameters()

    def masters(self) -> AdapterWeights:
        """Return the adapter's fp32 master weights as copies on the CPU."""
        return self.trainable.masters()


def run_folder(config: Config) -> RunFolder:
    """Return where a run is kept."""
    return RunFolder(config.output.folder or Path("runs") / config.output.name)


def prepare_run(config: Config, *, resume: bool, emit: Emitter) -> Run:
    """Make a run ready to step.

    Raises:
        SdloraError: for anything the user can mend; nothing has been overwritten then.
    """
    folder = run_folder(config)
    if config.data.folder is None and not config.data.sources:
        raise ConfigError("no folder of images given: sdlora train FOLDER, or data.folder in the settings")
    accelerator = Accelerator()
    if resume:
        if not list_checkpoints(folder.checkpoints):
            raise TrainingError(
                f"{folder.path}: holds no checkpoint to resume from; check --output, or start without "
                "--resume"
            )
    elif accelerator.is_main_process:
        _refuse_old_run(folder)
    wording = Wording.of(config.data)
    learned, priors = by_role(reworded(gather(config.data), wording))
    own_validation = gather_held_out(config.data)
    if own_validation is not None:
        own_validation = reworded(own_validation, wording)
    config, device, defaults = _choose(config, accelerator, emit)
    blueprint = _base(config, torch.device("meta"))
    facts = base_facts(blueprint, device.type)
    check_components(config, facts)
    config, more = resolve_data(config, facts, len(learned.items))
    training, validation = divide(
        learned, config.data.validation, own_validation, config.training.seed, priors.items
    )
    training = joined(training, priors)
    for note in training.notes:
        emit(Notice(note))
    start: AdapterWeights | None = None
    if config.adapter.from_file is not None:
        config, start, followed = warm_start(config, blueprint)
        more += followed
    config, rest = resolve_training(config, facts, data_facts(config, training, validation))
    for default in defaults + more + rest:
        emit(Decided(default.key, default.value, default.reason))
    if resume:
        _check_same(config, folder)
    plan = _plan_memory(config, device, emit)
    model = _base(config, device)
    return _assemble(
        config, folder, model, plan, start, training, validation, accelerator, emit, resume=resume
    )


def _refuse_old_run(folder: RunFolder) -> None:
    if list_checkpoints(folder.checkpoints):
        raise OutputError(
            f"{folder.path}: already holds a run; add --resume to go on with it, or choose another --output"
        )
    refuse_used_folder(folder.path, "a training run")


def _choose(
    config: Config, accelerator: Accelerator, emit: Emitter
) -> tuple[Config, torch.device, list[Default]]:
    """Return the device, and settings with device and number format filled in; tell of a card left idle."""
    device = choose_device(config.training.device)
    if accelerator.num_processes > 1:
        device = accelerator.device
    dtype = choose_dtype(config.training.precision, device)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    chosen = {"training.device": str(device.type), "training.precision": name}
    idle = idle_card_notice() if config.training.device is None and device.type == "cpu" else None
    if idle is not None:
        emit(Notice(idle))
    reasons = {
        "training.device": "torch cannot use the card that is here" if idle else "the fastest one here",
        "training.precision": f"fastest safe one on {device.type}",
    }
    open_keys = [key for key in chosen if config.get(key) is None]
    defaults = [Default(key, chosen[key], reasons[key]) for key in open_keys]
    config = config.with_values({key: chosen[key] for key in open_keys})
    attention = choose_attention(config.training.attention, device, dtype, training=True)
    defaults.append(Default("training.attention", attention.name, attention.reason))
    return config, device, defaults


def _base(config: Config, device: torch.device) -> DiffusionModel:
    """Return the base; on the meta device a blueprint of it, for which no weight is read."""
    return load_model(
        config.model.base,
        dtype=choose_dtype(config.training.precision, device),
        device=device,
        family=config.model.family,
        prediction_type=config.model.prediction_type,
        zero_terminal_snr=config.model.zero_terminal_snr,
        clip_skip=config.model.clip_skip,
        vae=config.model.vae,
        attention=config.training.attention,
        denoiser_waits=True,
    )


def _plan_memory(config: Config, device: torch.device, emit: Emitter) -> MemoryPlan:
    """Return what a step will take; warn or refuse if the device does not have that much."""
    free = free_memory(device)

    def plan(settings: Config) -> MemoryPlan:
        return plan_memory(settings, lambda: _base(settings, torch.device("meta")), free=free)

    memory = plan(config)
    warning = refuse_what_cannot_fit(memory, config, device, plan)
    emit(Notice(warning or f"memory: about {memory.render()}"))
    return memory


def _assemble(
    config: Config,
    folder: RunFolder,
    model: DiffusionModel,
    plan: MemoryPlan,
    start: AdapterWeights | None,
    training: Dataset,
    validation: Dataset,
    accelerator: Accelerator,
    emit: Emitter,
    *,
    resume: bool,
) -> Run:
    with accelerator.main_process_first():  # the others find everything in the cache
        data = prepare_data(config, training, validation, model, accelerator.num_processes, emit)
    config = data.config
    settings = config.training
    # the denoiser comes to the device now: the adapter's flat buffers must lie where it stays
    model.prepare(training=True, keep_text=config.adapter.adapts_text)
    trainable = make_trainable(model, config, start or create_adapter(model, config.adapter, settings.seed))
    run = Run(
        config=config,
        folder=folder,
        model=model,
        dataset=training,
        training=data.training,
        validation=data.validation,
        order=data.order,
        steps=data.steps,
        memory=plan,
        trainable=trainable,
        optimizer=make_optimizer(config.optimizer, trainable.groups),
        scaler=torch.amp.GradScaler(model.device.type, enabled=settings.precision == "fp16"),
        accelerator=accelerator,
        emit=emit,
        started_at=time.time(),
        splitter=_splitter(config, model),
        loader=_loader(data, model, accelerator.process_index),
    )
    if resume:
        _restore(run)
    elif accelerator.is_main_process:
        save_config(config, folder.config_file)
    model.prepare(
        training=True,
        gradient_checkpointing=settings.gradient_checkpointing,
        keep_text=run.keep_text,
        keep_images=run.training.views.in_loop,
    )
    return run


def _splitter(config: Config, model: DiffusionModel) -> SplitPredictor | None:
    """Return how batches are split over a CPU's cores, or None where they must stay whole.

    A trained text encoder is one graph that all parts would walk through; dropout draws from the
    global generator, which threads would share.
    """
    whole = config.adapter.adapts_text or config.adapter.dropout > 0 or config.training.gradient_checkpointing
    return SplitPredictor(model) if model.device.type == "cpu" and not whole else None


def _loader(data: PreparedData, model: DiffusionModel, rank: int) -> BatchLoader:
    config, seed = data.config, data.config.training.seed

    def make(step: int, micro: int, visits: MicroBatch) -> Batch:
        return make_batch(
            data.training,
            model,
            visits,
            seed=seed,
            caption_dropout=config.data.caption_dropout,
            unmasked_weight=config.data.unmasked_weight,
        )

    return BatchLoader(data.order, rank, data.steps, make, single_threaded=model.device.type == "cpu")


def state_tensors(run: Run) -> dict[str, Tensor]:
    """Return everything numeric that the next steps depend on, by name."""
    tensors = run.trainable.tensors()
    for group in run.groups:
        tensors[f"{group.name}.master"] = group.master.flat.data
        for name, value in run.optimizer.state.get(group.master.flat, {}).items():
            tensors[f"{group.name}.{name}"] = value.data
    return tensors


def state_values(run: Run) -> dict[str, Any]:
    """Return the rest of the state as JSON values."""
    return {
        "run_id": dataset_digest(run.dataset.items),
        "scaler": run.scaler.state_dict(),
        "started_at": run.started_at,
        "from_file": _origin(run),
    }


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


def _restore(run: Run) -> None:
    saved = checkpoint.load_newest(run.folder.checkpoints, lambda text: run.emit(Notice(text)))
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
    run.step, run.started_at = saved.step, float(saved.state["started_at"])
    by_group: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in saved.tensors.items():
        group_name, _, name = full_name.rpartition(".")
        by_group.setdefault(group_name, {})[name] = tensor
    starts = {
        name: group_tensors.pop("start")
        for name, group_tensors in by_group.items()
        if "start" in group_tensors
    }
    run.trainable.restore_start(run.model, starts)
    for group in run.groups:
        group_tensors = by_group[group.name]
        group.master.load(group_tensors.pop("master"))
        device = group.master.flat.device
        run.optimizer.state[group.master.flat] = {
            name: tensor.clone() if name == "step" else tensor.to(device).clone()
            for name, tensor in group_tensors.items()
        }
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(saved.state["scaler"])


def _check_same(config: Config, folder: RunFolder) -> None:
    """Refuse to resume under settings that would change the numbers."""
    stored = load_config(folder.config_file).model_dump(mode="json")
    current = config.model_dump(mode="json")
    changed = [
        f"{section}.{name}: was {stored[section][name]}, now {value}"
        for section, values in current.items()
        for name, value in values.items()
        if stored[section][name] != value and not f"{section}.{name}".startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"{folder.path}: cannot resume with other settings ({'; '.join(changed)}); leave them as they "
            "were, or start a new run in another --output"
        )
