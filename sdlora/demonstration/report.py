"""The demo's output: its result in a few lines, the sweep as one image, the before/after page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import Config
from ..data.reading.folder import ImageItem
from ..files import replacing
from ..generation.grids import grid
from ..judging.copying import Copying
from ..judging.score import StyleScore
from ..run_folder import RunFolder
from .page import Compared, Page, Swept, write_page

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class DemoResult:
    """The files that the demo wrote and what it measured.

    Attributes:
        folder: the run folder.
        adapter_file: the WebUI file.
        grid: strength sweep.
        page: before/after page.
        recommended: the measured strength at which style times subject kept is highest.
        scores: strength -> score over all held-out subjects; 0 is the base.
        ceiling: score of true icons against other true icons.
        copying: whether training images were repeated.
        num_images: images trained on.
        num_subjects: held-out subjects drawn.
        steps: optimizer steps.
        proof: line that says how exactly the exported file holds the adapter.
        seconds: wall time of everything, without breaks between a stop and the continuation.
        training_seconds: of the training alone.
    """

    folder: Path
    adapter_file: Path
    grid: Path
    page: Path
    recommended: float
    scores: Mapping[float, StyleScore]
    ceiling: float
    copying: Copying
    num_images: int
    num_subjects: int
    steps: int
    proof: str
    seconds: float
    training_seconds: float

    @property
    def score(self) -> StyleScore:
        """Score at the recommended strength."""
        return self.scores[self.recommended]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "score": round(self.score.value, 4),
            "score_interval": [round(self.score.low, 4), round(self.score.high, 4)],
            "seconds": round(self.seconds, 1),
            "adapter_file": str(self.adapter_file),
            "grid": str(self.grid),
            "page": str(self.page),
            "run": str(self.folder),
            "recommended_strength": self.recommended,
            "scores": {f"{strength:g}": score.to_dict() for strength, score in self.scores.items()},
            "ceiling": round(self.ceiling, 4),
            "copying": self.copying.to_dict(),
            "num_images": self.num_images,
            "num_subjects": self.num_subjects,
            "steps": self.steps,
            "training_seconds": round(self.training_seconds, 1),
            "proof": self.proof,
        }

    def render(self) -> str:
        """Return the outcome in a few lines for people."""
        by_strength = ", ".join(f"{s:g}: {score.value:.2f}" for s, score in self.scores.items())
        return "\n".join(
            (
                f"score {self.score.render()} at strength {self.recommended:g}; 0 looks like the base, "
                f"1 like the true style ({self.num_subjects} subjects the adapter never saw)",
                f"  by strength: {by_strength}",
                f"page:    {self.page}",
                f"sweep:   {self.grid}",
                f"adapter: {self.adapter_file}",
                f"proof:   {self.proof}",
                f"{self.seconds:.0f} s in all, {self.training_seconds:.0f} s of them for {self.steps} steps",
            )
        )


@dataclass(frozen=True)
class Drawn:
    """The held-out subjects, drawn: strength -> one image for each subject, and the true ones."""

    items: tuple[ImageItem, ...]
    images: Mapping[float, tuple[Image, ...]]
    true: tuple[Image, ...]
    training: tuple[Image, ...]
    shown: tuple[int, ...]
    sweep: Mapping[float, tuple[Image, ...]]


def _subject(item: ImageItem) -> str:
    """Return an item's subject, by its file name: ``sea-gull.png`` -> ``sea gull``."""
    return item.path.stem.replace("-", " ")


def write_sweep(drawn: Drawn, file: Path) -> Path:
    """Draw the shown subjects by strength, the true icons below; return the file."""
    columns = [_subject(drawn.items[i]) for i in drawn.shown]
    labels = ["base" if strength == 0 else f"{strength:g}" for strength in drawn.sweep]
    images = [image for row in drawn.sweep.values() for image in row]
    images += [drawn.true[i] for i in drawn.shown]
    title = "Subjects the adapter never saw, by strength; one seed for each column"
    sheet = grid(images, len(columns), [*labels, "true icon"], columns, title)
    with replacing(file) as temporary:
        sheet.save(temporary, format="PNG")
    return file


_GROUPS = (
    ("colour", "how colourful, and which way"),
    ("tone", "how much is black, grey, white"),
    ("edges", "how many, how sharp"),
    ("texture", "detail at each scale and direction"),
    ("strokes", "width of ink and gaps, pieces, holes"),
)


def write_demo_page(result: DemoResult, drawn: Drawn, config: Config) -> None:
    """Write the page that ``result`` names."""
    best = drawn.images[result.recommended]
    size = result.adapter_file.stat().st_size / 2**20
    page = Page(
        title=f"A new style, learned from {result.num_images} images",
        lead=f"sdlora trained a LoRA on {result.num_images} ink icons. The base model draws in colour and "
        "has never been taught this style. Below, the adapter draws subjects that were not among them.",
        facts=(
            (f"{result.score.value:.2f}", "style score: 0 base, 1 true style"),
            (f"{result.training_seconds:.0f} s", f"for {result.steps} training steps"),
            (f"{size:.1f} MiB", "adapter file for WebUI"),
            (f"{result.recommended:g}", "recommended strength"),
        ),
        strengths=tuple(drawn.sweep),
        chosen=result.recommended,
        sweep=[
            Swept(_subject(drawn.items[i]), tuple(row[k] for row in drawn.sweep.values()), drawn.true[i])
            for k, i in enumerate(drawn.shown)
        ],
        compared=[
            Compared(_subject(item), *images)
            for item, *images in zip(drawn.items, drawn.images[0.0], best, drawn.true, strict=True)
        ],
        scores=list(result.scores.items()),
        ceiling=result.ceiling,
        notes=_notes(result),
        groups=_GROUPS,
        loss_curve=RunFolder(result.folder).loss_curve,
        details=_details(result, config),
    )
    write_page(page, result.page)


def _notes(result: DemoResult) -> list[str]:
    copies = result.copying
    return [
        f"The score compares {result.num_subjects} generated images with the true icons of the same "
        "subjects, by hand-made measurements of colour, tone, edges, texture and strokes; no neural network "
        "judges. 0 is the look of the base alone, 1 the true style; below 0 is farther away than the base.",
        f"With another choice of subjects it would probably lie between {result.score.low:.2f} and "
        f"{result.score.high:.2f}. It says how the images are drawn, not whether they show their subjects.",
        "Copied? The likeness of a generated image to the nearest training image is "
        f"{copies.generated:.2f} on average; true icons that were not trained on reach {copies.true:.2f}. "
        f"{copies.share:.0%} of the generated images come closer to a training image than any of those.",
    ]


def _details(result: DemoResult, config: Config) -> list[tuple[str, str]]:
    return [
        ("adapter for WebUI", str(result.adapter_file)),
        ("read back and compared", result.proof),
        ("in a prompt", f"<lora:{config.output.name}:{result.recommended:g}> {config.data.trigger_word}"),
        ("all settings", str(RunFolder(result.folder).config_file)),
        ("wall time up to this page", f"{result.seconds:.0f} s"),
    ]
