"""``python -m tools.recompute_counts``: what each rung of ``training.recompute`` saves, and what it costs.

A step of a base of the true sizes is run on the meta device, batch 1, bf16, plain LoRA of rank 16 on the
attentions, by the fast paths. Counted are the memory alive at once, the multiplications and additions of
products, convolutions and attentions, operations of torch, and the bytes that they read and write.
``--kinds`` names what the forward pass keeps at the first rung, by what made it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdlora.adapters.attach import create_adapter
from sdlora.adapters.trainable_layers import attach_for_training
from sdlora.config.toml import load_config
from sdlora.families.base import SizeHint
from sdlora.families.lean import LeanResidual
from sdlora.families.lean_blocks import LeanBlock
from sdlora.families.recompute import Rungs
from sdlora.training.memory_as_computed import computed_as_in_a_run
from sdlora.training.memory_count import counting_memory, fused_attention

from .true_sizes import blueprint

SIDES = {"sd1": 512, "sd2": 768, "sdxl": 1024}
_GIB = 2**30
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
_PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1, "baddbmm_": 1}


@dataclass
class Counts:
    """What a step takes."""

    flops: int = 0
    launches: int = 0
    bytes: int = 0
    peak: int = 0
    kept: int = 0
    blocks: int = 0
    by_shape: Counter[Any] = field(default_factory=Counter)


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if func.is_view or name in ("detach", "empty", "empty_like", "_unsafe_view"):
            return out
        self._counts.launches += 1
        self._counts.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._counts.flops += _flops(name, args, out)
        return out


def _flops(name: str, args: Any, out: Any) -> int:
    """Return the multiplications and additions of an operation."""
    if name in _PRODUCTS:
        first, other = args[_PRODUCTS[name] :][:2]
        return 2 * first.numel() * other.shape[-1]
    if name in _ATTENTION:
        query, key = args[:2] if "backward" not in name else args[1:3]
        return 2 * _ATTENTION[name] * query.numel() * key.shape[-2]
    if name == "convolution":
        weight = args[1]
        return 2 * out.numel() * weight[0].numel()
    if name == "convolution_backward":
        gradient, _, weight = args[:3]
        return 2 * gradient.numel() * weight[0].numel() * sum(args[-1][:2])
    return 0


def counted(family: str, rung: str, count: int | None = None, *, kinds: bool = False) -> Counts:
    """Return what a step of a family takes at a rung."""
    side = SIDES[family]
    given = ["adapter.rank=16", "adapter.alpha=16", "training.batch_size=1", f"data.resolution={side}"]
    given += [f"training.recompute={rung}"] + (
        [] if count is None else [f"training.recompute_blocks={count}"]
    )
    config = load_config(None, given)
    model = blueprint(family, torch.bfloat16)
    with torch.device("meta"):  # no number is drawn
        fresh = create_adapter(model, config.adapter, 0)
    layers = attach_for_training(model, fresh, "counted")
    for layer in layers:
        for parameter in layer.parameters.values():
            parameter.requires_grad_(True)
    model.prepare(training=True)
    counts = Counts()
    latents = torch.empty((1, *model.facts.latents.shape(side, side)), device="meta")
    timesteps, sizes = (
        torch.zeros(1, dtype=torch.long, device="meta"),
        [SizeHint((side, side), (0, 0), (side, side))],
    )
    with fused_attention(), computed_as_in_a_run(model, layers, config, always=True):
        forwards = [module.__dict__.get("forward") for module in model.unet.modules()]
        counts.blocks = sum(isinstance(forward, LeanBlock | LeanResidual) for forward in forwards)
        with torch.no_grad():
            text = model.encode_text([""])
        with _Counting(counts), counting_memory() as memory, _kinds(counts) if kinds else _nothing():
            model.predict(latents, timesteps, text, sizes).square().mean().backward()
        counts.peak = memory.peak
    return counts


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _kinds(counts: Counts) -> Iterator[None]:
    """Count the memory that is saved for the backward pass by the shape of its tensors, each memory once."""
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (
            storage._cdata not in seen
            and not isinstance(tensor, torch.nn.Parameter)
            and tensor.grad_fn is not None
        ):
            seen[storage._cdata] = storage
            counts.by_shape[type(tensor.grad_fn).__name__, tuple(tensor.shape)] += storage.nbytes()
            counts.kept += storage.nbytes()
        return tensor.detach()

    hooks: Any = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks:
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.recompute_counts", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"some of {', '.join(SIDES)}; all by default")
    parser.add_argument("--between", type=int, default=0, metavar="N", help="N points between two rungs, too")
    parser.add_argument("--kinds", action="store_true", help="name what is kept at the first rung")
    given = parser.parse_args(arguments)
    print(
        "| base | rung | of its blocks | activations, GiB | FLOPs, T | more work | operations | bytes, GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for family in given.family or SIDES:
        if given.kinds:
            _print_kinds(counted(family, "nothing", kinds=True))
            continue
        first: Counts | None = None
        for rung in Rungs:
            whole = counted(family, rung.name)
            first = first or whole
            between = range(1, given.between + 1) if rung else ()
            for point in between:
                some = whole.blocks * point // (given.between + 1)
                _print_row(family, rung.name, str(some), counted(family, rung.name, some), first)
            _print_row(family, rung.name, "all", whole, first)
    return 0


def _print_row(family: str, rung: str, blocks: str, counts: Counts, first: Counts) -> None:
    print(
        f"| {family}, {SIDES[family]} px | {rung} | {blocks} | {counts.peak / _GIB:.2f} | "
        f"{counts.flops / 1e12:.2f} | {counts.flops / first.flops - 1:.1%} | {counts.launches:,} | "
        f"{counts.bytes / 1e9:.1f} |",
        flush=True,
    )


def _print_kinds(counts: Counts) -> None:
    print(f"kept: {counts.kept / _GIB:.2f} GiB")
    for (name, shape), size in counts.by_shape.most_common(40):
        print(f"  {size / 2**20:8.1f} MiB  {name} {shape}")


if __name__ == "__main__":
    sys.exit(main())
