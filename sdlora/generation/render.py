"""The denoising loop: from requests to images, for users and for previews during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.attach import set_strengths
from ..adapters.row_strengths import RowStrengths
from ..adapters.strength import Strength, strength_of
from ..config.defaults import USUAL_GUIDANCE
from ..diffusion.samplers import check_sampling, find_sampler, make_scheduler
from ..errors import ConfigError, ModelError
from ..families.base import Conditioning, DiffusionModel, SizeHint, stack_conditioning
from ..families.lean_drawing import drawing_lean
from .lora_tags import refuse_tags
from .prompt_parts import Part, parts_of, schedule

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
"""Called after every call of the denoiser: (images times calls done, all of them)."""

MOST_PX = 8192
"""Of a side: more is a slip of the finger, and would take all memory of the machine."""
MAX_BATCH = 16
MAX_BATCH_LATENTS = 4 * 64 * 64
"""Latent pixels of one batch: four images of 512 px; guidance doubles what the denoiser sees."""


@dataclass(frozen=True)
class GenerateRequest:
    """One image to be made.

    Attributes:
        prompt: what to show; one that changes or is several: :mod:`sdlora.generation.prompt_parts`.
        negative_prompt: what to avoid; it has no effect without guidance. It may change, too.
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

    @property
    def calls(self) -> int:
        """How often the denoiser is called."""
        return 2 * self.steps - 1 if find_sampler(self.sampler).second_order else self.steps

    @property
    def counted_calls(self) -> int:
        """The calls that changes in prompts are shares of: as WebUI counts, two for every step, or one."""
        return 2 * self.steps if find_sampler(self.sampler).second_order else self.steps


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
    each_at_its_strengths: bool = False,
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
        each_at_its_strengths: let the adapters act as each request says, whatever else is in its batch.

    Raises:
        ConfigError: for a size, sampler or number of steps that does not exist.
        ModelError: if the numbers overflow.
    """
    for request in requests:
        check_request(model, request)
    total, done = sum(request.calls for request in requests), 0
    images: dict[int, Image] = {}
    for batch in _batches(model, requests):
        members = [requests[i] for i in batch]

        def tick(count: int = len(batch)) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        latents = denoise(model, members, tick, encoded=encoded, each_at_its_strengths=each_at_its_strengths)
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
    for text in (request.prompt, request.negative_prompt):
        refuse_tags(text)
    _Told.check(request)
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
        parts = len(parts_of(request.prompt, request.counted_calls))
        key = (request.height, request.width, request.steps, request.guidance, find_sampler(request.sampler))
        alike.setdefault((*key, parts), []).append(i)
    for indices in alike.values():
        first = requests[indices[0]]
        parts = len(parts_of(first.prompt, first.counted_calls))
        size = max(1, most_at_once(model, first.height, first.width) // parts)
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
    each_at_its_strengths: bool = False,
) -> Tensor:
    """Return clean scaled latents (B, C, h, w) float32 of requests that share all but prompts and seed.

    Args:
        model: in eval mode, with its adapters' strengths set.
        requests: one batch.
        tick: called after every denoising step.
        encoded: see :func:`render`.
        each_at_its_strengths: see :func:`render`; no adapter acts afterwards.
    """
    first = requests[0]
    scheduler = make_scheduler(first.sampler, model.process, first.steps)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    extra = {"generator": generators} if find_sampler(first.sampler).ancestral else {}
    shape = model.facts.latents.shape(first.height, first.width)
    noise = torch.stack(
        [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]
    )
    latents = noise.to(model.facts.device) * float(scheduler.init_noise_sigma)
    told = _Told(model, requests, encoded, each_at_its_strengths)
    by_row = RowStrengths(model, told.strengths) if each_at_its_strengths else None
    pixels = (first.height, first.width)
    sizes = [SizeHint(original=pixels, crop=(0, 0), target=pixels)] * told.rows
    denoiser = model.components()[model.info.denoiser.component]
    with by_row.acting() if by_row is not None else nullcontext(), drawing_lean(denoiser):
        for call, timestep in enumerate(scheduler.timesteps):
            inputs = told.spread(scheduler.scale_model_input(latents, timestep))
            prediction = model.predict(inputs, timestep.repeat(told.rows), told.at(call), sizes)
            prediction = told.guided(prediction)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if tick is not None:
                tick()
    return latents


class _Told:
    """What the denoiser is told about a batch in each of its calls, and how its answers are put together.

    Rows are the negative prompts, if there is guidance, then the prompts, those joined by ``AND`` in turn.
    """

    def __init__(
        self,
        model: DiffusionModel,
        requests: Sequence[GenerateRequest],
        encoded: Mapping[str, Conditioning] | None,
        each_at_its_strengths: bool = False,
    ) -> None:
        first = requests[0]
        self._model, self._count = model, len(requests)
        self._parts = [parts_of(request.prompt, first.counted_calls) for request in requests]
        self._composed = any(_is_composed(request) for request in requests)
        self._guidance = max(1.0, first.guidance)
        guides = first.guidance > 1.0 or self._composed
        unwanted = [request.negative_prompt for request in requests] if guides else []
        self._negative = [schedule(text, first.counted_calls) for text in unwanted]
        flat = [Part(1.0, texts) for texts in self._negative] + [p for parts in self._parts for p in parts]
        self._flat = flat
        self.rows = len(flat)
        owners = [requests[i] for i in range(len(self._negative))]
        owners += [request for request, parts in zip(requests, self._parts, strict=True) for _ in parts]
        self.strengths = [request.strengths for request in owners]
        self._keys = [_of_text(model, r.strengths) if each_at_its_strengths else None for r in owners]
        self._known: dict[tuple[object, str], Conditioning] = {}
        for key, strengths in dict(zip(self._keys, self.strengths, strict=True)).items():
            rows = [part for part, other in zip(flat, self._keys, strict=True) if other == key]
            texts = [text for part in rows for _, text in part.texts]
            known = dict(encoded or {}) if key is None else {}
            if key is not None:
                set_strengths(model, strengths)
            known |= encode_prompts(model, [text for text in texts if text not in known])
            self._known |= {(key, text): conditioning for text, conditioning in known.items()}
        self._stacked: tuple[list[tuple[object, str]], Conditioning] | None = None

    @staticmethod
    def check(request: GenerateRequest) -> None:
        """Raise ConfigError for a prompt that changes more than is drawn."""
        parts_of(request.prompt, request.counted_calls)
        schedule(request.negative_prompt, request.counted_calls)

    def at(self, call: int) -> Conditioning:
        """Return the conditioning of a call, the first one being 0, on the denoiser's device."""
        texts = [(key, part.at(call)) for key, part in zip(self._keys, self._flat, strict=True)]
        if self._stacked is None or self._stacked[0] != texts:
            stacked = stack_conditioning([self._known[text] for text in texts])
            facts = self._model.facts
            # the format they are used in, so that each call is given the same tensors
            self._stacked = (
                texts,
                {
                    name: tensor.to(facts.device, facts.dtype if tensor.is_floating_point() else None)
                    for name, tensor in stacked.items()
                },
            )
        return self._stacked[1]

    def spread(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) as often as they are looked at, (rows, C, h, w)."""
        each = [latents[i : i + 1].expand(len(parts), -1, -1, -1) for i, parts in enumerate(self._parts)]
        shown = torch.cat(each) if self._composed else latents
        return torch.cat([latents, shown]) if self._negative else shown

    def guided(self, prediction: Tensor) -> Tensor:
        """Return the prediction (B, C, h, w) of predictions for all rows."""
        if not self._negative:
            return prediction
        negative, rest = prediction[: self._count], prediction[self._count :]
        if not self._composed:  # Ho and Salimans 2022, equation 6, in the scale that users know (w + 1)
            return negative + self._guidance * (rest - negative)
        towards = []
        for i, parts in enumerate(self._parts):  # Liu et al. 2022, equation 11
            towards_it, rest = rest[: len(parts)], rest[len(parts) :]
            weights = torch.tensor([part.weight for part in parts]).to(rest).reshape(-1, 1, 1, 1)
            towards.append((weights * (towards_it - negative[i])).sum(0))
        return negative + self._guidance * torch.stack(towards)


def _of_text(model: DiffusionModel, strengths: Mapping[str, Strength]) -> object:
    """Return what tells apart strengths that act differently in the text encoders."""
    encoders = [name for name in model.info.components if name != model.info.denoiser.component]
    return frozenset(
        (a, name, strength_of(value, name)) for a, value in strengths.items() for name in encoders
    )


def _is_composed(request: GenerateRequest) -> bool:
    """Tell whether a prompt is several joined by ``AND``."""
    return len(parts_of(request.prompt, request.counted_calls)) > 1


def conditioning_of(
    model: DiffusionModel, requests: Sequence[GenerateRequest], call: int = 0
) -> Conditioning:
    """Return what the denoiser is told in a call: all negative prompts (if guided), then all prompts."""
    return _Told(model, requests, None).at(call)


def texts_of(request: GenerateRequest) -> list[str]:
    """Return all texts that are encoded to draw an image."""
    parts = [
        *parts_of(request.prompt, request.counted_calls),
        Part(1.0, schedule(request.negative_prompt, request.counted_calls)),
    ]
    return [text for part in parts for _, text in part.texts]


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
