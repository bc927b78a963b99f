"""Smaller parts of the drawing page: several images at once, dropped adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import ConfigError, SdloraError

from ..gallery import table_html
from ..server.adapter_files import keep_adapter
from ..site import EXPORTED, Site

MOST_IMAGES = 64
"""Images of one press of the button."""
_ACROSS = 4


def count_control() -> gr.Number:
    """Return the field for the number of images."""
    return gr.Number(
        1, label="Images", precision=0, minimum=1, maximum=MOST_IMAGES, elem_id="count", min_width=70
    )


def several(count: Any, seed: Any) -> tuple[dict[str, Any], Any]:
    """Return what draws an image of each seed from ``seed`` on, and the function that shows them.

    Raises:
        ConfigError: for a number of images, or a seed, that is none.
    """
    if seed is None or count is None or not 1 <= int(count) <= MOST_IMAGES:
        raise ConfigError(f"images: give a number from 1 to {MOST_IMAGES}, and a seed")
    seeds = [(int(seed) + place) % 2**32 for place in range(int(count))]
    across = min(_ACROSS, len(seeds))

    def shape(parts: Sequence[Mapping[str, Any]], _: int) -> str:
        cells = {divmod(part["column"], across): part["file"] for part in parts}
        rows = -(-len(seeds) // across)
        return table_html(("",) * rows, ("",) * across, cells)

    return {"axes": [f"seed={','.join(map(str, seeds))}"]}, shape


def drop_control(site: Site) -> gr.File | None:
    """Return the area for an adapter's file; None where others can reach the server."""
    if not site.paths.local:
        return None
    return gr.File(
        label="Drop an adapter here (.safetensors)",
        file_types=[".safetensors"],
        elem_id="drop-adapter",
        height=90,
    )


def dropped(site: Site, file: str | None) -> Path | None:
    """Keep a dropped adapter among the exported ones and return it; say what is wrong with another file."""
    if not file:
        return None
    try:
        kept = keep_adapter(site.paths, Path(file), site.paths.runs / EXPORTED)
    except (SdloraError, OSError) as error:
        gr.Warning(str(error))
        return None
    gr.Info(f"{kept.name} is now in {site.paths.shown(kept.parent)}")
    return kept
