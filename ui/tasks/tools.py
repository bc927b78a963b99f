"""The functions behind ``sdlora export``, ``inspect``, ``merge``, ``resize`` and ``bake``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.exporting.export import export_adapter
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.inspecting.view import render

from ..worker import Emit


def export(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Write an adapter in another format and return the report with its proof."""
    emit.progress(0, 2, "writing and reading back")
    report = export_adapter(
        Path(arguments["source"]),
        str(arguments["format"]),
        _path(arguments.get("output")),
        dtype=arguments.get("dtype"),
        preview=_path(arguments.get("preview")),
        webui_folder=_path(arguments.get("webui")),
        overwrite=bool(arguments.get("overwrite")),
        name=arguments.get("name") or None,
        private=bool(arguments.get("private")),
    )
    return report.to_dict()


def inspect(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Return everything about an adapter file, and the text that the command line shows."""
    emit.progress(0, 1, "reading")
    summary = inspect_adapter(Path(arguments["file"]))
    return {"text": render(summary, width=100), **summary.to_dict()}


def merge(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Merge adapters into one and return the report with its text."""
    from sdlora.surgery.merge import merge_adapters

    sources = [(Path(source["file"]), float(source["weight"])) for source in arguments["sources"]]
    report = merge_adapters(
        sources,
        Path(arguments["output"]),
        method=str(arguments["method"]),
        density=arguments.get("density"),
        rank=arguments.get("rank"),
        overwrite=bool(arguments.get("overwrite")),
        report=True,
        progress=lambda done, total: emit.progress(done, total, "merging"),
    )
    return {"text": report.render(), **report.to_dict()}


def resize(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Write an adapter with fewer ranks and return the report with its text."""
    from sdlora.surgery.resize import resize_adapter

    report = resize_adapter(
        Path(arguments["source"]),
        Path(arguments["output"]),
        rank=arguments.get("rank"),
        energy=arguments.get("energy"),
        overwrite=bool(arguments.get("overwrite")),
        report=True,
        progress=lambda done, total: emit.progress(done, total, "resizing"),
    )
    return {"text": report.render(), **report.to_dict()}


def bake(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Write a checkpoint with an adapter in its weights and return the report with its text."""
    from sdlora.surgery.bake import bake_checkpoint

    report = bake_checkpoint(
        Path(arguments["checkpoint"]),
        [(Path(arguments["source"]), float(arguments["strength"]))],
        Path(arguments["output"]),
        overwrite=bool(arguments.get("overwrite")),
        report=True,
        progress=lambda done, total: emit.progress(done, total, "baking"),
    )
    return {"text": report.render(), **report.to_dict()}


def _path(text: Any) -> Path | None:
    return Path(text) if text else None
