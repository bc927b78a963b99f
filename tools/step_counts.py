"""``python -m tools.step_counts``: what a training step asks of a card, beside the bars that are to be met.

Counted on the pretended device (:mod:`tools.pretend_cuda`) over one warm step of the real loop on bases of
the true sizes, batch 1, rank 16, bf16: from the report of one step to that of the next. Counts are the same
on any machine; they say nothing of how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .pretend_cuda.build import Unavailable
from .pretend_cuda.command import play_all

BARS: dict[str, dict[str, float]] = {
    "step-sdxl-torch": {"launches": 4300, "bytes": 50e9, "activations": 5406 * 2**20, "waits": 0},
    "step-sd1-torch": {"launches": 1500, "bytes": 9e9, "activations": 791 * 2**20, "waits": 0},
    "step-sdxl-linear-torch": {"launches": 5200, "activations": 6499 * 2**20, "waits": 0},
    "step-sdxl": {"launches": 3100, "bytes": 50e9, "activations": 5406 * 2**20, "waits": 0},
    "step-sd1": {"launches": 1150, "bytes": 9e9, "activations": 791 * 2**20, "waits": 0},
    "step-sdxl-linear": {"launches": 4000, "activations": 6499 * 2**20, "waits": 0},
}
"""Scenario -> the most that a step may take, by torch alone and with the kernels in Triton. A launch is an
operation of torch's, as the bars count; each of these kernels is one."""

_UNITS = {"launches": (1, "{:,.0f}"), "bytes": (1e9, "{:.1f} GB"), "activations": (2**20, "{:,.0f} MiB")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print the table; return 0 if every bar is met, 1 if not, 2 where nothing can be counted."""
    parser = argparse.ArgumentParser(prog="python -m tools.step_counts", description=__doc__)
    parser.add_argument("scenario", nargs="*", help=f"some of {', '.join(BARS)}; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was counted there")
    parser.add_argument("--operations", action="store_true", help="print which operations the launches are")
    given = parser.parse_args(arguments)
    names = given.scenario or list(BARS)
    if unknown := [name for name in names if name not in BARS]:
        parser.error(f"no such scenario: {', '.join(unknown)}")
    try:
        answers = dict(play_all(names))
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    if given.json is not None:
        given.json.write_text(json.dumps(answers, indent=1), encoding="utf-8")
    missed = [line for name, answer in answers.items() for line in _rows(name, answer)]
    if given.operations:
        for name, answer in answers.items():
            print(f"\n{name}")
            moved = _step(answer).get("bytes_by_operation", {})
            for operation, count in _step(answer).get("launches_by_operation", {}).items():
                print(f"  {operation:45} {count:6} {moved[operation] / 1e9:8.2f} GB")
    return int(any(missed))


def _rows(name: str, answer: Mapping[str, Any]) -> list[bool]:
    """Print what a scenario counted, each figure beside its bar; return which bars it misses."""
    step = _step(answer)
    if not step:
        print(f"{name}: {answer['outcome']} [{answer['where']}]")
        return [True]
    forward = step["launches"] - step["backward"]
    print(
        f"{name}: backward {step['backward']:,} launches, everything else {forward:,}; "
        f"{step['kernels']:,} kernels where a library has several for one operation"
    )
    counted = {**step, "bytes": step["kernel_bytes"]}
    missed = []
    for what, bar in BARS[name].items():
        unit, form = _UNITS.get(what, (1, "{:.0f}"))
        missed.append(counted[what] > bar * 1.0005)  # bars are given in whole MiB
        verdict = "MISSED" if missed[-1] else "met"
        figure, limit = (form.format(value / unit) for value in (counted[what], bar))
        print(f"  {what:12} {figure:>12}  bar {limit:>10}  {verdict}")
    for why, site, count in step["waits_by_place"]:
        print(f"    waits {count} x {why} in {site}")
    return missed


def _step(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    facts = answer["facts"].get("step", {})
    assert isinstance(facts, Mapping)
    return facts


if __name__ == "__main__":
    sys.exit(main())
