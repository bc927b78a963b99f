"""Values for single blocks of a model: which pattern of a table matches which module.

A pattern is the beginning of a module's path, in whole names, with or without the component in front:
``down_blocks.1`` matches ``down_blocks.1.attentions.0...`` but not ``down_blocks.10``. ``*`` stands for one
name. The pattern with the most names wins; of equally long ones the one with fewer ``*``, then the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..errors import ConfigError
from .canonical import ModuleKey

Value = TypeVar("Value")
_TEXT_ROOT = "text_model."


def value_for(table: Mapping[str, Value], key: ModuleKey, default: Value) -> Value:
    """Return the value that a table gives a module."""
    chosen, best = default, (-1, 0)
    for pattern, value in table.items():
        specific = _specificity(pattern, key)
        if specific is not None and specific >= best:
            chosen, best = value, specific
    return chosen


def check_patterns(setting: str, table: Mapping[str, object], keys: Iterable[ModuleKey]) -> None:
    """Refuse a pattern that matches no module.

    Args:
        setting: dotted name, for the message.
        table: pattern -> value.
        keys: the modules there are.

    Raises:
        ConfigError: naming the pattern, and some blocks that exist.
    """
    modules = list(keys)
    for pattern in table:
        if not any(_specificity(pattern, key) is not None for key in modules):
            blocks = sorted({".".join(key.path.split(".")[:2]) for key in modules})
            raise ConfigError(
                f"`{setting}`: `{pattern}` matches no adapted layer; there are blocks such as "
                f"{', '.join(blocks[:6])}, and components {', '.join(sorted({k.component for k in modules}))}"
            )


def _specificity(pattern: str, key: ModuleKey) -> tuple[int, int] | None:
    """Return how specific a pattern is for a module: (names, minus wildcards); None if it does not match."""
    names = pattern.split(".")
    bare = key.path.removeprefix(_TEXT_ROOT)
    spelled = (key.path, bare, f"{key.component}.{key.path}", f"{key.component}.{bare}")
    for path in spelled:
        parts = path.split(".")
        if len(parts) >= len(names) and all(
            name in ("*", part) for name, part in zip(names, parts, strict=False)
        ):
            return len(names), -names.count("*")
    return None
