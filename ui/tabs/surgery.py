"""The part of page 4 that changes adapters: merge, resize, bake; each with the report of its command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import ConfigError, SdloraError
from sdlora.files import ASSETS

from ..server.uploads import folder_name
from ..site import EXPORTED, Site
from .shared import checked_number, choices, hint, problem, working

_NUM_MERGED = 3
MINI = ASSETS / "mini"


def build(site: Site) -> list[gr.Dropdown]:
    """Put the tools into the current column; return the lists of adapters, so that they can be updated."""
    with gr.Accordion("Merge adapters into one", open=False, elem_id="merge-box"):
        merged = _merge(site)
    with gr.Accordion("Resize: fewer ranks", open=False, elem_id="resize-box"):
        resized = _resize(site)
    with gr.Accordion("Bake into a checkpoint", open=False, elem_id="bake-box"):
        baked = _bake(site)
    return [*merged, resized, baked]


def _merge(site: Site) -> list[gr.Dropdown]:
    files, weights = [], []
    for number in range(_NUM_MERGED):
        with gr.Row():
            label = f"Adapter {number + 1}" + (" (optional)" if number > 1 else "")
            files.append(
                gr.Dropdown(
                    choices(site.adapters()),
                    value=None,
                    label=label,
                    elem_id=f"merge-{number}",
                    elem_classes="sd-names",
                )
            )
            weights.append(gr.Slider(-1, 2, 1, step=0.05, label="Weight", elem_id=f"merge-weight-{number}"))
    with gr.Row():
        method = gr.Dropdown(
            ["linear", "ties", "dare", "dare-ties"], value="linear", label="Method", elem_id="merge-method"
        )
        density = gr.Textbox(
            "", label="Density", placeholder="for ties and dare", elem_id="merge-density", max_lines=1
        )
        rank = gr.Textbox("", label="Rank", placeholder="exact sum", elem_id="merge-rank", max_lines=1)
    name = gr.Textbox("merged", label="Name of the new file", elem_id="merge-name", max_lines=1)
    overwrite = gr.Checkbox(False, label="Replace a file that exists", elem_id="merge-overwrite")
    button = gr.Button("Merge", variant="primary", elem_id="merge")
    report = gr.HTML(hint("A linear merge without a rank is the exact weighted sum."), elem_id="merge-report")

    def merge(*held: Any) -> Iterator[str]:
        chosen, given = held[:_NUM_MERGED], held[_NUM_MERGED : 2 * _NUM_MERGED]
        values = dict(
            zip(("method", "density", "rank", "name", "overwrite"), held[2 * _NUM_MERGED :], strict=True)
        )
        yield from _done(site, "merge", lambda: _merge_arguments(site, chosen, given, values))

    inputs = [*files, *weights, method, density, rank, name, overwrite]
    button.click(merge, inputs, report, show_progress="hidden")
    return files


def _merge_arguments(
    site: Site, files: Sequence[str | None], weights: Sequence[float], values: Mapping[str, Any]
) -> dict[str, Any]:
    sources = [
        {"file": str(site.paths.model(file)), "weight": weight}
        for file, weight in zip(files, weights, strict=True)
        if file
    ]
    if len(sources) < 2:
        raise ConfigError("merge: choose two adapters or more")
    return {**values, **_numbers(values), "sources": sources, "output": _target(site, values["name"])}


def _resize(site: Site) -> gr.Dropdown:
    file = gr.Dropdown(
        choices(site.adapters()), value=None, label="Adapter", elem_id="resize-file", elem_classes="sd-names"
    )
    with gr.Row():
        rank = gr.Textbox(
            "", label="Rank at most", placeholder="no limit", elem_id="resize-rank", max_lines=1
        )
        energy = gr.Textbox(
            "", label="Energy to keep", placeholder="e.g. 0.99", elem_id="resize-energy", max_lines=1
        )
    name = gr.Textbox("resized", label="Name of the new file", elem_id="resize-name", max_lines=1)
    overwrite = gr.Checkbox(False, label="Replace a file that exists", elem_id="resize-overwrite")
    button = gr.Button("Resize", variant="primary", elem_id="resize")
    report = gr.HTML(
        hint("The best smaller adapter, with the error of every layer."), elem_id="resize-report"
    )

    def resize(*held: Any) -> Iterator[str]:
        values = dict(zip(("source", "rank", "energy", "name", "overwrite"), held, strict=True))
        yield from _done(site, "resize", lambda: _resize_arguments(site, values))

    button.click(resize, [file, rank, energy, name, overwrite], report, show_progress="hidden")
    return file


def _resize_arguments(site: Site, values: Mapping[str, Any]) -> dict[str, Any]:
    if not values["source"]:
        raise ConfigError("adapter: choose one")
    source = str(site.paths.model(values["source"]))
    return {**values, **_numbers(values), "source": source, "output": _target(site, values["name"])}


def _numbers(values: Mapping[str, Any]) -> dict[str, float | int | None]:
    known = ("rank", "density", "energy")
    return {
        name: checked_number(name, values[name] or "", whole=name == "rank")
        for name in known
        if name in values
    }


def _bake(site: Site) -> gr.Dropdown:
    base = gr.Dropdown(
        choices(site.bases()), value="mini", label="Checkpoint", elem_id="bake-base", elem_classes="sd-names"
    )
    file = gr.Dropdown(
        choices(site.adapters()), value=None, label="Adapter", elem_id="bake-file", elem_classes="sd-names"
    )
    strength = gr.Slider(-1, 2, 1, step=0.05, label="Strength", elem_id="bake-strength")
    name = gr.Textbox("baked", label="Name of the new checkpoint", elem_id="bake-name", max_lines=1)
    overwrite = gr.Checkbox(False, label="Replace a file that exists", elem_id="bake-overwrite")
    button = gr.Button("Bake", variant="primary", elem_id="bake")
    report = gr.HTML(hint("A new checkpoint with the adapter in its weights."), elem_id="bake-report")

    def bake(*held: Any) -> Iterator[str]:
        values = dict(zip(("base", "source", "strength", "name", "overwrite"), held, strict=True))
        yield from _done(site, "bake", lambda: _bake_arguments(site, values))

    button.click(bake, [base, file, strength, name, overwrite], report, show_progress="hidden")
    return file


def _bake_arguments(site: Site, values: Mapping[str, Any]) -> dict[str, Any]:
    if not values["source"]:
        raise ConfigError("adapter: choose one")
    base = MINI if values["base"] == "mini" else site.paths.model(str(values["base"] or ""))
    ending = "" if base.is_dir() else ".safetensors"
    return {
        **values,
        "checkpoint": str(base),
        "source": str(site.paths.model(values["source"])),
        "output": _target(site, values["name"], ending),
    }


def _target(site: Site, name: str, ending: str = ".safetensors") -> str:
    if not (name or "").strip():
        raise ConfigError("name of the new file: give it one")
    return str(site.paths.writable(site.paths.runs / EXPORTED / f"{folder_name(name)}{ending}"))


def _done(site: Site, task: str, arguments: Any) -> Iterator[str]:
    """Run a task in the worker, and show its progress and its report."""
    try:
        for answer in site.desk.call(task, arguments()):
            if answer.progress is not None:
                yield working(*answer.progress)
            elif answer.result is not None:
                files = ", ".join(site.paths.shown(Path(file)) for file in answer.result["files"])
                text = escape(str(answer.result["text"]))
                yield (
                    f'<p class="sd-done" role="status">Written: {escape(files)}</p>'
                    f'<pre class="sd-text" translate="no" tabindex="0">{text}</pre>'
                )
    except SdloraError as error:
        yield problem(str(error))
