"""The previews' prompts as a table: what it says becomes the lines of the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from sdlora.config.prompt_lines import MOST_LINES, PromptLine, read_line
from sdlora.errors import ConfigError

from .shared import Shell, told

KEYS = ("sample.prompts", "sample.prompt_options")
"""The settings that the table changes."""


def build() -> None:
    """Put the table into the current block; its element reads the setting's field."""
    gr.HTML("<sd-prompts></sd-prompts>", elem_id="prompt-rows")


def connect(shell: Shell, controls: Mapping[str, Any], plan_after: Callable[[Any], object]) -> None:
    """Have the table's rows change the settings.

    Args:
        shell: with the hidden field that the table writes.
        controls: of the form, by key.
        plan_after: called with the event, to plan anew.
    """

    def take(message: str) -> list[Any]:
        text, options = from_rows(told(message, "lines"))
        return [text, "true" if options else gr.skip()]

    plan_after(
        shell.preview_rows.change(
            take, shell.preview_rows, [controls[key] for key in KEYS], show_progress="hidden"
        )
    )


def from_rows(lines: Any) -> tuple[str, bool]:
    """Return what the setting's field holds for a table's lines, and whether they have options.

    Raises:
        ConfigError: when these are no lines, which the page itself never sends.
    """
    if (
        not isinstance(lines, list)
        or len(lines) > MOST_LINES
        or not all(isinstance(line, str) and len(line.splitlines()) == 1 for line in lines)
    ):
        raise ConfigError("not a message of this page; reload it")
    return "\n".join(lines), any(_has_options(line) for line in lines)


def _has_options(line: str) -> bool:
    try:
        return read_line(line) != PromptLine(line.strip())
    except ConfigError:
        return True  # the plan says what is wrong with it
