"""Texts of other programs, read: command lines of a shell or a .bat file, JSON, TOML, YAML; all bounded."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files import parse_json, parse_toml

_MOST = 4 << 20  # bytes of a settings file
_MOST_YAML = 128 << 10  # characters; PyYAML reads some 200,000 a second, and settings have a few thousand
_DEPTH = 60
_MOST_OF_A_LINE = 32_767  # characters; CreateProcess takes no more, and shlex is quadratic in a word


def read_text(file: Path) -> str:
    """Return a settings file's text.

    Raises:
        ConfigError: when it cannot be read, is too large, or is no text.
    """
    try:
        if file.stat().st_size > _MOST:
            raise ConfigError(f"{file}: is larger than {_MOST >> 20} MiB; settings files are not")
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    for encoding in (
        ("utf-8-sig", "utf-16") if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030")
    ):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ConfigError(f"{file}: is no text; give the settings file of another trainer")


def read_table(text: str, kind: str, where: str) -> Any:
    """Return what a JSON, TOML or YAML text holds.

    Raises:
        ConfigError: naming the line.
    """
    try:
        if kind == "yaml":
            return read_yaml(text)
        return parse_json(text) if kind == "json" else parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid {kind.upper()}: {error}; mend that line") from None


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds: tables, lists, plain values; no tags, no aliases.

    Raises:
        ValueError: for what is not valid, with line and column, or too long.
    """
    if len(text) > _MOST_YAML:
        raise ValueError(f"it has {len(text)} characters, more than the {_MOST_YAML} that are read")
    import yaml  # only this needs it

    class Plain(yaml.SafeLoader):
        """Without anchors: a few lines of them can stand for more than any memory holds."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                line = self.peek_event().start_mark.line + 1
                raise ValueError(f"line {line}: an alias (*name), which settings are not read with")
            self.depth += 1
            try:
                if self.depth > _DEPTH:
                    raise ValueError(f"line {self.peek_event().start_mark.line + 1}: nested too deep")
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    try:
        return yaml.load(text, Loader=Plain)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{problem}") from None


def command_words(text: str) -> list[str]:
    """Return the words of the first command line in a text that starts a Python script or accelerate.

    Lines that end in ``\\`` (sh), ``^`` (cmd) or a backtick (PowerShell) go on in the next; comments and
    ``cd`` lines fall away; variables ``%NAME%`` and ``$NAME`` that the text itself sets are put in.
    """
    lines, variables = _joined(text), dict[str, str]()
    fallback: list[str] = []
    for line in lines:
        stripped = line.strip().removeprefix("@").strip()
        if not stripped or stripped.startswith(("#", "::")) or stripped.lower().startswith("rem "):
            continue
        name, value = _assignment(stripped)
        if name:
            variables[name] = _filled(value, variables)
            continue
        words = _split(_filled(stripped, variables))
        if any(word.endswith(".py") for word in words) or any(word.startswith("--") for word in words):
            if any(word.endswith(".py") for word in words):
                return words
            fallback = fallback or words
    return fallback


def _joined(text: str) -> list[str]:
    lines: list[str] = []
    pending = ""
    for line in text.splitlines():
        bare = line.rstrip()
        if bare.endswith(("\\", "^", "`")) and not bare.endswith("\\\\"):
            pending += bare[:-1] + " "
            continue
        lines.append(pending + line)
        pending = ""
    return [*lines, pending] if pending else lines


def _assignment(line: str) -> tuple[str, str]:
    """Return name and value of ``set NAME=value``, ``NAME=value``, ``export NAME=value``, ``$NAME =
    value``."""
    words = line
    for start in ("set ", "SET ", "export ", "Set "):
        words = words.removeprefix(start)
    name, separator, value = words.strip().strip('"').partition("=")
    name = name.strip().removeprefix("$")
    if separator and name.isidentifier() and not line.startswith("-"):
        return name, value.strip().strip("\"'")
    return "", ""


def _filled(text: str, variables: dict[str, str]) -> str:
    for name in sorted(variables, key=len, reverse=True):
        for spelled in (f"%{name}%", f"${{{name}}}", f"${name}"):
            text = text.replace(spelled, variables[name])
        if len(text) > _MOST:
            raise ConfigError("the command's variables make it too long")
    return text


def _split(line: str) -> list[str]:
    """Return words as a shell splits them; a backslash is an ordinary character, as paths of Windows
    have it."""
    if len(line) > _MOST_OF_A_LINE:
        raise ConfigError(
            f"the command has {len(line)} characters in a line, more than the {_MOST_OF_A_LINE} that "
            "Windows takes; give it without what does not belong to it"
        )
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConfigError(f"the command cannot be split into words ({error}): check its quotes") from None


def flags(words: list[str]) -> dict[str, Any]:
    """Return ``--name value ...`` and ``--name=value`` as a table; a flag without value is True."""
    table: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, separator, value = word[2:].partition("=")
            name = name.replace("-", "_")
            table[name] = value if separator else True
        elif name:
            held = table[name]
            table[name] = word if held is True else [*held, word] if isinstance(held, list) else [held, word]
    return table


def flattened(table: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested table with dotted names; lists stay as they are."""
    if not isinstance(table, dict):
        return {prefix.rstrip("."): table}
    flat: dict[str, Any] = {}
    for name, value in table.items():
        inner = (
            flattened(value, f"{prefix}{name}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{name}": value}
        )
        flat.update(inner)
    return flat


def line_of(text: str, name: str) -> int | None:
    """Return the number of the first line that holds a setting's name, from 1."""
    wanted = name.rpartition(".")[2]
    return next((number for number, line in enumerate(text.splitlines(), 1) if wanted in line), None)
