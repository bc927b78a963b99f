"""The page's languages as far as the server has to do with them; the translating is done in the browser.

``web/words.js`` replaces each text where it is shown, by the table ``web/zh-CN.json``.
"""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path

from sdlora.files import parse_json

_WEB = Path(__file__).parent / "web"


def with_language(page: str) -> str:
    """Return an HTML page that decides, before all else in it, which language it is read in."""
    return page.replace("<head>", f"<head><script>{_deciding()}</script>", 1)


def in_each_language(text: str) -> str:
    """Return a text as HTML in every language, for pages that have no script that translates."""
    texts = {"en": text} | {tag: page.get(text, text) for tag, page in _tables().items()}
    return "".join(f'<span lang="{tag}">{escape(shown)}</span>' for tag, shown in texts.items())


@cache
def one_language() -> str:
    """Return the style of pages with :func:`in_each_language`: it hides what is in another language."""
    tags = ["en", *_tables()]
    hidden = (f':root[lang="{tag}"] span[lang]:not([lang="{tag}"])' for tag in tags)
    return f"{','.join(hidden)}{{display:none}}"


@cache
def _deciding() -> str:
    return (_WEB / "language.js").read_text(encoding="utf-8")


@cache
def _tables() -> dict[str, dict[str, str]]:
    files = sorted(_WEB.glob("*-*.json"))
    return {file.stem: parse_json(file.read_text(encoding="utf-8"))["page"] for file in files}
