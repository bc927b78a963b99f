"""Adapters of any trainer judged against a folder of images: which one, and at which strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import Config, ModelConfig, Precision
from ..config.toml import load_config
from ..data.reading.folder import scan
from ..data.reading.image_files import load_pixels
from ..errors import ConfigError
from ..families.emphasis import escape
from ..files import refuse_bad_names
from ..generation.image_generator import ImageGenerator
from ..generation.render import GenerateRequest, Progress, usual_guidance
from ..judging.panel import Panel, Subject, make_panel
from ..judging.report_page import Report, score_curve, write_report_page
from ..judging.score import MIN_IMAGES, through_autoencoder
from ..judging.verdict import PanelJudge, Verdict, choose, copy_note
from ..run_folder import RunFolder, checkpoint_of, list_checkpoints

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..data.reading.items import ImageItem

STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)
_STEPS = 10
_SEED = 1
_MOST_STYLE = 48


@dataclass(frozen=True)
class Candidate:
    """An adapter to be judged: what it is called, its file, and the steps it learned for, where known."""

    name: str
    file: Path
    step: int | None = None


@dataclass(frozen=True)
class JudgingResult:
    """What judging adapters gave.

    Attributes:
        verdict: which one is best, and at which strength.
        best_file: its file.
        page: the report.
    """

    verdict: Verdict
    best_file: Path
    page: Path

    def render(self) -> str:
        """Return the outcome in a few lines for people."""
        verdict = self.verdict
        lines = [
            f"best: {verdict.best.source} at strength {verdict.strength:g} ({self.best_file})",
            f"  {verdict.reason}",
            *(f"note: {note}" for note in verdict.notes),
            f"report: {self.page}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"best_file": str(self.best_file), "report": str(self.page), **self.verdict.to_dict()}


def judge_adapters(
    sources: Sequence[Path],
    against: Path,
    output: Path,
    *,
    base: str | ModelConfig | None = None,
    strengths: Sequence[float] = STRENGTHS,
    images: int = 8,
    steps: int = _STEPS,
    trigger_word: str | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> JudgingResult:
    """Draw a panel with every adapter at every strength, judge it, and write a report.

    Args:
        sources: run folders (all their checkpoints and the finished file) and adapter files of any format.
        against: folder of images in the style, with captions; best the one that was trained on.
        output: the HTML file to write.
        base: the base to draw with; the run's own, or ``mini``, when None.
        strengths: above 0.
        images: prompts of the panel, 4 or more.
        steps: denoising steps.
        trigger_word: in the captions; the run's own when None.
        device: as in ``training.device``.
        precision: as in ``training.precision``.
        overwrite: replace the report if it exists.
        progress: called after every denoising step.

    Raises:
        ConfigError: for a source without adapters, or impossible numbers.
        SdloraError: if there are too few images, or a file cannot be used with the base.
    """
    _check(strengths, images, steps, output, overwrite)
    candidates = _candidates(sources)
    config = next((load_config(RunFolder(s).config_file) for s in sources if RunFolder(s).exists()), None)
    word = trigger_word or (config.data.trigger_word if config else None)
    items = scan(against, trigger_word=word).items
    if len(items) < MIN_IMAGES:
        raise ConfigError(f"--against {against}: {len(items)} images are too few; give {MIN_IMAGES} or more")
    panel = _panel(items, word, images)
    generator = ImageGenerator.load(
        base or (config.model if config else "mini"), device=device, precision=precision
    )
    drawing = _Drawing(generator, panel, steps, progress, 1 + len(candidates) * len(strengths))
    verdict, drawn, style = _verdict(drawing, candidates, items, strengths)
    files = {candidate.name: candidate.file for candidate in candidates}
    result = JudgingResult(verdict, files[verdict.best.source], output)
    _write(result, panel, drawn, style, against)
    return result


Drawn = dict[tuple[str, float], Sequence["Image"]]
"""(adapter, strength) -> the panel's images; those of the base alone under ``("base", 0)``."""


def _verdict(
    drawing: _Drawing,
    candidates: Sequence[Candidate],
    items: Sequence[ImageItem],
    strengths: Sequence[float],
) -> tuple[Verdict, Drawn, list[Image]]:
    """Draw and judge; return the verdict, what was drawn, and the style through the autoencoder."""
    panel, generator = drawing.panel, drawing.generator
    most = min(len(items), _MOST_STYLE)
    spread = [load_pixels(items[n * len(items) // most]) for n in range(most)]
    style = through_autoencoder(generator.model, spread)
    count = len(panel.prompts)
    drawn: Drawn = {("base", 0.0): drawing.draw({})}
    alone = drawn["base", 0.0]
    judge = PanelJudge(alone[:count], style, (), alone[count:], judges_subject=panel.judges_subject)
    cells = []
    for candidate in candidates:
        name = generator.add_adapter(candidate.file)
        for strength in strengths:
            shown = drawn[candidate.name, strength] = drawing.draw({name: strength})
            cells.append(judge.cell(candidate.name, candidate.step, strength, shown[:count], shown[count:]))
        generator.remove_adapter(name)
    best = choose(cells).best
    copied = copy_note(judge.copies(drawn[best.source, best.strength][:count]))
    return choose(cells, (*panel.notes, *((copied,) if copied else ()))), drawn, style


def _check(strengths: Sequence[float], images: int, steps: int, output: Path, overwrite: bool) -> None:
    if not strengths or not all(0 < value <= 10 for value in strengths):
        raise ConfigError("--strengths: give numbers above 0, up to 10, e.g. 0.5,0.75,1,1.25,1.5")
    if len(set(strengths)) != len(strengths):
        raise ConfigError("--strengths: names one of them twice; leave it out")
    if not MIN_IMAGES <= images <= 64:
        raise ConfigError(f"--count {images}: judge by {MIN_IMAGES} to 64 prompts")
    if steps < 1:
        raise ConfigError(f"--steps {steps}: must be 1 or more")
    refuse_bad_names(output)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: exists; choose another --output, or add --overwrite")


def _candidates(sources: Sequence[Path]) -> list[Candidate]:
    """Return the adapters that the sources hold: a run's checkpoints or its file, or files themselves."""
    candidates: list[Candidate] = []
    for source in sources:
        run = RunFolder(source)
        label = f"{source.name} " if len(sources) > 1 else ""
        if not run.exists():
            checkpoint = checkpoint_of(source)
            step = checkpoint[1].step if checkpoint else None
            candidates.append(Candidate(f"{label}step {step}" if step else source.stem, source, step))
            continue
        saved = [folder for folder in list_checkpoints(run.checkpoints) if folder.adapter_file.is_file()]
        candidates += [Candidate(f"{label}step {f.step}", f.adapter_file, f.step) for f in saved]
        if not saved:
            candidates += [Candidate(file.stem, file) for file in run.adapter_files()]
    if not candidates:
        raise ConfigError("nothing to judge: give adapter files, or a run that has a checkpoint")
    names: dict[str, int] = {}
    for number, candidate in enumerate(candidates):
        names[candidate.name] = names.get(candidate.name, 0) + 1
        if names[candidate.name] > 1:
            candidates[number] = replace(candidate, name=f"{candidate.name} ({names[candidate.name]})")
    return candidates


def _panel(items: Sequence[ImageItem], word: str | None, count: int) -> Panel:
    subjects = [Subject(escape(item.caption), escape(word) if word else None) for item in items]
    try:
        panel = make_panel((), subjects, count)
    except ValueError as error:
        raise ConfigError(f"--against: {error}; write captions beside the images") from None
    # nobody knows which of these images an adapter was trained on
    return replace(panel, notes=tuple(note for note in panel.notes if "held out" not in note))


class _Drawing:
    """Draws one panel again and again."""

    def __init__(
        self, generator: ImageGenerator, panel: Panel, steps: int, progress: Progress | None, times: int
    ) -> None:
        model = generator.model
        side = model.facts.native_resolution
        self.generator, self.panel, self._progress = generator, panel, progress
        self._requests = [
            GenerateRequest(
                prompt=text,
                height=side,
                width=side,
                steps=steps,
                guidance=usual_guidance(model),
                sampler=Config().sample.sampler,
                seed=_SEED + number,
            )
            for number, text in enumerate(panel.all_prompts)
        ]
        self._each = steps * len(self._requests)
        self._total, self._before = self._each * times, 0

    def draw(self, strengths: dict[str, float]) -> list[Image]:
        """Return the panel's images with an adapter at a strength; without one, the base's."""
        requests = [replace(request, strengths=strengths) for request in self._requests]
        progress, before = self._progress, self._before
        shifted = None if progress is None else lambda done, _: progress(before + done, self._total)
        self._before += self._each
        results = self.generator.generate(requests, merge=bool(strengths), progress=shifted)
        return [result.image for result in results]


def _write(
    result: JudgingResult,
    panel: Panel,
    drawn: Drawn,
    style: Sequence[Image],
    against: Path,
) -> None:
    verdict = result.verdict
    curve = score_curve(verdict)
    best = verdict.best
    report = Report(
        title=f"{best.source} at strength {verdict.strength:g}",
        verdict=verdict,
        prompts=panel.all_prompts,
        images=drawn,
        training=style[:8],
        curves=(curve,) if curve else (),
        facts=(
            (best.source, "best adapter"),
            (f"{verdict.strength:g}", "recommended strength"),
            (f"{best.score.mean:.2f}", f"score, 90 % interval {best.score.low:.2f} to {best.score.high:.2f}"),
        ),
        settings=(("judged against", str(against)), ("best file", str(result.best_file))),
        commands=(("in a prompt for WebUI", f"<lora:{result.best_file.stem}:{verdict.strength:g}>"),),
    )
    write_report_page(report, result.page)
