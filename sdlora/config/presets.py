"""Presets: settings under a name, those that come with the program and the user's own.

A preset is a TOML file as ``--config`` reads it; its first comment line says what it is for. The program's
are the files of ``configs/``, the user's those of :func:`own_folder`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError, shown
from ..files import name_problem, shipped_folder, write_text
from .schema import Config, fields
from .toml import given_toml, load_config

_ANY_BASE = ("style", "subject", "detailed-subject", "small-file", "low-memory")
"""Those for any base, in the order of a list; what else there is follows by name."""

OF_ONE_RUN = (
    "model.base",
    "data.folder",
    "data.sources",
    "data.trigger_word",
    "output.folder",
    "output.name",
    "output.description",
    "output.license",
    "output.presets",
)
"""Settings that say what is trained, not how: kept out of a preset that is made of a run's settings."""


@dataclass(frozen=True)
class Preset:
    """A named file of settings.

    Attributes:
        name: the file's, without ``.toml``.
        file: where it lies.
        about: its first comment line, in one sentence.
        users: whether it is the user's.
    """

    name: str
    file: Path
    about: str
    users: bool

    def values(self) -> dict[str, Any]:
        """Return its settings, dotted key -> value, validated.

        Raises:
            ConfigError: naming the file, for what is no valid setting.
        """
        config = load_config(self.file)
        given = config.model_dump(exclude_unset=True)
        keys = [f"{section}.{name}" for section in given for name in given[section]]
        return {key: config.get(key) for key in keys}


def own_folder() -> Path:
    """Return where the user's presets lie: below $SDLORA_CONFIG_FOLDER, or the user's config folder."""
    from platformdirs import user_config_path

    chosen = os.environ.get("SDLORA_CONFIG_FOLDER")
    return (Path(chosen) if chosen else user_config_path("sdlora", appauthor=False)) / "presets"


def presets() -> list[Preset]:
    """Return all presets: the program's for any base, those for one family, then the user's.

    A preset of the user's takes the place of the program's of the same name.
    """
    shipped = {file.stem: Preset(file.stem, file, _about(file), users=False) for file in _shipped()}
    order = [name for name in _ANY_BASE if name in shipped] + sorted(set(shipped) - set(_ANY_BASE))
    mine = {file.stem: Preset(file.stem, file, _about(file), users=True) for file in _files(own_folder())}
    return [shipped[name] for name in order if name not in mine] + list(mine.values())


def find_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ConfigError: with the list, when there is none.
    """
    there = {preset.name: preset for preset in presets()}
    if name in there:
        return there[name]
    close = difflib.get_close_matches(name, there, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"there is no preset `{shown(name)}`{hint}; there are {', '.join(there)}")


def preset_values(names: Sequence[str]) -> dict[str, Any]:
    """Return the settings of several presets, later ones first in rank, and the note of which they were.

    Raises:
        ConfigError: for a name that is unknown or given twice, or a file that is no valid preset.
    """
    values: dict[str, Any] = {}
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"preset `{shown(name)}`: is given twice; once is enough")
        values |= find_preset(name).values()
    return values | ({"output.presets": tuple(names)} if names else {})


def save_preset(name: str, values: Mapping[str, Any], about: str) -> Path:
    """Write a preset of the user's from settings, dotted key -> value; return its file.

    Raises:
        ConfigError: for settings that are not valid, or a name that no file can have.
        OutputError: when there is one of that name already, or it cannot be written.
    """
    name = name.strip()
    if not name:
        raise ConfigError("name of the preset: give it one")
    if problem := name_problem(name):
        raise ConfigError(f"name of the preset `{shown(name)}`: {problem}")
    file = own_folder() / f"{name}.toml"
    if file.exists():
        raise OutputError(f"{file}: there is a preset of that name; choose another name, or remove that file")
    config = load_config(values=values)
    line = " ".join(about.split()) or f"Settings saved as {name}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{file.parent}: cannot be made ({error.strerror}); check its permissions"
        ) from None
    write_text(file, f"# {line}\n\n{given_toml(config)}")
    return file


def keep_preset(name: str, source: Path) -> Path:
    """Keep the settings of a TOML file as a preset of the user's, without what belongs to one run alone.

    Raises:
        ConfigError: for a file that is no valid settings file, or a name that no file can have.
        OutputError: when there is one of that name already, or it cannot be written.
    """
    config = load_config(source)
    given = {key: config.get(key) for key, _ in fields() if config.get(key) != Config().get(key)}
    kept = {key: value for key, value in given.items() if key not in OF_ONE_RUN}
    if not kept:
        raise ConfigError(f"{source}: holds no setting that differs from the default; nothing to keep")
    return save_preset(name, kept, _about(source))


def differences(config: Config, preset: Preset) -> dict[str, tuple[Any, Any]]:
    """Return what a preset would change in settings: dotted key -> (value now, value of the preset)."""
    return {
        key: (config.get(key), value) for key, value in preset.values().items() if config.get(key) != value
    }


def _shipped() -> list[Path]:
    folder = shipped_folder("configs")
    return _files(folder) if folder else []


def _files(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(file for file in folder.glob("*.toml") if not file.name.startswith("."))
    return []


def _about(file: Path) -> str:
    """Return the first line of a file if it is a comment, else nothing."""
    with suppress(OSError, UnicodeDecodeError), file.open(encoding="utf-8-sig") as text:
        line = text.readline(1000).strip()
        if line.startswith("#"):
            return line.lstrip("# ").rstrip(":. ")
    return ""
