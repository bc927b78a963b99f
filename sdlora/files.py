"""Writing so that a crash never leaves half a file (temporary name first, then rename), reading with bounds.

Paths and names are as people give them. Texts from outside are parsed by :func:`parse_json` and
:func:`parse_toml` only: whatever the text holds, their time and memory grow in proportion to its length, and
they return a value or raise a ValueError of one line.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import re
import shutil
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from .errors import OutputError, TrainingError
from .run_folder import LOCK, RunFolder

ASSETS = Path(__file__).parent / "assets"
"""What comes with the program: the mini base, the families' configs and tokenizers, the report's page."""
MAX_LEVELS = 64
"""Of brackets inside brackets, and of names in a dotted key: more than anything real has, and few enough that
whatever goes through the value level by level comes to its end."""
MAX_TOML_CHARS = 2**19
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}(\.\w+)?")  # a name of `replacing`
MAX_DIGITS = 40  # of a whole number; 2**128 has 39
# both match to the end where a quote is never closed: else each quote would look for its end again
_JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_TOML_STRING = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*(?:"""|\\?\Z)'
    r"|'''[^']*(?:'(?!'')[^']*)*(?:'''|\Z)"
    r'|"[^"\\\n]*(?:\\.[^"\\\n]*)*(?:"|\\?(?=\n)|\\?\Z)'
    r"|'[^'\n]*(?:'|(?=\n)|\Z)"
    r"|\#[^\n]*",
    re.DOTALL,
)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")
_DEEP_KEY = re.compile(rf"(?<![\w-])[\w-]+(?:[ \t]*\.[ \t]*[\w-]+){{{MAX_LEVELS}}}")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
MAX_NAME_BYTES = 200
"""Of a file's name in UTF-8. File systems take 255, and endings such as ``.safetensors`` are added."""
_MAX_WHOLE_BYTES = 240  # with its ending
_MOST_LETTERS = 80
_LONGEST_ENDING = 12
_WINDOWS_CHARACTERS = re.compile(r'[\\/:*?"<>|]+')
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_WINDOWS_DEVICES = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])( *\..*)?", re.I
)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target``; on success it becomes ``target``, else it is removed.

    The temporary name keeps the suffix, so that libraries which choose a format by it work.

    Raises:
        OutputError: when the place cannot be written (full disk, no permission, a file as a folder).
    """
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: {write_problem(error)}") from error
    except OutputError as error:  # raised below the temporary name, which means nothing to a user
        raise OutputError(str(error).replace(str(temporary), str(target))) from error
    except SafetensorError as error:  # how safetensors reports a failed write, full disks included
        full = "os error 28" in str(error) or "No space" in str(error) or "os error 112" in str(error)
        cause = OSError(errno.ENOSPC if full else errno.EIO, str(error))
        raise OutputError(f"{target}: {write_problem(cause)}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # the place itself may not be a folder
                temporary.unlink()


def write_problem(error: OSError) -> str:
    """Return why writing failed and what to do, in plain words."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space or choose another --output (nothing was half-written)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "may not be written; change its permissions or choose another --output"
    if error.errno == errno.ENAMETOOLONG:
        return "the name is too long for this disk; choose a shorter one"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY):
        return (
            "a file stands where a folder is needed, or a folder where a file is; move it away or choose "
            "another --output"
        )
    return f"cannot be written ({error.strerror or error}); choose another --output"


def write_bytes(target: Path, data: bytes) -> None:
    """Write bytes atomically and through to the disk."""
    with replacing(target) as temporary, temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text with ``\\n`` line ends atomically."""
    write_bytes(target, text.encode("utf-8"))


def write_json(target: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def given_path(text: str) -> Path:
    """Return a path as a person gave it, ``~`` expanded.

    Raises:
        ValueError: for an empty text, as an unset variable of a shell leaves it, or one that names no file on
            any system.
    """
    if not text.strip():
        raise ValueError("is empty, as an unset variable leaves it; give a path (`.` is the current folder)")
    odd = next((letter for letter in text if letter < " "), None)
    if odd is not None:
        raise ValueError(
            f"holds a control character ({odd!r}); in TOML a backslash between double quotes begins an "
            "escape: put Windows paths between single quotes"
        )
    return Path(os.path.expanduser(text))


def name_problem(name: str, most_bytes: int = MAX_NAME_BYTES) -> str | None:
    """Return why ``name`` would not do for a new file on Linux, macOS and Windows; None if it does.

    Source: Microsoft's "Naming Files, Paths, and Namespaces".
    """
    size = len(name.encode("utf-8", "surrogatepass"))
    if not name.strip():
        return "is empty"
    if _WINDOWS_CHARACTERS.search(name):
        return 'must not hold any of \\ / : * ? " < > | (Windows takes none of them)'
    if _CONTROL.search(name):
        return "holds a control character"
    if size > most_bytes:
        return f"has {size} bytes in UTF-8, more than {most_bytes}; shorten it"
    if name.startswith(".") or name.startswith(" ") or name.endswith((".", " ")):
        return "must not begin with a dot or space, nor end with one (Windows drops it at the end)"
    if _WINDOWS_DEVICES.fullmatch(name):
        return "is the name of a device on Windows; choose another"
    return None


def as_file_name(text: str, fallback: str) -> str:
    """Return a text as the name of a file or folder that every system takes, a file's ending kept.

    Args:
        text: what a person typed, or a name from elsewhere.
        fallback: the name where nothing of it is left.
    """
    name = _CONTROL.sub("-", _WINDOWS_CHARACTERS.sub("-", text)).strip(" .-")
    stem, ending = os.path.splitext(name)
    if len(ending) > _LONGEST_ENDING:
        stem, ending = name, ""
    while len(stem + ending) > _MOST_LETTERS or len((stem + ending).encode()) > MAX_NAME_BYTES:
        stem = stem[:-1].rstrip(" .-")
    name = stem + ending or fallback
    return f"_{name}" if name_problem(name) else name


def refuse_bad_names(target: Path) -> None:
    """Check that ``target`` and the folders above it that are missing have names that every system takes.

    Raises:
        OutputError: naming the one that has not.
    """
    for path in (target, *target.parents):
        if os.path.lexists(path) or path.name in ("", ".."):
            continue
        if problem := name_problem(
            path.name.lstrip(".") or path.name, _MAX_WHOLE_BYTES
        ):  # folders may be hidden
            raise OutputError(f"{target}: the name `{path.name}` {problem}")


def is_used(folder: Path) -> bool:
    """Return whether a folder holds anything but what a process that was killed left half-written there."""
    if not folder.is_dir():
        return False
    return any(path.name != LOCK and not _TEMPORARY.fullmatch(path.name) for path in folder.iterdir())


def list_files(folder: Path, *endings: str) -> list[Path]:
    """Return the files with one of these endings in a folder and those below it, by path.

    Hidden files and folders are left out: what :func:`replacing` has not finished, which is renamed at any
    moment, and what macOS puts beside files (``._x.png``). What vanishes meanwhile or cannot be looked into
    is passed over; links to folders are not followed.

    Args:
        folder: where to look; one that does not exist has no files.
        endings: in small letters, with their dot (``.png``).
    """
    files = []
    for current, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(current, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
        ]
    return sorted(files)


def is_text(path: str | Path) -> bool:
    """Return whether a path can be shown and written down; on Linux a name may be any bytes."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def refuse_used_folder(folder: Path, what: str) -> None:
    """Check that ``folder`` is missing or empty, so that writing there can lose nothing.

    Raises:
        OutputError: when it is a file, holds anything, or cannot be made where it is to be.
    """
    refuse_bad_names(folder)
    if folder.is_file():
        raise OutputError(f"{folder}: is a file, but {what} needs a folder; choose another --output")
    try:
        used = is_used(folder)
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from error
    if used:
        raise OutputError(
            f"{folder}: exists and is not empty; nothing was overwritten. Choose another --output"
        )
    place = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), None)
    if place is not None and not place.is_dir():
        raise OutputError(
            f"{folder}: {place} is a file, so no folder can be below it; choose another --output"
        )
    if place is not None and not os.access(place, os.W_OK):
        raise OutputError(f"{folder}: {write_problem(PermissionError(errno.EACCES, 'no permission'))}")


def shipped_folder(name: str) -> Path | None:
    """Return a folder that comes with the program beside its code (``configs``, ``datasets``), if there.

    A wheel has it as the package ``sdlora_NAME``, a checkout beside ``sdlora``.
    """
    spec = importlib.util.find_spec(f"sdlora_{name}")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    places.append(Path(__file__).parent.parent / name)
    return next((place for place in places if place.is_dir()), None)


def find_settings(folder: Path) -> Path:
    """Return the file of a run's settings, which resuming it needs.

    Raises:
        TrainingError: when the folder holds no run.
    """
    file = RunFolder(folder).config_file
    if not file.is_file():
        raise TrainingError(
            f"{folder}: holds no run to continue (no config.toml); check --output, or leave --resume out"
        )
    return file


def size_text(num_bytes: float, decimals: int = 0) -> str:
    """Return a number of bytes for people: MiB with that many decimals, GiB with one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.{decimals}f} MiB"


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Return the value of a JSON text from outside.

    Args:
        text: bytes are UTF-8 (or UTF-16 or 32 by their first bytes, as JSON has it).
        finite: refuse the words ``NaN`` and ``Infinity``, which are not JSON, and numbers beyond a float's.

    Raises:
        ValueError: whatever is wrong with it: also brackets nested deeper than :data:`MAX_LEVELS`, whole
            numbers of more than 40 digits, a key given twice, and half characters (lone surrogates), which no
            file can hold.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    _check_levels(text, _JSON_STRING)
    value = json.loads(
        text,
        object_pairs_hook=_without_repeated_keys,
        parse_int=_whole_number,
        parse_float=_finite_number if finite else float,
        parse_constant=_no_number if finite else float,
    )
    if _HALF_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds half a character (a lone surrogate)") from None
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text from outside.

    Raises:
        ValueError: whatever is wrong with it: also brackets or dotted keys nested deeper than
            :data:`MAX_LEVELS`, more than :data:`MAX_TOML_CHARS` characters, and endless numbers.
    """
    if len(text) > MAX_TOML_CHARS:
        raise ValueError(f"it has {len(text)} characters, more than {MAX_TOML_CHARS}")
    _check_levels(text, _TOML_STRING)
    if _DEEP_KEY.search(_TOML_STRING.sub("x", text)):
        raise ValueError(f"a key has more than {MAX_LEVELS} parts")
    try:
        tree = tomllib.loads(text, parse_float=_finite_or_said)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except ValueError as error:
        if "int_max_str_digits" in str(error):  # Python's words, meant for programmers
            raise ValueError("a whole number has too many digits") from None
        raise
    waiting: list[Any] = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a whole number is beyond the 64 bits that TOML has")
    return tree


def _check_levels(text: str, strings: re.Pattern[str]) -> None:
    """Refuse brackets nested too deeply before a parser that calls itself sees them."""
    if text.count("[") + text.count("{") <= MAX_LEVELS:
        return
    depth = 0
    for bracket in _NOT_BRACKETS.sub("", strings.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_LEVELS:
            raise ValueError(f"brackets are nested more than {MAX_LEVELS} deep")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("it has the same key twice")
    return tree


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits")
    return int(digits)


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _finite_or_said(text: str) -> float:
    """TOML has the words ``inf`` and ``nan``, but no number may become one by its size."""
    value = float(text)
    if math.isinf(value) and "inf" not in text:
        raise ValueError("a number is too large")
    return value


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON")
