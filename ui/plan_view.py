"""The plan of a run, as the page shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from sdlora.files import size_text

from .folder_settings import changed
from .words import labels, page_words


def plan_html(plan: Mapping[str, Any]) -> str:
    """Return time, memory, and every setting that was filled in with its reason."""
    facts = [_fact(plan["images"], "images to train on")]
    if "steps" in plan:
        facts = [
            _fact(duration(plan["seconds"]), "to train, previews not counted"),
            _fact(plan["steps"], "steps"),
            _fact(
                size_text(plan["bytes"]), f"memory of {size_text(plan['free_bytes'])} free ({plan['device']})"
            ),
            *facts,
        ]
    warning = (
        f'<p class="sd-hint warning" role="note">{escape(plan["advice"])}</p>' if plan.get("advice") else ""
    )
    if plan.get("fits") is False:
        warning += (
            '<p class="sd-problem" role="alert">This does not fit into the free memory: lower the batch size '
            "or the resolution, or switch gradient checkpointing on.</p>"
        )
    rows = "".join(
        f"<tr><th scope='row' title='{escape(key)}'>{escape(labels().get(key, key))}</th>"
        f"<td translate='no'>{escape(_value(value))}</td><td>{escape(page_words(reason))}</td></tr>"
        for key, value, reason in plan["defaults"]
    )
    return (
        f'<div class="sd-facts">{"".join(facts)}</div>{warning}<details class="sd-panel"><summary>'
        f"Filled in for you ({len(plan['defaults'])} settings, with reasons)</summary>"
        f'<div class="sd-scroll"><table class="sd-reasons"><tbody>{rows}</tbody></table></div></details>'
    )


def changed_html(raw: Mapping[str, Any]) -> str:
    """Return the settings that differ from automatic, each with a button that takes it back."""
    listed = [
        {"key": setting.key, "label": labels()[setting.key], "value": str(raw[setting.key])}
        for setting in changed(raw)
    ]
    return f'<sd-changed data="{escape(json.dumps(listed), quote=True)}"></sd-changed>' if listed else ""


def _fact(value: object, what: str) -> str:
    return f'<div class="sd-fact"><strong>{escape(str(value))}</strong><span>{escape(what)}</span></div>'


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def duration(seconds: float) -> str:
    """Return a time as people say it: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
