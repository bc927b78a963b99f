"""What each optimizer teaches at the rate it gets when none is given: style scores on held-out subjects.

    python -m benchmarks.optimizers --output build/optimizers
    python -m benchmarks.optimizers --output build/optimizers --styles blueprint --names lion came

Each optimizer trains each style once from the mini base, all else by default (``judge.every=0``: the last
step counts), and draws subjects that no run saw. The score is that of ``benchmarks.style``; against AdamW it
is compared subject by subject, with intervals of 90 %. Memory is what an optimizer keeps for each trained
number, measured in the state of a few steps. Finished runs and images are kept below the output folder, so
that a second call only adds what is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from sdlora.config.schema import OptimizerConfig, OptimizerName
from sdlora.files import write_json
from sdlora.training.optimizers import OPTIMIZERS

from .base_formats import Key, drawn
from .style.entries import Workshop
from .style.gallery import Say
from .style.measure import Measured
from .style.styles import find_style

FIRST = "adamw"
"""What the others are compared with."""
_SHAPE = (16, 320)
"""Of a factor in the measure of memory: rank 16 in a layer of SD1.5."""


def main() -> None:
    """Train, draw, measure, and print a table that is kept as JSON, too."""
    options = _parser().parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    work: Path = options.output.resolve()
    names = [FIRST, *(name for name in options.names if name != FIRST)]
    scores = {style: _measured(style, names, work, options, say) for style in options.styles}
    rows = [_row(name, scores) for name in names]
    write_json(work / "optimizers.json", {"steps": options.steps, "seed": options.seed, "rows": rows})
    print(_table(rows, options.styles))


def _measured(
    name: str, optimizers: Sequence[str], work: Path, options: argparse.Namespace, say: Say
) -> dict[str, Measured]:
    style = find_style(name, None, work, work)
    workshop = Workshop("mini", style, work / "runs" / style.name, options.seed, say)
    entries: dict[Key, Any] = {}
    for optimizer in optimizers:
        settings = [f"optimizer.name={optimizer}", f"training.precision={options.precision}"]
        if options.steps is not None:
            settings.append(f"training.steps={options.steps}")
        entries[optimizer, options.seed], _ = workshop.ours(f"{style.name}-{optimizer}", settings)
    by_key = drawn(style, entries, work / style.name, options.subjects, say)
    return {optimizer: measured for (optimizer, _), measured in by_key.items()}


def state_bytes(name: OptimizerName) -> float:
    """Return the bytes an optimizer keeps for each trained number after two steps on two large factors."""
    kind = OPTIMIZERS[name]
    values = [torch.nn.Parameter(torch.randn(size)) for size in (_SHAPE, _SHAPE[::-1])]
    group: Any = {"params": values, "lr": 1e-4, "weight_decay": 0.01}
    optimizer = kind.make([group], OptimizerConfig(name=name))
    if kind.has_eval_mode:
        optimizer.train()  # type: ignore[attr-defined]
    for _ in range(2):
        for value in values:
            value.grad = torch.randn_like(value)
        optimizer.step()
    held = sum(
        part.numel() * part.element_size()
        for state in optimizer.state.values()
        for part in state.values()
        if isinstance(part, torch.Tensor) and part.numel() > 1
    )
    return held / sum(value.numel() for value in values)


def _row(name: str, scores: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    row: dict[str, Any] = {"optimizer": name, "bytes": round(state_bytes(name), 2), "styles": {}}  # type: ignore[arg-type]
    for style, measured in scores.items():
        figures = {measure: measured[name].figure(measure) for measure in ("style", "named")}
        against = None if name == FIRST else measured[name].difference(measured[FIRST], "style")
        known = {key: value.to_dict() for key, value in figures.items() if value is not None}
        row["styles"][style] = {**known, **({"against": against.to_dict()} if against is not None else {})}
    return row


def _table(rows: Sequence[Mapping[str, Any]], styles: Sequence[str]) -> str:
    heads = [f"{style}: {what}" for style in styles for what in ("style", f"against {FIRST}", "subjects")]
    lines = ["| " + " | ".join(["optimizer", "bytes a value", *heads]) + " |"]
    lines.append("|---" * (2 + len(heads)) + "|")
    for row in rows:
        cells = [row["optimizer"], f"{row['bytes']:.2f}"]
        for style in styles:
            known = row["styles"][style]
            cells += [_cell(known.get("style")), _cell(known.get("against"), "+")]
            cells.append(f"{known['named']['value']:.0%}" if "named" in known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(interval: Mapping[str, float] | None, sign: str = "") -> str:
    if interval is None:
        return ""
    return f"{interval['value']:{sign}.2f} ({interval['low']:{sign}.2f} to {interval['high']:{sign}.2f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, images and the table")
    parser.add_argument(
        "--names", nargs="+", choices=get_args(OptimizerName), default=get_args(OptimizerName)
    )
    parser.add_argument("--styles", nargs="+", default=["ink", "blueprint"])
    parser.add_argument("--steps", type=int, help="of each run (default: as the program decides)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", type=int, default=24, help="held-out subjects that are drawn")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    return parser


if __name__ == "__main__":
    main()
