"""Page 1: a folder of images, or images dropped onto the page; captions, findings, crops."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError

from ..folder_settings import trigger_of
from ..server.allowed_paths import PathRefused
from ..server.uploads import copy_folder, folder_name, import_files
from ..site import Site
from .shared import Shell, choices, data_set_html, hint, problem

RESOLUTIONS = [
    ("64 px (mini base)", 64),
    ("512 px (SD 1.5)", 512),
    ("768 px (SD 2)", 768),
    ("1024 px (SDXL)", 1024),
]
_FIRST_RESOLUTION = 64
_PROGRESS = gr.Progress()
_WELCOME = """<div class="sd-hero"><h2>Teach Stable Diffusion a style or a subject</h2>
<p>From a folder of images to a LoRA with a strength slider. Nothing leaves this machine.</p></div>"""
_DEMO = """<h3>See it work first</h3><p class="sd-dim">48 ink icons on the built-in base: a LoRA in a few
minutes, without a GPU or a download. This fills in everything; the next click starts it.</p>"""


def build(site: Site, shell: Shell, tab: gr.Tab) -> None:
    """Put the page into the current tab."""
    folder, look, dropped, named, demo = _ways_in(site)
    bar, trigger, resolution, go = _bar()
    view = gr.HTML("", elem_id="dataset-view")

    shell.word = trigger
    shell.opened = [view, shell.folder, shell.trigger, bar, trigger, folder]
    shown: list[Any] = [folder, trigger, resolution, shell.folder]
    opened = [view, shell.folder, shell.trigger, bar, trigger]

    def show(
        request: gr.Request, path: str | None, word: str | None, px: int, before: str | None
    ) -> tuple[Any, ...]:
        shell.opened_by_hand.add(request.session_hash)
        return _show(site, path, word or "", px, before or "")

    gr.on(
        [look.click, folder.input, trigger.submit, resolution.input],
        show,
        shown,
        opened,
        show_progress="minimal",
    )

    def take(
        request: gr.Request,
        files: list[str] | None,
        name: str | None,
        word: str | None,
        px: int,
        progress: gr.Progress = _PROGRESS,
    ) -> tuple[Any, ...]:
        shell.opened_by_hand.add(request.session_hash)
        return _take(site, files, (name or "", word or "", px), progress)

    def open_demo(request: gr.Request) -> tuple[Any, ...]:
        shell.opened_by_hand.add(request.session_hash)
        return demo_folder(site)

    dropped.upload(take, [dropped, named, trigger, resolution], [*opened, folder, dropped])
    demo.click(
        open_demo,
        None,
        [*opened, folder, shell.demo, shell.tabs],
        show_progress="minimal",
    )
    go.click(lambda: gr.Tabs(selected="train"), None, shell.tabs)


def _ways_in(site: Site) -> tuple[gr.Dropdown, gr.Button, gr.File, gr.Textbox, gr.Button]:
    """Return the folder field and its button, the drop area and its name field, and the demo's button."""
    gr.HTML(_WELCOME)
    with gr.Row(elem_classes="sd-choose", equal_height=True):
        with gr.Column(scale=3, min_width=280, elem_classes="sd-box"):
            gr.HTML("<h3>Open a folder</h3>")
            folder = gr.Dropdown(
                choices(site.data_sets()),
                value=None,
                label="Folder of images",
                info="One that you dropped, or the path of a folder on this machine",
                allow_custom_value=True,
                elem_id="dataset-folder",
                elem_classes="sd-names",
            )
            gr.HTML("<sd-browse></sd-browse>", elem_id="browse")
            look = gr.Button("Open folder", elem_id="open-folder")
        with gr.Column(scale=3, min_width=280, elem_classes="sd-box"):
            gr.HTML("<h3>Or drop images</h3>")
            dropped = gr.File(
                label="Images, with .txt captions if you have them, or a zip",
                file_count="multiple",
                elem_id="drop",
                height=128,
            )
            named = gr.Textbox(
                label="Name of the new folder", placeholder="my-images", elem_id="drop-name", max_lines=1
            )
        with gr.Column(scale=2, min_width=240, elem_classes="sd-box"):
            gr.HTML(_DEMO)
            demo = gr.Button("Try the demo", variant="primary", elem_id="demo")
    return folder, look, dropped, named, demo


def _bar() -> tuple[gr.Row, gr.Textbox, gr.Dropdown, gr.Button]:
    """Return the bar of an opened folder, its trigger word, size of crops and training button."""
    with gr.Row(elem_id="dataset-bar", visible=False, equal_height=True) as bar:
        trigger = gr.Textbox(
            label="Trigger word",
            info="The word that will call up the style or subject",
            placeholder="none",
            elem_id="dataset-trigger",
            max_lines=1,
        )
        resolution = gr.Dropdown(
            RESOLUTIONS,
            value=_FIRST_RESOLUTION,
            label="Show crops for",
            info="The resolution your base model is trained at",
            elem_id="dataset-resolution",
        )
        go = gr.Button("Train on it", variant="primary", elem_id="train-on-it", size="lg")
    return bar, trigger, resolution, go


def _show(site: Site, path: str | None, word: str, px: int, before: str = "") -> tuple[Any, ...]:
    """Return what opening a folder changes; another folder than the one before starts without its word."""
    if not (path or "").strip():
        return hint("Choose a folder first."), "", word, gr.Row(visible=False), word
    try:
        folder = str(site.paths.folder(str(path)))
    except SdloraError as error:
        return _refused(site, str(path), error), "", word, gr.Row(visible=False), word
    typed = word
    word = word.strip() if before in ("", folder) else trigger_of(site, folder)
    # a field that stays as it is may be typed into already
    field = gr.skip() if word == typed else word
    return data_set_html(folder, word, px), folder, word, gr.Row(visible=True), field


def _refused(site: Site, path: str, error: SdloraError) -> str:
    """Return why a folder is not shown; where the owner may add it, with a button that does."""
    if not (isinstance(error, PathRefused) and site.paths.can_be_added(path)):
        return problem(str(error))
    text = f"{path}: sdlora does not use this folder yet. It would read the images and write captions in it."
    return f'{hint(text)}<sd-allow path="{escape(path, quote=True)}"></sd-allow>'


def opened_again(site: Site, kept: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what shows the folder that a form was about when the page was left, for ``Shell.opened``."""
    named = str(kept.get("data.folder") or "").strip()
    try:
        folder = str(site.paths.folder(named)) if named else ""
    except SdloraError:
        folder = ""
    if not folder:
        return tuple(gr.skip() for _ in range(6))
    word = str(kept.get("data.trigger_word") or "")
    return (*_show(site, folder, word, _FIRST_RESOLUTION, folder)[:4], word, gr.Dropdown(value=folder))


def _take(
    site: Site, files: list[str] | None, fields: tuple[str, str, int], progress: gr.Progress
) -> tuple[Any, ...]:
    name, word, px = fields
    paths = [Path(file) for file in files or []]
    usual = paths[0].stem if len(paths) == 1 else "images"
    try:
        taken = import_files(
            paths,
            site.paths.data,
            folder_name(name, usual),
            lambda done, total: progress((done, total), desc="checking the images"),
        )
    except SdloraError as error:
        return (problem(str(error)), *([gr.skip()] * 5), None)
    if taken.left_out:
        gr.Warning(f"{len(taken.left_out)} left out: " + "; ".join(taken.left_out[:5]))
    gr.Info(f"{taken.num_images} images are now in {site.paths.shown(taken.folder)}")
    listed = gr.Dropdown(choices(site.data_sets()), value=str(taken.folder))
    return (*_show(site, str(taken.folder), word, px), listed, None)


def demo_folder(site: Site) -> tuple[Any, ...]:
    """Copy the demo's images into the data folder; return the values of the components that follow."""
    from sdlora.demonstration.data import STYLE, demo_config, find_data

    folder = copy_folder(find_data() / STYLE, site.paths.data)
    word = demo_config(site.paths.runs / STYLE, site.paths.data).data.trigger_word or ""
    return (
        *_show(site, str(folder), word, _FIRST_RESOLUTION)[:4],
        word,
        gr.Dropdown(choices(site.data_sets()), value=str(folder)),
        json.dumps({"folder": str(folder), "at": time.time()}),
        gr.Tabs(selected="train"),
    )
