"""Flags that are settings of a run: name, choices, limits and help are the schema's own.

So the settings of a base, for example, have the same names in ``train``, ``generate`` and every command that
loads one. The parsed options hold a flag's value under the setting's dotted key, None where it was left out.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.schema import ModelConfig

_NAMES = {"model.prediction_type": ("--prediction-type", "--prediction")}
"""Flags with an earlier name, which still works."""


def declare_setting(
    parser: argparse.ArgumentParser, key: str, *names: str, metavar: str | None = None
) -> None:
    """Declare a flag for one setting that is a word, a number, a path or a switch.

    Args:
        parser: of a command.
        key: dotted, e.g. ``model.clip_skip``.
        names: of the flag; the setting's own name when none are given, here ``--clip-skip``.
        metavar: placeholder for the value in the help.
    """
    from ..config.schema import choices_of, fields
    from ..config.toml import read_value

    field = dict(fields())[key]
    names = names or _NAMES.get(key) or (f"--{key.partition('.')[2].replace('_', '-')}",)
    text = " ".join((field.description or "").split()).replace("%", "%%")
    if bool in (field.annotation, *get_args(field.annotation)):
        parser.add_argument(*names, dest=key, default=None, action=argparse.BooleanOptionalAction, help=text)
        return

    def read(given: str) -> Any:
        try:
            return read_value(key, given)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    words = choices_of(field)
    shown = f"{{{','.join(words)}}}" if words else names[0].strip("-").upper().replace("-", "_")
    parser.add_argument(*names, dest=key, type=read, metavar=metavar or shown, help=text)


def declare_base(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for every setting of a base model (the section ``model``)."""
    from ..config.schema import fields

    for key, _ in fields():
        if key.startswith("model."):
            declare_setting(parser, key)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that flags gave: dotted key -> value, None where one was left out."""
    return {key: value for key, value in vars(options).items() if "." in key}


def base_of(options: argparse.Namespace) -> ModelConfig:
    """Return the base that flags describe.

    Raises:
        ConfigError: for settings that contradict each other.
    """
    from ..config.toml import load_config

    given = {key: value for key, value in settings_of(options).items() if key.startswith("model.")}
    return load_config(None, (), given).model
