"""How much memory a training run will take, counted before any weight is read.

Each phase of a run (encoding, placing, step, validation, previews) is really run on torch's meta device:
with tensors of the true shapes and formats that hold no numbers. Every allocation and release is counted as
it happens, so the peak is that of the true graph, with no table of guesses. The count cannot see the scratch
space inside single kernels. The memory of the libraries themselves (a CUDA context takes 0.3 to 0.8 GiB) is
already taken when a card is asked how much it has free.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import nn

from ..adapters.attach import create_adapter
from ..adapters.direct import can_be_direct
from ..adapters.joint import can_be_joined
from ..adapters.module_paths import module_at
from ..adapters.trainable_layers import TrainedLayer, attach_for_training
from ..config.defaults import USUAL_GUIDANCE
from ..config.schema import Config
from ..diffusion.process import per_image_loss
from ..errors import TrainingError
from ..families.base import DiffusionModel, SizeHint
from ..families.facts import AUTOENCODER
from ..families.lean import make_lean, undo_lean
from ..families.offload import offloadable_blocks, offloaded_bytes
from ..families.recompute import Rungs
from ..families.rungs import blocks_by_saving, can_recompute
from ..files import size_text
from ..generation.render import most_at_once
from .fast import chosen_paths, recompute_of
from .memory_as_computed import computed_as_in_a_run, gradient_bytes
from .memory_count import counting_memory, fused_attention
from .optimizers import optimizer_kind

_TOLERANCE = 0.85  # the count may be 15 % too high; with less free than this share of it, a run cannot fit
_VALIDATION_ROWS = 4  # timesteps of a held-out image that are predicted together
WHOLE_SIDE = 256  # px; squares up to this side are encoded and decoded whole wherever a step fits
_SPARED = ("validation", "previews", "judging")  # phases that are skipped where they do not fit


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted memory of a training run on its device, in bytes.

    Attributes:
        weights: the frozen components that stay on the device.
        adapter: the adapter's fp32 masters, its copy in the base's format, gradients and optimizer's state.
        activations: the largest amount alive at once during a step, besides the above.
        free: how much the device has free before the run, if that is known.
        others: the largest amount alive at once in each other phase: name -> bytes.
        flops: multiplications and additions of a micro-batch, forward and backward.
        blocks: of the denoiser that make something again, by rung of ``training.recompute``.
        block_sizes: bytes of each block that could be offloaded.
        offloaded: how many of them are, the largest first.
    """

    weights: int
    adapter: int
    activations: int
    free: int | None
    others: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)
    block_sizes: tuple[int, ...] = ()
    offloaded: int = 0

    @property
    def phases(self) -> Mapping[str, int]:
        """The largest amount alive at once in each phase of the run."""
        return {"step": self.weights + self.adapter + self.activations, **self.others}

    @property
    def peak(self) -> int:
        """The largest amount alive at once in the whole run."""
        return max(self.phases.values())

    @property
    def needed(self) -> int:
        """The largest amount alive at once in the phases that training cannot do without."""
        return max(size for name, size in self.phases.items() if name not in _SPARED)

    @property
    def copied(self) -> int:
        """Bytes of offloaded blocks that come to the device in a micro-batch, forward and backward."""
        sizes = self._largest(self.offloaded)
        # what the two buffers hold when the direction turns need not come again
        return max(0, 2 * sum(sizes) - 4 * min(sizes, default=0))

    def with_offloaded(self, count: int) -> MemoryPlan:
        """Return the plan of the same run with other blocks offloaded: two buffers hold the largest ones."""
        less = _saved_by(self._largest(count)) - _saved_by(self._largest(self.offloaded))
        others = {name: size if name == "encoding" else size - less for name, size in self.others.items()}
        return replace(self, weights=self.weights - less, others=others, offloaded=count)

    def _largest(self, count: int) -> list[int]:
        return sorted(self.block_sizes, reverse=True)[:count]

    def fits(self) -> bool | None:
        """Return whether the needed memory fits into the free memory; None if the latter is not known."""
        return None if self.free is None else self.needed <= self.free

    def render(self) -> str:
        """Return the plan in one line for people."""
        counts = {"weights": self.weights, "adapter": self.adapter, "step": self.activations}
        parts = ", ".join(f"{name} {size_text(count)}" for name, count in counts.items())
        step = self.phases["step"]
        more = "".join(f"; {name} {size_text(size)}" for name, size in self.others.items() if size > step)
        free = "" if self.free is None else f"; {size_text(self.free)} free"
        return f"{size_text(self.peak)} ({parts}{more}{free})"


def _saved_by(offloaded: Sequence[int]) -> int:
    """Return the bytes by which weights on the device are less if these blocks are offloaded."""
    return sum(offloaded) - 2 * max(offloaded, default=0)


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes ``device`` has free for this process, or None where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])  # asking opens the context: its memory is off already
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)


def validation_rows(config: Config) -> int:
    """Return how many timesteps validation predicts together: at most as many as a step has images.

    So validation takes less memory than training and fits wherever training does.
    """
    assert config.training.batch_size is not None
    return min(_VALIDATION_ROWS, config.training.batch_size)


def plan_memory(config: Config, blueprint: Callable[[], DiffusionModel], *, free: int | None) -> MemoryPlan:
    """Count the memory that each phase of a resolved run takes.

    Args:
        config: resolved settings.
        blueprint: makes the base on the meta device, without weights; called at most once.
        free: see :attr:`MemoryPlan.free`.
    """
    counted = _count(_Question(_structure(config), config, blueprint))
    plan = replace(counted, free=free)
    moved = config.training.offload_blocks
    return plan.with_offloaded(min(moved, len(plan.block_sizes))) if moved else plan


@dataclass(frozen=True)
class _Question:
    """The argument of :func:`_count`; equal for equal structure, so that no step is counted twice."""

    structure: str
    config: Config = field(compare=False)
    blueprint: Callable[[], DiffusionModel] = field(compare=False)


def _structure(config: Config) -> str:
    """Return the settings that a step's memory depends on, as text."""
    tree = config.model_dump(mode="json")
    training = (
        "batch_size",
        "precision",
        "base_format",
        "device",
        "attention",
        "fast",
        "average",
        "recompute",
        "autoencoder",
    )
    wanted = [
        tree["model"],
        tree["adapter"],
        config.optimizer.name,
        [tree["training"][name] for name in (*training, "recompute_blocks")],
    ]
    wanted += [
        config.training.gradient_accumulation > 1,
        _side(config),
        _keeps_text(config),
        _keeps_images(config),
        *_priors(config),
    ]
    return json.dumps(
        [
            *wanted,
            bool(config.data.validation),
            config.data.resolution,
            _preview(config),
            bool(config.judge.every),
        ]
    )


def _preview(config: Config) -> tuple[int, bool, int]:
    """Return how many previews are drawn together, whether they are guided, and the px of the largest one.

    Where memory is saved, each is drawn by itself. 0 px are those of the run's resolution.
    """
    lines = config.sample.lines
    scales = [config.sample.guidance if line.guidance is None else line.guidance for line in lines]
    if config.judge.every:  # drawn as previews are
        scales.append(USUAL_GUIDANCE if config.sample.guidance is None else config.sample.guidance)
    guided = any((scale or 0) > 1 for scale in scales)
    side = config.data.resolution or 0
    most = max(((line.width or side) * (line.height or side) for line in lines), default=0)
    together = 1 if config.training.autoencoder == "banded" else max(1, len(lines))
    return together, guided, most if most > side * side else 0


def _side(config: Config) -> int:
    """Return the largest resolution of a run."""
    assert config.data.resolution is not None
    return max((config.data.resolution, *config.data.more_resolutions))


def _keeps_text(config: Config) -> bool:
    """Tell whether the text encoders may be needed while training; an open setting counts as yes."""
    varying = config.data.varies_captions and config.data.encode_captions != "before"
    return config.adapter.adapts_text or varying


def _keeps_images(config: Config) -> bool:
    """Tell whether the image encoder is needed while training."""
    return config.data.varies_images and config.data.variants == 0


def _priors(config: Config) -> tuple[bool, bool]:
    """Return whether the base predicts in every step, too, and whether always for the empty caption."""
    wanted = config.data.prior_preservation > 0
    return wanted, wanted and not config.data.has_regularisation


@functools.lru_cache(maxsize=64)
def _count(question: _Question) -> MemoryPlan:
    """Return the plan with all blocks on the device, without what is free."""
    config, model = question.config, question.blueprint()
    device = torch.device(config.training.device or "cpu")
    waiting = device.type == "cpu"  # components that wait in main memory then take the same memory
    sizes = {name: _bytes_of(module) for name, module in model.components().items()}
    denoiser, images = sizes.pop(model.info.denoiser.component), sizes.pop(AUTOENCODER)
    text = sum(sizes.values())
    weights = denoiser + text * (waiting or _keeps_text(config)) + images * (waiting or _keeps_images(config))
    encoding = _encoding(model, config, waiting=waiting)
    offloadable = () if waiting else tuple(map(offloaded_bytes, offloadable_blocks(_denoiser(model))))
    layers, values, copied = _attach(model, config)
    # the fp32 master; the model's own copy and gradient, which in fp32 is the master; and the fp32 sum of
    # several micro-batches' gradients: of a single one it is there only when the activations are not
    summed = 4 * (config.training.gradient_accumulation > 1)
    layer_bytes = 2 * model.facts.dtype.itemsize if model.facts.dtype != torch.float32 else 4
    average = 4 * (config.training.average != "none")
    adapter = int(
        values * (4 + summed + layer_bytes + average + optimizer_kind(config.optimizer).bytes_per_value)
    )
    adapter += 2 * model.facts.dtype.itemsize * copied  # a copy, and its gradient
    model.prepare(
        training=True,
        gradient_checkpointing=config.training.rung != "nothing",
        keep_text=_keeps_text(config),
    )
    blocks = _blocks_by_rung(model, config)
    with computed_as_in_a_run(model, layers, config):
        activations, flops = _step_bytes(model, _rounded(model, _side(config)), config)
    activations = max(activations, (4 - summed) * values)
    others = {"encoding": encoding, "placing": weights + values * (8 + layer_bytes // 2)}
    if config.data.validation:
        rows = validation_rows(config)
        others["validation"] = weights + adapter + _forward_bytes(model, _side(config), rows)
    names = _drawing(config)
    if names:
        model.prepare(training=False, lean=True)
        visiting = 0 if waiting or _keeps_images(config) else _decoder_bytes(model)
        drawn = weights + adapter + _preview_bytes(model, config, visiting)
        others |= dict.fromkeys(names, drawn)
        if "judging" in names and not waiting and not _keeps_text(config):
            # its prompts are encoded when the first checkpoint is judged, and images by the whole autoencoder
            encoding_again = max(text, _encoder_bytes(model) + _encode_bytes(model, config))
            others["judging"] = max(drawn, weights + adapter + encoding_again)
    return MemoryPlan(weights, adapter, activations, None, others, flops, blocks, offloadable)


def _drawing(config: Config) -> list[str]:
    """Return the phases that draw."""
    return ["previews"] * bool(config.sample.prompts) + ["judging"] * bool(config.judge.every)


def _denoiser(model: DiffusionModel) -> nn.Module:
    return model.components()[model.info.denoiser.component]


def _blocks_by_rung(model: DiffusionModel, config: Config) -> dict[str, int]:
    """Return how many blocks make something again at each rung of recomputation that can be taken."""
    denoiser = _denoiser(model)
    if "blocks" not in chosen_paths(config.training.fast) or not can_recompute(denoiser, Rungs.blocks):
        return {}
    make_lean(denoiser)
    positions = recompute_of(config, model).positions
    counts = {r.name: len(blocks_by_saving(denoiser, r, positions)) for r in Rungs if r}
    undo_lean(denoiser)
    return counts


def refuse_what_cannot_fit(
    plan: MemoryPlan, config: Config, device: torch.device, again: Callable[[Config], MemoryPlan]
) -> str | None:
    """Return a warning if the run may not fit, with the mildest settings that would.

    Args:
        plan: of ``config``.
        config: resolved settings.
        device: where it would run.
        again: plans other settings.

    Raises:
        TrainingError: if it cannot fit even if the count is as wrong as it may be.
    """
    if plan.free is None or plan.peak <= plan.free:
        return None
    if plan.needed <= plan.free:
        large = [name for name in _SPARED if plan.phases.get(name, 0) > plan.free]
        return (
            f"memory: about {plan.render()}; {' and '.join(large)} may not fit on {device} and are skipped "
            "then, or decoded in tiles"
        )
    remedy = _remedy(config, again)
    text = (
        f"this run needs about {plan.render()} on {device}, more than is free; "
        f"{remedy or 'nothing smaller fits either: use a device with more memory'}"
    )
    if plan.needed * _TOLERANCE > plan.free:
        raise TrainingError(text)
    return text


def _remedy(config: Config, again: Callable[[Config], MemoryPlan]) -> str | None:
    """Return the mildest change of settings with which the run fits."""
    batch, resolution = config.training.batch_size, _side(config)
    assert batch is not None
    accumulate = config.training.gradient_accumulation * batch
    single_images = {"training.batch_size": 1, "training.gradient_accumulation": accumulate}
    saving = {"training.recompute": "blocks"}
    steps: list[dict[str, Any]] = [saving, single_images, {**single_images, **saving}]
    # the smaller ones of several resolutions take no memory of their own
    only = {"data.more_resolutions": ()} if config.data.more_resolutions else {}
    smaller = [{**only, "data.resolution": resolution * share // 4 // 64 * 64} for share in (3, 2)]
    steps += [{**single_images, **saving, **changes} for changes in smaller]
    if config.training.precision == "fp32" and config.training.device != "cpu":
        steps = [{"training.precision": "bf16", **step} for step in ({}, *steps)]
    for changes in steps:
        if all(config.get(key) == value for key, value in changes.items()):
            continue
        if changes.get("data.resolution", 64) < 64:
            continue
        if again(config.with_values(changes)).fits():
            changed = {key: value for key, value in changes.items() if config.get(key) != value}
            return "it fits with " + " ".join(f"{key}={_as_toml(value)}" for key, value in changed.items())
    return None


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def _bytes_of(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _decoder_bytes(model: DiffusionModel) -> int:
    vae: Any = model.components()[AUTOENCODER]
    return _bytes_of(vae.decoder) + (0 if vae.post_quant_conv is None else _bytes_of(vae.post_quant_conv))


def _rounded(model: DiffusionModel, side: int) -> int:
    """Return a side in px that the base can work at."""
    return max(model.facts.size_multiple, side // model.facts.size_multiple * model.facts.size_multiple)


@torch.no_grad()
def _encoding(model: DiffusionModel, config: Config, *, waiting: bool) -> int:
    """Encode a caption, then an image of the largest size; return the largest amount alive.

    Args:
        model: the blueprint.
        config: resolved settings.
        waiting: the components wait where they work, in main memory; else each comes for its work only.
    """
    with fused_attention(), counting_memory() as texts:
        model.encode_text([""])
    images = _encode_bytes(model, config)
    sizes = {name: _bytes_of(module) for name, module in model.components().items()}
    if waiting:
        return sum(sizes.values()) + max(texts.peak, images)
    text = sum(sizes.values()) - sizes[model.info.denoiser.component] - sizes[AUTOENCODER]
    return max(text + texts.peak, _encoder_bytes(model) + images)


@torch.no_grad()
def _encode_bytes(model: DiffusionModel, config: Config) -> int:
    """Encode an image of the largest size; return the largest amount alive besides the encoder."""
    side = _rounded(model, _side(config))
    pixels = torch.empty((1, 3, side, side), device="meta", dtype=torch.float32)
    with fused_attention(), counting_memory() as memory:
        model.encode_images(pixels)
    # in bands the pixels stay where they are
    banded = config.training.autoencoder == "banded" and side > WHOLE_SIDE
    return memory.peak + (0 if banded else pixels.nbytes)


def _encoder_bytes(model: DiffusionModel) -> int:
    vae: Any = model.components()[AUTOENCODER]
    return _bytes_of(vae.encoder) + (0 if vae.quant_conv is None else _bytes_of(vae.quant_conv))


@torch.no_grad()
def _forward_bytes(model: DiffusionModel, side: int, rows: int) -> int:
    """Predict for some rows without gradients; return the largest amount alive."""
    side = _rounded(model, side)
    shape = (rows, *model.facts.latents.shape(side, side))
    latents, timesteps = torch.empty(shape, device="meta"), torch.zeros(rows, dtype=torch.long, device="meta")
    text = model.encode_text([""] * rows)
    with fused_attention(), counting_memory() as memory:
        model.predict(latents, timesteps, text, [SizeHint((side, side), (0, 0), (side, side))] * rows)
    return memory.peak + sum(tensor.numel() * tensor.element_size() for tensor in (latents, *text.values()))


@torch.no_grad()
def _preview_bytes(model: DiffusionModel, config: Config, visiting: int) -> int:
    """Predict for the previews, then decode one of them with the decoder on the device for that time."""
    assert config.data.resolution is not None
    count, guided, most = _preview(config)
    side = _rounded(model, config.data.resolution)
    if most:
        side = -(-math.isqrt(most) // model.facts.size_multiple) * model.facts.size_multiple
    rows = min(count, most_at_once(model, side, side)) * (2 if guided else 1)
    latents = torch.empty((1, *model.facts.latents.shape(side, side)), device="meta")
    with fused_attention(), counting_memory() as memory:
        model.decode_latents(latents)
    return max(_forward_bytes(model, side, rows), visiting + memory.peak)


def _attach(model: DiffusionModel, config: Config) -> tuple[Sequence[TrainedLayer], int, int]:
    """Put a fresh adapter of the same kind and shapes on the blueprint.

    Returns:
        Its layers, how many numbers it has, and of how many there are copies, as several layers are computed
        together.
    """
    # starting values computed from the base's weights have the same shapes as any others
    with torch.device("meta"):  # no number is drawn
        fresh = create_adapter(model, config.adapter.model_copy(update={"init": "default"}), 0)
    layers = attach_for_training(model, fresh, "planned", dropout=config.adapter.dropout)
    together = config.adapter.init in ("default", "gaussian") and can_be_direct(model, layers)
    together = together and "joint" in chosen_paths(config.training.fast)
    count = copied = 0
    for layer in layers:
        numbers = sum(parameter.numel() for parameter in layer.parameters.values())
        for parameter in layer.parameters.values():
            parameter.requires_grad_(True)
        count += numbers
        copied += numbers if together and can_be_joined(module_at(model, layer.key)) else 0
    return layers, count, copied


def _step_bytes(model: DiffusionModel, side: int, config: Config) -> tuple[int, int]:
    """Run a step of the objective's shape; see :func:`sdlora.training.objective.loss_of`.

    Returns:
        The largest amount alive, and the arithmetic.
    """
    device, adapts_text, count = torch.device("meta"), config.adapter.adapts_text, config.training.batch_size
    assert count is not None
    preserving, blank = _priors(config)
    rows = 2 * count if blank else count
    shape = (rows, *model.facts.latents.shape(side, side))
    sizes = [SizeHint((side, side), (0, 0), (side, side))] * rows
    captions = [""] * rows  # one chunk of tokens, like nearly all captions
    latents, timesteps = torch.empty(shape, device=device), torch.zeros(rows, dtype=torch.long, device=device)
    before = gradient_bytes(model)
    with fused_attention(), torch.enable_grad():
        with torch.set_grad_enabled(adapts_text):
            text = None if adapts_text else model.encode_text(captions)
        with counting_memory() as memory:
            if text is None:
                text = model.encode_text(captions)
            prediction = model.predict(latents, timesteps, text, sizes)
            loss = per_image_loss(prediction, torch.empty_like(prediction)).sum()
            if preserving:  # what the base predicts, while the graph of the first prediction is alive
                with torch.no_grad():
                    part_text = {name: tensor[:count] for name, tensor in text.items()}
                    model.predict(latents[:count], timesteps[:count], part_text, sizes[:count])
            loss.backward()
    # gradients of the adapter are counted with the adapter; some were there before
    return max(0, memory.peak - (gradient_bytes(model) - before)), memory.flops
