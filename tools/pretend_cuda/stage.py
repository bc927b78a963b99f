"""Where a scenario plays, and what most of them do: draw images, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cards import Card

if TYPE_CHECKING:
    from sdlora.events import Event

    from .device import Cards

MIB = 2**20
PROMPTS = '["a (red:1.2) fox", "a house"]'


@dataclass
class Stage:
    """Where a scenario plays.

    Attributes:
        folder: for everything it writes.
        cards: the pretended machine.
        facts: what is to be reported besides the ledger.
        events: everything the runs told.
    """

    folder: Path
    cards: Cards
    facts: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def hear(self, event: Event) -> None:
        """Listen to a run."""
        self.events.append(event)
        planned = getattr(event, "expected_bytes", None)
        if planned is not None:
            self.facts["planned"] = planned
            self.facts["phases"] = dict(getattr(event, "expected_phases", {}))

    def told(self, kind: str) -> list[Event]:
        """Return the events of one kind."""
        return [event for event in self.events if type(event).__name__ == kind]


Play = Callable[[Stage], None]


@dataclass(frozen=True)
class Scenario:
    """A scenario: what plays, in a few words, and on which cards."""

    play: Play
    what: str
    cards: tuple[Card, ...] = (Card(),)


def draw_images(folder: Path, count: int = 6, side: int = 96, *, mixed: bool = True) -> Path:
    """Draw captioned images, no two alike, transparent around, unless they are there.

    Args:
        folder: for the images and their captions.
        count: of images.
        side: the longer one of each, in px.
        mixed: square, wide and high ones by turns, instead of square ones only.
    """
    import random

    from PIL import Image, ImageDraw

    if not folder.is_dir():
        folder.mkdir(parents=True)
        for number in range(count):
            shapes = [(side, side), (side, side * 2 // 3), (side * 2 // 3, side)]
            width, height = shapes[number % 3 if mixed else 0]
            image, chance = Image.new("RGBA", (width, height), (0, 0, 0, 0)), random.Random(number)
            for _ in range(12):
                x, y = chance.randrange(width // 2), chance.randrange(height // 2)
                corners = (x, y, x + chance.randrange(8, width // 2), y + chance.randrange(8, height // 2))
                ImageDraw.Draw(image).rectangle(corners, fill=(*chance.randbytes(3), 255))
            image.save(folder / f"thing{number:02d}.png")
            (folder / f"thing{number:02d}.txt").write_text(f"an icon, a cat, {number}", encoding="utf-8")
    return folder


def train(
    stage: Stage,
    *overrides: str,
    base: str = "mini",
    resume: bool = False,
    stop_at: int = 0,
    listen: Callable[[Event], None] | None = None,
) -> Path:
    """Train with ``sdlora.train``; return the adapter's file, or the run's folder if it was stopped."""
    import sdlora

    fixed = {
        "training.steps": 2,
        "training.device": "cuda",
        "training.batch_size": 2,
        "sample.prompts": [],
        "data.validation": 0,
    }
    given = {text.partition("=")[0] for text in overrides}
    values = {
        **fixed,
        "data.folder": draw_images(stage.folder / "images"),
        "data.cache_folder": stage.folder / "cache",
        "output.folder": stage.folder / "run",
        "model.base": base,
    }
    rest = {key: value for key, value in values.items() if key not in given}
    config = sdlora.load_config(None, overrides, rest)
    control = sdlora.Control()

    def stop(event: Event) -> None:
        if type(event).__name__ == "StepDone" and getattr(event, "step", 0) == stop_at:
            control.stop()

    result = sdlora.train(config, resume=resume, listeners=[listen or stage.hear, stop], control=control)
    if stop_at:
        assert result.stopped, "the run was to be stopped"
        return result.folder
    assert result.step == config.training.steps, f"{result.step} of {config.training.steps} steps"
    assert result.adapter_file is not None and result.adapter_file.is_file(), "no adapter file"
    return result.adapter_file


def only_card(stage: Stage, wanted: int) -> None:
    """Demand that no other card was touched."""
    others = {card: place for card, place in stage.cards.ledger.touched.items() if card != wanted}
    assert not others, "; ".join(f"cuda:{card} was touched by {p.site}" for card, p in others.items())
