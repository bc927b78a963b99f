"""Images made while training: rows of previews as a steps x prompts grid, and the loss curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from PIL import Image

from ..adapters.attach import attach, detach, set_strengths
from ..adapters.strength import Strength, by_role, pair_of
from ..data.reading.decoding import ImageFileError, opened_image
from ..events import Sampled, read_events
from ..formats.adapter_files import OpenAdapter
from ..generation.generate import GenerateRequest, render
from ..generation.grids import loss_curve, steps_by_prompts
from ..generation.png_info import parameters_text, save_png
from ..run_folder import RunFolder
from .preview_prompts import preview_requests
from .trainable import ADAPTER_NAME

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
        for number, request in enumerate(preview_requests(run.config, run.model)):
            file = run.folder.preview(run.step, row * len(prompts) + number + 1)
            image = shared_image(shares, preview_requests(run.config, run.model), number)
            save_png(image, file, parameters_text(request, base=run.model.base))
            files.append(file)
    shown = [line.prompt for line in run.config.sample.lines]
    columns = [*shown, *(f"{prompt} (as learned)" for prompt in shown * (learned is not None))]
    _draw_grid(run.folder, columns)
    run.emit(Sampled(run.step, tuple(files), run.folder.grid))


def draw(run: Run) -> list[bytes]:
    """Return the pixels of the previews with what the model holds now, each process drawing its share.

    The sampler, size and prompt layout are those of generation.

    Raises:
        torch.OutOfMemoryError: in all processes, if one of them lacks memory.
    """
    requests = preview_requests(run.config, run.model)
    share = requests[run.processes.rank :: run.processes.count]
    return run.processes.together(lambda: _pixels(run, share)) if requests else []


def shared_image(shares: Sequence[bytes], requests: Sequence[GenerateRequest], number: int) -> Image.Image:
    """Return the ``number``-th image (from 0), the processes having drawn one each in turn."""
    count = len(shares)
    before = sum(r.width * r.height * 3 for r in requests[number % count : number : count])
    request = requests[number]
    pixels = shares[number % count][before : before + request.width * request.height * 3]
    return Image.frombytes("RGB", (request.width, request.height), pixels)


def _pixels(run: Run, requests: Sequence[GenerateRequest]) -> bytes:
    """Return the RGB bytes of some previews, one after the other."""
    if not requests:
        return b""
    drawn: dict[int, Image.Image] = {}
    with run.fast.out():
        run.model.prepare(
            training=False, keep_text=run.keep_text, keep_images=run.training.views.in_loop, lean=True
        )
        try:
            usual = [i for i, request in enumerate(requests) if not request.strengths]
            alone = run.config.training.autoencoder == "banded"  # memory is saved: one image at a time
            for together in [[i] for i in usual] if alone else [usual]:
                images = render(run.model, [requests[i] for i in together], encoded=run.preview_text)
                drawn |= zip(together, images, strict=True)
            for i in sorted(set(range(len(requests))) - set(usual)):
                with _acting(run, requests[i].strengths):
                    drawn[i] = render(run.model, [requests[i]])[0]
        finally:
            run.ready_to_train()
    return b"".join(drawn[i].convert("RGB").tobytes() for i in range(len(requests)))


@contextmanager
def _acting(run: Run, strengths: Mapping[str, Strength]) -> Iterator[None]:
    """Have the run's adapter act at a strength of its own, and others beside it, within the block."""
    model, usual = run.model, run.trainable.strengths
    learning = [p for module in model.components().values() for p in module.parameters() if p.requires_grad]
    of_run = strengths.get(run.config.output.name, 1.0)
    added: list[str] = []
    acting: dict[str, Strength] = {name: _times(of_run, factor) for name, factor in usual.items()}
    try:
        for name, strength in strengths.items():
            if name != run.config.output.name:
                added.append(f"{ADAPTER_NAME}-beside-{len(added)}")
                attach(model, OpenAdapter(run.preview_adapters[name]).read().weights, added[-1])
                acting[added[-1]] = strength
        set_strengths(model, acting)
        yield
    finally:
        for name in added:
            detach(model, name)
        set_strengths(model, usual)
        for parameter in learning:  # attaching takes that from all parameters
            parameter.requires_grad_(True)


def _times(strength: Strength, factor: float) -> Strength:
    denoiser, text = pair_of(strength)
    return factor * denoiser if denoiser == text else by_role(factor * denoiser, factor * text)


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
