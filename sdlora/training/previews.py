"""Images made while training: rows of previews as a steps x prompts grid, and the loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from PIL import Image

from ..data.reading.decoding import ImageFileError, opened_image
from ..events import Sampled, read_events
from ..generation.generate import GenerateRequest, render
from ..generation.grids import loss_curve, steps_by_prompts
from ..generation.png_info import parameters_text, save_png
from ..run_folder import RunFolder

if TYPE_CHECKING:
    from .state import Run


def preview(run: Run, learned: Sequence[bytes] | None = None) -> None:
    """Draw the preview prompts with the adapter as it is, and redraw the grid of all steps so far.

    Args:
        run: its model holds the values to show.
        learned: what :func:`draw` returned with the values as learned, to be shown beside.

    Raises:
        torch.OutOfMemoryError: in all processes, if one of them lacks memory.
    """
    prompts = run.config.sample.prompts
    if not prompts:
        return
    drawings = [draw(run), *([learned] if learned is not None else [])]
    if not run.processes.is_main:
        return
    files = []
    for row, shares in enumerate(drawings):
        for number, prompt in enumerate(prompts):
            request = preview_request(run, prompt, number)
            file = run.folder.preview(run.step, row * len(prompts) + number + 1)
            save_png(_image(shares, request, number), file, parameters_text(request, base=run.model.base))
            files.append(file)
    columns = [*prompts, *(f"{prompt} (as learned)" for prompt in prompts * (learned is not None))]
    _draw_grid(run.folder, columns)
    run.emit(Sampled(run.step, tuple(files), run.folder.grid))


def draw(run: Run) -> list[bytes]:
    """Return the pixels of the previews with what the model holds now, each process drawing its share.

    The sampler, size and prompt layout are those of generation.

    Raises:
        torch.OutOfMemoryError: in all processes, if one of them lacks memory.
    """
    requests = [
        preview_request(run, prompt, number) for number, prompt in enumerate(run.config.sample.prompts or ())
    ]
    share = requests[run.processes.rank :: run.processes.count]
    return run.processes.together(lambda: _pixels(run, share)) if requests else []


def _image(shares: Sequence[bytes], request: GenerateRequest, number: int) -> Image.Image:
    """Return the ``number``-th preview (from 0), the processes having drawn one each in turn."""
    size = request.width * request.height * 3
    start = number // len(shares) * size
    pixels = shares[number % len(shares)][start : start + size]
    return Image.frombytes("RGB", (request.width, request.height), pixels)


def _pixels(run: Run, requests: Sequence[GenerateRequest]) -> bytes:
    """Return the RGB bytes of some previews, one after the other."""
    if not requests:
        return b""
    with run.fast.out():
        run.model.prepare(
            training=False, keep_text=run.keep_text, keep_images=run.training.views.in_loop, lean=True
        )
        try:
            images = render(run.model, requests, encoded=run.preview_text)
        finally:
            run.ready_to_train()
    return b"".join(image.convert("RGB").tobytes() for image in images)


def preview_request(run: Run, prompt: str, number: int) -> GenerateRequest:
    """Return the request for the preview of the ``number``-th prompt (from 0)."""
    settings = run.config.sample
    assert settings.guidance is not None and run.config.data.resolution is not None
    multiple = run.model.facts.size_multiple
    side = max(multiple, run.config.data.resolution // multiple * multiple)
    return GenerateRequest(
        prompt=prompt,
        negative_prompt=settings.negative_prompt,
        height=side,
        width=side,
        steps=settings.steps,
        guidance=settings.guidance,
        sampler=settings.sampler,
        seed=settings.seed + number,
        strengths={},
    )


def _draw_grid(folder: RunFolder, prompts: list[str]) -> None:
    rows: dict[int, list[Image.Image]] = {}
    for preview in folder.list_previews():
        with suppress(ImageFileError), opened_image(preview.file) as loaded:  # damaged: its row is left out
            rows.setdefault(preview.step, []).append(loaded.image.convert("RGB"))
    whole = {step: images for step, images in rows.items() if len(images) == len(prompts)}
    steps_by_prompts(whole, prompts, folder.grid)


def draw_loss_curve(run: Run) -> None:
    """Draw ``loss.png`` from the run's event file, so that a resumed run shows its whole history."""
    training: dict[int, tuple[float, float]] = {}
    validation: dict[int, float] = {}
    for event in read_events(run.folder.path):
        if event.get("event") == "StepDone" and event.get("loss") is not None:
            training[event["step"]] = (event["loss"], event["learning_rate"])
        elif event.get("event") == "Validated":
            validation[event["step"]] = event["loss"]
    points = [(step, *values) for step, values in sorted(training.items())]
    if points:
        loss_curve(points, sorted(validation.items()), run.folder.loss_curve)
