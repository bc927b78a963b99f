"""The drawn images: their list, and the strips, grids and comparisons that the page shows.

The page's own elements are written as HTML, with their data as one escaped attribute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from typing import Any
from urllib.parse import quote

from sdlora.files import is_text, list_files

from .server.allowed_paths import AllowedPaths


def list_images(paths: AllowedPaths, limit: int) -> dict[str, Any]:
    """Return the newest drawn PNGs as ``{"total": n, "images": [{file, name, changed}]}``.

    Links that lead to nothing, or out of the server's folders, are passed over, and so are names that are not
    UTF-8: they cannot be asked for.
    """
    dated, folder = [], paths.images
    for file in list_files(folder, ".png"):
        if not is_text(file) or (file.is_symlink() and not paths.reaches(file)):
            continue
        with suppress(OSError):  # removed meanwhile
            state = file.stat()
            if state.st_size and file.is_file():
                dated.append((state.st_mtime_ns, file))
    dated.sort(reverse=True)
    images = [
        {"file": str(file), "name": str(file.relative_to(folder)), "changed": changed}
        for changed, file in dated[:limit]
    ]
    return {"total": len(dated), "images": images}


def file_url(path: str) -> str:
    """Return the URL of a file on this server."""
    return f"/sdlora/file?path={quote(path)}"


def image_html(image: Mapping[str, Any], seconds: float | None = None) -> str:
    """Return one image with the settings it was drawn with."""
    took = f'<span class="sd-dim">drawn in {seconds:.1f} s</span>' if seconds is not None else ""
    return (
        f'<figure class="sd-main"><img translate="no" src="{escape(file_url(image["file"]), quote=True)}" '
        f'alt="{escape(image["text"].splitlines()[0], quote=True)}">'
        f"<figcaption>{took}<details><summary>Settings in the PNG</summary>"
        f"<pre translate='no'>{escape(image['text'])}</pre></details></figcaption></figure>"
    )


def strip_html(
    images: Sequence[Mapping[str, Any]], strengths: Sequence[float], total: int, chosen: float = 1.0
) -> str:
    """Return a strip of strengths, to be scrubbed in the browser."""
    data = {
        "images": [{"file": image["file"]} for image in images],
        "strengths": list(strengths[: len(images)]),
        "total": total,
        "chosen": chosen,
    }
    return _element("sd-strip", data)


def compare_html(before: str, after: str, labels: tuple[str, str]) -> str:
    """Return two images, one over the other, with a line between them that can be moved."""
    return _element("sd-compare", {"before": before, "after": after, "labels": labels})


def grid_html(
    rows: Sequence[Mapping[str, str]], columns: Sequence[float], cells: Mapping[tuple[int, int], str]
) -> str:
    """Return a grid of checkpoints x strengths whose images can be chosen.

    Args:
        rows: ``label`` and ``file`` of each checkpoint.
        columns: strengths.
        cells: (row, column) -> image file.
    """
    named = {f"{row},{column}": file for (row, column), file in cells.items()}
    return _element("sd-grid", {"rows": list(rows), "columns": list(columns), "cells": named})


def table_html(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[int, int], str]) -> str:
    """Return images in a table; each leads to the image alone.

    Args:
        rows: what stands beside each row.
        columns: what stands above each column; empty texts for none.
        cells: (row, column) -> image file, of those that are drawn.
    """

    def cell(row: int, column: int) -> str:
        file = cells.get((row, column))
        if file is None:
            return '<td><div class="sd-empty"></div></td>'
        name = " ".join(part for part in (rows[row], columns[column]) if part)
        url = escape(file_url(file), quote=True)
        image = f'<img src="{url}" alt="{escape(name, quote=True)}">'
        return f'<td translate="no"><a href="{url}" target="_blank">{image}</a></td>'

    head = "".join(f'<th scope="col" class="sd-names">{escape(column)}</th>' for column in columns)
    lines = "".join(
        f'<tr><th scope="row" class="sd-names">{escape(label)}</th>'
        f"{''.join(cell(row, n) for n in range(len(columns)))}</tr>"
        for row, label in enumerate(rows)
    )
    return (
        f'<div class="sd-scroll"><table class="sd-grid"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _element(name: str, data: object) -> str:
    return f'<{name} data="{escape(json.dumps(data), quote=True)}"></{name}>'
