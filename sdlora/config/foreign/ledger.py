"""The account of an import: what became of every setting of the source, and why.

A program's translation reads settings from a :class:`Ledger` and says for each what it became. What it does
not say ends up as "without counterpart", so nothing is dropped in silence. Values are checked one by one
against the schema, so that one setting that sdlora does not allow costs that setting, not the import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError

from ...errors import ConfigError
from ...errors import shown as printable
from ..schema import fields

_OFF = ("", "off", "none", "never", "no", "false", "null", "[]", "{}", "0", "0.0")
OWN_WAY = "no effect on the result; sdlora decides by itself"
_LONGEST = 200  # characters of a value that are shown
_MOST_SOURCES = 1000
_SECRET = ("token", "api_key", "access_key", "secret", "password")


class Outcome(StrEnum):
    """What became of a setting of the source."""

    TAKEN = "taken"
    TRANSLATED = "translated"
    DEFAULT = "default anyway"
    NONE = "without counterpart"


@dataclass(frozen=True)
class Row:
    """One setting of the source.

    Attributes:
        setting: its name there.
        value: as it was given; "(not given)" where the source's own default counts.
        outcome: what became of it.
        ours: ``key = value`` in sdlora, or empty.
        reason: why, where it is not plain.
    """

    setting: str
    value: str
    outcome: Outcome
    ours: str = ""
    reason: str = ""


class Ledger:
    """Settings of a source, and what they became.

    Args:
        given: name -> value as it was read (text, number, bool, list, table).
        where: the source, for errors.
    """

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.values: dict[str, Any] = {}
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._given = dict(given)
        self._told: set[str] = set()
        self._fields = dict(fields())

    # ---- reading

    def names(self) -> list[str]:
        """Return the names of all settings that are given."""
        return list(self._given)

    def is_told(self, name: str) -> bool:
        """Return whether it was said what a setting became."""
        return name in self._told

    def has(self, name: str) -> bool:
        """Return whether the source gives a setting a value."""
        return self._given.get(name) not in (None, "")

    def raw(self, name: str, default: Any = None) -> Any:
        """Return a value as it was read."""
        return self._given[name] if self.has(name) else default

    def text(self, name: str, default: str = "") -> str:
        """Return a value as text."""
        return str(self.raw(name, default))

    def truth(self, name: str, default: bool = False) -> bool:
        """Return a switch; ``true``, ``1``, ``yes`` and ``on`` are on, in any spelling."""
        value = self.raw(name, default)
        return value if isinstance(value, bool) else str(value).strip().lower() not in _OFF

    def number(self, name: str, default: float | None = None) -> float | None:
        """Return a number.

        Raises:
            ConfigError: when it is none.
        """
        value = self.raw(name, default)
        if value is None:
            return None
        amount = as_number(value)
        if amount is None:
            raise ConfigError(f"{self.where}: `{name}={shown(value)}` is no number; mend it there")
        return amount

    def whole(self, name: str, default: int | None = None) -> int | None:
        """Return a whole number, rounded."""
        value = self.number(name, default)
        return None if value is None else round(value)

    def allows(self, key: str, value: Any) -> bool:
        """Return whether sdlora has a setting that may have that value."""
        return key in self._fields and self._checked(key, value) is None

    def inner(self, label: str, name: str, value: Any) -> str:
        """Take up one setting inside of another, such as one of ``optimizer_args``; return its name here."""
        full = f"{label}{name}" if label.endswith(".") else f"{label}: {name}"
        self._given[full] = value
        self._told.add(label)
        return full

    # ---- telling

    def put(self, names: Sequence[str] | str, key: str, value: Any, reason: str = "") -> None:
        """Settings become one of ours: taken where one keeps its value, else translated."""
        names = [names] if isinstance(names, str) else names
        kept = len(names) == 1 and self.has(names[0]) and _same(self._given[names[0]], value)
        self._put(key, value, names, Outcome.TAKEN if kept else Outcome.TRANSLATED, "" if kept else reason)

    def implied(self, name: str, key: str, value: Any, reason: str) -> None:
        """The source does not give a setting, and its own default differs from ours."""
        if not self.has(name):
            self._put(key, value, (name,), Outcome.TRANSLATED, reason)

    def default(self, names: Sequence[str] | str, reason: str) -> None:
        """Settings ask for what sdlora does anyway; those that something was said of keep that."""
        for name in [names] if isinstance(names, str) else names:
            if name not in self._told:
                self._tell(name, Outcome.DEFAULT, "", reason)

    def none(self, names: Sequence[str] | str, reason: str) -> None:
        """Settings have no counterpart; those that are switched off ask for nothing."""
        for name in [names] if isinstance(names, str) else names:
            if name in self._told:
                continue
            if self.has(name) and is_off(self._given[name]):
                self._tell(name, Outcome.DEFAULT, "", "switched off, as here")
            else:
                self._tell(name, Outcome.NONE, "", reason)

    def tell_source(self, name: str, part: str, value: Any) -> None:
        """A setting of one folder becomes a part of its `[[data.sources]]` table."""
        if self.has(name):
            kept = _same(self._given[name], value)
            self._tell(
                name,
                Outcome.TAKEN if kept else Outcome.TRANSLATED,
                f"data.sources: {part} = {shown(value)}",
                "",
            )

    def put_sources(self, sources: Sequence[Mapping[str, Any]], otherwise: str = "") -> None:
        """Folders of images become `[[data.sources]]` tables; what sdlora refuses is left out with a note.

        Args:
            sources: each with its ``folder`` and other parts of such a table.
            otherwise: what else one can do where no folder is named.

        Raises:
            ConfigError: for more folders than anyone has.
        """
        if len(sources) > _MOST_SOURCES:
            raise ConfigError(
                f"{self.where}: names {len(sources)} folders of images; take at most {_MOST_SOURCES}"
            )
        kept = list(sources)
        if self._checked("data.sources", sources) is not None:
            problems = [self._checked("data.sources", [source]) for source in sources]
            kept = [source for source, problem in zip(sources, problems, strict=True) if problem is None]
            for source, problem in zip(sources, problems, strict=True):
                if problem is not None:
                    self.note(f"the folder `{shown(source.get('folder', ''))}` is left out: it {problem}")
        if kept:
            self.values["data.sources"] = kept
        else:
            self.note(
                f"no folder of images is given: name it in `sdlora train FOLDER --config ...`{otherwise}"
            )

    def tell_as(self, name: str, key: str, value: str) -> None:
        """A setting has become a part of one of ours, together with others."""
        if self.has(name):
            self._tell(name, Outcome.TAKEN, f"{key} = {value}", "")

    def adopt(self, row: Row, names: Sequence[str]) -> None:
        """Tell of settings what another account says of the one they share."""
        if not names and row.value == "(not given)":
            self.rows.append(row)
        for name in names:
            if name not in self._told:
                self._tell(name, row.outcome, row.ours, row.reason)

    def note(self, text: str) -> None:
        """Say something about the whole."""
        self.notes.append(text)

    def finish(self) -> None:
        """Account for every setting that nothing was said of."""
        for name, value in self._given.items():
            if name in self._told:
                continue
            if value is None or is_off(value):
                self._tell(name, Outcome.DEFAULT, "", "empty or switched off")
            else:
                self._tell(name, Outcome.NONE, "", "sdlora knows no setting like it")

    def refuse(self, key: str, reason: str) -> None:
        """Give up one of our settings, which contradicts the others; those that had become it have no
        counterpart."""
        self.values.pop(key, None)
        self.rows = [
            replace(row, outcome=Outcome.NONE, ours="", reason=reason)
            if row.ours.partition(" = ")[0] == key
            else row
            for row in self.rows
        ]

    # ---- within

    def _put(self, key: str, value: Any, names: Sequence[str], outcome: Outcome, reason: str) -> None:
        problem = self._checked(key, value)
        if problem is not None:
            self._tell(names, Outcome.NONE, "", f"`{key}={shown(value)}` {problem}")
            return
        self.values[key] = value
        self._tell(names, outcome, f"{key} = {shown(value)}", reason)

    def _checked(self, key: str, value: Any) -> str | None:
        """Return why the schema refuses a value, or None."""
        field = self._fields.get(key)
        if field is None:
            return "is not a setting of this version of sdlora"
        annotation: Any = field.annotation
        for mark in field.metadata:
            annotation = Annotated[annotation, mark]
        try:
            TypeAdapter(annotation).validate_python(value)
        except ValidationError as error:
            choices = [
                item
                for part in (annotation, *get_args(annotation))
                for item in get_args(part)
                if isinstance(item, str)
            ]
            if choices:
                return f"is not possible here: sdlora has {', '.join(choices)}"
            return f"is not possible here: {str(error.errors()[0]['msg']).removeprefix('Input ')}"
        return None

    def _tell(self, names: Sequence[str] | str, outcome: Outcome, ours: str, reason: str) -> None:
        for name in [names] if isinstance(names, str) else names:
            self._told.add(name)
            value = shown(self._given[name]) if self.has(name) else "(not given)"
            if self.has(name) and name.lower().endswith(_SECRET):
                value = "(kept back)"
            if value == "(not given)" and outcome in (Outcome.DEFAULT, Outcome.NONE):
                continue  # nothing was asked, nothing came of it
            self.rows.append(Row(name, value, outcome, ours, reason))


def _same(theirs: Any, ours: Any) -> bool:
    """Return whether a value reads alike on both sides (``"1e-4"`` and 0.0001, True and a bare flag)."""
    if isinstance(ours, bool):
        return (isinstance(theirs, bool) and theirs == ours) or str(theirs).strip().lower() == str(
            ours
        ).lower()
    if isinstance(ours, (int, float)):
        return as_number(theirs) == ours
    if isinstance(ours, (list, tuple)):
        return numbers(theirs) == list(ours)
    return str(theirs).lower() == str(ours).lower()


def as_number(value: Any) -> float | None:
    """Return a finite number for a number or a text of one (``1e-4``, ``"32"``), else None."""
    if isinstance(value, bool):
        return float(value)
    try:
        amount = float(str(value).strip())
    except ValueError:
        return None
    return amount if math.isfinite(amount) else None


def is_off(value: Any) -> bool:
    """Return whether a value switches something off or leaves it empty."""
    if isinstance(value, (list, tuple, dict)):
        return len(value) == 0
    return str(value).strip().lower() in _OFF


def shown(value: Any) -> str:
    """Return a value for people: of bounded length, and without what commands a terminal."""
    if isinstance(value, float) and abs(value) < 1e15 and value == int(value):
        value = int(value)
    text = " ".join(("true" if value is True else "false" if value is False else str(value)).split())
    return printable(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…", _LONGEST)


def key_values(words: Sequence[Any] | str | None) -> dict[str, str]:
    """Return ``name=value`` words as a table; a text is split at blanks, and quotes around values fall."""
    if words is None:
        return {}
    parts = words.split() if isinstance(words, str) else [str(word) for word in words]
    table: dict[str, str] = {}
    for part in parts:
        name, separator, value = part.partition("=")
        if separator:
            table[name.strip()] = value.strip().strip("\"'")
        elif part.strip():
            table[part.strip()] = ""
    return table


def numbers(value: Any) -> list[float]:
    """Return the numbers of a list, of ``512,768``, ``512x768`` or ``(0.9, 0.99)``; others are left out."""
    words = (
        value if isinstance(value, (list, tuple)) else str(value).replace("x", ",").strip("()[] ").split(",")
    )
    return [number for number in map(as_number, words) if number is not None]
