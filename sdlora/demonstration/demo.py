"""The whole product in one call: learn an ink style on the built-in base, show it, score it, export it.

The training goes through the same :func:`sdlora.config.toml.load_config` and
:func:`sdlora.training.train.train` as any other. This module adds what one would do next by hand: draw
subjects the adapter never saw at several strengths, compare them with the true icons of these subjects, and
export for WebUI.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import Config
from ..config.toml import load_config
from ..data.reading.folder import ImageItem, load_pixels, scan
from ..errors import TrainingError
from ..events import Control, Emitter, Event, Listener, Notice, RunFinished, RunStarted, read_events
from ..files import find_settings, refuse_used_folder, replacing, write_json
from ..generation.grids import grid
from ..judging.copying import copying
from ..judging.score import StyleRuler, through_autoencoder
from ..judging.verdict import PanelJudge, choose_strength
from .data import HOLDOUT, STYLE, demo_config, find_data
from .report import DemoResult, Drawn, write_demo_page, write_sweep

if TYPE_CHECKING:
    from ..exporting.export import ExportReport
    from ..generation.image_generator import ImageGenerator
    from ..generation.render import GenerateRequest
    from ..training.train import TrainResult

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Strengths in the sweep."""
MEASURED = (0.75, 1.0, 1.25)
"""Strengths at which all held-out subjects are drawn and scored."""
SHOWN = ("bicycle", "cat", "hamburger", "house", "mushroom", "sailboat", "teapot", "umbrella")
"""Subjects of the sweep, chosen by name for their different outlines; the page also shows all others."""

_DRAW_STEPS = 10
_SEED = 1


def demo(
    output: Path,
    *,
    base: str = "mini",
    steps: int | None = None,
    num_subjects: int | None = None,
    draw_steps: int = _DRAW_STEPS,
    settings: Sequence[str] = (),
    listeners: Sequence[Listener] = (),
    resume: bool = False,
) -> DemoResult:
    """Train the ink style, draw and score held-out subjects, and export for WebUI.

    Args:
        output: run folder; must be missing or empty, except to resume.
        base: the base model, as in ``model.base``.
        steps: optimizer steps; the base's recommended number when None.
        num_subjects: draw and score this many of the held-out subjects (4 or more); all when None.
        draw_steps: denoising steps of each image.
        settings: further ``key=value`` texts for the training.
        listeners: receive every event, those of the training among them.
        resume: continue a demo that was stopped: its training from where it stopped, the rest from the
            start. The settings are those in its folder; ``base``, ``steps`` and ``settings`` are ignored.

    Raises:
        SdloraError: for anything the user can correct, and when it is stopped: Ctrl-C loses nothing.
    """
    begun = time.monotonic()
    data = find_data()
    earlier = 0.0
    if resume:
        config = load_config(find_settings(output), (), {"output.folder": output})
        earlier = _seconds_so_far(output)
    else:
        refuse_used_folder(output, "the demo")
        config = demo_config(output, data, base=base, steps=steps, settings=settings)
    emit = Emitter(tuple(listeners))
    emit(Notice("1 of 3: learning an ink style from black-and-white icons"))
    trained, num_images = _train(config, listeners, resume=resume)
    trained = replace(trained, seconds=trained.seconds + earlier)
    try:
        return _show(config, trained, num_images, data, num_subjects, draw_steps, emit, begun - earlier)
    except KeyboardInterrupt:
        raise TrainingError(f"stopped after the training, which is saved; {_go_on(output)}") from None


def _seconds_so_far(output: Path) -> float:
    """Return the wall time of the trainings that were stopped; one that was killed recorded none."""
    finished = [event for event in read_events(output) if event.get("event") == RunFinished.__name__]
    return sum(float(event["seconds"]) for event in finished)


def _go_on(output: Path) -> str:
    return f"continue with: sdlora demo --resume --output {output}"


def _show(
    config: Config,
    trained: TrainResult,
    num_images: int,
    data: Path,
    num_subjects: int | None,
    draw_steps: int,
    emit: Emitter,
    begun: float,
) -> DemoResult:
    """Draw, score and export what was trained, and write the page."""
    output = trained.folder
    emit(Notice("2 of 3: drawing subjects that were not among them, at several strengths"))
    drawn = _draw(config, trained, data, num_subjects, draw_steps, emit)
    emit(Notice("3 of 3: scoring against the true icons, exporting, writing the page"))
    ruler = StyleRuler(drawn.images[0.0], drawn.true)
    scores = {strength: ruler.score(images) for strength, images in drawn.images.items()}
    judge = PanelJudge(drawn.images[0.0], drawn.training, drawn.true)
    verdict = choose_strength(judge, {strength: drawn.images[strength] for strength in MEASURED})
    chosen = verdict.best.strength
    sheet = write_sweep(drawn, output / "sweep.png")
    report = _export(output, chosen, drawn, config)
    result = DemoResult(
        folder=output,
        adapter_file=report.files[0],
        grid=sheet,
        page=output / "before-after.html",
        recommended=chosen,
        scores=scores,
        ceiling=ruler.ceiling(),
        copying=copying(drawn.images[chosen], drawn.training, drawn.true),
        num_images=num_images,
        num_subjects=len(drawn.items),
        steps=trained.step,
        proof=report.proof_line(),
        seconds=time.monotonic() - begun,
        training_seconds=trained.seconds,
    )
    write_demo_page(result, drawn, config)
    result = replace(result, seconds=time.monotonic() - begun)
    write_json(output / "score.json", result.to_dict())
    return result


def _train(config: Config, listeners: Sequence[Listener], *, resume: bool) -> tuple[TrainResult, int]:
    """Train; return the result and the number of images."""
    from ..training.train import train

    counts: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, RunStarted):
            counts.append(event.num_images)

    control = Control(config.output.folder)
    with control.on_interrupt():  # Ctrl-C saves the training; the drawing afterwards has nothing to save
        result = train(config, resume=resume, listeners=[count, *listeners], control=control)
    if result.adapter_file is None:
        raise TrainingError(f"stopped after step {result.step} and saved; {_go_on(result.folder)}")
    if result.stop_asked:
        raise TrainingError(f"stopped after the training, which is saved; {_go_on(result.folder)}")
    return result, counts[0]


def _draw(
    config: Config,
    trained: TrainResult,
    data: Path,
    num_subjects: int | None,
    draw_steps: int,
    emit: Emitter,
) -> Drawn:
    """Draw all subjects at the measured strengths, and the shown ones at the others of the sweep."""
    from ..generation.image_generator import ImageGenerator

    items = _choose(scan(data / HOLDOUT).items, num_subjects)
    everyone = tuple(range(len(items)))
    shown = tuple(i for i, item in enumerate(items) if item.path.stem in SHOWN) or everyone[:8]
    generator = ImageGenerator.load(
        config.model, device=config.training.device, precision=config.training.precision
    )
    assert trained.adapter_file is not None
    name = generator.add_adapter(trained.adapter_file)
    wanted = {s: everyone if s in (0.0, *MEASURED) else shown for s in sorted({*STRENGTHS, *MEASURED})}
    requests = [
        _request(generator, items[i], i, {name: strength} if strength else {}, draw_steps)
        for strength, indices in wanted.items()
        for i in indices
    ]
    progress = _progress_notices(emit, len(requests), draw_steps)
    generated = iter(generator.generate(requests, merge=True, progress=progress))
    images = {s: {i: next(generated).image for i in indices} for s, indices in wanted.items()}
    true = through_autoencoder(generator.model, [load_pixels(item) for item in items])
    known = through_autoencoder(generator.model, [load_pixels(item) for item in scan(data / STYLE).items])
    return Drawn(
        items,
        {s: tuple(images[s][i] for i in everyone) for s in (0.0, *MEASURED)},
        tuple(true),
        tuple(known),
        shown,
        {s: tuple(images[s][i] for i in shown) for s in STRENGTHS},
    )


def _choose(items: Sequence[ImageItem], wanted: int | None) -> tuple[ImageItem, ...]:
    """Return all items, or ``wanted`` of them: the shown ones first, then in order."""
    if wanted is None or wanted >= len(items):
        return tuple(items)
    ranked = sorted(items, key=lambda item: item.path.stem not in SHOWN)
    chosen = {item.path for item in ranked[:wanted]}
    return tuple(item for item in items if item.path in chosen)


def _request(
    generator: ImageGenerator, item: ImageItem, number: int, strengths: dict[str, float], steps: int
) -> GenerateRequest:
    from ..generation.render import GenerateRequest, usual_guidance

    model = generator.model
    return GenerateRequest(
        prompt=item.caption,
        height=model.facts.native_resolution,
        width=model.facts.native_resolution,
        steps=steps,
        guidance=usual_guidance(model),
        sampler=Config().sample.sampler,
        seed=_SEED + number,
        strengths=strengths,
    )


def _progress_notices(emit: Emitter, num_images: int, steps: int) -> Callable[[int, int], None]:
    """Return a progress function that says, at every eighth of the way, how long the rest will take."""
    begun, eighths = time.monotonic(), 0

    def progress(done: int, total: int) -> None:
        nonlocal eighths
        if 8 * done // total > eighths:
            eighths = 8 * done // total
            left = (time.monotonic() - begun) * (total - done) / done
            emit(Notice(f"drew {done // steps} of {num_images} images, about {left:.0f} s left"))

    return progress


def _export(output: Path, strength: float, drawn: Drawn, config: Config) -> ExportReport:
    """Export the run for WebUI with the measured strength on its card."""
    from ..exporting.export import export_adapter

    preview = output / "preview.png"
    chosen = drawn.images[strength]
    sheet = grid([chosen[i] for i in drawn.shown], 4)
    with replacing(preview) as temporary:
        sheet.save(temporary, format="PNG")
    return export_adapter(
        output,
        "webui",
        output / "webui",
        preview=preview,
        preferred_strength=strength,
        overwrite=True,  # of the demo's own earlier files, when it is resumed
    )
