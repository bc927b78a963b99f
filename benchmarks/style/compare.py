"""Everything about one style: references for scale, entries at every strength, and what follows from them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.data.reading.folder import ImageItem, load_pixels
from sdlora.judging.score import through_autoencoder
from sdlora.judging.verdict import PanelJudge, choose_strength

from . import icon_sets
from .entries import Entry
from .gallery import Say, Studio, read_folder
from .judge import SubjectJudge
from .measure import Measured, Yardstick
from .styles import Style

if TYPE_CHECKING:
    from PIL.Image import Image

BASE, COPIES, UNSEEN = "base", "copies of training images", "true images of other subjects"


@dataclass(frozen=True)
class Row:
    """One entry, measured.

    Attributes:
        entry: what it is.
        strengths: strength -> images' measures; images that were made elsewhere have the single key 1.
        images: strength -> one image a subject.
        recommended: where style times subject kept is highest; None for images made elsewhere.
    """

    entry: Entry
    strengths: Mapping[float, Measured]
    images: Mapping[float, Sequence[Image]]
    recommended: float | None

    @property
    def shown(self) -> float:
        """The strength of the main table: 1, at which adapters are trained, or the nearest there is."""
        return min(self.strengths, key=lambda strength: (abs(strength - 1), strength))

    @property
    def measured(self) -> Measured:
        """The measures at :attr:`shown`."""
        return self.strengths[self.shown]


@dataclass(frozen=True)
class Comparison:
    """What was found out about one style.

    Attributes:
        style: which.
        base: title of the base.
        items: held-out subjects.
        yardstick: what they were measured with.
        references: name -> (images, measures), for scale.
        true: measures of the true images themselves; their style is the ceiling instead.
        rows: the entries, in the order given.
        facts: what the figures depend on.
    """

    style: Style
    base: str
    items: tuple[ImageItem, ...]
    yardstick: Yardstick
    references: Mapping[str, tuple[Sequence[Image], Measured]]
    true: Measured
    rows: Sequence[Row]
    facts: Mapping[str, Any] = field(default_factory=dict)


def compare(
    style: Style,
    items: tuple[ImageItem, ...],
    entries: Sequence[Entry],
    studio: Studio,
    *,
    strengths: Sequence[float],
    judge: SubjectJudge | None,
    icons: Path | None,
    say: Say,
) -> Comparison:
    """Draw and measure the entries and the references of one style.

    Args:
        style: which.
        items: its held-out subjects.
        entries: what to compare.
        studio: the base, which draws.
        strengths: at which adapters are drawn.
        judge: names subjects; without one that is not measured.
        icons: folder of icon packages, for other hands; without it there are none.
        say: called with the progress.
    """
    subjects = [icon_sets.subject_of(item.path.stem) for item in items]
    say(f"{style.name}: drawing {len(items)} subjects with the base alone")
    # the base's images do not depend on the style, but its captions' trigger words do
    base = studio.draw(f"{style.name} {BASE}", None, [0.0], items)[0.0]
    true = through_autoencoder(studio.model, [load_pixels(item) for item in items])
    training = through_autoencoder(studio.model, [load_pixels(item) for item in style.training_items()])
    ranks = None if judge is None else judge.ranks
    yardstick = Yardstick(subjects, base, true, training, ranks=ranks)
    say(f"{style.name}: measuring the references")
    drawn = {BASE: base, **_references(base, training, len(items))}
    if icons is not None:
        drawn |= _other_hands(subjects, studio, icons, say)
    references = {name: (images, yardstick.measure(images)) for name, images in drawn.items()}
    rows = [_row(entry, yardstick, studio, strengths, items, style, say) for entry in entries]
    facts = {
        "subjects": len(items),
        "training_images": len(training),
        "drawing_steps": studio.drawing.steps,
        "guidance": studio.guidance,
        "base_digest": studio.digest,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }
    return Comparison(
        style,
        studio.model.base.title,
        items,
        yardstick,
        references,
        yardstick.measure(true),
        rows,
        facts,
    )


def _row(
    entry: Entry,
    yardstick: Yardstick,
    studio: Studio,
    strengths: Sequence[float],
    items: tuple[ImageItem, ...],
    style: Style,
    say: Say,
) -> Row:
    images: Mapping[float, Sequence[Image]]
    if entry.images is not None:
        images = {1.0: [studio.fitted(image) for image in read_folder(entry.images, yardstick.subjects)]}
    else:
        assert entry.adapter is not None
        images = studio.draw(f"{style.name} {entry.name}", entry.adapter, strengths, items)
    say(f"{style.name}: measuring {entry.name}")
    measured = {strength: yardstick.measure(drawn) for strength, drawn in images.items()}
    recommended = None
    if entry.adapter is not None and any(strength > 0 for strength in measured):
        judge = PanelJudge(yardstick.base, yardstick.training, yardstick.true)
        drawn = {strength: shown for strength, shown in images.items() if strength > 0}
        recommended = choose_strength(judge, drawn).best.strength
    return Row(entry, measured, images, recommended)


Change = Callable[["Image"], "Image"]


def _references(base: Sequence[Image], training: Sequence[Image], count: int) -> dict[str, list[Image]]:
    """Return sets for scale that need nothing else: cheap imitations, and perfect copying."""
    from PIL import ImageOps

    def imitated(change: Change) -> list[Image]:
        return [change(image.convert("L")).convert("RGB") for image in base]

    return {
        "base, greyscaled": imitated(lambda image: image),
        "base, in two tones": imitated(lambda image: image.point(lambda value: 255 if value > 150 else 0)),
        "base, inverted": imitated(ImageOps.invert),
        # subject by subject another one's image, as a trainer would draw that learned by heart
        COPIES: [training[i % len(training)] for i in range(count)],
    }


def _other_hands(subjects: Sequence[str], studio: Studio, icons: Path, say: Say) -> dict[str, list[Image]]:
    """Return the same subjects as other sets draw them; a set without one of the subjects is left out."""
    hands = {}
    for name in icon_sets.hands():
        draw = icon_sets.drawer(name, icons, 4 * studio.model.facts.native_resolution)
        drawn = [draw(subject) for subject in subjects]
        known = [image for image in drawn if image is not None]
        if len(known) == len(subjects):
            hands[f"icons of {name}"] = through_autoencoder(studio.model, known)
        else:
            say(f"icons of {name}: left out, as {len(subjects) - len(known)} subjects are not drawn there")
    return hands
