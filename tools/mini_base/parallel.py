"""Data parallelism between processes of one machine.

Two single-threaded processes train almost twice as fast here as one process
with two threads: on small tensors, the threads of one operation mostly wait
for each other, all the more when other programs use the cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Returns this worker's number; 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Returns the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(init_file: str, number: int, count: int, device: torch.device) -> None:
    """Joins a group of ``count`` workers that meet at ``init_file``."""
    if count > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{init_file}", rank=number, world_size=count)


def leave() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over the workers, in one exchange."""
    if world() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


@torch.no_grad()
def share(owned: Sequence[Sequence[Tensor]]) -> None:
    """Sends each worker's tensors to all others.

    Args:
        owned: For each worker the tensors whose values it decides.
    """
    if world() == 1:
        return
    for owner, tensors in enumerate(owned):
        if not tensors:
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.broadcast(flat, owner)
        if owner != rank():
            parts = flat.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(
                list(tensors),
                [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)],
            )


def agree(value: float) -> float:
    """Returns worker 0's ``value`` to every worker."""
    if world() == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(box, 0)
    return box.item()
