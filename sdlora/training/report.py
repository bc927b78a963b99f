"""The page of a run: which step and strength are best, and what it looked like on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..data.reading.image_files import load_pixels
from ..events import Estimate, Reported, read_events
from ..judging.report_page import Report, Series, score_curve, write_report_page
from ..judging.verdict import Verdict

if TYPE_CHECKING:
    from .state import Run

_TRAINING = 8
_CONTINUE = 0.5  # of the run's steps, where more of them would help


def write_report(run: Run, verdict: Verdict) -> None:
    """Write ``report.html`` into the run folder and say where it is.

    Raises:
        OutputError: when it cannot be written.
    """
    judge, best = run.judge, verdict.best
    assert judge is not None and best.step is not None
    curves = [curve for curve in (score_curve(verdict), _held_out(run)) if curve is not None]
    learned = run.dataset.learned
    shown = [learned[n * len(learned) // _TRAINING] for n in range(min(_TRAINING, len(learned)))]
    report = Report(
        title=f"{run.config.output.name}: step {best.step} at strength {verdict.strength:g}",
        verdict=verdict,
        prompts=judge.panel.all_prompts,
        images=judge.images(),
        training=[_square(load_pixels(item, run.config.data.background)) for item in shown],
        curves=curves,
        facts=(
            (f"{best.step} of {run.step}", "best step"),
            (f"{verdict.strength:g}", "recommended strength"),
            (
                f"{best.score.mean:.2f}",
                "score, 90 % interval " + f"{best.score.low:.2f} to {best.score.high:.2f}",
            ),
            (f"{judge.share:.0%}", "of the training's time went into judging"),
        ),
        settings=_settings(run),
        commands=_commands(run, verdict),
    )
    write_report_page(report, run.folder.report)
    run.emit(
        Reported(
            run.folder.report, best.step, verdict.strength, verdict.reason, verdict.rising, verdict.notes
        )
    )


def _held_out(run: Run) -> Series | None:
    """Return the held-out loss minus the base's by step; None if it was not measured."""
    points: dict[int, Estimate] = {}
    for event in read_events(run.folder.path):
        against = event.get("against_base")
        if event.get("event") == "Validated" and isinstance(against, dict) and event["step"] <= run.step:
            points[event["step"]] = Estimate(*(float(against[name]) for name in ("mean", "low", "high")))
    if not points:
        return None
    about = "loss on held-out images minus that of the base alone, image by image; below 0 is better"
    return Series("Held-out loss against the base", about, sorted(points.items()))


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _settings(run: Run) -> Sequence[tuple[str, str]]:
    config = run.config
    keys = (
        *(
            "model.base",
            "data.resolution",
            "adapter.kind",
            "adapter.rank",
            "adapter.alpha",
            "adapter.targets",
        ),
        *("optimizer.name", "optimizer.learning_rate", "optimizer.schedule", "training.batch_size"),
        *("training.precision", "training.seed", "judge.every", "judge.share"),
    )
    values: list[tuple[str, Any]] = [("images trained on", len(run.dataset.learned)), ("steps", run.step)]
    values += [(key, config.get(key)) for key in keys]
    return [(name, str(value)) for name, value in values]


def _commands(run: Run, verdict: Verdict) -> list[tuple[str, str]]:
    folder, name = run.folder.path, run.config.output.name
    file = run.folder.adapter_file(name)
    trigger = f"{run.config.data.trigger_word} " if run.config.data.trigger_word else ""
    commands = [
        ("in a prompt for WebUI", f"<lora:{name}:{verdict.strength:g}> {trigger}"),
        (
            "draw",
            f'sdlora generate --base {run.config.model.base} --adapter "{file}:{verdict.strength:g}" '
            f'--prompt "{run.judge.panel.prompts[0] if run.judge else trigger}" --output images',
        ),
        ("put it into WebUI", f'sdlora export "{folder}" --format webui --webui PATH/TO/WEBUI'),
    ]
    more = max(1, round(_CONTINUE * run.step))
    if verdict.rising:
        commands.append(
            ("more steps would help", f'sdlora train --resume --output "{folder}" --continue-for {more}')
        )
    return commands
