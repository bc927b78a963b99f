"""Digests that are equal if two modules or files hold the same numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn


def module_fingerprint(module: nn.Module, *, extra: str = "") -> str:
    """Return SHA-256 (hex) over names, shapes, formats and bytes of all weights, and ``extra``."""
    digest = hashlib.sha256(extra.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # flatten: a channels-last 1x1 kernel counts as contiguous, but torch refuses to view it as bytes
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """Return SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
