"""Writing a safetensors file again with some tensors changed: same keys, order, formats and places.

The file goes through memory tensor by tensor. Since no tensor changes its format or shape, the data keeps
its layout to the byte, and the header differs in its text entries only.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, shown
from ..files import replacing
from ..tensor_file import DTYPE_NAMES, FLOAT_DTYPES, Header, all_finite
from .checkpoints import read_into
from .workers import in_order

Change = Callable[[str, Tensor], None]
"""(key, stored tensor) -> changes the tensor in place."""
_PIECE = 32 * 2**20


class Scratch(threading.local):
    """Memory that a thread uses again and again.

    With fresh memory for each tensor, page faults took a third as much processor time as all the other work.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}

    def tensor(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of arbitrary content; the next call for the same use reuses its memory."""
        needed = math.prod(shape) * dtype.itemsize
        if use not in self._blocks or len(self._blocks[use]) < needed:
            self._blocks[use] = torch.empty(needed, dtype=torch.uint8)
        return self._blocks[use][:needed].view(dtype).view(*shape)


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
        change: changes a tensor in place; called from several threads at once.
        advance: called with the bytes of each tensor written.

    Raises:
        ModelError: when the file cannot be read, or a result does not fit its number format.
        OutputError: when the place cannot be written.
    """
    jobs = _jobs(header, keys)
    scratch = Scratch()
    first = _header_bytes(header, metadata)

    with replacing(target) as temporary:

        def work(job: tuple[str | None, int, int]) -> None:
            key, start, end = job
            block = scratch.tensor("stored", (end - start,), torch.uint8)
            read_into(header, start, block)
            if key is not None:
                spec = header.tensors[key]
                stored = block.view(spec.dtype).view(spec.shape)
                change(key, stored)
                _check_finite(header, key, stored)
            with temporary.open("r+b", buffering=0) as stream:  # every tensor has its place already
                stream.seek(len(first) + start)
                _write_all(stream, block.numpy().data)

        with temporary.open("wb", buffering=0) as stream:
            _write_all(stream, first)
        for (_, start, end), _ in zip(jobs, in_order(work, jobs), strict=True):
            advance(end - start)
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())


def _check_finite(header: Header, key: str, tensor: Tensor) -> None:
    seen = tensor if tensor.dtype in FLOAT_DTYPES else tensor.float()  # fp8 has few operations
    if not all_finite(seen):
        raise ModelError(
            f"{header.path}: `{shown(key)}` would hold values too large for its number format "
            f"({DTYPE_NAMES[tensor.dtype]}), or holds NaN already; use smaller strengths"
        )


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


def _write_all(stream: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
