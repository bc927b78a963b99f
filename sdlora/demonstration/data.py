"""The demo's data and settings; no torch, so that the web UI can offer it at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..config.schema import Config
from ..config.toml import load_config
from ..errors import DatasetError
from ..files import shipped_folder

STYLE, HOLDOUT = "ink-icons", "ink-icons-holdout"
SETTINGS = ("adapter.targets=all", "sample.steps=10", "sample.every=75", "judge.every=0")
"""What the demo sets besides the base's recommended settings; it judges the adapter itself."""


def find_data() -> Path:
    """Return the folder that holds the sample data sets: installed, or of the checkout.

    Raises:
        DatasetError: when there is none.
    """
    folder = shipped_folder("datasets")
    if folder is not None and (folder / STYLE).is_dir() and (folder / HOLDOUT).is_dir():
        return folder
    raise DatasetError(f"the sample data sets {STYLE} and {HOLDOUT} are missing; install sdlora again")


def demo_config(
    output: Path, data: Path, *, base: str = "mini", steps: int | None = None, settings: Sequence[str] = ()
) -> Config:
    """Return the training's settings: the base's recommended ones and the few that the demo sets."""
    return load_config(
        None,
        (*SETTINGS, *settings),
        {
            "model.base": base,
            "data.folder": data / STYLE,
            "data.trigger_word": _trigger_word(data / STYLE),
            "training.steps": steps,
            "output.folder": output,
            "output.name": STYLE,
            "output.license": "MIT",
            "output.description": "Black ink on white, learned from Fluent UI Emoji High Contrast.",
        },
    )


def _trigger_word(folder: Path) -> str:
    match = re.search(r"Trigger word\W+(\w+)", (folder / "README.md").read_text(encoding="utf-8"))
    if match is None:
        raise DatasetError(f"{folder / 'README.md'}: names no trigger word; install sdlora again")
    return match.group(1)
