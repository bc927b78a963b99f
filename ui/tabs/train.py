"""Page 2: base, name and trigger word, everything else filled in; the queue and the running job."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.data.reading.folder import survey
from sdlora.errors import ConfigError, DatasetError, SdloraError

from ..forms import NOT_FOR_A_BROWSER, SECTION_TITLES, Setting, control, from_config, settings
from ..machine_view import machine_html
from ..plan_view import plan_html
from ..server.uploads import folder_name
from ..settings import checked_config
from ..site import Site
from ..worker_client import CallCancelled
from .shared import Shell, choices, hint, problem, told, working

_DRAFT = "train"
_PAUSE = 0.4  # seconds without a key press before the plan is made
_NO_FOLDER = "Choose a folder of images on the first page; time, memory and settings then appear here."
_LATER = "Time and memory are worked out when a setting changes."
_FIRST = ("model.base", "data.folder", "output.name", "data.trigger_word")


def build(site: Site, shell: Shell, tab: gr.Tab) -> None:
    """Put the page into the current tab."""
    known = {setting.key: setting for setting in settings()}
    controls: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            with gr.Column(elem_classes="sd-box"):
                gr.HTML("<h3>What to train</h3>")
                controls |= _first(site, known)
                start = gr.Button("Start training", variant="primary", size="lg", elem_id="start-training")
                message = gr.HTML("", elem_id="start-said")
            plan = gr.HTML(hint(_NO_FOLDER), elem_id="plan")
            with gr.Accordion("This machine", open=False, elem_id="machine") as machine:
                report = gr.HTML(
                    hint("Looking at torch, cards, driver and memory ..."), elem_id="machine-report"
                )
            machine.expand(machine_html, None, report, show_progress="hidden")
            with gr.Accordion("More settings", open=False, elem_id="more"):
                gr.HTML(hint("Empty settings are decided from your images and the base, as listed above."))
                for section, title in SECTION_TITLES.items():
                    settings_here = [
                        setting
                        for setting in known.values()
                        if setting.key.startswith(f"{section}.")
                        and setting.key not in controls
                        and setting.key not in NOT_FOR_A_BROWSER
                    ]
                    with gr.Accordion(title, open=False, elem_id=f"more-{section}"):
                        controls |= {setting.key: control(setting) for setting in settings_here}
        with gr.Column(scale=6, min_width=320):
            gr.HTML("<sd-jobs></sd-jobs>", elem_id="jobs")
    _connect(site, shell, controls, start, message, plan)
    _connect_keeping(site, tab, controls, plan)


def _first(site: Site, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the few controls that are always visible."""
    base = gr.Dropdown(
        choices(site.bases()),
        value="mini",
        label="Base model",
        info="Built in, a file found here, a path, or a Hugging Face id: owner/name",
        allow_custom_value=True,
        elem_id="base",
    )
    folder = gr.Textbox(
        label="Folder of images", info="Chosen on the first page", elem_id="train-folder", max_lines=1
    )
    with gr.Row():
        name = gr.Textbox(label="Name of the LoRA", placeholder="my-style", elem_id="train-name", max_lines=1)
        trigger = gr.Textbox(label="Trigger word", placeholder="none", elem_id="train-trigger", max_lines=1)
    return dict(zip(_FIRST, (base, folder, name, trigger), strict=True))


def _connect(
    site: Site, shell: Shell, controls: dict[str, Any], start: gr.Button, message: gr.HTML, plan: gr.HTML
) -> None:
    keys, shown = list(controls), list(controls.values())

    newest: dict[str | None, int] = {}

    def predict(*held: Any) -> Iterator[str]:
        raw = dict(zip(keys, held, strict=True))
        site.drafts.keep(_DRAFT, raw)
        yield from _predict(site, raw)

    def edited(request: gr.Request, *held: Any) -> Iterator[Any]:
        """Predict when the typing pauses."""
        number = newest[request.session_hash] = newest.get(request.session_hash, 0) + 1
        time.sleep(_PAUSE)
        if newest[request.session_hash] == number:
            yield from predict(*held)
        else:
            yield gr.skip()

    def begin(*held: Any) -> Iterator[Any]:
        yield from _begin(site, dict(zip(keys, held, strict=True)))

    def choose(folder: str, trigger: str, name: str) -> tuple[Any, ...]:
        return folder, trigger, _free_name(site, folder_name(Path(folder).name)) if folder else name

    def fill(config: Config) -> list[Any]:
        return list(from_config(config)[key] for key in keys)

    def clone(said_text: str) -> list[Any]:
        job = site.queue.get(told(said_text, "id"))
        config = load_config(site.queue.settings(job.id))
        raw = fill(config.with_values({"output.name": _free_name(site, job.name), "output.folder": None}))
        gr.Info("The job's settings are in the form, under a new name. Change them and start.")
        return raw

    def fill_demo(said_text: str) -> list[Any]:
        from sdlora.demonstration.data import STYLE, demo_config

        config = demo_config(site.paths.runs / STYLE, Path(told(said_text, "folder")).parent)
        return fill(config.with_values({"output.name": _free_name(site, STYLE), "output.folder": None}))

    # without a queue: a plan that waits for its turn would overwrite a newer draft
    at_once: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 32}
    edits = [shown_control.input for shown_control in shown]
    gr.on(edits, edited, shown, plan, trigger_mode="multiple", **at_once)
    folder, name, trigger = (controls[key] for key in ("data.folder", "output.name", "data.trigger_word"))
    shell.folder.change(choose, [shell.folder, shell.trigger, name], [folder, trigger, name]).then(
        predict, shown, plan, **at_once
    )
    shell.trigger.change(lambda word: word, shell.trigger, trigger)
    shell.demo.change(fill_demo, shell.demo, shown).then(predict, shown, plan, **at_once)
    shell.clone_run.change(clone, shell.clone_run, shown).then(predict, shown, plan, **at_once)
    start.click(begin, shown, message, show_progress="hidden")


def _connect_keeping(site: Site, tab: gr.Tab, controls: Mapping[str, Any], plan: gr.HTML) -> None:
    """Fill a newly opened page with what the form held when it was last edited."""
    keys, shown = list(controls), list(controls.values())
    known = {setting.key: setting for setting in settings()}

    def again() -> list[Any]:
        kept = site.drafts.kept(_DRAFT)
        if kept.get("output.name"):
            kept["output.name"] = _free_name(site, str(kept["output.name"]))
        return [kept[key] if key in kept and _fits(known[key], kept[key]) else gr.skip() for key in keys]

    gr.on(None, again, None, shown, show_progress="hidden")

    def look(so_far: str, *held: Any) -> Iterator[Any]:
        raw = dict(zip(keys, held, strict=True))
        if raw["data.folder"] and _NO_FOLDER in so_far:
            yield from _predict(site, raw)
        else:
            yield gr.skip()

    tab.select(look, [plan, *shown], plan, show_progress="hidden")


def _fits(setting: Setting, held: Any) -> bool:
    """Return whether a control accepts a value that an older version of the form may have held."""
    return setting.kind != "choice" or held in ("", *setting.choices)


def _predict(site: Site, raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield the run's plan, or why the run is not possible."""
    if not str(raw["data.folder"] or "").strip():
        yield hint(_NO_FOLDER)
        return
    part: Mapping[str, Any] | None = None
    try:
        config = _config(site, raw)
        if site.plans.would_disturb():
            yield hint("A job trains on the GPU now; time and memory are worked out when it is done.")
            return
        yield working(0, 1, "working out the settings")
        for answer in site.plans.ask(config, replace="plan"):
            if answer.progress is not None:
                yield working(*answer.progress) + (plan_html(part) if part else "")
            elif answer.part is not None:
                part = answer.part
            elif answer.result is not None:
                yield plan_html(answer.result)
    except CallCancelled:  # by a newer edit, which makes its own plan, or by the start of a job
        yield plan_html(part) if part else hint(_LATER)
    except SdloraError as error:
        yield problem(str(error))


def _begin(site: Site, raw: Mapping[str, Any]) -> Iterator[Any]:
    """Queue the run, or say why it is not possible."""
    try:
        config = _config(site, raw)
        _refuse_bad_images(config)
        for answer in site.plans.refusals(config):
            assert answer.progress is not None
            done, total, note = answer.progress
            yield working(done, total, f"checking that it is possible: {note}")
        job = site.queue.add(config)
        site.make_room()
        site.queue.tick()
    except SdloraError as error:
        yield problem(str(error))
        return
    gr.Info(f"{job.name} is in the queue")
    yield ""


def _config(site: Site, raw: Mapping[str, Any]) -> Config:
    if not str(raw["output.name"] or "").strip():
        raise ConfigError("name of the LoRA: give it one")
    if not str(raw["data.folder"] or "").strip():
        raise ConfigError("folder of images: choose one on the first page")
    return checked_config(site.paths, raw)


def _refuse_bad_images(config: Config) -> None:
    assert config.data.folder is not None
    problems = survey(config.data.folder, recursive=config.data.recursive).problems
    if problems:
        listed = "; ".join(str(trouble) for trouble in problems[:3])
        more = f"; and {len(problems) - 3} more, see the first page" if len(problems) > 3 else ""
        raise DatasetError(f"{len(problems)} images or captions cannot be used: {listed}{more}")


def _free_name(site: Site, wanted: str) -> str:
    taken = {job.name for job in site.queue.all()}
    stem, _, number = wanted.rpartition("-")
    base = stem if stem and number.isdigit() else wanted
    names = [wanted, *(f"{base}-{count}" for count in range(2, 1000))]
    return next(n for n in names if n not in taken and not (site.paths.runs / n).exists())
