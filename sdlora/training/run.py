"""A run made ready: settings resolved, images encoded, adapter attached, state restored.

:func:`prepare_run` does everything before the first step, cheapest checks first; :mod:`sdlora.training.train`
holds the loop.
"""

from __future__ import annotations

import time

import torch

from ..adapters.attach import create_adapter
from ..adapters.canonical import AdapterWeights
from ..config.defaults import Default, check_components, resolve_data, resolve_training
from ..config.schema import Config
from ..config.toml import save_config
from ..data.batching.batches import Batch, make_batch
from ..data.batching.loader import BatchLoader
from ..data.batching.order import MicroBatch
from ..data.batching.prepare import PreparedData, base_facts, data_facts, prepare_data
from ..data.reading.holdout import divide
from ..data.reading.items import Dataset
from ..data.reading.sources import by_role, gather, gather_held_out, joined
from ..data.reading.wording import Wording, reworded
from ..devices import choose_device, choose_dtype, make_current, set_exactness
from ..errors import ConfigError, OutputError, TrainingError
from ..events import Decided, Emitter, Notice
from ..families.attention import choose_attention
from ..families.base import Conditioning, DiffusionModel
from ..families.loading import load_model
from ..families.parallel import SplitPredictor
from ..files import refuse_used_folder
from ..generation.render import encode_prompts
from ..machine import idle_card_notice
from ..run_folder import RunFolder, list_checkpoints
from .memory import MemoryPlan, free_memory, plan_memory, refuse_what_cannot_fit
from .optimizers import check_rates, make_optimizer, optimizer_kind
from .processes import Processes
from .shown_weights import weights_to_show
from .state import Run, check_alike, check_same, masters_digest, restore, run_folder
from .trainable import make_trainable
from .warm_start import warm_start


def prepare_run(config: Config, *, resume: bool, emit: Emitter, processes: Processes | None = None) -> Run:
    """Make a run ready to step; ``processes`` are those that train together, by default one alone.

    Raises:
        SdloraError: for anything the user can mend; nothing has been overwritten then.
    """
    folder = run_folder(config)
    if config.data.folder is None and not config.data.sources:
        raise ConfigError("no folder of images given: sdlora train FOLDER, or data.folder in the settings")
    processes = processes or Processes()
    if processes.is_main:  # the run folder is only looked at here: other machines need not have it
        _check_folder(folder, emit, resume=resume)
    wording = Wording.of(config.data)
    learned, priors = by_role(reworded(gather(config.data), wording))
    own_validation = gather_held_out(config.data)
    if own_validation is not None:
        own_validation = reworded(own_validation, wording)
    config, device, defaults = _choose(config, processes, emit)
    blueprint = _base(config, torch.device("meta"))
    facts = base_facts(blueprint, device.type, processes.count)
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
    rule = optimizer_kind(config.optimizer).rate
    config, rest = resolve_training(config, facts, data_facts(config, training, validation), rule)
    check_rates(config, facts.parts)
    for default in defaults + more + rest:
        emit(Decided(default.key, default.value, default.reason))
    if resume and processes.is_main:
        check_same(config, folder, processes.count)
    check_alike(config, training, blueprint, processes)
    plan = _plan_memory(config, device, emit)
    model = _base(config, device)
    return _assemble(config, folder, model, plan, start, training, validation, processes, emit, resume=resume)


def _check_folder(folder: RunFolder, emit: Emitter, *, resume: bool) -> None:
    saved = bool(list_checkpoints(folder.checkpoints))
    if resume and not saved and not folder.exists():
        raise TrainingError(
            f"{folder.path}: holds no run to go on with; check --output, or start without --resume"
        )
    if resume and not saved:
        emit(Notice(f"{folder.path}: ended before its first checkpoint, so it begins anew"))
    if resume:
        return
    if saved or folder.exists():
        raise OutputError(
            f"{folder.path}: already holds a run; add --resume to go on with it, or choose another --output"
        )
    refuse_used_folder(folder.path, "a training run")


def _choose(
    config: Config, processes: Processes, emit: Emitter
) -> tuple[Config, torch.device, list[Default]]:
    """Return the device, and settings with device and number format filled in; tell of a card left idle."""
    device = processes.device or choose_device(config.training.device)
    make_current(device)
    dtype = choose_dtype(config.training.precision, device)
    set_exactness(device, dtype)
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
    processes: Processes,
    emit: Emitter,
    *,
    resume: bool,
) -> Run:
    share = processes.rank, processes.count
    data = prepare_data(config, training, validation, model, emit, share=share, meet=processes.exchange)
    config = data.config
    settings = config.training
    preview_text = _preview_text(config, model)
    # the denoiser comes to the device now: the adapter's flat buffers must lie where it stays
    keep_text = config.adapter.adapts_text or config.data.encode_captions == "in loop"
    model.prepare(training=True, keep_text=keep_text, keep_images=data.training.views.in_loop)
    trainable = make_trainable(model, config, start or create_adapter(model, config.adapter, settings.seed))
    optimizer = make_optimizer(config.optimizer, trainable.groups)
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
        optimizer=optimizer,
        shown=weights_to_show(optimizer_kind(config.optimizer), optimizer, trainable.groups),
        scaler=torch.amp.GradScaler(model.facts.device.type, enabled=settings.precision == "fp16"),
        processes=processes,
        emit=emit,
        started_at=time.time(),
        splitter=_splitter(config, model),
        loader=_loader(data, model, processes.rank),
        preview_text=preview_text,
    )
    run.start = masters_digest(run)
    if resume:
        restore(run)
    elif processes.is_main:
        save_config(config, folder.config_file)
    run.ready_to_train()
    return run


def _preview_text(config: Config, model: DiffusionModel) -> dict[str, Conditioning]:
    """Encode what the previews need while the text encoders are there; nothing if they will change."""
    if not config.sample.prompts or config.adapter.adapts_text:
        return {}
    encoded = encode_prompts(model, [config.sample.negative_prompt, *config.sample.prompts])
    return {prompt: {name: tensor.cpu() for name, tensor in text.items()} for prompt, text in encoded.items()}


def _splitter(config: Config, model: DiffusionModel) -> SplitPredictor | None:
    """Return how batches are split over a CPU's cores, or None where they must stay whole.

    A trained text encoder is one graph that all parts would walk through; dropout draws from the
    global generator, which threads would share.
    """
    whole = config.adapter.adapts_text or config.adapter.dropout > 0 or config.training.gradient_checkpointing
    return SplitPredictor(model) if model.facts.device.type == "cpu" and not whole else None


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

    return BatchLoader(data.order, rank, data.steps, make, single_threaded=model.facts.device.type == "cpu")
