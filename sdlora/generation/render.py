"""The denoising loop: from requests to images, for users and for previews during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.strength import Strength
from ..config.defaults import USUAL_GUIDANCE
from ..diffusion.samplers import check_sampling, find_sampler, make_scheduler
from ..errors import ConfigError, ModelError
from ..families.base import Conditioning, DiffusionModel, SizeHint, stack_conditioning
from ..families.parallel import SplitPredictor

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
"""Called after every denoising step: (images times steps done, all of them)."""

MOST_PX = 8192
"""Of a side: more is a slip of the finger, and would take all memory of the machine."""
MAX_BATCH = 16
MAX_BATCH_LATENTS = 4 * 64 * 64
"""Latent pixels of one batch: four images of 512 px; guidance doubles what the denoiser sees."""


@dataclass(frozen=True)
class GenerateRequest:
    """One image to be made.

    Attributes:
        prompt: what to show.
        negative_prompt: what to avoid; it has no effect without guidance.
        height: px.
        width: px.
        steps: denoising steps.
        guidance: how far to go from the negative prompt to the prompt; 1 or less: no guidance.
        sampler: a name of :data:`sdlora.diffusion.samplers.SAMPLERS`.
        seed: fixes the noise, whatever else is in the batch.
        strengths: adapter name -> strength; other adapters do not act.
    """

    prompt: str
    negative_prompt: str = ""
    _: KW_ONLY
    height: int
    width: int
    steps: int
    guidance: float
    sampler: str
    seed: int
    strengths: Mapping[str, Strength] = field(default_factory=dict)


def usual_guidance(model: DiffusionModel) -> float:
    """Return the guidance scale that the base's author recommends, or else the usual one."""
    return float(model.base.recommended.get("sample.guidance", USUAL_GUIDANCE))


@dataclass(frozen=True)
class GeneratedImage:
    """An image and the request for it."""

    image: Image
    request: GenerateRequest


@torch.no_grad()  # not inference_mode: training continues with this model, and inference tensors forbid that
def render(
    model: DiffusionModel,
    requests: Sequence[GenerateRequest],
    *,
    progress: Progress | None = None,
    encoded: Mapping[str, Conditioning] | None = None,
) -> list[Image]:
    """Return the images of ``requests``, in their order, with the adapters as they act in the model now.

    Requests that differ only in prompts and seed share batches. Each image draws all its noise from its
    own CPU generator and each prompt is encoded by itself, so a batch changes an image only by rounding.
    The caller sets modes and strengths (:meth:`DiffusionModel.prepare`, ``set_strengths``).

    Args:
        model: see :func:`denoise`.
        requests: what to make.
        progress: called after every denoising step.
        encoded: prompts encoded before (:func:`encode_prompts`); the others are encoded now.

    Raises:
        ConfigError: for a size, sampler or number of steps that does not exist.
        ModelError: if the numbers overflow.
    """
    for request in requests:
        check_request(model, request)
    total, done = sum(request.steps for request in requests), 0
    images: dict[int, Image] = {}
    for batch in _batches(model, requests):
        members = [requests[i] for i in batch]

        def tick(count: int = len(batch)) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        latents = denoise(model, members, tick, encoded=encoded)
        for request, latent in zip(members, latents, strict=True):
            if not bool(torch.isfinite(latent).all()):
                raise ModelError(
                    f"prompt `{request.prompt}`: the denoiser of {model.base.title} overflowed in "
                    f"{str(model.facts.dtype).removeprefix('torch.')}; use fp32 or bf16, or weaker adapters"
                )
        images |= zip(batch, _to_images(model.decode_latents(latents)), strict=True)
    return [images[i] for i in range(len(requests))]


def check_request(model: DiffusionModel, request: GenerateRequest) -> None:
    """Raise ConfigError if the model cannot make such an image, naming what it could make."""
    check_sampling(request.sampler, model.process, request.steps)
    multiple = model.facts.size_multiple
    for name, value in (("height", request.height), ("width", request.width)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ConfigError(
                f"`{name}={value}`: {model.base.title} makes multiples of {multiple} px; use {nearest}"
            )
        if value > MOST_PX:
            raise ConfigError(
                f"`{name}={value}`: more than {MOST_PX} px cannot be drawn; draw smaller, and enlarge"
            )
    if not 0 <= request.seed < 2**64:
        raise ConfigError(f"`seed={request.seed}`: seeds are whole numbers from 0 to 2^64 - 1")
    if not math.isfinite(request.guidance) or request.guidance < 0:
        raise ConfigError(f"`guidance={request.guidance}`: use a number from 0 up; 5 to 9 are usual")


def _batches(model: DiffusionModel, requests: Sequence[GenerateRequest]) -> Iterator[list[int]]:
    """Yield indices of requests that can go through the denoiser together."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, request in enumerate(requests):
        key = (request.height, request.width, request.steps, request.guidance, find_sampler(request.sampler))
        alike.setdefault(key, []).append(i)
    for indices in alike.values():
        size = most_at_once(model, requests[indices[0]].height, requests[indices[0]].width)
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def most_at_once(model: DiffusionModel, height: int, width: int) -> int:
    """Return how many images of a size in px may share a batch."""
    _, rows, columns = model.facts.latents.shape(height, width)
    return max(1, min(MAX_BATCH, MAX_BATCH_LATENTS // (rows * columns)))


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    requests: Sequence[GenerateRequest],
    tick: Callable[[], None] | None = None,
    *,
    encoded: Mapping[str, Conditioning] | None = None,
) -> Tensor:
    """Return clean scaled latents (B, C, h, w) float32 of requests that share all but prompts and seed.

    Args:
        model: in eval mode, with its adapters' strengths set.
        requests: one batch.
        tick: called after every denoising step.
        encoded: see :func:`render`.
    """
    first, count = requests[0], len(requests)
    scheduler = make_scheduler(first.sampler, model.process, first.steps)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    extra = {"generator": generators} if find_sampler(first.sampler).ancestral else {}
    shape = model.facts.latents.shape(first.height, first.width)
    noise = torch.stack(
        [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]
    )
    latents = noise.to(model.facts.device) * float(scheduler.init_noise_sigma)
    guided = first.guidance > 1.0
    text = conditioning_of(model, requests, guided, encoded)
    copies = 2 if guided else 1
    pixels = (first.height, first.width)
    sizes = [SizeHint(original=pixels, crop=(0, 0), target=pixels)] * (count * copies)
    with SplitPredictor(model) as split:
        for timestep in scheduler.timesteps:
            inputs = torch.cat([scheduler.scale_model_input(latents, timestep)] * copies)
            prediction = split.predict(inputs, timestep.repeat(count * copies), text, sizes)
            if guided:  # Ho and Salimans 2022, equation 6, in the scale that users know (w + 1)
                negative, positive = prediction.chunk(2)
                prediction = negative + first.guidance * (positive - negative)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if tick is not None:
                tick()
    return latents


def conditioning_of(
    model: DiffusionModel,
    requests: Sequence[GenerateRequest],
    guided: bool,
    encoded: Mapping[str, Conditioning] | None = None,
) -> Conditioning:
    """Encode each prompt by itself and stack: all negative prompts (if guided), then all prompts."""
    prompts = [request.negative_prompt for request in requests] if guided else []
    prompts += [request.prompt for request in requests]
    known = dict(encoded or {})
    known |= encode_prompts(model, [prompt for prompt in prompts if prompt not in known])
    stacked = stack_conditioning([known[prompt] for prompt in prompts])
    return {name: tensor.to(model.facts.device) for name, tensor in stacked.items()}


@torch.no_grad()
def encode_prompts(model: DiffusionModel, prompts: Iterable[str]) -> dict[str, Conditioning]:
    """Return prompt -> its conditioning, tensors without batch axis, where the text encoders are."""
    return {
        prompt: {name: tensor[0] for name, tensor in model.encode_text([prompt]).items()}
        for prompt in dict.fromkeys(prompts)
    }


def _to_images(pixels: Tensor) -> list[Image]:
    """Return images of pixels (B, 3, H, W) in [-1, 1]."""
    from PIL import Image as Pil

    numbers = ((pixels.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Pil.fromarray(array.permute(1, 2, 0).contiguous().numpy()) for array in numbers]
