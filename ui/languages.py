"""The page's languages as far as the server has to do with them; the translating is done in the browser.

``web/words.js`` replaces each text where it is shown, by the table ``web/zh-CN.json``. Only reports, in which
no script may run, are translated here, by the same table.
"""

from __future__ import annotations

import re
from functools import cache
from html import escape, unescape
from pathlib import Path

from sdlora.files import parse_json

_WEB = Path(__file__).parent / "web"
_NAME = re.compile(r"\{([0-9a-zA-Z])\}")
_NUMBER = r"[-+]?[\d.,:/\xd7x ]*\d ?%?"
_DEPTH = 3  # of texts of the table in texts of the table
_STAYS = re.compile(r"(<style.*?</style>|<ol>.*?</ol>|<dd>.*?</dd>|<code>.*?</code>)", re.DOTALL)
"""What is the user's in a report, or a program's: prompts, values of settings, command lines."""
_SHOWN = re.compile(
    r"(?:(?<=>)|\A)([^<>]+)(?=<|\Z)|(?<= title=\")([^\"]+)|(?<= alt=\")([^\"]+)|(?<= aria-label=\")([^\"]+)"
)


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


def translated_report(page: str, tag: str) -> str:
    """Return a report in another language, as far as the table has its texts; unchanged for English.

    Args:
        page: HTML that sdlora wrote, with text in it that the user wrote.
        tag: of the language, as ``zh-CN``.
    """
    if tag not in _tables():
        return page
    parts = _STAYS.split(page)  # every second one stays
    parts[::2] = [_SHOWN.sub(lambda match: _shown(match[0], tag), part) for part in parts[::2]]
    return "".join(parts).replace('<html lang="en">', f'<html lang="{tag}">', 1)


def _shown(text: str, tag: str) -> str:
    plain = " ".join(unescape(text).split())
    rendered = _translation(plain, tag, _DEPTH)
    if rendered is None and plain.endswith("."):  # a remark of the program, made a sentence
        rendered = _translation(plain[0].lower() + plain[1:-1], tag, _DEPTH)
        rendered = None if rendered is None else f"{rendered}。"
    return text if rendered is None else escape(rendered)


def _translation(text: str, tag: str, depth: int) -> str | None:
    exact = _all_of(tag).get(text)
    if exact is not None or not depth:
        return exact
    for pattern, names, value in _patterns(tag):
        if (match := pattern.fullmatch(text)) is None:
            continue
        words = dict(zip(names, match.groups(), strict=True))
        held = {
            name: _translation(word, tag, depth - 1) if name.isupper() else word
            for name, word in words.items()
        }
        if None not in held.values():
            parts = _NAME.split(value)
            return "".join(part if n % 2 == 0 else str(held[part]) for n, part in enumerate(parts))
    return None


@cache
def _all_of(tag: str) -> dict[str, str]:
    """Return a table with what may stand in lists of names, which only reports need here."""
    table = parse_json((_WEB / f"{tag}.json").read_text(encoding="utf-8"))
    return {**table["names"], **table["page"]}


@cache
def _patterns(tag: str) -> list[tuple[re.Pattern[str], list[str], str]]:
    """Return the table's patterns with the names in them, those with the most text first."""
    known = []
    for key, value in _all_of(tag).items():
        parts = _NAME.split(key)
        if len(parts) == 1:
            continue
        pieces = [f"({_NUMBER})" if name.isdigit() else "(.+?)" for name in parts[1::2]]
        text = "".join(
            re.escape(plain) + piece for plain, piece in zip(parts[::2], [*pieces, ""], strict=True)
        )
        known.append((len("".join(parts[::2])), re.compile(text, re.DOTALL), parts[1::2], value))
    return [entry[1:] for entry in sorted(known, key=lambda entry: -entry[0])]
