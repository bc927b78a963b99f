"""How the pages send to each other: fields that one page sets and another reads; shared bits of HTML."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from sdlora.errors import ConfigError
from sdlora.files import parse_json

from ..forms import number
from ..site import Choice
from ..words import page_words


@dataclass
class Shell:
    """The page around the tabs.

    Attributes:
        tabs: to switch between pages.
        folder: the chosen data set, for the training page.
        trigger: its trigger word.
        demo: set when the demo's images were chosen.
        try_run: job whose adapter is to be used for drawing.
        export_run: job whose adapter is to be exported.
        clone_run: job whose settings are to be copied into the form.
        chosen_cell: checkpoint and strength clicked in a grid.
        import_png: image of the gallery whose settings are to be used.
        reset_setting: key of the training setting that is to be automatic again; ``all`` for all of them.
        tab_word: the browser tab's word, which its drafts go by; set when the page is there.
        use_masks: folder of masks that were painted, for the training page.
        preview_rows: the previews' prompts as their table has them.
        word: the trigger word's field on the first page.
        opened: everything there that the opening of a folder changes.
        opened_by_hand: sessions in which a folder was opened since the page is there.
    """

    tabs: gr.Tabs
    folder: gr.Textbox
    trigger: gr.Textbox
    demo: gr.Textbox
    try_run: gr.Textbox
    export_run: gr.Textbox
    clone_run: gr.Textbox
    chosen_cell: gr.Textbox
    import_png: gr.Textbox
    reset_setting: gr.Textbox
    tab_word: gr.Textbox
    use_masks: gr.Textbox
    preview_rows: gr.Textbox
    word: gr.Textbox = field(init=False)
    opened: list[Any] = field(init=False)
    opened_by_hand: set[str | None] = field(init=False, default_factory=set)


def choices(listed: Iterable[Choice]) -> list[tuple[str, str]]:
    """Return choices in the form a dropdown takes."""
    return [(choice.label, choice.path) for choice in listed]


def checked_number(label: str, text: str, *, whole: bool = False) -> float | int | None:
    """Return the number in a text field that may be empty.

    Raises:
        ConfigError: when it holds something else.
    """
    try:
        return number(text, whole=whole)
    except ValueError as error:
        raise ConfigError(f"{label} `{text}`: {error}") from None


def told(message: str, key: str) -> Any:
    """Return what an element of the page says in a hidden field, e.g. the id of a job.

    Raises:
        ConfigError: when it says nothing of the kind, which the page itself never does.
    """
    try:
        return parse_json(message)[key]
    except (ValueError, LookupError, TypeError):
        raise ConfigError("not a message of this page; reload it") from None


def problem(text: str) -> str:
    """Return an error as HTML that screen readers announce, in the words of the page."""
    return f'<p class="sd-problem" role="alert">{escape(page_words(text))}</p>'


def hint(text: str) -> str:
    """Return a remark as HTML."""
    return f'<p class="sd-dim">{escape(text)}</p>'


def working(done: int, total: int, note: str) -> str:
    """Return a progress bar as HTML."""
    share = min(1.0, done / total) if total else 0.0
    return (
        f'<div class="sd-working" role="status"><progress max="1" value="{share:.3f}" '
        f'aria-label="{escape(note)}"></progress><span>{escape(note)} …</span></div>'
    )


class Pause:
    """Tells whether the typing pauses: of several events in a row only the last one goes on."""

    def __init__(self, seconds: float = 0.4) -> None:
        """Wait that long for a further event."""
        self._seconds = seconds
        self._newest: dict[str | None, int] = {}

    def after(self, session: str | None) -> bool:
        """Wait, and return whether this session's event is still the newest."""
        number = self._newest[session] = self._newest.get(session, 0) + 1
        time.sleep(self._seconds)
        return self._newest[session] == number


def data_set_html(folder: str, word: str, resolution: int) -> str:
    """Return the element that shows a data set; nothing for no folder."""
    if not folder:
        return ""
    attributes = {"folder": folder, "trigger": word.strip(), "resolution": str(resolution)}
    written = " ".join(f'{name}="{escape(value, quote=True)}"' for name, value in attributes.items())
    return f"<sd-dataset {written}></sd-dataset>"
