"""The images that were drawn, newest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def list_images(folder: Path, limit: int) -> dict[str, Any]:
    """Return the newest PNGs below a folder as ``{"total": n, "images": [{file, name, changed}]}``."""
    dated = []
    for file in folder.rglob("*.png") if folder.is_dir() else ():
        if not file.name.startswith(".") and (state := file.stat()).st_size:
            dated.append((state.st_mtime_ns, file))
    dated.sort(reverse=True)
    images = [
        {"file": str(file), "name": str(file.relative_to(folder)), "changed": changed}
        for changed, file in dated[:limit]
    ]
    return {"total": len(dated), "images": images}
