"""Page 2: base, name and trigger word, everything else filled in; the queue and the running job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.data.reading.sources import survey_all, survey_held_out
from sdlora.errors import ConfigError, DatasetError, SdloraError

from .. import folder_settings
from ..drafts import TRAIN_FORM
from ..forms import NOT_FOR_A_BROWSER, SECTION_TITLES, control, from_config, settings
from ..machine_view import machine_html
from ..plan_view import changed_html, plan_html
from ..server.uploads import folder_name
from ..settings import checked_config, folders_of
from ..site import Site
from ..start_time import start_time
from ..words import FIRST_LABELS
from ..worker_client import CallCancelled
from . import base_picker, fill_form, prompt_rows
from .dataset import opened_again
from .shared import Pause, Shell, choices, hint, problem, told, working

_NO_FOLDER = "Choose a folder of images on the first page; time, memory and settings then appear here."
_SOON = "Time and memory are worked out when this page is looked at."
_LATER = "Time and memory are worked out when a setting changes."
_FIRST = tuple(FIRST_LABELS)


@dataclass(frozen=True)
class _Form:
    """The form: the control of every setting by its key, the plan, what differs from automatic, presets."""

    controls: dict[str, Any]
    plan: gr.HTML
    changed: gr.HTML
    filled_by: fill_form.Filling


def build(site: Site, shell: Shell, tab: gr.Tab) -> None:
    """Put the page into the current tab."""
    known = {setting.key: setting for setting in settings()}
    controls: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            with gr.Column(elem_classes="sd-box"):
                gr.HTML("<h3 aria-level='2'>What to train</h3>")
                controls |= _first(site)
                start = gr.Button("Start training", variant="primary", size="lg", elem_id="start-training")
                message = gr.HTML("", elem_id="start-said")
                with gr.Accordion("Start later", open=False, elem_id="start-later"):
                    later = gr.Textbox(
                        label="Not before",
                        info="A time of this machine's clock, as 22:30 or 2026-12-24 06:00; "
                        "empty: as soon as nothing else trains",
                        max_lines=1,
                        elem_id="not-before",
                    )
            plan = gr.HTML(hint(_NO_FOLDER), elem_id="plan")
            changed = gr.HTML("", elem_id="changed")
            filled_by = fill_form.build(local=site.paths.local)
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
                        if section == "sample":
                            prompt_rows.build()
                        controls |= {setting.key: control(setting) for setting in settings_here}
        with gr.Column(scale=6, min_width=320):
            gr.HTML("<sd-device></sd-device>", elem_id="device")
            gr.HTML("<sd-jobs></sd-jobs>", elem_id="jobs")
    form = _Form(controls, plan, changed, filled_by)
    _connect(site, shell, tab, form, (start, later, message))
    _connect_keeping(site, shell, tab, form)


def _first(site: Site) -> dict[str, Any]:
    """Return the few controls that are always visible."""
    base = gr.Dropdown(
        choices(site.bases()),
        value=site.default_base() or None,
        label="Base model",
        info="Found here, a path, or a Hugging Face id: owner/name",
        allow_custom_value=True,
        elem_id="base",
        elem_classes="sd-names",
    )
    base_picker.build(site, base)
    folder = gr.Textbox(
        label="Folder of images", info="Chosen on the first page", elem_id="train-folder", max_lines=1
    )
    with gr.Row():
        name = gr.Textbox(label="Name of the LoRA", placeholder="my-style", elem_id="train-name", max_lines=1)
        trigger = gr.Textbox(label="Trigger word", placeholder="none", elem_id="train-trigger", max_lines=1)
    return dict(zip(_FIRST, (base, folder, name, trigger), strict=True))


@dataclass(frozen=True)
class _Filling:
    """What is put into the form at once; each method returns every control's value, and what the plan says.

    Attributes:
        site: with jobs and drafts.
        keys: of the controls, in their order.
    """

    site: Site
    keys: list[str]

    def choose(self, chosen: str, word: str, demo_said: str, *held: Any) -> list[Any]:
        raw = dict(zip(self.keys, held, strict=True))
        known = folder_settings.same_folder(self.site, raw["data.folder"], chosen)
        if not chosen or (known and word == raw["data.trigger_word"]):
            return [gr.skip() for _ in (*self.keys, "plan")]
        if known:
            raw["data.trigger_word"] = word
        elif demo_said and told(demo_said, "folder") == chosen:  # as `fill_demo`, which is asked as well
            return self.fill_demo(demo_said)
        else:
            raw = folder_settings.settings_for(self.site, chosen, raw) | {"data.trigger_word": word}
            raw["output.name"] = _free_name(self.site, folder_name(Path(chosen).name))
        return [*(raw[key] for key in self.keys), hint(_LATER)]

    def fill_demo(self, said_text: str) -> list[Any]:
        raw = folder_settings.demo_settings(self.site, Path(told(said_text, "folder")))
        raw["output.name"] = _free_name(self.site, str(raw["output.name"]))
        return [*(raw[key] for key in self.keys), hint(_LATER)]

    def clone(self, said_text: str) -> list[Any]:
        job = self.site.queue.get(told(said_text, "id"))
        config = load_config(self.site.queue.settings(job.id))
        config = config.with_values({"output.name": _free_name(self.site, job.name), "output.folder": None})
        raw = from_config(config)
        gr.Info("The job's settings are in the form, under a new name. Change them and start.")
        return [*(raw[key] for key in self.keys), hint(_LATER)]

    def reset(self, said_text: str, *held: Any) -> list[Any]:
        raw = dict(zip(self.keys, held, strict=True))
        raw = folder_settings.reset(self.site, raw, told(said_text, "key"), self.keys)
        return [*(raw[key] for key in self.keys), hint(_LATER)]


class _Planning:
    """Keeps what the form holds as a draft and plans it, each page only its newest state."""

    def __init__(self, site: Site, keys: list[str]) -> None:
        self._site, self._keys, self._pause = site, keys, Pause()
        self._newest: dict[str | None, int] = {}

    def predict(self, request: gr.Request, tab_word: str, *held: Any) -> Iterator[Any]:
        """Keep what the form holds, and plan it until a newer prediction of this page begins."""
        number = self._newest[request.session_hash] = self._newest.get(request.session_hash, 0) + 1
        raw = dict(zip(self._keys, held, strict=True))
        folder_settings.keep(self._site, raw, tab_word or "")
        for shown_plan in _predict(self._site, raw):
            if self._newest[request.session_hash] != number:
                yield gr.skip(), gr.skip()  # Gradio sends what came last once more when a generator ends
                return
            yield shown_plan, changed_html(raw)

    def edited(self, request: gr.Request, *held: Any) -> Iterator[Any]:
        """Predict when the typing pauses."""
        if self._pause.after(request.session_hash):
            yield from self.predict(request, *held)
        else:
            yield gr.skip(), gr.skip()

    def anew(self, request: gr.Request, so_far: str, *held: Any) -> Iterator[Any]:
        """Predict, unless nothing changed since the page was opened again and nobody looks at the plan."""
        if _SOON in so_far:
            yield gr.skip(), gr.skip()
        else:
            yield from self.predict(request, *held)


def _connect(
    site: Site, shell: Shell, tab: gr.Tab, form: _Form, starting: tuple[gr.Button, gr.Textbox, gr.HTML]
) -> None:
    start, later, message = starting
    keys, shown = list(form.controls), list(form.controls.values())
    trigger = form.controls["data.trigger_word"]
    told_all = [shell.tab_word, *shown]
    planning = _Planning(site, keys)

    def begin(later: str, *held: Any) -> Iterator[Any]:
        yield from begin_run(site, dict(zip(keys, held, strict=True)), later or "")

    # without a queue: a plan that waits for its turn would overwrite a newer draft; and while one is made,
    # Gradio would drop the next one
    at_once: dict[str, Any] = {
        "show_progress": "hidden",
        "concurrency_limit": 32,
        "trigger_mode": "multiple",
    }
    plans = [form.plan, form.changed]
    edits = [shown_control.input for shown_control in shown]
    gr.on(edits, planning.edited, told_all, plans, **at_once)
    filling = _Filling(site, keys)
    senders: list[tuple[Any, Callable[..., list[Any]], list[Any]]] = [
        (
            [shell.folder.change, shell.trigger.change],
            filling.choose,
            [shell.folder, shell.trigger, shell.demo, *shown],
        ),
        ([shell.demo.change], filling.fill_demo, [shell.demo]),
        ([shell.clone_run.change], filling.clone, [shell.clone_run]),
        ([shell.reset_setting.change], filling.reset, [shell.reset_setting, *shown]),
    ]
    for events, fill, given in senders:
        filled = gr.on(
            events, fill, given, [*shown, form.plan], show_progress="hidden", trigger_mode="always_last"
        )
        filled.then(planning.anew, [form.plan, *told_all], plans, **at_once)
    fill_form.connect(
        form.filled_by,
        tab,
        form.controls,
        lambda event: event.then(planning.predict, told_all, plans, **at_once),
    )
    prompt_rows.connect(
        shell, form.controls, lambda event: event.then(planning.edited, told_all, plans, **at_once)
    )
    start.click(begin, [later, *shown], message, show_progress="hidden")
    shell.use_masks.change(
        lambda message: str(told(message, "folder")),
        shell.use_masks,
        form.controls["data.mask_folder"],
        show_progress="hidden",
    ).then(planning.edited, told_all, plans, **at_once)
    _connect_words(shell, trigger, lambda event: event.then(planning.edited, told_all, plans, **at_once))


def _connect_words(shell: Shell, trigger: gr.Textbox, plan_after: Callable[[Any], object]) -> None:
    """Keep the trigger word the same on the first page and here, whichever of them it is typed on."""
    first, here = Pause(), Pause()

    def typed_first(request: gr.Request, word: str) -> Any:
        return word if first.after(request.session_hash) else gr.skip()

    def typed_here(request: gr.Request, word: str) -> Any:
        return word if here.after(request.session_hash) else gr.skip()

    options: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 32, "trigger_mode": "multiple"}
    plan_after(shell.word.input(typed_first, shell.word, trigger, **options))
    trigger.input(typed_here, trigger, shell.word, **options)


def _connect_keeping(site: Site, shell: Shell, tab: gr.Tab, form: _Form) -> None:
    """Fill a page that was opened again with what the form held in its tab."""
    keys, shown = list(form.controls), list(form.controls.values())
    known = {setting.key: setting for setting in settings()}
    seen = gr.State(False)

    def again(request: gr.Request, tab_word: str) -> list[Any]:
        kept = site.drafts.kept(TRAIN_FORM, tab_word or "")
        if kept.get("output.name"):
            kept["output.name"] = _free_name(site, str(kept["output.name"]))
        filled = str(kept.get("data.folder") or "").strip()
        opened = opened_again(site, kept)
        usable = {key for key in keys if key in kept and folder_settings.fits(known[key], kept[key])}
        held = [kept[key] if key in usable else gr.skip() for key in keys]
        base = str(kept.get("model.base") or "") or site.default_base()
        held[keys.index("model.base")] = base_picker.listed(site, base or None)
        plans = [hint(_SOON), changed_html(kept)] if filled else [gr.skip(), gr.skip()]
        filling = [*held, *plans, *opened]
        # a folder that was opened meanwhile is not taken back
        return [gr.skip() for _ in filling] if request.session_hash in shell.opened_by_hand else filling

    def look(so_far: str, *held: Any) -> Iterator[Any]:
        raw = dict(zip(keys, held, strict=True))
        if raw["data.folder"] and any(
            text in so_far for text in (_NO_FOLDER, _SOON, escape(base_picker.NO_BASE))
        ):
            yield from _predict(site, raw)
        else:
            yield gr.skip()

    def look_if_seen(is_seen: bool, so_far: str, *held: Any) -> Iterator[Any]:
        if is_seen:
            yield from look(so_far, *held)
        else:
            yield gr.skip()

    given = [form.plan, *shown]
    shell.tab_word.change(
        again, shell.tab_word, [*shown, form.plan, form.changed, *shell.opened], show_progress="hidden"
    ).then(None, None, None, js="() => document.dispatchEvent(new Event('sdlora-filled'))").then(
        look_if_seen, [seen, *given], form.plan, show_progress="hidden"
    )
    base = form.controls["model.base"]

    def select(chosen: str | None) -> tuple[bool, Any]:
        return True, base_picker.listed(site, None if chosen else site.default_base() or None)

    tab.select(select, base, [seen, base], show_progress="hidden").then(
        look, given, form.plan, show_progress="hidden"
    )


def _predict(site: Site, raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield the run's plan, or why the run is not possible."""
    if not str(raw["data.folder"] or "").strip():
        yield hint(_NO_FOLDER)
        return
    if not str(raw["model.base"] or "").strip():
        site.desk.cancel("plan")  # of what the form held before
        yield hint(base_picker.NO_BASE)
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


def begin_run(site: Site, raw: Mapping[str, Any], later: str = "") -> Iterator[Any]:
    """Queue the run, or say why it is not possible.

    Args:
        site: with the queue.
        raw: the form's values.
        later: before which time it does not start, as it is typed.
    """
    try:
        not_before = start_time(later)
        config = _config(site, raw)
        if why := site.captioning.holds(folders_of(config)):
            raise ConfigError(why)
        _refuse_bad_images(config)
        for answer in site.plans.refusals(config):
            assert answer.progress is not None
            done, total, note = answer.progress
            yield working(done, total, f"checking that it is possible: {note}")
        job = site.queue.add(config, not_before=not_before)
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
    if not str(raw["model.base"] or "").strip():
        raise ConfigError("base model: choose the one that you draw with, or mini to try it out")
    return checked_config(site.paths, raw)


def _refuse_bad_images(config: Config) -> None:
    assert config.data.folder is not None
    apart = survey_held_out(config.data)
    problems = [*survey_all(config.data).problems, *(apart.problems if apart else ())]
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
