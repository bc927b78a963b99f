"""Messages of sdlora in the words of the page: settings by what stands on their fields, not by their keys."""

from __future__ import annotations

import re
from functools import cache

from .forms import SECTION_TITLES, settings

FIRST_LABELS = {
    "model.base": "Base model",
    "data.folder": "Folder of images",
    "output.name": "Name of the LoRA",
    "data.trigger_word": "Trigger word",
}
"""Labels of the fields that are always visible."""
_NAME = r"([a-z]+\.[a-z_]+)"
_KEY = re.compile(rf"`{_NAME}(?:=([^`]*))?`|(?<![\w./\\`-]){_NAME}(?![\w/\\]|\.\w)(?:=([^\s`,;]+))?")


@cache
def labels() -> dict[str, str]:
    """Return dotted key -> what stands on the page, with the section where a field is folded away."""
    named = {
        setting.key: f"{SECTION_TITLES[section]} > {setting.label}"
        for setting in settings()
        if (section := setting.key.partition(".")[0]) in SECTION_TITLES
    }
    return named | FIRST_LABELS


def page_words(text: str) -> str:
    """Return a message with every setting named as on the page: ``data.trigger_word`` is “Trigger word”."""

    def named(match: re.Match[str]) -> str:
        label, value = labels().get(match[1] or match[3]), match[2] or match[4]
        if label is None:
            return match[0]
        return f"“{label}”" + (f" = {value.strip()}" if value else "")

    return _KEY.sub(named, text)
