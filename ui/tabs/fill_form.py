"""The part of the training page that fills its form at once: presets, TOML, other trainers' settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora.config.presets import presets
from sdlora.errors import SdloraError

from ..setting_files import Filled, as_toml, from_text, keep_form, with_preset
from .shared import problem


@dataclass(frozen=True)
class Filling:
    """The controls, and where it is said what they did.

    ``name`` and ``keep`` are None on a server that others can reach: what they write lies in the user's own
    folder for settings, and the user's presets are not for visitors either.
    """

    preset: gr.Dropdown
    message: gr.HTML
    text: gr.Textbox
    show: gr.Button
    use: gr.Button
    name: gr.Textbox | None
    keep: gr.Button | None


def build(*, local: bool) -> Filling:
    """Put the controls into the current block.

    Args:
        local: whether only this machine can reach the page.
    """
    name = keep = None
    preset = gr.Dropdown(
        _choices(local),
        value="",
        label="Preset",
        info="Settings that suit a purpose; what changes is listed below, and can be changed again",
        elem_id="preset",
    )
    message = gr.HTML("", elem_id="filling-said")
    with gr.Accordion("Settings as text, and from other trainers", open=False, elem_id="as-text"):
        text = gr.Textbox(
            label="Settings as TOML",
            info="Show the form's, change them and use them; or paste the settings or the command line of "
            "kohya, OneTrainer, ai-toolkit, SimpleTuner or diffusers",
            lines=8,
            max_lines=24,
            elem_id="settings-text",
        )
        with gr.Row(equal_height=True):
            show = gr.Button("Show the form's settings", elem_id="settings-show")
            use = gr.Button("Use this text", elem_id="settings-use")
        if local:
            with gr.Row(elem_classes="sd-beside"):
                name = gr.Textbox(label="Name of a preset of your own", max_lines=1, elem_id="preset-name")
                keep = gr.Button("Keep the form as a preset", elem_id="preset-keep")
    return Filling(preset, message, text, show, use, name, keep)


def connect(
    filling: Filling, tab: gr.Tab, controls: Mapping[str, Any], plan_after: Callable[[Any], object]
) -> None:
    """Let the controls fill the form.

    Args:
        filling: what :func:`build` made.
        tab: the page's; when it is opened, the list of presets is read again.
        controls: setting -> its control in the form.
        plan_after: makes an event that filled the form be followed by a new plan.
    """
    keys, shown = list(controls), list(controls.values())
    local = filling.keep is not None

    def filled(fill: Callable[[dict[str, Any]], Filled], held: tuple[Any, ...]) -> list[Any]:
        raw = dict(zip(keys, held, strict=True))
        try:
            new, html = fill(raw)
        except SdloraError as error:
            return [*(gr.skip() for _ in keys), problem(str(error))]
        return [*(new[key] if new[key] != raw[key] else gr.skip() for key in keys), html]

    def take_preset(name: str, *held: Any) -> list[Any]:
        if not name:
            return [*(gr.skip() for _ in keys), ""]
        return filled(lambda raw: with_preset(raw, name, users=local), held)

    def take_text(text: str, *held: Any) -> list[Any]:
        return filled(lambda raw: from_text(raw, text or ""), held)

    def show_text(*held: Any) -> tuple[Any, str]:
        try:
            return as_toml(dict(zip(keys, held, strict=True))), ""
        except SdloraError as error:
            return gr.skip(), problem(str(error))

    def keep(name: str, *held: Any) -> tuple[Any, Any]:
        try:
            file = keep_form(dict(zip(keys, held, strict=True)), name or "")
        except SdloraError as error:
            return problem(str(error)), gr.skip()
        gr.Info(f"Kept as {file}")
        return "", gr.update(choices=_choices(local))

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    outputs = [*shown, filling.message]
    plan_after(filling.preset.input(take_preset, [filling.preset, *shown], outputs, **quiet))
    plan_after(filling.use.click(take_text, [filling.text, *shown], outputs, **quiet))
    filling.show.click(show_text, shown, [filling.text, filling.message], **quiet)
    if filling.keep is not None:
        filling.keep.click(keep, [filling.name, *shown], [filling.message, filling.preset], **quiet)
    tab.select(lambda: gr.update(choices=_choices(local)), None, filling.preset, **quiet)


def _choices(local: bool) -> list[tuple[str, str]]:
    """Return the presets as a dropdown takes them, the user's own marked, and left out for visitors."""
    listed = [
        (f"{preset.name} (yours)" if preset.users else preset.name, preset.name)
        for preset in presets()
        if local or not preset.users
    ]
    return [("none", ""), *listed]
