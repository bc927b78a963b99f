"""Ways to merge that resolve conflicts between adapters: TIES and DARE, on the updates themselves.

Both papers work on task vectors, the fine-tuned weights minus the base's weights: here each layer's
dW. peft's ``add_weighted_adapter`` applies them to the factors A and B one by one, where signs and sizes
mean nothing: ``(up G, G^-1 down)`` is the same adapter for every invertible G, but another sign pattern.
So merged results would depend on how an adapter happens to be written. On dW they do not; the price is
that the result is no longer of low rank and must be cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.canonical import ModuleKey

METHODS = ("linear", "ties", "dare", "dare-ties")


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Return a task vector with only its largest entries, the rest zero (TIES, step 1).

    The paper trims a whole model at once; here each layer keeps its share, as in peft, so that layers with
    small updates are not emptied.

    Args:
        delta: any shape.
        density: share of the entries kept, above 0 and at most 1; ties with the smallest kept one stay too.

    Source: Yadav et al. 2023, "TIES-Merging", section 4.2.
    """
    count = max(1, round(density * delta.numel()))
    if count >= delta.numel():
        return delta
    sizes = delta.abs()
    border = sizes.flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(sizes >= border, delta, 0.0)


def elected(deltas: Sequence[Tensor]) -> Tensor:
    """Return, entry by entry, the mean of the task vectors that have the winning sign (TIES, steps 2, 3).

    The sign with the larger total size wins. The weights are in the vectors already, so a negative weight
    votes against; with one weight for all this is the paper's ``lambda * tau_m``.

    Source: Yadav et al. 2023, section 4.2.
    """
    signs = torch.sign(sum(deltas[1:], deltas[0].clone()))
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        agrees = (torch.sign(delta) == signs) & (delta != 0)
        total += torch.where(agrees, delta, 0.0)
        count += agrees
    return total / count.clamp(min=1.0)


def dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return a task vector with entries dropped at random and the rest scaled by 1 / density (DARE).

    The expectation of every entry stays the same: ``density * delta / density``.

    Args:
        density: probability that an entry stays, above 0 and at most 1.

    Source: Yu et al. 2024, "Language Models are Super Mario", equation 3.
    """
    if density >= 1.0:
        return delta
    keep = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(keep, delta / density, 0.0)


def combined(
    deltas: Sequence[Tensor], method: str, density: float, seed: int, module: ModuleKey, places: Sequence[int]
) -> Tensor:
    """Return one layer's merged update by a method other than ``linear``.

    Args:
        deltas: of the layer, each times its weight.
        method: ``ties``, ``dare`` or ``dare-ties`` (dropping in place of trimming).
        density: share of the entries kept.
        seed: for dropping; each adapter and layer has its own numbers.
        module: which layer.
        places: the adapters' places on the command line.
    """
    if method == "ties":
        return elected([trimmed(delta, density) for delta in deltas])
    thinned = []
    for place, delta in zip(places, deltas, strict=True):
        generator = torch.Generator().manual_seed(layer_seed(seed, module, place))
        thinned.append(dropped(delta, density, generator))
    return elected(thinned) if method == "dare-ties" else sum(thinned[1:], thinned[0].clone())


def layer_seed(seed: int, module: ModuleKey, place: int = 0) -> int:
    """Return a seed that depends on nothing but the run's seed, the layer and the adapter's place."""
    text = f"{seed}/{place}/{module.component}/{module.path}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
