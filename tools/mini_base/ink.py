"""Writes the sample data set and its hold-out: ink icons with captions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from . import icons
from .captions import bare, load_nouns
from .config import INK
from .files import write_bytes, write_text
from .licences import mit

TRIGGER = "inkicon"
IMAGE_SIZE = 256

_README = """# {title}

{count} icons drawn in black ink on white, {size} x {size} pixels, each with a
caption beside it (`{example}.png`, `{example}.txt`). {purpose}

- **Trigger word**: `{trigger}`. Captions read `{trigger}, an icon of a NOUN`.
- **Source**: Fluent UI Emoji, High Contrast, by Microsoft ({source}), as packed
  in `{package}` {version}, rendered with resvg. Nothing was drawn or edited by hand.
- **Licence**: MIT, see [LICENSE](LICENSE).
- **Made by**: `python -m tools.mini_base --stages datasets --datasets datasets --output build/mini`

The embedded mini base knows every subject from four colourful icon sets and has
never been shown this style in training its text encoder or U-Net (its image
autoencoder has seen ink icons, so that it can draw them). The subjects here and
in `{sibling}` are disjoint.
"""


def file_stem(phrase: str) -> str:
    """Returns a readable file name for a subject."""
    return bare(phrase).replace(" ", "-")


def write_dataset(
    folder: Path, names: Sequence[str], cache_dir: Path, title: str, purpose: str, sibling: str
) -> None:
    """Writes one folder of captioned ink icons with its README and licence."""
    package = icons.load(INK, cache_dir)
    phrases = load_nouns().phrases
    stems = {name: file_stem(phrases[name]) for name in names}
    for stale in [*folder.glob("*.png"), *folder.glob("*.txt")]:
        if stale.stem not in stems.values():
            stale.unlink()
    for name, stem in stems.items():
        # Sixteen greys keep the edges smooth and the files small.
        image = icons.render(package.svg(name), IMAGE_SIZE).convert("L").quantize(16)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        write_bytes(folder / f"{stem}.png", buffer.getvalue())
        write_text(folder / f"{stem}.txt", f"{TRIGGER}, an icon of {phrases[name]}\n")
    readme = _README.format(
        title=title,
        count=len(names),
        size=IMAGE_SIZE,
        purpose=purpose,
        trigger=TRIGGER,
        source=INK.source,
        package=INK.package,
        version=INK.version,
        sibling=sibling,
        example=min(stems.values()),
    )
    write_text(folder / "README.md", readme)
    write_text(folder / "LICENSE", mit(INK.owner))


def write_datasets(root: Path, cache_dir: Path) -> None:
    """Writes ``ink-icons`` and ``ink-icons-holdout`` below ``root``."""
    nouns = load_nouns()
    write_dataset(
        root / "ink-icons",
        nouns.ink_training,
        cache_dir,
        "Ink icons",
        "The sample data set: a LoRA trained on it draws other subjects in ink.",
        "../ink-icons-holdout",
    )
    write_dataset(
        root / "ink-icons-holdout",
        nouns.ink_holdout,
        cache_dir,
        "Ink icons, hold-out",
        "The true icons of subjects no LoRA trained on `ink-icons` has seen: "
        "what to compare its images with. **Do not train on this folder.**",
        "../ink-icons",
    )
