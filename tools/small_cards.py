"""What a run takes on cards of each size: the table of docs/small-cards.md, counted on the meta device.

``python -m tools.small_cards`` prints it; ``--family`` and ``--sizes`` leave parts out. Counted is the whole
run (encoding, placing, steps, validation, previews), batch 1, rank 16 on the attention, at each base's own
resolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sdlora.config.toml import load_config
from sdlora.training.foresight import foresee
from sdlora.training.ladder import APART, Climbed

CONTEXT = 0.8
"""GiB of a card that its context and the desktop take, about."""
SIZES = (4, 6, 8, 12, 16, 24)
FAMILIES = {"sd1": "SD1.5, 512 px", "sd2": "SD2.1, 768 px", "sdxl": "SDXL, 1024 px"}
_FIXED = ("training.batch_size=1", "adapter.rank=16", "adapter.alpha=16", "judge.every=0")
_CHEAPEST = {
    "training.autoencoder": "banded",
    "training.recompute": "blocks",
    "training.fast": APART,
    "training.offload_blocks": "0",
    "optimizer.name": "adamw8bit",
}
_GIB = 2**30


def climbed(family: str, free: float | None, *overrides: str) -> Climbed:
    """Return the ladder's end for a family and the GiB that are free; None for any number."""
    config = load_config(None, [*_FIXED, *overrides], {"model.base": family})
    return foresee(config, None if free is None else int(free * _GIB))


def row(title: str, planned: Climbed, without: int) -> str:
    """Return a line of the table; ``without`` is the arithmetic of a step without any rung."""
    peak = max(planned.plan.phases.values()) / _GIB
    rungs = [f"`{rung.key.partition('.')[2]}={rung.value}`" for rung in planned.taken]
    work = f"{planned.plan.flops / without - 1:+.1%}"
    copied = f"{planned.plan.copied / _GIB:.1f} GiB" if planned.plan.copied else "-"
    fits = "" if planned.fits else " (does not fit)"
    return f"| {title} | {', '.join(rungs) or 'none'}{fits} | {peak:.2f} | {work} | {copied} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.small_cards", description=__doc__)
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="GiB of cards")
    given = parser.parse_args(arguments)
    for family in given.family:
        print(f"\n{FAMILIES[family]}\n")
        print("| card | rungs | GiB | arithmetic | copied a step |\n|---|---|---|---|---|")
        usual = climbed(family, None)
        without = usual.plan.flops
        print(row("any", usual, without), flush=True)
        for size in given.sizes:
            print(row(f"{size} GB", climbed(family, size - CONTEXT), without), flush=True)
        for base_format in ("full", "fp8", "nf4"):
            rungs = [f'{key}="{value}"' for key, value in _CHEAPEST.items()]
            cheapest = climbed(family, None, *rungs, f"training.base_format={base_format}")
            print(row(f"all rungs but offloading, {base_format}", cheapest, without), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
