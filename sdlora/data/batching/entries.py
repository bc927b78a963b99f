"""One cached encoding on disk: written as a whole or not at all, and used only if its checksum is right.

A killed run leaves at most a file with a hidden temporary name; a power cut may leave a file of the right
length full of zeros, which only the checksum reveals. Two processes may write one entry at the same time:
both write the same numbers, and the last one wins.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ...errors import OutputError
from ...files import parse_json, replacing
from ..reading.cache_folder import mark_used

_CHECKSUM = "crc32"
_MAX_HEADER = 1 << 20
_ATTEMPTS = 5


def read_entry(file: Path) -> dict[str, Tensor] | None:
    """Return the tensors of an entry and note its use; None when it is missing or damaged."""
    if file.is_symlink():  # not made by a run; noting its use would change what it leads to
        return None
    try:
        data = file.read_bytes()  # not mapped: on Windows a mapped file could not be replaced
    except OSError:
        return None
    if not _intact(data):
        return None
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError):
        return None
    mark_used(file)
    return tensors


def write_entry(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an entry with its checksum.

    Raises:
        OutputError: when it cannot be written.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with replacing(file) as temporary:
                save_file(dict(tensors), temporary, metadata={_CHECKSUM: "0" * 8})
                _stamp(temporary)
            return
        except OutputError as error:
            if read_entry(file) is not None:  # another process was faster, and holds it open (Windows)
                return
            # pruning removes empty folders, perhaps between our creating one and writing to it
            if attempt + 1 < _ATTEMPTS:
                continue
            where = "set data.cache_folder, or free space with `sdlora cache --prune`"
            raise OutputError(f"{error}; this is the cache of encodings: {where}") from error


def _stamp(file: Path) -> None:
    """Put the checksum of the tensors where the header holds eight zeros for it."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(length)
        checksum = zlib.crc32(stream.read())
        empty = f'"{_CHECKSUM}":"{"0" * 8}"'.encode()
        assert header.count(empty) == 1, header
        stream.seek(8)
        stream.write(header.replace(empty, f'"{_CHECKSUM}":"{checksum:08x}"'.encode()))


def _intact(data: bytes) -> bool:
    if len(data) < 8:
        return False
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MAX_HEADER, len(data) - 8):
        return False
    try:
        header = parse_json(data[8 : 8 + length])
        noted = int(header["__metadata__"][_CHECKSUM], 16)
    except (ValueError, KeyError, TypeError):
        return False
    return noted == zlib.crc32(memoryview(data)[8 + length :])
