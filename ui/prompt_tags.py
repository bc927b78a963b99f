"""Adapters that a prompt of the page names, found among those that the page lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.adapters.strength import pair_of
from sdlora.errors import ConfigError, shown
from sdlora.generation.lora_tags import refuse_tags, take_tags

from .site import Site

Row = Sequence[Mapping[str, Any]]
"""Adapters that are drawn together: ``file``, ``denoiser`` and ``text``, its strengths."""


def adapters_by_name(site: Site) -> dict[str, str]:
    """Return the files of the listed adapters by their label and by their own name."""
    listed = {choice.label: choice.path for choice in site.adapters()}
    return {Path(path).stem: path for path in listed.values()} | listed


def with_tagged(
    site: Site, prompt: str, negative: str, rows: Sequence[Row]
) -> tuple[str, list[list[Mapping[str, Any]]]]:
    """Return a prompt without its ``<lora:...>`` tags, and the rows with the adapters that they name.

    A row without adapters beside others shows the base alone, and stays so.

    Raises:
        ConfigError: for a tag that says nothing clear or stands in the negative prompt, or an adapter that is
            not listed, saying where it was looked for.
    """
    plain, tags = take_tags(prompt)
    refuse_tags(negative)
    known = adapters_by_name(site)
    named: list[Mapping[str, Any]] = []
    for name, strength in tags.items():
        if name not in known:
            raise ConfigError(
                f"<lora:{shown(name, 60)}>: there is no such adapter; looked in {site.paths.runs} and the "
                "models' folders that this page may read; start the page with --allow DIR for another one"
            )
        denoiser, text = pair_of(strength)
        named.append({"file": known[name], "denoiser": denoiser, "text": text})
    return plain, [[*row, *named] if row or len(rows) == 1 else list(row) for row in rows]
