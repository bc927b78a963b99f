"""A style to learn: images to train on, the true images of held-out subjects, and where they come from.

``ink`` is in the repository. The others are made on the spot and never kept in it: ``blueprint`` by a
documented change of the ink icons, ``openmoji`` and ``twemoji`` from pinned icon packages whose licences
(CC BY-SA 4.0, CC BY 4.0) allow that, and which no base of ours may learn from. A folder of one's own works
as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.data.reading.folder import ImageItem, load_pixels, scan
from sdlora.errors import ConfigError
from sdlora.files import replacing, write_text

from . import icon_sets, restyled

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).parent.parent.parent
INK, INK_HOLDOUT = ROOT / "datasets" / "ink-icons", ROOT / "datasets" / "ink-icons-holdout"
PAPER, LINES = (24, 62, 122), (214, 230, 250)
"""The blueprint's ground and lines, sRGB."""
SIDE = 256
"""px of the images that are made."""


@dataclass(frozen=True)
class Style:
    """A style and its hold-out.

    Attributes:
        name: short, for folders and tables.
        training: captioned images to train on.
        holdout: captioned true images of other subjects.
    """

    name: str
    training: Path
    holdout: Path

    def subjects(self, most: int | None = None) -> tuple[ImageItem, ...]:
        """Return the held-out images, or ``most`` of them, evenly spread over the alphabet.

        Raises:
            SdloraError: for a folder that cannot be used, or one with subjects of the training folder.
        """
        items = scan(self.holdout, recursive=False).items
        shared = {item.path.stem for item in items} & {item.path.stem for item in self.training_items()}
        if shared:
            raise ConfigError(
                f"{self.holdout}: {', '.join(sorted(shared)[:5])} can be trained on, too; "
                "subjects of the hold-out must not be in the training folder"
            )
        if most is None or most >= len(items):
            return items
        return tuple(items[i * len(items) // most] for i in range(most))

    def training_items(self) -> tuple[ImageItem, ...]:
        """Return the images to train on."""
        return scan(self.training, recursive=False).items

    @property
    def trigger_word(self) -> str | None:
        """The word that all captions begin with, if there is one: ``inkicon, an icon of a cat``."""
        heads = {item.caption.partition(",")[0] for item in self.training_items() if "," in item.caption}
        whole = len(heads) == 1 and all("," in item.caption for item in self.training_items())
        return heads.pop() if whole else None


def find_style(name: str, holdout: Path | None, work: Path, icons: Path) -> Style:
    """Return a style by name (:data:`MADE` or ``ink``) or by folder; made ones are written below ``work``.

    Args:
        name: ``ink``, a name of :data:`MADE`, or a folder of captioned images.
        holdout: hold-out of a folder; ``FOLDER-holdout`` when None.
        work: where made styles are kept.
        icons: where icon packages are kept.

    Raises:
        ConfigError: for a name that is neither.
    """
    if name == "ink":
        return Style("ink", INK, INK_HOLDOUT)
    if name in MADE:
        return _made(name, work / "styles", icons)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"style `{name}`: neither a folder nor one of ink, {', '.join(MADE)}; check the path"
        )
    holdout_folder = folder.with_name(f"{folder.name}-holdout") if holdout is None else holdout
    if not holdout_folder.is_dir():
        raise ConfigError(
            f"style `{name}`: its hold-out {holdout_folder} is not a folder; give one with --holdout"
        )
    return Style(re.sub(r"[^\w.-]", "-", folder.resolve().name), folder, holdout_folder)


Drawer = Callable[[Path], Mapping[Path, "Image"]]


def _made(name: str, work: Path, icons: Path) -> Style:
    style = Style(name, work / name, work / f"{name}-holdout")
    redraw = MADE[name](icons)
    for source, target in ((INK, style.training), (INK_HOLDOUT, style.holdout)):
        missing = []
        for item in scan(source, recursive=False).items:
            file = target / f"{item.path.stem}.png"
            if file.is_file():
                continue
            image = redraw(item)
            if image is None:
                missing.append(item.path.stem)
                continue
            subject = item.caption.partition(",")[2].strip()
            # the caption first: an image that is there is complete
            write_text(file.with_suffix(".txt"), f"{name}style, {subject}\n")
            with replacing(file) as temporary:
                image.save(temporary, format="PNG")
        if missing:
            print(f"{name}: the set draws no {', '.join(missing)}; left out of {target.name}", flush=True)
    return style


def blueprint(icon: Image) -> Image:
    """Return the icon as pale lines on blue paper: black becomes :data:`LINES`, white :data:`PAPER`."""
    from PIL import ImageOps

    return ImageOps.colorize(icon.convert("L"), LINES, PAPER).convert("RGB")


def _blueprints(icons: Path) -> Callable[[ImageItem], Image | None]:
    return lambda item: blueprint(load_pixels(item))


def _icons_of(name: str) -> Callable[[Path], Callable[[ImageItem], Image | None]]:
    def opened(icons: Path) -> Callable[[ImageItem], Image | None]:
        draw = icon_sets.drawer(name, icons, SIDE)
        return lambda item: draw(item.path.stem)

    return opened


def _restyled(name: str) -> Callable[[Path], Callable[[ImageItem], Image | None]]:
    def opened(icons: Path) -> Callable[[ImageItem], Image | None]:
        change = restyled.styles()[name]
        return lambda item: restyled.at_side(load_pixels(item), change)

    return opened


RESTYLED = ("night", "rose", "sepia", "dots", "hatching", "outlines", "soft")
"""Styles of :mod:`restyled` that are there to be learned."""

MADE: Mapping[str, Callable[[Path], Callable[[ImageItem], Image | None]]] = {
    "blueprint": _blueprints,
    **{name: _icons_of(name) for name in (*icon_sets.TEST_SETS, *icon_sets.STYLE_SETS)},
    **{name: _restyled(name) for name in RESTYLED},
}
"""Styles that are made on the spot: name -> (folder of icon packages -> how an ink icon is redrawn)."""
