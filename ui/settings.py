"""From a form's values to settings that may be run: valid, and inside the folders the user named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sdlora.config.schema import Config, fields, names_files
from sdlora.config.toml import load_config
from sdlora.data.reading.cache_folder import refuse_links_away
from sdlora.errors import ConfigError

from .forms import NOT_FOR_A_BROWSER, to_values
from .server.allowed_paths import AllowedPaths, PathRefused
from .server.uploads import folder_name

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def checked_config(paths: AllowedPaths, raw: Mapping[str, Any]) -> Config:
    """Return the settings that a form gives, with absolute paths and the run folder filled in.

    Raises:
        ConfigError: for all invalid settings at once.
        PathRefused: for a path outside the named folders.
        OutputError: for a cache folder in which links lead away.
    """
    values = to_values(raw)
    name = str(values.get("output.name") or "").strip()
    if name:
        values["output.name"] = name
    config = load_config(values=values)
    for key in NOT_FOR_A_BROWSER:
        if config.get(key):
            raise ConfigError(
                f"`{key}` works on the command line only: see the folders this server was given"
            )
    changes: dict[str, Any] = {}
    for key, field in fields():
        if names_files(field) and (text := config.get(key)) is not None:
            changes[key] = checked_source(paths, key.rpartition(".")[2], text)
    if config.output.folder is None:
        changes["output.folder"] = paths.runs / folder_name(config.output.name)
    for key, path in _paths(config):
        written = key in ("output.folder", "data.cache_folder")
        real = paths.writable(path) if written else paths.readable(path)
        if key == "data.cache_folder":
            refuse_links_away(real)
        if config.get(key) == path:
            changes[key] = real
    config = config.with_values(changes)
    assert config.output.folder is not None
    paths.writable(config.output.folder)
    return config


def data_settings(paths: AllowedPaths, raw: Mapping[str, Any], folder: Path) -> Config | None:
    """Return the settings in a form that decide what becomes of a folder's images.

    Args:
        paths: the server's folders.
        raw: what the form's controls hold.
        folder: the data set.

    Returns:
        None when the form is about another folder.

    Raises:
        ConfigError: for invalid settings.
        PathRefused: for a path in them outside the named folders.
    """
    named = str(raw.get("data.folder") or "").strip()
    try:
        about_it = bool(named) and paths.readable(named) == folder
    except PathRefused:
        about_it = False
    if not about_it:
        return None
    wanted = {key: held for key, held in raw.items() if key.startswith("data.") or key == "training.seed"}
    return checked_config(paths, wanted)


def folders_of(config: Config) -> list[Path]:
    """Return the folders whose captions a run reads."""
    data = config.data
    named = [data.folder, *(source.folder for source in data.sources)]
    named += [data.validation] if isinstance(data.validation, Path) else []
    return [folder.resolve() for folder in named if folder is not None]


def checked_base(paths: AllowedPaths, base: str) -> str:
    """Return a base that may be loaded, see :func:`checked_source`."""
    return checked_source(paths, "base", base)


def checked_source(paths: AllowedPaths, what: str, source: str) -> str:
    """Return a model that may be loaded: the built-in one, a hub id, or a path that may be read.

    Args:
        paths: the server's folders.
        what: the setting, for messages.
        source: its value.

    Raises:
        ConfigError: when nothing is named.
        PathRefused: for a path outside the named folders.
    """
    source = source.strip()
    if not source:
        raise ConfigError(f"{what}: choose one" + (", e.g. mini" if what == "base" else ""))
    is_file = source.lower().endswith(".safetensors")
    if source == "mini" or (HUB_ID.fullmatch(source) and not is_file and not (paths.home / source).exists()):
        return source
    path = paths.model(source)
    if not path.exists():
        raise ConfigError(
            f"{what} `{source}`: there is no such file or folder, and it is not a hub id (owner/name)"
        )
    return str(path)


def _paths(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield every path in the settings with its dotted key, including those inside lists and tables."""
    for section in type(config).model_fields:
        part = getattr(config, section)
        for name in type(part).model_fields:
            for path in _inside(getattr(part, name)):
                yield f"{section}.{name}", path


def _inside(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _inside(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _inside(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item)
