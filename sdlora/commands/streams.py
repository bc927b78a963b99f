"""Standard output and error that never end a command: closed, full or cut off, the work is still done."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Tolerant(io.RawIOBase):
    """The raw stream below standard output: once it cannot be written, the rest goes nowhere.

    Attributes:
        failure: why it could not be written, if so.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return bool(self._raw.isatty())

    def write(self, data: Any) -> int:
        """Write what can be written."""
        if self.failure is None:
            try:
                written = self._raw.write(data)
                return len(data) if written is None else int(written)
            except OSError as error:
                self.failure = error
        return len(data)


class Lost:
    """What became of the answer.

    Attributes:
        failure: why standard output could not be written; None while it can, and if its reader has only
            seen enough.
    """

    def __init__(self, output: _Tolerant | None) -> None:
        self._output = output

    @property
    def failure(self) -> OSError | None:
        """See the class."""
        error = self._output.failure if self._output else None
        return None if error is None or _is_broken_pipe(error) else error


@contextmanager
def tolerant_streams() -> Iterator[Lost]:
    """Replace the standard streams inside by ones that neither fail nor refuse a character.

    Output to a closed stream is dropped. Characters that its encoding lacks are
    written as escapes.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    output, sys.stdout = _tolerant(sys.stdout)
    _, sys.stderr = _tolerant(sys.stderr)
    try:
        yield Lost(output)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Open the first three descriptors; otherwise the next opened file would be taken for standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _tolerant(stream: Any) -> tuple[_Tolerant | None, Any]:
    if stream is None:  # it was closed when the program began
        return None, open(os.devnull, "w", encoding="utf-8")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # unbuffered streams have no buffer in between
    if not isinstance(raw, io.RawIOBase):  # a stream of a test or a notebook
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        return None, stream
    with suppress(OSError, ValueError):
        stream.flush()
    tolerant = _Tolerant(raw)
    text = io.TextIOWrapper(
        io.BufferedWriter(tolerant),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return tolerant, text


def _is_broken_pipe(error: OSError) -> bool:
    # Windows says EINVAL where a pipe's reader is gone
    return error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL)
