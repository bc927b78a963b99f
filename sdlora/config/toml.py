"""Reads and writes settings: TOML, ``key=value`` texts and ready values; reports all problems at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError

from ..errors import ConfigError, shown
from ..files import parse_toml, write_text
from .contradictions import contradictions
from .schema import Config, choices_of, fields

_PATTERNS = {
    "output.name": 'must not hold any of \\ / : * ? " < > |',
    "training.device": "must be cpu, cuda, cuda:1 or mps",
    "data.background": "must be a colour such as #ffffff",
}
"""What to say where a text does not match the pattern of its setting."""

_LONGEST_NAME = 200  # of which a nearest one is looked for
_MOST_PROBLEMS = 50  # explained at once: each is compared with the names of all settings


def load_config(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    schema: type[Config] | None = None,
) -> Config:
    """Read settings from a TOML file, then ``key=value`` texts, then ready values (last one wins).

    Args:
        file: TOML file with the sections of :class:`Config`.
        overrides: texts such as ``training.steps=40``; the value is TOML, or else a plain string.
        values: dotted key to value, as the command line's own flags give them; ``None`` is skipped.
        schema: the tree of settings; another one may allow more than the program's own (an optimizer, say).

    Raises:
        ConfigError: naming every unknown key, bad value and contradiction at once.
    """
    problems: list[str] = []
    tree = _read_toml(file) if file else {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or key.count(".") != 1:
            hint = _nearest(key[:_LONGEST_NAME])
            problems.append(f"`{shown(text)}`: settings are given as section.name=value{hint}")
            continue
        _put(tree, key, _parse_value(value), problems)
    for key, value in (values or {}).items():
        if value is not None:
            _put(tree, key, value, problems)
    config, more = _validate(tree, schema or Config)
    problems += more
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
        return Config.model_validate({section: {name: text}}).get(key)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item)) for item in error.errors())) from None


def save_config(config: Config, file: Path) -> None:
    """Write all set values as TOML, each under its help text; unset ones are left out."""
    lines: list[str] = []
    for section in Config.model_fields:
        lines.append(f"[{section}]")
        values = getattr(config, section).model_dump(mode="json", exclude_none=True)
        tables: list[str] = []
        for name, field in type(getattr(config, section)).model_fields.items():
            if name in values:
                help_text = f"# {' '.join((field.description or '').split())}"
                if _is_tables(values[name]):  # tables end the section they stand in, so they come last
                    tables.append(help_text)
                    tables += [
                        f"[[{section}.{name}]]\n{tomli_w.dumps(table).strip()}" for table in values[name]
                    ]
                else:
                    lines += [help_text, toml_line(name, values[name])]
        lines += [*tables, ""]
    write_text(file, "\n".join(lines))


def toml_line(name: str, value: Any) -> str:
    """Return one setting as TOML; a table on one line, as a header would start another section."""
    if not isinstance(value, dict):
        return tomli_w.dumps({name: value}).strip()
    inner = ", ".join(tomli_w.dumps({key: item}).strip() for key, item in value.items())
    return f"{name} = {{ {inner} }}" if inner else f"{name} = {{}}"


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return parse_toml(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such settings file; check the path after --config") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a folder; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error}); give a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}; correct that line") from None


def _parse_value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text  # an unquoted string, as shells leave it: output.name=my-style


def _put(tree: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    section, _, name = key.partition(".")
    group = tree.setdefault(section, {})
    if not isinstance(group, dict):
        problems.append(f"`{shown(section)}` is a section, not a value")
        return
    group[name] = value


def _validate(tree: dict[str, Any], schema: type[Config]) -> tuple[Config | None, list[str]]:
    """Validate; after errors also validate the rest, so that contradictions are in the same report."""
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(dict(item)) for item in error.errors()[:_MOST_PROBLEMS]]
        rest = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
        for item in error.errors():
            location = item["loc"]
            if len(location) >= 2 and isinstance(rest.get(str(location[0])), dict):
                rest[str(location[0])].pop(str(location[1]), None)
            else:
                rest.pop(str(location[0]), None)
        with suppress(ValidationError):  # the first report already names what is wrong
            problems += contradictions(schema.model_validate(rest))
        return None, problems
    return config, contradictions(config)


def _explain(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location[:2])
    if len(location) > 2:  # inside a table of a list: data.sources[1].weight
        key += "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in location[2:])
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"`{shown(key)}` is not a setting{_nearest(key[:_LONGEST_NAME])}"
    message = str(item["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    if kind == "literal_error":
        choices = choices_of(dict(fields())[key])
        close = difflib.get_close_matches(_brief(given)[:_LONGEST_NAME], choices, 1)
        message = "must be one of " + ", ".join(choices) + (f" (did you mean {close[0]}?)" if close else "")
    elif kind == "string_pattern_mismatch" and key in _PATTERNS:
        message = _PATTERNS[key]
    return f"`{shown(key)}={shown(_brief(given))}`: {message}"


def _brief(given: Any) -> str:
    """Return a value that was given, as text; one that has no end only by its kind."""
    try:
        return str(given)
    except (ValueError, RecursionError):
        return type(given).__name__


def _nearest(key: str) -> str:
    known = [name for name, _ in fields()]
    if "[" in key:
        return _nearest_in_table(key)
    close = difflib.get_close_matches(key, known, 1, cutoff=0.6)
    if not close:
        wanted = key.rpartition(".")[2]
        by_name = {name.partition(".")[2]: name for name in known}
        close = [by_name[name] for name in difflib.get_close_matches(wanted, list(by_name), 1, cutoff=0.6)]
    return f"; did you mean `{close[0]}`?" if close else "; see `sdlora train --help` for all settings"


def _nearest_in_table(key: str) -> str:
    """Return a hint for a key such as ``data.sources[1].wieght``."""
    table, _, wanted = key.rpartition(".")
    annotation = dict(fields())[table.partition("[")[0]].annotation
    known = list(get_args(annotation)[0].model_fields)
    close = difflib.get_close_matches(wanted, known, 1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; it may have {', '.join(known)}"


def _listing(problems: list[str], file: Path | None) -> str:
    where = f" in {file} and the command line" if file else ""
    if len(problems) == 1:
        return f"settings{where}: {problems[0]}"
    listed = "\n".join(f"  - {p}" for p in problems[:_MOST_PROBLEMS])
    count = f"{_MOST_PROBLEMS} or more" if len(problems) >= _MOST_PROBLEMS else f"{len(problems)}"
    return f"{count} problems with the settings{where}:\n{listed}"
