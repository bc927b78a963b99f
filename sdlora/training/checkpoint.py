"""The resumable state of a run on disk: saved atomically, the newest good one found, old ones pruned.

A checkpoint is a folder ``step-000040`` with ``adapter.safetensors`` (fp32, WebUI format: usable by
itself), ``optimizer.safetensors`` (masters and moments) and ``state.json`` (step, digests of the other
two). The folder gets its name only when everything in it is written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from ..errors import TrainingError
from ..families.fingerprint import file_digest
from ..files import parse_json, replacing, write_json
from ..run_folder import CheckpointFolder, checkpoint_folder, list_checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A loaded state.

    Attributes:
        step: optimizer steps done.
        tensors: named tensors of masters and optimizer.
        state: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    folder: Path


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    write_adapter: Callable[[Path], None],
) -> Path:
    """Write a checkpoint under ``root`` and return its folder.

    Args:
        write_adapter: writes the adapter to the path it is given.

    Raises:
        OutputError: if it cannot be written; earlier checkpoints stay as they are.
    """
    target = checkpoint_folder(root, step).path
    if os.path.lexists(target):
        if is_whole(CheckpointFolder(target, step)):  # saved already at this step: the content is the same
            return target
        _put_away(target)
    with replacing(target) as temporary:
        temporary.mkdir(parents=True)
        files = CheckpointFolder(temporary, step)
        adapter, optimizer = files.adapter_file, files.optimizer_file
        write_adapter(adapter)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, optimizer)
        digests = {file.name: file_digest(file) for file in (adapter, optimizer)}
        write_json(files.state_file, {"step": step, "digests": digests, **state})
    return target


def _put_away(target: Path) -> None:
    """Make room for a checkpoint: a damaged one goes, and what is no checkpoint at all gets another name."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.rename(target.with_name(f"{target.name} was here {time.time_ns()}"))


def load_newest(root: Path, notice: Callable[[str], None]) -> Checkpoint:
    """Load the newest checkpoint whose files are intact; ``notice`` is called for each damaged one skipped.

    Raises:
        TrainingError: if there is none.
    """
    for folder in reversed(list_checkpoints(root)):
        try:
            return load_checkpoint(folder)
        except (OSError, ValueError, KeyError) as error:
            notice(f"{folder.path} is damaged ({error}); trying the one before")
    raise TrainingError(
        f"{root}: no usable checkpoint to resume from; start without --resume in a new --output"
    )


def load_checkpoint(folder: CheckpointFolder) -> Checkpoint:
    """Load one checkpoint, checking its digests (ValueError if they differ)."""
    state = _state_of(folder)
    for name, digest in state.pop("digests").items():
        if file_digest(folder.path / name) != digest:
            raise ValueError(f"{name} differs from what was written")
    return Checkpoint(int(state.pop("step")), load_file(folder.optimizer_file), state, folder.path)


def micro_batches(root: Path) -> int | None:
    """Return how many micro-batches made up a step when the newest checkpoint was written, if it says."""
    for folder in reversed(list_checkpoints(root)):
        with suppress(OSError, ValueError, KeyError):
            return int(_state_of(folder)["micro_batches"])
    return None


def packed(saved: Checkpoint) -> bytes:
    """Return a checkpoint as bytes, for another process."""
    rest = {"step": saved.step, "state": saved.state, "folder": str(saved.folder)}
    return save(saved.tensors, {"rest": json.dumps(rest)})


def unpacked(content: bytes) -> Checkpoint:
    """Return the checkpoint that :func:`packed` made into bytes."""
    length = int.from_bytes(content[:8], "little")
    rest = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["rest"])
    return Checkpoint(int(rest["step"]), load(content), rest["state"], Path(rest["folder"]))


def is_whole(folder: CheckpointFolder) -> bool:
    """Return whether a checkpoint's files are as they were written."""
    try:
        digests = _state_of(folder)["digests"]
        return all(file_digest(folder.path / name) == digests[name] for name in digests)
    except (OSError, ValueError):
        return False


def _state_of(folder: CheckpointFolder) -> dict[str, Any]:
    state = parse_json(folder.state_file.read_text(encoding="utf-8"), finite=False)
    digests = state.get("digests") if isinstance(state, dict) else None
    whole = isinstance(digests, dict) and folder.optimizer_file.name in digests
    if not whole or not all(type(state.get(key, 0)) is int for key in ("step", "micro_batches")):
        raise ValueError(f"{folder.state_file.name} differs from what was written")
    return state


def prune_checkpoints(root: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Remove all but the ``keep`` newest; never the newest one, nor the newest intact one.

    Args:
        root: the folder of checkpoints.
        keep: how many of the newest are kept.
        spared: steps whose checkpoints stay as well.
    """
    folders = list_checkpoints(root)
    old, kept = folders[: -max(1, keep)], folders[-max(1, keep) :]
    if not any(is_whole(folder) for folder in reversed(kept)):
        intact = next((folder for folder in reversed(old) if is_whole(folder)), None)
        old = [folder for folder in old if folder != intact]
    for folder in old:
        if folder.step not in spared:
            shutil.rmtree(folder.path, ignore_errors=True)
    for leftover in root.glob(".*"):  # half-written by a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
