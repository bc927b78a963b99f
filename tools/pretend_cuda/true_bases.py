"""Bases of the true sizes that take no memory and no disk: files of zeros that were never written.

A checkpoint here is a header and a hole. Its tensors are not read either: each is one zero, repeated, which
:mod:`.dispatch` keeps as memory that is never touched when it stays in main memory, and as a fake tensor when
it goes to a card.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sdlora.families.weights as weights
from sdlora.tensor_file import DTYPE_NAMES
from tools.true_sizes import checkpoint_shapes


def write_hollow_checkpoint(file: Path, family: str, dtype: torch.dtype = torch.float16) -> None:
    """Write a single-file checkpoint of the family's true size whose numbers are a hole in the file."""
    position, header = 0, {}
    for key, shape in checkpoint_shapes(family).items():
        size = math.prod(shape) * dtype.itemsize
        offsets = [position, position + size]
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)


@contextmanager
def reading_zeros() -> Iterator[None]:
    """Have checkpoints read as zeros, without reading."""

    def read(stream: Any, header: Any, spec: Any, buffer: Any) -> torch.Tensor:
        return torch.zeros((), dtype=spec.dtype).expand(spec.shape)

    original = weights._read
    weights._read = read
    try:
        yield
    finally:
        weights._read = original
