"""What single phases of a run take, each run on the meta device; :mod:`.memory` adds them up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters.attach import adapters_disabled, create_adapter
from ..adapters.direct import can_be_direct
from ..adapters.hooks import acting_update
from ..adapters.joint import can_be_joined
from ..adapters.module_paths import module_at, without_adapters
from ..adapters.trainable_layers import TrainedLayer, attach_for_training
from ..config.defaults import USUAL_GUIDANCE
from ..config.schema import Config
from ..diffusion.process import per_image_loss
from ..families.base import DiffusionModel, SizeHint
from ..families.facts import AUTOENCODER
from ..families.quantised import QuantisedLayer
from ..generation.render import most_at_once
from .fast import chosen_paths
from .memory_as_computed import gradient_bytes
from .memory_count import counting_memory, fused_attention

WHOLE_SIDE = 256  # px; squares up to this side are encoded and decoded whole wherever a step fits


def preview_shape(config: Config) -> tuple[int, bool, int]:
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


def largest_side(config: Config) -> int:
    """Return the largest resolution of a run."""
    assert config.data.resolution is not None
    return max((config.data.resolution, *config.data.more_resolutions))


def keeps_text(config: Config) -> bool:
    """Tell whether the text encoders may be needed while training; an open setting counts as yes."""
    varying = config.data.varies_captions and config.data.encode_captions != "before"
    return config.adapter.adapts_text or varying


def keeps_images(config: Config) -> bool:
    """Tell whether the image encoder is needed while training."""
    return config.data.varies_images and config.data.variants == 0


def priors(config: Config) -> tuple[bool, bool]:
    """Return whether the base predicts in every step, too, and whether always for the empty caption."""
    wanted = config.data.prior_preservation > 0
    return wanted, wanted and not config.data.has_regularisation


def bytes_of(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def decoder_bytes(model: DiffusionModel) -> int:
    vae: Any = model.components()[AUTOENCODER]
    return bytes_of(vae.decoder) + (0 if vae.post_quant_conv is None else bytes_of(vae.post_quant_conv))


def rounded_side(model: DiffusionModel, side: int) -> int:
    """Return a side in px that the base can work at."""
    return max(model.facts.size_multiple, side // model.facts.size_multiple * model.facts.size_multiple)


@torch.no_grad()
def encoding_bytes(model: DiffusionModel, config: Config, *, waiting: bool) -> int:
    """Encode a caption, then an image of the largest size; return the largest amount alive.

    Args:
        model: the blueprint.
        config: resolved settings.
        waiting: the components wait where they work, in main memory; else each comes for its work only.
    """
    with fused_attention(), counting_memory() as texts:
        model.encode_text([""])
    images = encode_bytes(model, config)
    sizes = {name: bytes_of(module) for name, module in model.components().items()}
    if waiting:
        return sum(sizes.values()) + max(texts.peak, images)
    text = sum(sizes.values()) - sizes[model.info.denoiser.component] - sizes[AUTOENCODER]
    return max(text + texts.peak, encoder_bytes(model) + images)


@torch.no_grad()
def encode_bytes(model: DiffusionModel, config: Config) -> int:
    """Encode an image of the largest size; return the largest amount alive besides the encoder."""
    side = rounded_side(model, largest_side(config))
    pixels = torch.empty((1, 3, side, side), device="meta", dtype=torch.float32)
    with fused_attention(), counting_memory() as memory:
        model.encode_images(pixels)
    # in bands the pixels stay where they are
    banded = config.training.autoencoder == "banded" and side > WHOLE_SIDE
    return memory.peak + (0 if banded else pixels.nbytes)


def encoder_bytes(model: DiffusionModel) -> int:
    vae: Any = model.components()[AUTOENCODER]
    return bytes_of(vae.encoder) + (0 if vae.quant_conv is None else bytes_of(vae.quant_conv))


@torch.no_grad()
def forward_bytes(model: DiffusionModel, side: int, rows: int) -> int:
    """Predict for some rows without gradients; return the largest amount alive."""
    side = rounded_side(model, side)
    shape = (rows, *model.facts.latents.shape(side, side))
    latents, timesteps = torch.empty(shape, device="meta"), torch.zeros(rows, dtype=torch.long, device="meta")
    text = model.encode_text([""] * rows)
    with fused_attention(), counting_memory() as memory:
        model.predict(latents, timesteps, text, [SizeHint((side, side), (0, 0), (side, side))] * rows)
    return memory.peak + sum(tensor.numel() * tensor.element_size() for tensor in (latents, *text.values()))


@torch.no_grad()
def preview_bytes(model: DiffusionModel, config: Config, visiting: int) -> int:
    """Predict for the previews, then decode one of them with the decoder on the device for that time."""
    assert config.data.resolution is not None
    count, guided, most = preview_shape(config)
    side = rounded_side(model, config.data.resolution)
    if most:
        side = -(-math.isqrt(most) // model.facts.size_multiple) * model.facts.size_multiple
    rows = min(count, most_at_once(model, side, side)) * (2 if guided else 1)
    latents = torch.empty((1, *model.facts.latents.shape(side, side)), device="meta")
    with fused_attention(), counting_memory() as memory:
        model.decode_latents(latents)
    return max(forward_bytes(model, side, rows), visiting + memory.peak)


def attached(model: DiffusionModel, config: Config) -> tuple[Sequence[TrainedLayer], int, int, int]:
    """Put a fresh adapter of the same kind and shapes on the blueprint.

    Returns:
        Its layers, how many numbers it has, of how many there are copies, as several layers are computed
        together, and the bytes that are alive at most while it is put there: PEFT looks at each layer's
        weight, which a quantised one makes for that.
    """
    # starting values computed from the base's weights have the same shapes as any others
    with torch.device("meta"):  # no number is drawn
        fresh = create_adapter(model, config.adapter.model_copy(update={"init": "default"}), 0)
    with counting_memory() as memory:
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
    return layers, count, copied, memory.peak


@contextmanager
def judged_at_a_strength(model: DiffusionModel, layers: Sequence[TrainedLayer]) -> Iterator[int]:
    """Have a blueprint draw as judging does, and give the bytes of the factors that are there for that.

    See :func:`sdlora.adapters.folded.folded`: beside a quantised weight the update acts by itself, worked out
    as large as the weight; what is in the other weights takes nothing.
    """
    with adapters_disabled(model), ExitStack() as acting:
        size = 0
        for layer in layers:
            base = without_adapters(module_at(model, layer.key))
            if isinstance(base, QuantisedLayer):
                acting.enter_context(acting_update(base, "judged", layer.update, 1.0))
                size += sum(4 * factor.numel() for factor in layer.update.tensors().values())
        yield size


def step_bytes(model: DiffusionModel, side: int, config: Config) -> tuple[int, int]:
    """Run a step of the objective's shape; see :func:`sdlora.training.objective.loss_of`.

    Returns:
        The largest amount alive, and the arithmetic.
    """
    device, adapts_text, count = torch.device("meta"), config.adapter.adapts_text, config.training.batch_size
    assert count is not None
    preserving, blank = priors(config)
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
