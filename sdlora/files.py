"""Writing so that a crash never leaves half a file: temporary name first, then rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import OutputError, TrainingError
from .run_folder import RunFolder


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
    except OutputError as error:  # told by what wrote below the temporary name, which means nothing to anyone
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
    """Return in plain words why writing failed and what to do."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space or choose another --output (nothing was half-written)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "may not be written; change its permissions or choose another --output"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a file stands where a folder is needed; move it away or choose another --output"
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


def refuse_used_folder(folder: Path, what: str) -> None:
    """Check that ``folder`` is missing or empty, so that writing there can lose nothing.

    Raises:
        OutputError: when it is a file, holds anything, or cannot be made where it is to be.
    """
    if folder.is_file():
        raise OutputError(f"{folder}: is a file, but {what} needs a folder; choose another --output")
    try:
        used = folder.is_dir() and any(folder.iterdir())
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


def find_settings(folder: Path) -> Path:
    """Return the file of a run's settings, which going on with it needs.

    Raises:
        TrainingError: when the folder holds no run.
    """
    file = RunFolder(folder).config_file
    if not file.is_file():
        raise TrainingError(
            f"{folder}: holds no run to go on with (no config.toml); check --output, or leave --resume out"
        )
    return file


def size_text(num_bytes: float, decimals: int = 0) -> str:
    """Return a number of bytes for people: MiB with so many decimals, GiB with one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.{decimals}f} MiB"


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text from outside.

    Raises:
        ValueError: whatever is wrong with it, brackets nested too deeply and endless numbers included.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text from outside.

    Raises:
        ValueError: whatever is wrong with it, brackets nested too deeply and endless numbers included.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
