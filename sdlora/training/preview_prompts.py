"""What previews show: from the settings to requests, the adapters they name, and their encoded texts."""

from __future__ import annotations

from pathlib import Path

from ..config.defaults import USUAL_GUIDANCE
from ..config.schema import Config
from ..families.base import Conditioning, DiffusionModel
from ..generation.adapter_folders import find_adapter
from ..generation.lora_tags import refuse_tags, take_tags
from ..generation.render import GenerateRequest, check_request, encode_prompts, texts_of
from ..run_folder import RunFolder


def preview_requests(config: Config, model: DiffusionModel) -> list[GenerateRequest]:
    """Return the requests for all previews of a run with final settings.

    Raises:
        ConfigError: for a prompt that says nothing clear, or wants what the base cannot draw.
    """
    settings, multiple = config.sample, model.facts.size_multiple
    guidance = (
        USUAL_GUIDANCE if settings.guidance is None else settings.guidance
    )  # set where there are prompts
    side = max(multiple, (config.data.resolution or 0) // multiple * multiple)
    requests = []
    for number, line in enumerate(settings.lines):
        prompt, strengths = take_tags(line.prompt)
        if line.strength is not None and line.strength != 1.0:
            strengths = {config.output.name: line.strength, **strengths}
        request = GenerateRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt if line.negative is None else line.negative,
            height=side if line.height is None else line.height,
            width=side if line.width is None else line.width,
            steps=settings.steps if line.steps is None else line.steps,
            guidance=guidance if line.guidance is None else line.guidance,
            sampler=settings.sampler if line.sampler is None else line.sampler,
            seed=settings.seed + number if line.seed is None else line.seed,
            strengths=strengths,
        )
        requests.append(request)
    return requests


def find_preview_adapters(config: Config, model: DiffusionModel, folder: RunFolder) -> dict[str, Path]:
    """Return the files of the adapters that previews want beside the run's own, by name.

    Raises:
        ConfigError: for one that is not found, and anything that cannot be drawn.
    """
    refuse_tags(config.sample.negative_prompt)
    requests = preview_requests(config, model)
    for request in requests:
        check_request(model, request)
    names = {name for request in requests for name in request.strengths} - {config.output.name}
    given = config.sample.adapter_folder
    places = [*([given] if given else []), folder.path.absolute().parent]
    return {name: find_adapter(name, places) for name in sorted(names)}


def preview_text(config: Config, model: DiffusionModel) -> dict[str, Conditioning]:
    """Encode the previews' prompts while the text encoders are there; none if the encoders will change."""
    if config.adapter.adapts_text:
        return {}
    usual = [request for request in preview_requests(config, model) if not request.strengths]
    encoded = encode_prompts(model, [text for request in usual for text in texts_of(request)])
    return {prompt: {name: tensor.cpu() for name, tensor in text.items()} for prompt, text in encoded.items()}
