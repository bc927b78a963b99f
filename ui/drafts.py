"""What the forms hold, kept on disk, so that a reload or a browser crash loses nothing.

Each tab of the browser has drafts of its own, by a word that it keeps for as long as it is open. A new tab
begins with the newest draft of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.errors import OutputError
from sdlora.files import parse_json, write_json

TRAIN_FORM, DRAW_FORM = "train", "generate"
MOST_TABS = 40
"""Tabs whose drafts are kept; those that were not changed for longest go first."""
_TAB = re.compile(r"[0-9a-f]{8,32}")


class Drafts:
    """Two files for each form and tab, below the server's records: the tab's own, and the newest of all."""

    def __init__(self, folder: Path) -> None:
        """Keep them in ``folder``, which is made when the first one is kept."""
        self._folder = folder

    def keep(self, form: str, values: Mapping[str, Any], tab: str = "") -> None:
        """Write what a form holds; a full disk is not an error here, as it must not interrupt the typing.

        Args:
            form: its name.
            values: what its controls hold.
            tab: the browser tab's word; one that is none, as from a page without scripts, is passed over.
        """
        with suppress(OSError, OutputError):
            write_json(self._folder / f"{form}.json", dict(values))
            if _TAB.fullmatch(tab):
                write_json(self._folder / f"{form}-{tab}.json", dict(values))
                self._thin_out(form)

    def kept(self, form: str, tab: str = "") -> dict[str, Any]:
        """Return what a form held in this tab, or else in the tab that was used last.

        It is empty when nothing was kept or it cannot be read.
        """
        names = [f"{form}-{tab}.json"] if _TAB.fullmatch(tab) else []
        for name in (*names, f"{form}.json"):
            with suppress(OSError, ValueError):
                values = parse_json((self._folder / name).read_text(encoding="utf-8"))
                if isinstance(values, dict):
                    return values
        return {}

    def _thin_out(self, form: str) -> None:
        files = list(self._folder.glob(f"{form}-*.json"))
        if len(files) > MOST_TABS:
            for file in sorted(files, key=lambda file: file.stat().st_mtime)[:-MOST_TABS]:
                file.unlink(missing_ok=True)
