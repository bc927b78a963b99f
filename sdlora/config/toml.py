"""Reads and writes settings: TOML, ``key=value`` texts and ready values; reports all problems at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from ..errors import ConfigError, shown
from ..files import parse_toml, write_text
from .advice import explain, nearest, of_another_trainer, toml_problem, where
from .contradictions import contradictions
from .schema import Config, sections

MOST_PROBLEMS = 50  # explained at once: each is compared with the names of all settings


def load_config(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    presets: Mapping[str, Any] | None = None,
    schema: type[Config] | None = None,
) -> Config:
    """Read settings from a TOML file, presets, ``key=value`` texts, then ready values (last one wins).

    Args:
        file: TOML file with the sections of :class:`Config`.
        overrides: texts such as ``training.steps=40``; the value is TOML, or else a plain string.
        values: dotted key to value, as the command line's own flags give them; ``None`` is skipped.
        presets: dotted key to value, as :func:`sdlora.config.presets.preset_values` gives them.
        schema: the tree of settings; another one may allow more than the program's own (an optimizer, say).

    Raises:
        ConfigError: naming every unknown key, bad value and contradiction at once.
    """
    problems: list[str] = []
    tree = _read_toml(file) if file else {}
    typed: dict[str, str] = {}
    for key, value in (presets or {}).items():
        _put(tree, key, value, problems)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or key.count(".") != 1:
            hint = nearest(key)
            problems.append(f"`{shown(text)}`: settings are given as section.name=value{hint}")
            continue
        typed[key] = value
        _put(tree, key, _parse_value(value), problems)
    for key, value in (values or {}).items():
        if value is not None:
            typed.pop(key, None)
            _put(tree, key, value, problems)
    config, more = _validate(tree, schema or Config, typed)
    problems += more
    if problems and file:
        problems += of_another_trainer(tree, file)
    if problems:
        raise ConfigError(_listing(problems, file))
    assert config is not None
    return config


def read_value(key: str, text: str) -> Any:
    """Return what a text says for one setting that is a word, a number or a path.

    Raises:
        ConfigError: for a value that it cannot have.
    """
    section, name = key.split(".")
    try:
        return getattr(sections()[section].model_validate({name: text}), name)
    except ValidationError as error:
        problems = [{**item, "loc": (section, *item["loc"])} for item in error.errors()]
        raise ConfigError("; ".join(explain(problem, {}) for problem in problems)) from None


def save_config(config: Config, file: Path) -> None:
    """Write all set values as TOML, each under its help text; unset ones are left out."""
    write_text(file, _toml_text(config, explained=True))


def given_toml(config: Config) -> str:
    """Return as TOML what was given in settings; what has its default value is left out."""
    return _toml_text(config, explained=False)


def _toml_text(config: Config, *, explained: bool) -> str:
    """Return settings by section as TOML: all with their help text, or those that are not the default."""
    lines: list[str] = []
    tree = config.model_dump(mode="json", exclude_none=explained, exclude_defaults=not explained)
    for section in Config.model_fields:
        values = tree.get(section, {})
        if not values and not explained:
            continue
        lines.append(f"[{section}]")
        tables: list[str] = []
        for name, field in type(getattr(config, section)).model_fields.items():
            if name not in values:
                continue
            text = [f"# {' '.join((field.description or '').split())}"] if explained else []
            if _is_tables(values[name]):  # tables end the section they stand in, so they come last
                tables += text
                tables += [f"[[{section}.{name}]]\n{tomli_w.dumps(table).strip()}" for table in values[name]]
            else:
                lines += [*text, toml_line(name, values[name])]
        lines += [*tables, ""]
    return "\n".join(lines)


def toml_line(name: str, value: Any) -> str:
    """Return one setting as TOML; a table on one line, as a header would start another section."""
    if not isinstance(value, dict):
        return tomli_w.dumps({name: value}).strip()
    inner = ", ".join(tomli_w.dumps({key: item}).strip() for key, item in value.items())
    return f"{name} = {{ {inner} }}" if inner else f"{name} = {{}}"


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _read_toml(file: Path) -> dict[str, Any]:
    text = ""
    try:
        text = file.read_text(encoding="utf-8-sig")
        return parse_toml(text)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such settings file; check the path after --config") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a folder; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error}); give a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {toml_problem(error, text)}") from None


def _parse_value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        inner = text[1:-1]
        if text[:1] == text[-1:] == '"' and len(text) > 1 and '"' not in inner:
            return inner  # a Windows path in quotes: its backslashes begin no escapes
        return text  # an unquoted string, as shells leave it: output.name=my-style


def _put(tree: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    section, _, name = key.partition(".")
    group = tree.setdefault(section, {})
    if not isinstance(group, dict):
        problems.append(f"`{shown(section)}` is a section, not a value")
        return
    group[name] = value


def _validate(
    tree: dict[str, Any], schema: type[Config], typed: Mapping[str, str]
) -> tuple[Config | None, list[str]]:
    """Validate; after errors also validate the rest, so that contradictions are in the same report."""
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        errors: list[dict[str, Any]] = [dict(item) for item in error.errors()]
        if _take_as_typed(tree, errors, typed):
            return _validate(tree, schema, {})
        problems = [explain(item, typed) for item in errors[:MOST_PROBLEMS]]
        rest = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
        for item in errors:
            location = item["loc"]
            if len(location) >= 2 and isinstance(rest.get(str(location[0])), dict):
                rest[str(location[0])].pop(str(location[1]), None)
            else:
                rest.pop(str(location[0]), None)
        with suppress(ValidationError):  # the first report already names what is wrong
            problems += contradictions(schema.model_validate(rest))
        return None, list(dict.fromkeys(problems))
    return config, contradictions(config)


def _take_as_typed(
    tree: dict[str, Any], errors: Sequence[Mapping[str, Any]], typed: Mapping[str, str]
) -> bool:
    """Put back as text what TOML takes for a number, a date or a switch where a text is meant.

    A shell has no quotes to tell ``output.name=2024`` from a number.
    """
    taken = False
    for item in errors:
        key = ".".join(str(part) for part in item["loc"][:2])
        if len(item["loc"]) == 2 and item["type"] in ("string_type", "path_type") and key in typed:
            section, _, name = key.partition(".")
            if not isinstance(tree[section][name], list | dict):
                tree[section][name] = typed[key].strip()
                taken = True
    return taken


def _listing(problems: list[str], file: Path | None) -> str:
    if len(problems) == 1:
        return f"settings{where(file)}: {problems[0]}"
    listed = "\n".join(f"  - {p}" for p in problems[:MOST_PROBLEMS])
    count = f"{MOST_PROBLEMS} or more" if len(problems) >= MOST_PROBLEMS else f"{len(problems)}"
    return f"{count} problems with the settings{where(file)}:\n{listed}"
