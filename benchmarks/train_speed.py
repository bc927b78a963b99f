"""Images per second of a training step: sdlora against diffusers' own LoRA script, and that both learn.

    python benchmarks/train_speed.py --peer-script PATH/train_text_to_image_lora.py

Each round trains with both, turn and turn about, as whole processes at two lengths; the difference of
their wall times is the time of the steps alone, without start-up and encoding. benchmarks/README.md says
what is equal, what is not, and how to read the result. Exit code 1: one of the trainers does not learn
as it should, or the two files are not of one make, and the times mean nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainers import TRAINERS, BenchmarkError, Images, Measured, Settings, Trainer, prepare_images, run

ROOT = Path(__file__).parent.parent
LEARNS_ENOUGH = 0.85
"""Least share of the peer's gain (fall of the objective below the base's) that ours must reach."""


@dataclass(frozen=True)
class Side:
    """One trainer in one round.

    Attributes:
        images_per_second: of the steps alone.
        cpu_seconds_per_image: the same from CPU time, which other processes disturb less.
        wall_s: the whole process at the longer length.
        start_s: the part of it that is not steps.
        peak_bytes: most memory the process held.
        loss: objective of its LoRA, see ``adapter_loss.py``; None if it was not measured.
    """

    images_per_second: float
    cpu_seconds_per_image: float
    wall_s: float
    start_s: float
    peak_bytes: int
    loss: float | None


Round = Mapping[Trainer, Side]


def side(short: Measured, long: Measured, batch_size: int, loss: float | None) -> Side:
    """Return what two runs of different lengths say about a trainer.

    Raises:
        BenchmarkError: if the longer run was not longer: the machine was too busy to measure.
    """
    steps = long.steps - short.steps
    wall, cpu = long.wall_s - short.wall_s, long.cpu_s - short.cpu_s
    if wall <= 0 or cpu <= 0:
        raise BenchmarkError(f"{steps} more steps took {wall:.2f} s more: use more --steps, or wait for calm")
    return Side(
        images_per_second=batch_size * steps / wall,
        cpu_seconds_per_image=cpu / (batch_size * steps),
        wall_s=long.wall_s,
        start_s=long.wall_s - wall / steps * long.steps,
        peak_bytes=long.peak_bytes,
        loss=loss,
    )


def measure_round(
    settings: Settings, images: Images, folder: Path, number: int, lengths: tuple[int, int]
) -> dict[Trainer, tuple[Measured, Measured]]:
    """Train with both at both lengths; who goes first changes from round to round."""
    order = TRAINERS if number % 2 == 0 else TRAINERS[::-1]
    runs: dict[Trainer, list[Measured]] = {name: [] for name in TRAINERS}
    for steps in lengths:
        for name in order:
            where = folder / f"round{number}-{name}-{steps}"
            runs[name].append(run(name, settings, images, where, steps=steps, seed=number))
    return {name: (short, long) for name, (short, long) in runs.items()}


def problems(
    rounds: Sequence[Round], base_loss: float | None, layouts: Mapping[Trainer, object]
) -> list[str]:
    """Return why the times are not worth comparing; empty if they are.

    Without the base's loss nobody looked at what was learned.
    """
    faults = []
    if layouts["sdlora"] != layouts["diffusers"]:
        faults.append("the two LoRA files differ in layers, ranks or scales")
    if base_loss is None:
        return faults
    gains = {
        name: base_loss - _median([round_measured[name].loss for round_measured in rounds])
        for name in TRAINERS
    }
    faults += [
        f"{name} did not learn: its objective is not below the base's"
        for name in TRAINERS
        if gains[name] <= 0
    ]
    if not faults and gains["sdlora"] < LEARNS_ENOUGH * gains["diffusers"]:
        share = gains["sdlora"] / gains["diffusers"]
        faults.append(
            f"sdlora learned {share:.0%} of what diffusers did; at least {LEARNS_ENOUGH:.0%} is due"
        )
    return faults


def table(rounds: Sequence[Round], base_loss: float | None) -> str:
    """Return the result as a Markdown table: each cell is the median and the range over the rounds."""
    rows: list[tuple[str, str, float, int, bool]] = [
        ("images/s of a step", "images_per_second", 1.0, 1, True),
        ("CPU ms per image", "cpu_seconds_per_image", 1e3, 1, False),
        ("whole run, s", "wall_s", 1.0, 1, False),
        ("of it not steps, s", "start_s", 1.0, 1, False),
        ("peak memory, MiB", "peak_bytes", 1 / 2**20, 0, False),
        *([("objective after", "loss", 1.0, 4, False)] if base_loss is not None else []),
    ]
    lines = ["| | sdlora | diffusers | times better |", "|---|---|---|---|"]
    for title, attribute, factor, digits, more_is_better in rows:
        ours, peers = (
            [getattr(round_measured[name], attribute) * factor for round_measured in rounds]
            for name in TRAINERS
        )
        cells = [_spread(values, digits) for values in (ours, peers)]
        ratio = ""
        if attribute != "loss":
            ratio = _spread([o / p if more_is_better else p / o for o, p in zip(ours, peers, strict=True)], 2)
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {ratio} |")
    if base_loss is not None:
        lines += ["", f"Objective of the base without a LoRA: {base_loss:.4f} (lower is better)."]
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{_median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def facts(settings: Settings, num_images: int) -> dict[str, Any]:
    """Return what the figures depend on: settings, machine, versions, and which peer script it was."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets")
    return {
        "settings": {key: str(v) if isinstance(v, Path) else v for key, v in asdict(settings).items()},
        "num_images": num_images,
        "peer_script_sha256": hashlib.sha256(settings.peer_script.read_bytes()).hexdigest(),
        "machine": f"{os.cpu_count()} x {_cpu_name()}, Python {platform.python_version()}",
        "load_before": os.getloadavg()[0],
        "versions": {name: _version(name) for name in packages},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def compare(
    settings: Settings,
    images: Path,
    folder: Path,
    rounds: int,
    steps: int,
    warm_up: int,
    *,
    speed_only: bool = False,
) -> dict[str, Any]:
    """Run the whole comparison below ``folder``; return the result as JSON values.

    Args:
        speed_only: do not look at what was learned: with random weights there is nothing to learn.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    from adapter_loss import LossMeter, layout

    prepared = prepare_images(images, folder / "images", settings.batch_size)
    result = facts(settings, len(prepared.captions))
    for name in TRAINERS:  # fills the disk cache, and fails early
        run(name, settings, prepared, folder / f"first-{name}", steps=1, seed=0)
    runs = []
    for number in range(rounds):
        runs.append(measure_round(settings, prepared, folder, number, (warm_up, warm_up + steps)))
        times = ", ".join(
            f"{name} {long.wall_s - short.wall_s:.1f} s" for name, (short, long) in runs[-1].items()
        )
        print(f"round {number + 1}/{rounds}: {steps} steps in {times}", file=sys.stderr, flush=True)
    base_loss, measure = None, _not_measured
    if not speed_only:
        print("measuring what was learned", file=sys.stderr, flush=True)
        meter = LossMeter(
            settings.base,
            prepared.folders["sdlora"],
            prepared.captions,
            resolution=settings.resolution,
            min_snr_gamma=settings.min_snr_gamma,
        )
        base_loss, measure = meter.measure(None), meter.measure
    measured = [
        {
            name: side(short, long, settings.batch_size, measure(long.adapter))
            for name, (short, long) in round_run.items()
        }
        for round_run in runs
    ]
    faults = problems(measured, base_loss, {name: layout(runs[-1][name][1].adapter) for name in TRAINERS})
    ratios = [
        round_measured["sdlora"].images_per_second / round_measured["diffusers"].images_per_second
        for round_measured in measured
    ]
    return {
        **result,
        "steps": steps,
        "rounds": [
            {name: asdict(part) for name, part in round_measured.items()} for round_measured in measured
        ],
        "base_loss": base_loss,
        "ratio": {"median": _median(ratios), "min": min(ratios), "max": max(ratios)},
        "problems": faults,
        "table": table(measured, base_loss),
    }


def _not_measured(adapter: Path | None) -> float | None:
    return None


def _version(package: str) -> str:
    """Return what is installed; a stand-in for the peer's script needs fewer packages than that."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the table, and write the JSON file if one is asked for."""
    options = _parser().parse_args(arguments)
    settings = Settings(
        base=options.base.resolve(),
        peer_script=options.peer_script.resolve(),
        batch_size=options.batch,
        rank=options.rank,
        precision=options.precision,
        learning_rate=options.learning_rate,
        resolution=options.resolution,
        min_snr_gamma=5.0,
        threads=options.threads,
        peer_workers=options.peer_workers,
        device=options.device,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="train-speed-") as folder:
            result = compare(
                *(settings, options.images, Path(folder), options.rounds, options.steps, options.warm_up),
                speed_only=options.speed_only,
            )
    except BenchmarkError as error:
        print(f"train_speed: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    ratio = result["ratio"]
    print(result["table"])
    print(
        f"sdlora makes {ratio['median']:.2f} times ({ratio['min']:.2f}..{ratio['max']:.2f}) as many steps "
        "a second as diffusers."
    )
    for text in result["problems"]:
        print(f"NOT COMPARABLE: {text}")
    return 1 if result["problems"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peer-script", type=Path, required=True, help="train_text_to_image_lora.py of diffusers"
    )
    parser.add_argument(
        "--base", type=Path, default=ROOT / "sdlora" / "assets" / "mini", help="diffusers folder"
    )
    parser.add_argument(
        "--images", type=Path, default=ROOT / "datasets" / "ink-icons", help="captioned images"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps that are timed, in each run")
    parser.add_argument("--warm-up", type=int, default=4, help="length of the shorter run")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer-workers", type=int, default=0, help="the peer's data loading processes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--speed-only", action="store_true", help="do not measure what was learned")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
