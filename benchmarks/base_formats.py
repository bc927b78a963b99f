"""What a base kept in 8 or 4 bits costs in quality: the same adapters learned over each, side by side.

    python -m benchmarks.base_formats --output build/base_formats
    python -m benchmarks.base_formats --output build/base_formats --precision bf16 --seeds 0 1 2
    python -m benchmarks.base_formats --output build/base_formats --formats full nf4 --subjects 0  # losses

Each seed trains the demo's style once for each format, all else by default. All adapters are measured on the
base in full, as people use them: the loss on the held-out icons (the same noise and timesteps for all)
against that of the adapter of the same seed over the full base, image by image, and the style score of
``benchmarks.style``. Intervals are 90 %. Finished runs and images are kept below the output folder.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.files import write_json
from sdlora.judging.intervals import estimate

from .style.entries import MINI, Entry, Workshop
from .style.gallery import Say
from .style.measure import Measured, Yardstick
from .style.styles import Style, find_style

FORMATS = ("full", "fp8", "nf4")
BOUNDS = {"fp8": 0.01, "nf4": 0.02}
"""How much higher the held-out loss may be than over the full base."""


@dataclass(frozen=True)
class Result:
    """One adapter.

    Attributes:
        base_format: that its base was kept in.
        seed: of its training.
        losses: of each held-out image.
        style: measured on images of held-out subjects; None where none were drawn.
        seconds: of its training.
    """

    base_format: str
    seed: int
    losses: tuple[float, ...]
    style: Measured | None
    seconds: float


def main() -> None:
    """Train, measure, print the table and write it as JSON."""
    parser = _parser()
    options = parser.parse_args()
    if "full" not in options.formats:
        parser.error("--formats: the others are compared with full")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    work: Path = options.output.resolve()
    style = find_style("ink", None, work, work)
    entries = {
        (base_format, seed): _trained(style, work, options, base_format, seed, say)
        for seed in options.seeds
        for base_format in options.formats
    }
    say("measuring losses")
    losses = _losses(style, entries)
    measured = drawn(style, entries, work, options.subjects, say) if options.subjects else {}
    results = [
        Result(*key, losses[key], measured.get(key), entry.seconds or 0.0) for key, entry in entries.items()
    ]
    rows = _rows(results)
    write_json(work / "base_formats.json", {"steps": options.steps, "rows": rows})
    print(_table(rows))


def _trained(
    style: Style, work: Path, options: argparse.Namespace, base_format: str, seed: int, say: Say
) -> Entry:
    workshop = Workshop("mini", style, work / "runs", seed, say)
    settings = [
        *(f"training.base_format={base_format}", f"training.steps={options.steps}"),
        *("data.validation=0", f"training.precision={options.precision}", "training.batch_size=2"),
    ]
    entry, _ = workshop.ours(f"{base_format}-{seed}", settings)
    return entry


Key = tuple[str, int]
"""Name and seed."""


def _losses(style: Style, entries: Mapping[Key, Entry]) -> dict[Key, tuple[float, ...]]:
    from .adapter_loss import LossMeter

    captions = {item.path.name: item.caption for item in style.subjects()}
    meter = LossMeter(MINI, style.holdout, captions, resolution=64, min_snr_gamma=5.0)
    return {key: meter.losses(entry.adapter) for key, entry in entries.items()}


def drawn(
    style: Style, entries: Mapping[Key, Entry], work: Path, subjects: int, say: Say
) -> dict[Key, Measured]:
    """Draw held-out subjects with each adapter at strength 1, on the mini base in full, and measure them."""
    from sdlora.data.reading.folder import load_pixels
    from sdlora.judging.score import through_autoencoder

    from .style.gallery import Drawing, Studio
    from .style.icon_sets import subject_of

    items = style.subjects(subjects)
    studio = Studio("mini", Drawing(), work / "images", say)
    names = [subject_of(item.path.stem) for item in items]
    base = studio.draw("base", None, [0.0], items)[0.0]
    true = through_autoencoder(studio.model, [load_pixels(item) for item in items])
    training = through_autoencoder(studio.model, [load_pixels(item) for item in style.training_items()])
    yardstick = Yardstick(names, base, true, training)
    return {
        key: yardstick.measure(studio.draw(entry.name, entry.adapter, [1.0], items)[1.0])
        for key, entry in entries.items()
    }


def _rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each format: its loss as a share of the full base's, and its style score."""
    by_key = {(result.base_format, result.seed): result for result in results}
    seeds = sorted({result.seed for result in results})
    rows = []
    for base_format in [name for name in FORMATS if (name, seeds[0]) in by_key]:
        ours = [by_key[base_format, seed] for seed in seeds]
        full = [by_key["full", seed] for seed in seeds]
        whole = statistics.fmean(loss for result in full for loss in result.losses)
        # the mean over the seeds for each image: images are what an interval is over
        by_image = [
            statistics.fmean(
                mine.losses[n] - theirs.losses[n] for mine, theirs in zip(ours, full, strict=True)
            )
            / whole
            for n in range(len(full[0].losses))
        ]
        more = estimate(by_image)
        assert more is not None
        scores = [result.style.figure("style") for result in ours if result.style]
        pairs = [(mine.style, theirs.style) for mine, theirs in zip(ours, full, strict=True)]
        against = [mine.difference(theirs, "style") for mine, theirs in pairs if mine and theirs]
        rows.append(
            {
                "format": base_format,
                "loss": statistics.fmean(loss for result in ours for loss in result.losses),
                "more": [more.mean, more.low, more.high],
                "by_seed": [
                    statistics.fmean(mine.losses) / statistics.fmean(theirs.losses) - 1
                    for mine, theirs in zip(ours, full, strict=True)
                ],
                "style": [score.to_dict() for score in scores if score is not None],
                "style_against_full": [score.to_dict() for score in against if score is not None],
                "seconds": [round(result.seconds) for result in ours],
                "bound": BOUNDS.get(base_format),
            }
        )
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| base | held-out loss | against full | bound | style by seed | style against full |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        value, low, high = row["more"]
        bound = row["bound"]
        lines.append(
            f"| {row['format']} | {row['loss']:.5f} | {value:+.2%} ({low:+.2%} to {high:+.2%}) "
            f"| {'' if bound is None else format(bound, '.0%')} "
            f"| {_figures(row['style'])} | {_figures(row['style_against_full'], '+')} |"
        )
    return "\n".join(lines)


def _figures(values: Sequence[Mapping[str, float]], sign: str = "") -> str:
    return "; ".join(
        f"{value['value']:{sign}.2f} ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})"
        for value in values
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="runs, images and figures are kept here")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="full must be among them"
    )
    parser.add_argument("--subjects", type=int, default=60, help="held-out icons that are drawn; 0: none")
    parser.add_argument(
        "--precision", default="fp32", help="that all is computed in (bf16 needs AMX or a card)"
    )
    return parser


if __name__ == "__main__":
    main()
