"""The hashes of an adapter file that its own header holds: kohya's two, and that of modelspec."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..tensor_file import header_bytes, in_file_order, tensor_bytes

_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def with_hashes(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> dict[str, str]:
    """Return the entries with ``sshs_model_hash``, ``sshs_legacy_hash`` and ``modelspec.hash_sha256``.

    The first is the SHA-256 of the tensor data, the second that of :func:`legacy_hash`.
    """
    data = hashlib.sha256()
    for tensor in in_file_order(tensors).values():
        data.update(tensor_bytes(tensor))
    return dict(entries) | {
        "sshs_model_hash": data.hexdigest(),
        "sshs_legacy_hash": legacy_hash(tensors, entries, lambda key: tensor_bytes(tensors[key])),
        "modelspec.hash_sha256": "0x" + data.hexdigest(),
    }


def legacy_hash(
    tensors: Mapping[str, Tensor], entries: Mapping[str, str], data: Callable[[str], bytes]
) -> str:
    """Return ``sshs_legacy_hash``: that of 64 KiB at 1 MiB of a file whose header has only ``ss_*`` entries.

    As in kohya sd-scripts (``train_util.precalculate_safetensors_hashes``), which lays out such a file.

    Args:
        tensors: of the file; only shapes and number formats are looked at.
        entries: all entries of the header.
        data: gives the bytes of one tensor.
    """
    ordered = in_file_order(tensors)
    start = header_bytes(ordered, {key: value for key, value in entries.items() if key.startswith("ss_")})
    window = hashlib.sha256()
    _feed(window, start, 0)
    position = len(start)
    for key, tensor in ordered.items():
        end = position + tensor.numel() * tensor.element_size()
        if end > _LEGACY_START and position < _LEGACY_START + _LEGACY_LENGTH:
            _feed(window, data(key), position)
        position = end
    return window.hexdigest()[:8]


def _feed(digest: Any, block: bytes, position: int) -> None:
    """Add to the digest the part of ``block`` (at ``position`` in the file) inside the legacy window."""
    first = max(_LEGACY_START - position, 0)
    last = _LEGACY_START + _LEGACY_LENGTH - position
    if last > first:
        digest.update(block[first:last])
