"""The training settings of each folder of images: a new one starts automatic, a known one as it was left."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.config.schema import Config
from sdlora.demonstration.data import STYLE, demo_config
from sdlora.errors import SdloraError

from .drafts import TRAIN_FORM
from .forms import Setting, from_config, settings
from .site import Site
from .words import FIRST_LABELS

OF_THE_RUN = ("model.base", "data.folder", "output.name")
"""What is chosen for a run, not for its folder."""


def automatic(site: Site) -> dict[str, Any]:
    """Return what every control holds before anything was set: the best base that is known, and no more."""
    return from_config(Config()) | {"model.base": site.default_base()}


def demo_settings(site: Site, folder: Path) -> dict[str, Any]:
    """Return what every control holds for the demo, whose images lie in ``folder``."""
    return from_config(demo_config(site.paths.runs / STYLE, folder.parent)) | {"output.folder": ""}


def keep(site: Site, raw: Mapping[str, Any], tab: str) -> None:
    """Remember what the form holds, for this tab and for its folder."""
    site.drafts.keep(TRAIN_FORM, raw, tab)
    if folder := str(raw.get("data.folder") or "").strip():
        site.drafts.keep(_form_of(site, folder), raw)


def settings_for(site: Site, folder: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the controls hold for a folder that was chosen.

    Args:
        site: with the drafts.
        folder: the one that was chosen.
        before: what they hold for the folder before; of it only a base that the user chose stays.
    """
    raw = automatic(site)
    if before.get("model.base") and not _is_demo(site, str(before.get("data.folder") or "")):
        raw["model.base"] = before["model.base"]
    kept = site.drafts.kept(_form_of(site, folder))
    known = {setting.key: setting for setting in settings()}
    mine = {key for key in known if key in kept and key not in OF_THE_RUN and fits(known[key], kept[key])}
    return raw | {key: kept[key] for key in mine} | {"data.folder": folder}


def trigger_of(site: Site, folder: str) -> str:
    """Return the trigger word that a folder was given before; empty for a new one."""
    return str(site.drafts.kept(_form_of(site, folder)).get("data.trigger_word") or "")


def changed(raw: Mapping[str, Any]) -> list[Setting]:
    """Return the settings that differ from automatic, those that are always visible left out."""
    start = from_config(Config())
    return [
        setting
        for setting in settings()
        if setting.key in raw
        and setting.key not in FIRST_LABELS
        and not _same(raw[setting.key], start[setting.key])
    ]


def reset(site: Site, raw: Mapping[str, Any], key: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return what the controls hold when one setting, or ``all`` of them, is automatic again."""
    start = automatic(site)
    if key != "all":
        return dict(raw) | ({key: start[key]} if key in keys else {})
    return {name: raw[name] if name in FIRST_LABELS else start[name] for name in keys}


def fits(setting: Setting, held: Any) -> bool:
    """Return whether a control accepts a value that an older version of the form may have held."""
    return setting.kind != "choice" or held in ("", *setting.choices)


def _same(held: Any, start: Any) -> bool:
    return (held or "") == (start or "") if isinstance(start, str) or held is None else held == start


def _is_demo(site: Site, folder: str) -> bool:
    return same_folder(site, folder, str(site.paths.data / STYLE))


def same_folder(site: Site, folder: str | None, other: str) -> bool:
    """Return whether two texts name the same folder."""
    return bool(folder) and _real(site, str(folder)) == _real(site, other)


def _real(site: Site, folder: str) -> str:
    try:
        return str(site.paths.readable(folder))
    except SdloraError:
        return folder


def _form_of(site: Site, folder: str) -> str:
    return f"folder-{hashlib.sha256(_real(site, folder).encode('utf-8', 'replace')).hexdigest()[:20]}"
