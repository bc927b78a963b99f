"""Page 4: export an adapter for other programs, with proof; inspect a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import ConfigError, SdloraError
from sdlora.formats.table import FORMATS, written_formats
from sdlora.number_formats import PRECISIONS

from ..gallery import file_url
from ..server.allowed_paths import program_folders
from ..site import EXPORTED, Site
from . import surgery
from .shared import Shell, choices, hint, problem, told, working

_MORE = "More settings: folder, file name, number format, preview"
_EXPORTING = ("source", "format", "output", "webui", "name", "dtype", "overwrite", "preview", "private")


def build(site: Site, shell: Shell, tab: gr.Tab) -> None:
    """Put the page into the current tab."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320), gr.Column(elem_classes="sd-box"):
            source = _export(site)
        with gr.Column(scale=1, min_width=320):
            with gr.Column(elem_classes="sd-box"):
                files = [_inspect(site)]
            files += surgery.build(site)

    def refresh(chosen: str | None) -> list[Any]:
        sources = _sources(site)
        first = chosen or (sources[0][1] if sources else None)
        known = choices(site.adapters())
        return [gr.Dropdown(choices=sources, value=first), *(gr.Dropdown(choices=known) for _ in files)]

    tab.select(refresh, source, [source, *files], show_progress="hidden")

    def take(message: str) -> list[Any]:
        job = site.queue.get(told(message, "id"))
        return [gr.Tabs(selected="tools"), gr.Dropdown(choices=_sources(site), value=str(job.run))]

    shell.export_run.change(take, shell.export_run, [shell.tabs, source])


def format_choices() -> list[tuple[str, str]]:
    """Return (programs, name) of every format an adapter can be exported to."""
    return [(FORMATS[name].programs or FORMATS[name].title, name) for name in written_formats()]


def _sources(site: Site) -> list[tuple[str, str]]:
    runs = [(f"run: {run.label}", run.path) for run in site.runs()]
    return runs + [(label, path) for label, path in choices(site.adapters())]


def _export(site: Site) -> gr.Dropdown:
    gr.HTML("<h3 aria-level='2'>Export</h3>")
    source = gr.Dropdown(
        _sources(site),
        value=None,
        label="Run or adapter file",
        allow_custom_value=True,
        elem_id="export-source",
        elem_classes="sd-names",
    )
    form = gr.Radio(format_choices(), value="webui", label="For", elem_id="export-format")
    named, others = program_folders(site.paths)
    webui = gr.Dropdown(
        [("none", ""), *((str(folder), str(folder)) for folder in named)],
        value="",
        label="Also into this WebUI or ComfyUI",
        info=_webui_info(named, others),
        allow_custom_value=True,
        elem_id="export-webui",
        elem_classes="sd-names",
    )
    with gr.Accordion(_MORE, open=False, elem_id="export-more"):
        place = gr.Textbox(
            str(site.paths.runs / EXPORTED), label="Into folder", elem_id="export-place", max_lines=1
        )
        with gr.Row():
            name = gr.Textbox(label="File name", placeholder="as the run", elem_id="export-name", max_lines=1)
            dtype = gr.Dropdown(
                [("as trained", ""), *PRECISIONS],
                value="",
                label="Number format",
                elem_id="export-dtype",
            )
        preview = gr.Textbox(
            label="Preview image",
            info="The image that WebUI shows on the adapter's card",
            placeholder="the run's newest preview",
            elem_id="export-preview",
            max_lines=1,
        )
        private = gr.Checkbox(
            False,
            label="Leave out what describes the training images",
            info="Folder names, captions, tags and file names in the header",
            elem_id="export-private",
        )
        overwrite = gr.Checkbox(False, label="Replace files that exist", elem_id="export-overwrite")
    button = gr.Button("Export", variant="primary", elem_id="export", size="lg")
    report = gr.HTML(
        hint("The file is read back and compared with what was trained; the proof appears here."),
        elem_id="export-report",
    )

    def export(*held: Any) -> Iterator[str]:
        yield from _exported(site, dict(zip(_EXPORTING, held, strict=True)))

    inputs = [source, form, place, webui, name, dtype, overwrite, preview, private]
    button.click(export, inputs, report, show_progress="hidden")
    return source


def _webui_info(named: Sequence[Path], others: Sequence[Path]) -> str:
    """Return how to export straight into another program, for the folders that exist."""
    if named:
        return "Copied into its folder of adapters, with preview and card"
    if others:
        return f"Found {others[0]}; to write there, start with: sdlora ui --allow {others[0]}"
    return "No folder was named; to write into one, start with: sdlora ui --allow FOLDER"


def _exported(site: Site, values: Mapping[str, Any]) -> Iterator[str]:
    try:
        if not values["source"]:
            raise ConfigError("run or adapter file: choose one")
        # Gradio gives None for text fields that are folded away
        text = {key: str(values[key] or "").strip() for key in ("output", "webui", "name", "preview")}
        arguments = dict(values) | {
            "source": str(site.paths.model(values["source"])),
            "output": str(site.paths.writable(text["output"])) if text["output"] else None,
            "webui": str(site.paths.writable(text["webui"])) if text["webui"] else None,
            "preview": str(site.paths.readable(text["preview"])) if text["preview"] else None,
            "name": text["name"] or None,
            "dtype": values["dtype"] or None,
        }
        for answer in site.desk.call("export", arguments):
            if answer.progress is not None:
                yield working(*answer.progress)
            elif answer.result is not None:
                yield _report_html(site, answer.result)
    except SdloraError as error:
        yield problem(str(error))


def _report_html(site: Site, report: Mapping[str, Any]) -> str:
    files = "".join(_file_html(site, Path(file)) for file in report["files"])
    clients = "".join(_client_html(name, verdict) for name, verdict in report["clients"].items())
    return (
        f'<p class="sd-done" role="status">Exported and proven.</p><ul class="sd-files">{files}</ul>'
        f'<p class="sd-proof"><b>Proof</b>: {escape(report["proof"])}</p>'
        f'<table class="sd-reasons"><tbody>{clients}</tbody></table>'
    )


def _file_html(site: Site, file: Path) -> str:
    link = escape(file_url(str(file)), quote=True)
    return f'<li translate="no"><a href="{link}" download>{escape(site.paths.shown(file))}</a></li>'


def _client_html(name: str, verdict: Any) -> str:
    text = "loads it fully" if verdict == "full" else "; ".join(verdict)
    return f"<tr><th scope='row' translate='no'>{escape(name)}</th><td>{escape(text)}</td></tr>"


def _inspect(site: Site) -> gr.Dropdown:
    gr.HTML("<h3 aria-level='2'>Inspect</h3>")
    file = gr.Dropdown(
        choices(site.adapters()),
        value=None,
        label="Adapter file",
        allow_custom_value=True,
        elem_id="inspect-file",
        elem_classes="sd-names",
    )
    button = gr.Button("Inspect", elem_id="inspect")
    report = gr.HTML(
        hint("Ranks, alphas, trigger words, settings, and which programs load it."), elem_id="inspect-report"
    )

    def inspect(path: str | None) -> Iterator[str]:
        try:
            if not path:
                raise ConfigError("adapter file: choose one")
            for answer in site.desk.call("inspect", {"file": str(site.paths.model(path))}):
                if answer.progress is not None:
                    yield working(*answer.progress)
                elif answer.result is not None:
                    text = escape(str(answer.result["text"]))
                    yield f'<pre class="sd-text" translate="no" tabindex="0">{text}</pre>'
        except SdloraError as error:
            yield problem(str(error))

    button.click(inspect, file, report, show_progress="hidden")
    return file
