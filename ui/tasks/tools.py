"""Export and inspection: the functions behind ``sdlora export`` and ``sdlora inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.export import export_adapter
from sdlora.inspection import inspect_adapter
from sdlora.inspection_view import render

from ..worker import Tell


def export(arguments: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Write an adapter in another format and return the report with its proof."""
    tell.progress(0, 2, "writing and reading back")
    report = export_adapter(
        Path(arguments["source"]),
        str(arguments["format"]),
        _path(arguments.get("output")),
        dtype=arguments.get("dtype"),
        preview=_path(arguments.get("preview")),
        webui_folder=_path(arguments.get("webui")),
        overwrite=bool(arguments.get("overwrite")),
        name=arguments.get("name") or None,
    )
    return report.to_dict()


def inspect(arguments: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Return everything an adapter file holds, and the text the command line shows."""
    tell.progress(0, 1, "reading")
    summary = inspect_adapter(Path(arguments["file"]))
    return {"text": render(summary, width=100), **summary.to_dict()}


def _path(text: Any) -> Path | None:
    return Path(text) if text else None
