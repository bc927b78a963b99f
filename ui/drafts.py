"""What the forms hold, kept on disk, so that a reload or a browser crash loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.errors import OutputError
from sdlora.files import parse_json, write_json


class Drafts:
    """One file for each form, below the server's records."""

    def __init__(self, folder: Path) -> None:
        """Keep them in ``folder``, which is made when the first one is kept."""
        self._folder = folder

    def keep(self, form: str, values: Mapping[str, Any]) -> None:
        """Write what a form holds; a full disk is not an error here, as it must not interrupt the typing."""
        with suppress(OSError, OutputError):
            write_json(self._folder / f"{form}.json", dict(values))

    def kept(self, form: str) -> dict[str, Any]:
        """Return what a form held; empty when nothing was kept or it cannot be read."""
        with suppress(OSError, ValueError):
            values = parse_json((self._folder / f"{form}.json").read_text(encoding="utf-8"))
            return values if isinstance(values, dict) else {}
        return {}
