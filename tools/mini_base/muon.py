"""Muon: momentum whose matrix updates are made orthogonal.

Tried for 25 equal steps of 32 images from the same weights, the error on fixed
noise fell from 0.0666 to 0.0578 with it and to 0.0593 with AdamW; the extra matrix
products cost about 0.25 of 2.3 seconds a step (two workers, 64 images).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import parallel
from .models import autocast_type

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Brings the singular values of a stack of matrices close to one.

    Args:
        matrices: (count, rows, columns) with any scale.

    Returns:
        The same stack after five Newton-Schulz iterations.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # bfloat16 is enough for a direction (Jordan et al. 2024), where the device has units for it.
    kind = autocast_type(matrices.device)
    x = x if kind is None else x.to(kind)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _flat_shape(parameter: Tensor) -> tuple[int, int]:
    rows = parameter.shape[0]
    return rows, parameter.numel() // rows


def _share_out(parameters: list[Parameter], workers: int) -> list[list[Parameter]]:
    """Deals parameters to workers so that each has about the same work."""

    def work(parameter: Parameter) -> int:
        return parameter.numel() * min(_flat_shape(parameter))

    shares: list[list[Parameter]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for parameter in sorted(parameters, key=work, reverse=True):
        lightest = loads.index(min(loads))
        shares[lightest].append(parameter)
        loads[lightest] += work(parameter)
    return shares


class Muon(Optimizer):
    """Nesterov momentum with orthogonal updates for matrices and convolutions.

    Updates are scaled to the root mean square that AdamW's have, so both can
    share one learning rate.
    """

    def __init__(self, params: Iterable[Parameter], lr: float, momentum: float = 0.95) -> None:
        """Optimises ``params``, each of which must have two or more dimensions.

        With several workers each one computes the updates of its share and
        sends the results to the others.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._shares = _share_out(self.param_groups[0]["params"], parallel.world())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Applies one update to every parameter that has a gradient."""
        group = self.param_groups[0]
        # Every worker keeps every momentum, so that any one can write a checkpoint.
        moving = [p for p in group["params"] if p.grad is not None]
        for parameter in moving:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum_buffer"] for p in moving]
        torch._foreach_lerp_(buffers, [p.grad for p in moving], 1 - group["momentum"])
        # Equal shapes are stacked: one batched product for many small ones.
        stacks: dict[tuple[int, int], list[Parameter]] = defaultdict(list)
        for parameter in self._shares[parallel.rank()]:
            if parameter.grad is not None:
                stacks[_flat_shape(parameter)].append(parameter)
        for shape, members in stacks.items():
            self._update(shape, members, group["lr"], group["momentum"])
        parallel.share(self._shares)

    def _update(self, shape: tuple[int, int], members: list[Parameter], lr: float, momentum: float) -> None:
        directions = []
        for parameter in members:
            assert parameter.grad is not None
            buffer = self.state[parameter]["momentum_buffer"]
            directions.append(parameter.grad.lerp(buffer, momentum).reshape(shape))
        updates = orthogonalise(torch.stack(directions))
        scale = 0.2 * max(shape) ** 0.5
        for parameter, update in zip(members, updates, strict=True):
            parameter.add_(update.reshape(parameter.shape), alpha=-lr * scale)
