"""The function behind the page's captioning: the same as ``sdlora caption``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdlora.data.captioning.caption import Captioning, CaptionSettings
from sdlora.data.captioning.tag_lists import TagChoice, thresholds_of
from sdlora.data.captioning.wording import Wording, tags_of

from ..worker import Emit


def settings_of(values: Mapping[str, Any]) -> CaptionSettings:
    """Return the settings in the fields of the page; empty ones are as in ``sdlora caption``.

    Raises:
        ConfigError: for values that are out of range.
        ValueError: for a number that is none.
    """

    def text(name: str) -> str:
        return str(values.get(name) or "").strip()

    choice = TagChoice(thresholds_of(text("threshold").split()), tuple(tags_of(text("blacklist"))))
    most = text("max_tokens")
    wording = Wording(text("prefix"), text("trigger") or None, int(most) if most else None)
    return CaptionSettings(
        text("model"),
        prompt=text("prompt") or None,
        batch_size=int(text("batch_size") or 4),
        device=text("device") or None,
        wording=wording,
        tags=choice,
        overwrite=values.get("overwrite") is True,
    )


def caption(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Caption a folder, or show what eight of its images would get; return the report or the preview."""
    with Captioning(Path(arguments["folder"]), settings_of(arguments["settings"])) as work:
        counts = {"todo": len(work.todo), "kept": work.kept, "continued": work.continued}
        emit.progress(0, max(1, len(work.todo)), "loading the model")
        if arguments.get("preview"):
            shown = work.preview(progress=lambda done, total: emit.progress(done, total, "preview"))
            return counts | {"preview": [asdict(captioned) for captioned in shown]}
        report = work.run(lambda done, total: emit.progress(done, total, "captioning"))
        return counts | report.to_dict()
