"""Negative prompts to choose from on the drawing page: usual ones, and those that the owner keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError

from ..site import Site
from .shared import problem

NEGATIVES = {
    "general": "worst quality, low quality, blurry, jpeg artifacts, watermark, signature, text",
    "photo": "painting, drawing, illustration, render, cartoon, blurry, overexposed, watermark, text",
    "drawing": "photo, photorealistic, 3d render, blurry, jpeg artifacts, watermark, text",
    "people": "bad anatomy, bad hands, extra fingers, extra limbs, deformed, cropped, out of frame",
}
"""Name -> usual negative prompt; none is ever put in without being chosen."""
_KEPT = "kept: "  # before the names of the owner's, which may be called as the usual ones are


@dataclass(frozen=True)
class Negatives:
    """The controls; those that change the owner's are None on a server that others can reach."""

    listed: gr.Dropdown
    message: gr.HTML
    name: gr.Textbox | None = None
    keep: gr.Button | None = None
    remove: gr.Button | None = None


def build(site: Site) -> Negatives:
    """Put the list, and what keeps further ones, into the current block."""
    listed = gr.Dropdown(
        _choices(site),
        value="",
        label="Usual negative prompts",
        info="Added to what is written; guidance of 1 has no negative prompt",
        elem_id="negative-preset",
    )
    if not site.paths.local:
        return Negatives(listed, gr.HTML(""))
    with gr.Row(elem_classes="sd-beside"):
        name = gr.Textbox(
            label="Name of one of your own", max_lines=1, elem_id="negative-name", min_width=120
        )
        keep = gr.Button("Keep what is written", elem_id="negative-keep", min_width=90)
        remove = gr.Button("Remove", elem_id="negative-remove", min_width=70)
    return Negatives(listed, gr.HTML("", elem_id="negative-said"), name, keep, remove)


def connect(site: Site, controls: Negatives, negative: gr.Textbox, opened: gr.Textbox) -> None:
    """Let the controls act on the field of the negative prompt.

    Args:
        site: with the owner.
        controls: what :func:`build` made.
        negative: the field.
        opened: changes when a page is opened: what the owner kept since the server's start is listed then.
    """
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    if controls.name is None or controls.keep is None or controls.remove is None:
        controls.listed.input(
            lambda chosen, written: with_negative(NEGATIVES.get(chosen, ""), written),
            [controls.listed, negative],
            [negative, controls.listed],
            **quiet,
        )
        return

    opened.change(lambda: gr.Dropdown(choices=_choices(site)), None, controls.listed, **quiet)

    def choose(chosen: str, written: str) -> list[Any]:
        name = (chosen or "").removeprefix(_KEPT) if (chosen or "").startswith(_KEPT) else ""
        words = site.owner.negatives.get(name, "") if name else NEGATIVES.get(chosen, "")
        return [*with_negative(words, written), name or gr.skip(), ""]

    def keep(name: str, written: str) -> list[Any]:
        try:
            kept = site.owner.keep_negative(name or "", written or "")
        except SdloraError as error:
            return [gr.skip(), gr.skip(), problem(str(error))]
        return [gr.Dropdown(choices=_choices(site), value=""), kept, ""]

    def remove(name: str) -> list[Any]:
        try:
            site.owner.remove_negative(name or "")
        except SdloraError as error:
            return [gr.skip(), gr.skip(), problem(str(error))]
        return [gr.Dropdown(choices=_choices(site), value=""), "", ""]

    controls.listed.input(
        choose,
        [controls.listed, negative],
        [negative, controls.listed, controls.name, controls.message],
        **quiet,
    )
    changed = [controls.listed, controls.name, controls.message]
    controls.keep.click(keep, [controls.name, negative], changed, **quiet)
    controls.remove.click(remove, controls.name, changed, **quiet)


def with_negative(words: str, written: str) -> tuple[Any, str]:
    """Return the negative prompt with those of some words that it lacks, and the list at its start."""
    have = [part for part in ((part.strip()) for part in (written or "").split(",")) if part]
    known = {part.casefold() for part in have}
    parts = [part.strip() for part in words.split(",")]
    more = [part for part in parts if part and part.casefold() not in known]
    return (", ".join([*have, *more]) if more else gr.skip()), ""


def _choices(site: Site) -> list[tuple[str, str]]:
    kept = [(f"{name} (yours)", f"{_KEPT}{name}") for name in sorted(site.owner.negatives)]
    return [("choose", ""), *((name, name) for name in NEGATIVES), *kept]
