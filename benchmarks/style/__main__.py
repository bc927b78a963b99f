"""How well adapters learn a style: train, draw held-out subjects, measure, and set side by side.

    python -m benchmarks.style --output build/style
    python -m benchmarks.style --output build/style --peer-script PATH/train_text_to_image_lora.py
    python -m benchmarks.style --output build/style --check --style ink --style blueprint --style openmoji

README.md beside this file says what is measured. Interrupted, the same command continues: runs that are
finished and images that are drawn are kept below the output folder, under names that tell what they were
made from, so that another base never gets an old one's. Exit code 1: a check of the yardstick failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.demonstration.data import SETTINGS
from sdlora.errors import ConfigError, SdloraError
from sdlora.files import write_json

if TYPE_CHECKING:
    from .compare import Comparison
    from .entries import Entry
    from .gallery import Say
    from .styles import Style

STRENGTHS = "0.5,0.75,1,1.25"
OURS = ("sdlora", "sdlora, as demo")
"""What is trained when nothing else is asked for: all defaults, and what ``sdlora demo`` changes in them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except SdloraError as error:
        print(f"benchmarks.style: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from .compare import compare
    from .gallery import Drawing, Studio
    from .judge import SubjectJudge
    from .report import write_report
    from .styles import find_style

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    work: Path = options.output.expanduser().resolve()  # trainers are started in folders of their own
    kept = work / "_work"  # reports lie beside it, in folders named after styles
    icons = None if options.no_icons else options.icons or kept / "icons"
    names = options.style or ["ink"]
    styles = [find_style(name, options.holdout, kept, icons or kept / "icons") for name in names]
    given = _given(options)
    if len(styles) > 1 and (given or options.holdout):
        raise ConfigError("--adapter, --images and --holdout belong to one style; give one --style")
    entries: dict[str, list[Entry]] = {}
    for style in styles:
        trained = [] if options.check else _trained(options, style, kept, say)
        entries[style.name] = [*trained, *given]
    if options.train_only:
        return 0
    judge = None if icons is None else SubjectJudge(icons, icons)
    drawing = Drawing(options.draw_steps, options.guidance, options.seed)
    studio = Studio(options.base, drawing, kept / "images", say)
    bad = 0
    for style in styles:
        comparison = compare(
            style,
            style.subjects(options.subjects),
            entries[style.name],
            studio,
            strengths=options.strengths,
            judge=judge,
            icons=icons,
            say=say,
        )
        folder = work / (f"check-{style.name}" if options.check else style.name)
        print(write_report(comparison, folder), flush=True)
        if options.check:
            bad += _check(comparison, folder)
    say(f"done; reports are in {work}")
    return 1 if bad else 0


def _given(options: argparse.Namespace) -> list[Entry]:
    """Return the entries that were made elsewhere."""
    from .entries import Entry, named

    entries = []
    for name, value in named(options.adapter, "--adapter").items():
        adapter = Path(value).expanduser()
        if not adapter.exists():
            raise ConfigError(f"--adapter {name}={value}: no such file or folder; check the path")
        entries.append(Entry(name, adapter=adapter))
    for name, value in named(options.images, "--images").items():
        entries.append(Entry(name, images=Path(value).expanduser()))
    return entries


def _trained(options: argparse.Namespace, style: Style, kept: Path, say: Say) -> list[Entry]:
    """Train what was asked for, or the default entries when nothing at all was; then the peer."""
    from .entries import Workshop, peers

    parts = [text.partition("=") for text in options.train]
    wanted = {name.strip(): settings.split() for name, _, settings in parts}
    if len(wanted) < len(parts) or not all(wanted):
        raise ConfigError("--train: give each run a name of its own, e.g. --train 'small=adapter.rank=4'")
    if not wanted and not options.adapter and not options.images:
        wanted = {
            OURS[0]: [],
            OURS[1]: [setting for setting in SETTINGS if not setting.startswith("sample.")],
        }
    workshop = Workshop(options.base, style, kept / "runs" / style.name, options.seed, say)
    trained = [workshop.ours(name, [*settings, *options.set]) for name, settings in wanted.items()]
    entries = [entry for entry, _ in trained]
    if options.peer_script is not None:
        if not trained:
            raise ConfigError(
                "--peer-script compares with a run of ours; leave --adapter out or give --train"
            )
        entries += peers(workshop, options.peer_script, *trained[0], rates=options.peer_rates)
    return entries


def _check(comparison: Comparison, folder: Path) -> int:
    """Print and write how the yardstick did; return the number of expectations that do not hold."""
    from .check import findings

    findings_now = list(findings(comparison))
    for finding in findings_now:
        print(f"{'ok  ' if finding.holds else 'FAIL'} {finding.expected}: {finding.result}")
    write_json(folder / "check.json", [asdict(finding) for finding in findings_now])
    return sum(not finding.holds for finding in findings_now)


def _strengths(text: str) -> tuple[float, ...]:
    values = tuple(sorted({float(part) for part in text.split(",")}))
    if not any(value > 0 for value in values):
        raise argparse.ArgumentTypeError("give at least one strength above 0, e.g. 0.5,1")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.style",
        description=(__doc__ or "").splitlines()[0],
        epilog="All measures, and how to read them: benchmarks/style/README.md.",
    )
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        help="folder for runs, images and reports; kept and continued",
    )
    add("--base", default="mini", help="mini, a diffusers folder, a .safetensors file or a hub id")
    style = "ink, blueprint, openmoji, twemoji, or a folder of captioned images; several times for several"
    add("--style", action="append", metavar="NAME", help=f"{style} (default: ink)")
    add("--holdout", type=Path, help="true images of other subjects (default: STYLE-holdout)")
    add("--subjects", type=int, help="measure this many of the held-out subjects (default: all)")
    what = parser.add_argument_group(
        "what is compared (default: sdlora's own defaults, and the demo's settings)"
    )
    add = what.add_argument
    add(
        "--train", action="append", default=[], metavar="NAME[=SETTINGS]", help="a run of ours, key=value ..."
    )
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="file or PEFT folder of any trainer",
    )
    add("--images", action="append", default=[], metavar="NAME=FOLDER", help="images named by subject")
    add(
        "--peer-script",
        type=Path,
        help="diffusers' train_text_to_image_lora.py: at equal steps and equal time",
    )
    add("--peer-rates", type=float, nargs="*", default=[], help="further learning rates for the peer")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run of ours")
    add("--check", action="store_true", help="check the yardstick instead: sets whose order is known")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--strengths", type=_strengths, default=_strengths(STRENGTHS), help=f"(default: {STRENGTHS})")
    add("--draw-steps", type=int, default=10, help="denoising steps an image (default: 10)")
    add("--guidance", type=float, help="(default: the base's recommended one)")
    add("--seed", type=int, default=0, help="of trainings and drawings")
    add("--icons", type=Path, help="folder of fetched icon packages (default: OUTPUT/_work/icons)")
    add("--no-icons", action="store_true", help="no npm packages: without judge and other hands")
    add(
        "--train-only",
        action="store_true",
        help="stop before anything is drawn, e.g. to time on a quiet machine",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
