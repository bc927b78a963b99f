"""Writing a safetensors file again with some tensors changed: same keys, order, formats and places.

The file goes through memory tensor by tensor. Since no tensor changes its format or shape, the data keeps
its layout to the byte, and the header differs in its text entries only.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..files import replacing
from ..tensor_file import DTYPE_NAMES, FLOAT_DTYPES, Header, shown
from .checkpoints import read_tensor
from .workers import in_order

Change = Callable[[str, Tensor], Tensor]
"""(key, stored tensor) -> the tensor to store in its place, in the same format and shape."""
_PIECE = 32 * 2**20


def rewrite(
    header: Header,
    target: Path,
    metadata: Mapping[str, str],
    keys: frozenset[str],
    change: Change,
    advance: Callable[[int], None],
) -> None:
    """Write a file again, atomically, with the tensors under ``keys`` changed.

    Args:
        header: of the file to read.
        target: the new file.
        metadata: its text entries.
        keys: what is changed; everything else is copied byte for byte.
        change: gives the new tensors; called from several threads at once.
        advance: told the bytes of each tensor written.

    Raises:
        ModelError: when the file cannot be read, or a result does not fit its number format.
        OutputError: when the place cannot be written.
    """
    jobs = _jobs(header, keys)

    def work(job: tuple[str | None, int, int]) -> bytes | memoryview:
        key, start, end = job
        if key is None:
            return _read_bytes(header, start, end)
        stored = read_tensor(header, key)
        changed = change(key, stored)
        assert changed.dtype == stored.dtype and changed.shape == stored.shape, key
        seen = changed if changed.dtype in FLOAT_DTYPES else changed.float()  # fp8 has few operations
        if not bool(torch.isfinite(seen).all()):
            raise ModelError(
                f"{header.path}: `{shown(key)}` would hold values too large for its number format "
                f"({DTYPE_NAMES[stored.dtype]}), or holds NaN already; use smaller strengths"
            )
        return changed.contiguous().reshape(-1).view(torch.uint8).numpy().data

    with replacing(target) as temporary, temporary.open("wb", buffering=0) as stream:
        _write_all(stream, _header_bytes(header, metadata))
        for (_, start, end), data in zip(jobs, in_order(work, jobs), strict=True):
            _write_all(stream, data)
            advance(end - start)
        os.fsync(stream.fileno())


def _jobs(header: Header, keys: frozenset[str]) -> list[tuple[str | None, int, int]]:
    """Return (key, start, end) of what is written, in order; None for bytes that are copied."""
    jobs: list[tuple[str | None, int, int]] = []
    for key, spec in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if key in keys:
            jobs.append((key, spec.start, spec.end))
            continue
        for start in range(spec.start, spec.end, _PIECE):
            end = min(start + _PIECE, spec.end)
            if jobs and jobs[-1][0] is None and end - jobs[-1][1] <= _PIECE:
                jobs[-1] = (None, jobs[-1][1], end)
            else:
                jobs.append((None, start, end))
    return jobs


def _header_bytes(header: Header, metadata: Mapping[str, str]) -> bytes:
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, spec in header.tensors.items():
        tree[key] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [spec.start, spec.end],
        }
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_bytes(header: Header, start: int, end: int) -> bytes:
    with header.path.open("rb", buffering=0) as stream:
        stream.seek(header.data_offset + start)
        data = b""
        while len(data) < end - start:
            more = stream.read(end - start - len(data))
            if not more:
                raise ModelError(f"{header.path}: became shorter while it was read; check the disk")
            data = data + more if data else more
    return data


def _write_all(stream: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
