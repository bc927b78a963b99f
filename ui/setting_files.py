"""Settings of the form as a whole: presets, TOML, and other trainers' settings put into it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from sdlora.config.advice import toml_problem
from sdlora.config.foreign.programs import Imported, import_settings
from sdlora.config.presets import OF_ONE_RUN, find_preset, save_preset
from sdlora.config.schema import Config
from sdlora.config.toml import given_toml, load_config
from sdlora.errors import ConfigError, shown
from sdlora.files import parse_toml

from .forms import NOT_FOR_A_BROWSER, from_config, to_values
from .words import FIRST_LABELS, labels

MOST_CHARS = 2**18
"""Of a text of settings that is taken from the page."""


class Filled(NamedTuple):
    """What the form's controls are to hold, and what was changed, in words."""

    raw: dict[str, Any]
    html: str


def with_preset(raw: Mapping[str, Any], name: str, *, users: bool = True) -> Filled:
    """Return the form with a preset's settings in it; what the preset does not name stays.

    Args:
        raw: what the controls hold.
        name: of the preset.
        users: whether it may be one of the user's own, which visitors of an open server do not see.

    Raises:
        ConfigError: for a name that is unknown, or a preset that is not valid.
    """
    preset = find_preset(name)
    if preset.users and not users:
        raise ConfigError(f"there is no preset `{shown(name)}` for visitors")
    values = {key: value for key, value in preset.values().items() if key not in NOT_FOR_A_BROWSER}
    # what the run is of stays the user's: a preset may hold it, but it was chosen for its other settings
    values = {key: value for key, value in values.items() if key not in OF_ONE_RUN}
    filled = from_config(Config().with_values({**values, "output.presets": (name,)}))
    changes = {key: (raw.get(key), filled[key]) for key in values if raw.get(key) != filled[key]}
    taken = {key: filled[key] for key in (*values, "output.presets")}
    return Filled({**raw, **taken}, _changes_html(f"Preset {name}: {preset.about}.", changes))


def as_toml(raw: Mapping[str, Any]) -> str:
    """Return what the form holds as TOML, without what is left at its default.

    Raises:
        ConfigError: for controls whose value cannot be read, and for contradictions.
    """
    return given_toml(load_config(values=to_values(raw)))


def from_text(raw: Mapping[str, Any], text: str) -> Filled:
    """Return the form as a text says it: our TOML, or another trainer's settings file or command line.

    Everything that the text leaves out becomes automatic, but for base, folder, name and trigger word. Files
    that a foreign text names are not read.

    Raises:
        ConfigError: naming what is wrong, for a text that is neither or holds invalid settings.
    """
    if len(text) > MOST_CHARS:
        raise ConfigError(f"settings: longer than {MOST_CHARS} characters, which settings are not")
    if not text.strip():
        raise ConfigError("settings: paste a TOML file, or the settings or command line of another trainer")
    values, notes = _values_of(text)
    for key in NOT_FOR_A_BROWSER:
        if values.pop(key, None):
            raise ConfigError(f"`{key}` works on the command line only")
    filled = from_config(load_config(values=values))
    for key in FIRST_LABELS:
        if key not in values:
            filled[key] = raw.get(key, filled[key])
    changes = {key: (raw.get(key), filled[key]) for key in filled if key in raw and raw[key] != filled[key]}
    return Filled(filled, _changes_html(f"{len(values)} settings taken.", changes) + notes)


def keep_form(raw: Mapping[str, Any], name: str) -> str:
    """Save what the form sets as a preset of the user's; return its file's path.

    Raises:
        ConfigError: when nothing is set, for invalid settings, or a name that no file can have.
        OutputError: when there is a preset of that name, or it cannot be written.
    """
    values = {key: value for key, value in to_values(raw).items() if key not in OF_ONE_RUN}
    if not values:
        raise ConfigError("preset: every setting is automatic; there is nothing to keep")
    return str(save_preset(name, values, "Settings saved on the page"))


def _values_of(text: str) -> tuple[dict[str, Any], str]:
    """Return the settings of a text, and remarks about those of another trainer as HTML."""
    problem, tree = "", None
    try:
        tree = parse_toml(text)
    except ValueError as error:
        problem = toml_problem(error, text)
    if tree is not None and tree.keys() <= Config.model_fields.keys():
        parts = {section: part for section, part in tree.items() if isinstance(part, dict)}
        if len(parts) == len(tree):
            return {
                f"{section}.{name}": value for section in parts for name, value in parts[section].items()
            }, ""
    start = text.lstrip()[:1]
    if tree is None and start == "[":
        raise ConfigError(f"settings: {problem}")
    first_problem = ""
    for kind in ["json"] if start == "{" else ["toml"] if tree is not None else ["", "yaml"]:
        try:
            imported = import_settings(text, kind=kind, alone=True)
        except ConfigError as error:
            first_problem = first_problem or str(error)
        else:
            return dict(imported.values), _account_html(imported)
    raise ConfigError(f"settings: neither sdlora's nor of a trainer that it reads: {first_problem}")


def _changes_html(title: str, changes: Mapping[str, tuple[Any, Any]]) -> str:
    named = labels()
    rows = "".join(
        f"<tr><th scope='row'>{escape(named[key])}</th><td>{_shown(before)}</td><td>{_shown(after)}</td></tr>"
        for key, (before, after) in changes.items()
    )
    if not rows:
        return f'<p class="sd-dim" role="status">{escape(title)} Nothing had to change.</p>'
    return (
        f'<p class="sd-dim" role="status">{escape(title)} It changed:</p><div class="sd-scroll">'
        "<table class='sd-reasons'><thead><tr><th>setting</th><th>before</th><th>now</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _account_html(imported: Imported) -> str:
    """Return what became of each setting of another trainer, and the notes."""
    rows = "".join(
        f"<tr><th scope='row' translate='no'>{escape(row.setting)}</th><td>{escape(str(row.outcome))}</td>"
        f"<td translate='no'>{escape(row.ours)}</td><td>{escape(row.reason)}</td></tr>"
        for row in imported.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in imported.notes)
    return (
        f"<details class='sd-panel'><summary>What became of {len(imported.rows)} settings of "
        f"{escape(imported.program)}</summary><div class='sd-scroll'><table class='sd-reasons'><tbody>{rows}"
        f"</tbody></table></div><ul>{notes}</ul></details>"
    )


def _shown(value: Any) -> str:
    """Return a setting's value as HTML; what the user gave stays in every language."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "automatic" if value in ("", None) else f"<span translate='no'>{escape(str(value))}</span>"
