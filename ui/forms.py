"""The form of a training run, made from the settings' schema: label, help, range, default from one place."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sdlora.config.schema import Config, fields
from sdlora.config.toml import toml_line
from sdlora.errors import ConfigError
from sdlora.files import parse_toml

if TYPE_CHECKING:
    import gradio as gr

Kind = Literal["switch", "choice", "whole", "number", "text", "lines", "toml"]
NOT_FOR_A_BROWSER = ("data.follow_links",)
"""Settings that only the command line has: a browser gets nothing from outside of the server's folders."""
OPEN = "automatic"

SECTION_TITLES = {
    "model": "Base model",
    "data": "Images",
    "adapter": "LoRA",
    "optimizer": "Optimizer",
    "training": "Training",
    "sample": "Previews",
    "judge": "Best step and strength",
    "output": "Output",
}


@dataclass(frozen=True)
class Setting:
    """One setting as a form shows it.

    Attributes:
        key: dotted, e.g. ``adapter.rank``.
        label: e.g. ``Rank``.
        help: the docstring with range and default.
        kind: which control it gets.
        optional: whether it may be left open.
        default: its value when it is not touched.
        choices: the values of a choice.
        words: whether a value that is not TOML is meant as plain text, such as a path.
    """

    key: str
    label: str
    help: str
    kind: Kind
    optional: bool
    default: Any
    choices: tuple[str, ...] = ()
    words: bool = False


def settings() -> list[Setting]:
    """Return every setting of a run, in the order of the schema."""
    return [_setting(key, field) for key, field in fields()]


def _setting(key: str, field: FieldInfo) -> Setting:
    annotation, optional = _without_none(field.annotation)
    default = None if field.default is PydanticUndefined else field.default
    kind, choices = _kind(annotation, optional)
    limits = _limits(field.metadata, annotation)
    notes = [" ".join((field.description or "").split())]
    notes += [f"{limits[0].upper()}{limits[1:]}."] if limits else []
    if default is not None and kind != "switch":
        notes.append(f"Default: {_shown(default)}.")
    elif optional and default is None and kind not in ("choice",):
        notes.append(f"Empty: {OPEN}.")
    label = key.partition(".")[2].replace("_", " ").capitalize()
    words = any(_plain(part) in (str, Path) for part in get_args(_plain(annotation)))
    return Setting(key, label, " ".join(notes), kind, optional, default, choices, words)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        if len(rest) < len(get_args(annotation)):
            return (rest[0] if len(rest) == 1 else Union[tuple(rest)]), True  # noqa: UP007
    return annotation, False


def _kind(annotation: Any, optional: bool) -> tuple[Kind, tuple[str, ...]]:
    plain = _plain(annotation)
    if plain is bool:
        return ("choice", ("true", "false")) if optional else ("switch", ())
    if get_origin(plain) is Literal and all(isinstance(value, str) for value in get_args(plain)):
        return "choice", tuple(get_args(plain))
    if plain is int:
        return "whole", ()
    if plain is float:
        return "number", ()
    if plain is str or (isinstance(plain, type) and issubclass(plain, Path)):
        return "text", ()
    if get_origin(plain) is tuple and get_args(plain) == (str, ...):
        return "lines", ()
    return "toml", ()


def _plain(annotation: Any) -> Any:
    """Return an annotation without its limits."""
    while get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    return annotation


def _limits(metadata: Sequence[Any], annotation: Any) -> str:
    every = [*metadata, *_metadata(annotation)]
    limits: dict[str, Any] = {}
    for constraint in every:
        for name in ("ge", "gt", "le", "lt"):
            value = getattr(constraint, name, None)
            if value is not None:
                limits[name] = value
    low = (
        f"from {_shown(limits['ge'])}"
        if "ge" in limits
        else f"above {_shown(limits['gt'])}"
        if "gt" in limits
        else ""
    )
    high = (
        f"to {_shown(limits['le'])}"
        if "le" in limits
        else f"below {_shown(limits['lt'])}"
        if "lt" in limits
        else ""
    )
    return " ".join(part for part in (low, high) if part)


def _metadata(annotation: Any) -> Iterator[Any]:
    for constraint in getattr(annotation, "__metadata__", ()):
        yield constraint
        yield from getattr(constraint, "metadata", ())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if abs(value) < 1e6 else str(value)
    return repr(value) if value == "" or not isinstance(value, str) else value


def control(setting: Setting) -> gr.components.FormComponent:
    """Return the control of a setting, inside the current block."""
    import gradio as gr  # takes seconds; what settings are is asked before the page is made

    common = {
        "label": setting.label,
        "info": setting.help,
        "elem_id": element_id(setting.key),
        "interactive": True,
    }
    start = to_raw(setting, setting.default)
    if setting.kind == "switch":
        return gr.Checkbox(value=bool(start), **common)
    if setting.kind == "choice":
        choices = [(OPEN, "")] if setting.optional else []
        choices += [(choice, choice) for choice in setting.choices]
        return gr.Dropdown(choices=choices, value=start, **common)
    if setting.kind in ("whole", "number") and not setting.optional:
        return gr.Number(value=start, precision=0 if setting.kind == "whole" else None, **common)
    lines = 3 if setting.kind == "lines" else 1
    placeholder = OPEN if setting.optional and setting.default is None else ""
    return gr.Textbox(value=start, placeholder=placeholder, lines=lines, max_lines=8, **common)


def element_id(key: str) -> str:
    """Return the id of a setting's control in the page."""
    return "set-" + key.replace(".", "-").replace("_", "-")


def to_raw(setting: Setting, value: Any) -> Any:
    """Return a setting's value as its control holds it."""
    if setting.kind == "switch":
        return bool(value)
    if setting.kind in ("whole", "number") and not setting.optional:
        return value
    if value is None:
        return ""
    if setting.kind == "lines":
        return "\n".join(value) if value else "[]"
    if setting.kind == "toml":
        return _toml(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return "" if plain == {} else toml_line("value", plain).partition("=")[2].strip()


def to_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a form gives, without those left at their default.

    Args:
        raw: dotted key -> what its control holds.

    Raises:
        ConfigError: naming every control whose value cannot be read.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    known = {setting.key: setting for setting in settings()}
    for key, held in raw.items():
        try:
            value = _from_raw(known[key], held)
        except ValueError as error:
            problems.append(f"`{key}={held}`: {error}")
            continue
        if value is not None and value != known[key].default:
            values[key] = value
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def _from_raw(setting: Setting, held: Any) -> Any:
    if held is None or (isinstance(held, str) and not held.strip()):
        return None
    if setting.kind == "choice" and setting.choices == ("true", "false"):
        return held == "true"
    if setting.kind in ("whole", "number") and isinstance(held, str):
        return number(held, whole=setting.kind == "whole")
    if setting.kind == "lines":
        if held.strip() == "[]":
            return ()
        return tuple(line.strip() for line in held.splitlines() if line.strip())
    if setting.kind == "toml":
        try:
            value = parse_toml(f"value = {held}")["value"]
        except ValueError:
            if setting.words:
                return held.strip()
            raise ValueError("write it as in a TOML file, e.g. [0.9, 0.99]") from None
        return tuple(value) if isinstance(value, list) else value
    return held.strip() if isinstance(held, str) else held


def number(text: str, *, whole: bool = False) -> float | int | None:
    """Return the number a text field holds; None for an empty one.

    Optional settings are text fields because Gradio's number fields turn an empty field into 0.

    Raises:
        ValueError: when it holds something else.
    """
    if not text.strip():
        return None
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ValueError(f"give a {'whole ' if whole else ''}number, or leave it empty") from None


def from_config(config: Config) -> dict[str, Any]:
    """Return what every control holds for given settings."""
    return {setting.key: to_raw(setting, config.get(setting.key)) for setting in settings()}
