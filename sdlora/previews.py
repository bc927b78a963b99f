"""Pictures made while training: rows of previews as a steps x prompts grid, and the loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .events import Sampled, read_events
from .generate import GenerateRequest, render
from .pictures import loss_curve, steps_by_prompts
from .png_info import parameters_text, save_png

if TYPE_CHECKING:
    from .run import Run


def preview(run: Run) -> None:
    """Render the preview prompts with the adapter as it is, and redraw the grid of all steps so far.

    The sampler, size and prompt layout are those of generation; only the main process draws.
    """
    prompts = run.config.sample.prompts
    if not prompts or not run.accelerator.is_main_process:
        return
    requests = [_request(run, prompt, number) for number, prompt in enumerate(prompts)]
    run.model.prepare(
        training=False, keep_text=run.keep_text, keep_images=run.training.looks.in_loop, lean=True
    )
    images = render(run.model, requests)
    run.model.prepare(
        training=True,
        gradient_checkpointing=run.config.training.gradient_checkpointing,
        keep_text=run.keep_text,
        keep_images=run.training.looks.in_loop,
    )
    folder = run.folder / "samples"
    files = []
    for number, (image, request) in enumerate(zip(images, requests, strict=True), start=1):
        file = folder / f"step-{run.step:06d}-{number}.png"
        save_png(image, file, parameters_text(request, base=run.model.base))
        files.append(file)
    grid = folder / "grid.png"
    _draw_grid(folder, list(prompts), grid)
    run.tell(Sampled(run.step, tuple(files), grid))


def _request(run: Run, prompt: str, number: int) -> GenerateRequest:
    settings = run.config.sample
    assert settings.guidance is not None and run.config.data.resolution is not None
    multiple = run.model.size_multiple
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


def _draw_grid(folder: Path, prompts: list[str], target: Path) -> None:
    rows: dict[int, list[Image.Image]] = {}
    for file in sorted(folder.glob("step-*-*.png"), key=_step_and_number):
        with Image.open(file) as image:
            rows.setdefault(_step_and_number(file)[0], []).append(image.convert("RGB"))
    whole = {step: images for step, images in rows.items() if len(images) == len(prompts)}
    steps_by_prompts(whole, prompts, target)


def _step_and_number(file: Path) -> tuple[int, int]:
    _, step, number = file.stem.split("-")
    return int(step), int(number)


def draw_loss_curve(run: Run) -> None:
    """Draw ``loss.png`` from the run's event file, so that a resumed run shows its whole history."""
    training: dict[int, tuple[float, float]] = {}
    validation: dict[int, float] = {}
    for event in read_events(run.folder):
        if event.get("event") == "StepDone":
            training[event["step"]] = (event["loss"], event["learning_rate"])
        elif event.get("event") == "Validated":
            validation[event["step"]] = event["loss"]
    points = [(step, *values) for step, values in sorted(training.items())]
    if points:
        loss_curve(points, sorted(validation.items()), run.folder / "loss.png")
