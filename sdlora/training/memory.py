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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import nn

from ..adapters.trainable_layers import TrainedLayer
from ..config.schema import Config
from ..errors import TrainingError
from ..families.base import DiffusionModel
from ..families.facts import AUTOENCODER
from ..families.lean import make_lean, undo_lean
from ..families.offload import offloadable_blocks, offloaded_bytes
from ..families.recompute import Rungs
from ..families.rungs import blocks_by_saving, can_recompute
from ..files import size_text
from .fast import chosen_paths, recompute_of
from .memory_as_computed import computed_as_in_a_run
from .memory_phases import (
    attached,
    bytes_of,
    decoder_bytes,
    encode_bytes,
    encoder_bytes,
    encoding_bytes,
    forward_bytes,
    judged_at_a_strength,
    keeps_images,
    keeps_text,
    largest_side,
    preview_bytes,
    preview_shape,
    priors,
    rounded_side,
    step_bytes,
)
from .optimizers import optimizer_kind

_TOLERANCE = 0.85  # the count may be 15 % too high; with less free than this share of it, a run cannot fit
_VALIDATION_ROWS = 4  # timesteps of a held-out image that are predicted together
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
        largest_side(config),
        keeps_text(config),
        keeps_images(config),
        *priors(config),
    ]
    return json.dumps(
        [
            *wanted,
            bool(config.data.validation),
            config.data.resolution,
            preview_shape(config),
            bool(config.judge.every),
        ]
    )


@functools.lru_cache(maxsize=64)
def _count(question: _Question) -> MemoryPlan:
    """Return the plan with all blocks on the device, without what is free."""
    config, model = question.config, question.blueprint()
    device = torch.device(config.training.device or "cpu")
    waiting = device.type == "cpu"  # components that wait in main memory then take the same memory
    sizes = {name: bytes_of(module) for name, module in model.components().items()}
    denoiser, images = sizes.pop(model.info.denoiser.component), sizes.pop(AUTOENCODER)
    text = sum(sizes.values())
    weights = denoiser + text * (waiting or keeps_text(config)) + images * (waiting or keeps_images(config))
    encoding = encoding_bytes(model, config, waiting=waiting)
    offloadable = () if waiting else tuple(map(offloaded_bytes, offloadable_blocks(_denoiser(model))))
    layers, values, copied, attaching = attached(model, config)
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
        keep_text=keeps_text(config),
    )
    blocks = _blocks_by_rung(model, config)
    with computed_as_in_a_run(model, layers, config):
        activations, flops = step_bytes(model, rounded_side(model, largest_side(config)), config)
    activations = max(activations, (4 - summed) * values)
    others = {"encoding": encoding, "placing": weights + max(values * (8 + layer_bytes // 2), attaching)}
    if config.data.validation:
        # when a run validates, its fast paths have proven themselves
        with computed_as_in_a_run(model, layers, config, always=True):
            predicting = forward_bytes(model, largest_side(config), validation_rows(config))
        others["validation"] = weights + adapter + predicting
    for name, size in _drawing(model, config, layers, text).items():
        others[name] = weights + adapter + size
    return MemoryPlan(weights, adapter, activations, None, others, flops, blocks, offloadable)


def _drawing(
    model: DiffusionModel, config: Config, layers: Sequence[TrainedLayer], text: int
) -> dict[str, int]:
    """Return what each phase that draws takes besides weights and adapter; ``text`` is that of encoders."""
    sizes: dict[str, int] = {}
    waiting = torch.device(config.training.device or "cpu").type == "cpu"
    visiting = 0 if waiting or keeps_images(config) else decoder_bytes(model)
    model.prepare(training=False, lean=True)
    if config.sample.prompts:
        sizes["previews"] = preview_bytes(model, config, visiting)
    if config.judge.every:
        with judged_at_a_strength(model, layers) as factors:
            sizes["judging"] = factors + preview_bytes(model, config, visiting)
        if not waiting and not keeps_text(config):
            # its prompts are encoded when the first checkpoint is judged, and images by the whole autoencoder
            encoding_again = max(text, encoder_bytes(model) + encode_bytes(model, config))
            sizes["judging"] = max(sizes["judging"], encoding_again)
    return sizes


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
    batch, resolution = config.training.batch_size, largest_side(config)
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
