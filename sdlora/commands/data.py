"""The commands for data: check a folder of images, show and thin out the cache."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, OutputError
from ..files import refuse_bad_names, size_text
from .arguments import folder_argument, path_argument, source_argument

if TYPE_CHECKING:
    from ..data.check.doctor import Report

Result = tuple[dict[str, Any], int]

_DAY = 86_400
_RESOLUTION = 512
_MOST_PX = 4096
_MULTIPLE = 64


def declare_check(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora check``."""
    parser.add_argument(
        "folder", nargs="?", type=folder_argument, help="folder of images; as in the settings when left out"
    )
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="look at what these settings train on"
    )
    parser.add_argument(
        "--base",
        type=source_argument,
        help="base to be trained on: its image sizes are used (mini, a checkpoint, a folder, a hub id)",
    )
    parser.add_argument("--trigger", metavar="WORD", help="word the captions should hold")
    parser.add_argument("--resolution", type=int, help="training resolution in px; 512 without a base")
    parser.add_argument(
        "--multiple", type=int, help="image sides are multiples of this many px; 64 without a base"
    )
    parser.add_argument("--batch-size", type=int, help="also count the batches of an epoch")
    parser.add_argument("--flat", action="store_true", help="leave out subfolders")
    parser.add_argument(
        "--follow-links", action="store_true", help="also read what links lead to outside the folder"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="tell which rungs a run would take on a card with so much free, e.g. 6GB; the base may then be "
        "named by its family (sd1, sd2, sdxl), and no folder is needed",
    )
    parser.add_argument(
        "--html", type=path_argument, metavar="FILE", help="also write a page with every image's crop"
    )
    parser.add_argument("--fix", action="store_true", help="write a repaired copy of the folder to --output")
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="where --fix puts the copy")
    parser.set_defaults(overrides=[])
    parser.usage = "sdlora check FOLDER [options] [data.name=value ...]"


def run_check(options: argparse.Namespace) -> Result:
    """Run ``sdlora check``; the exit code is 1 when training would be refused."""
    from ..data.check.doctor import report_to_dict
    from ..data.check.report_text import print_report
    from .display import progress_bar

    _refuse_odd_numbers(options)
    if options.fix != (options.output is not None):
        raise ConfigError("--fix and --output DIR belong together: the copy is written to DIR")
    if options.fix and (options.config is not None or options.overrides):
        raise ConfigError("--fix repairs one folder as it is: give it without --config and key=value")
    if options.memory is not None and options.folder is None and options.config is None:
        foreseen = _foreseen(options, None)
        return {"memory": foreseen}, 0 if foreseen["fits"] else 1
    if options.folder is None and options.config is None and not options.overrides:
        raise ConfigError("no folder of images given: sdlora check FOLDER, or --config FILE")
    if options.html:
        _refuse_to_replace(options.html)
    report = _examined(options, options.folder and Path(options.folder))
    print_report(report)
    result = report_to_dict(report)
    if options.memory is not None:
        result["memory"] = _foreseen(options, report)
    if options.html:
        from ..data.check.report_page import write_report_page

        with progress_bar("drawing") as progress:
            write_report_page(report, options.html, progress)
        print(options.html)
        result["html"] = options.html
    if options.fix:
        result["fix"] = _mend(options)
        return result, 1 if result["fix"]["harmful"] else 0
    return result, 1 if report.harmful else 0


def _foreseen(options: argparse.Namespace, report: Report | None) -> dict[str, Any]:
    """Print which rungs of the memory ladder a run would take, and what it takes then; return the same.

    Args:
        options: of the command.
        report: on the images that would be trained on; None for a usual number of them.
    """
    from ..config.toml import load_config

    config = load_config(
        options.config,
        options.overrides,
        {
            "data.folder": options.folder,
            "model.base": options.base,
            "training.batch_size": options.batch_size,
            "data.resolution": options.resolution,
        },
    )
    from ..training.foresight import foresee  # takes seconds, as it needs torch: after the typing errors
    from ..training.ladder import parse_size, told

    budget = None if options.memory == "max" else parse_size(options.memory)
    known = report is not None and report.num_trained > 0
    climbed = foresee(config, budget, (report.num_trained, report.num_held_out) if report and known else None)
    step = climbed.config.training
    side, batch = climbed.config.data.resolution, step.batch_size
    free = "any memory" if budget is None else f"{size_text(budget)} free"
    print(f"{climbed.config.model.base} at {side} px, batch {batch}, on a card with {free}:")
    for line in told(climbed):
        print(f"  {line}")
    phases = ", ".join(f"{name} {size_text(size)}" for name, size in climbed.plan.phases.items())
    print(f"  planned: {phases}")
    if not climbed.fits:
        print("  it does not fit: use a smaller data.resolution, or a card with more memory")
    return {
        "fits": climbed.fits,
        "rungs": [asdict(rung) for rung in climbed.taken],
        "phases": dict(climbed.plan.phases),
        "work": climbed.work,
        "copied_per_step": climbed.plan.copied,
    }


def _refuse_odd_numbers(options: argparse.Namespace) -> None:
    for name in ("resolution", "multiple", "batch_size"):
        flag, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be 1 or more")
        if value is not None and name != "batch_size" and value > _MOST_PX:
            raise ConfigError(f"{flag} {value}: must be {_MOST_PX} or less")


def _examined(options: argparse.Namespace, folder: Path | None) -> Report:
    """Examine a folder by itself, or with the settings or the base that are given."""
    from ..data.check.doctor import examine
    from .display import progress_bar

    if options.config is not None or options.overrides or options.base is not None:
        return _examined_settings(options, folder)
    assert folder is not None
    with progress_bar("reading") as progress:
        return examine(
            folder,
            recursive=not options.flat,
            follow_links=options.follow_links,
            trigger_word=options.trigger,
            resolution=options.resolution or _RESOLUTION,
            multiple=options.multiple or _MULTIPLE,
            batch_size=options.batch_size,
            progress=progress,
        )


def _examined_settings(options: argparse.Namespace, folder: Path | None) -> Report:
    from ..config.toml import load_config
    from .display import progress_bar

    config = load_config(
        options.config,
        options.overrides,
        {
            "data.folder": folder,
            "data.trigger_word": options.trigger,
            "data.resolution": options.resolution,
            "data.recursive": False if options.flat else None,
            "data.follow_links": options.follow_links or None,
            "model.base": options.base,
        },
    )
    from ..data.check.outlook import (
        examine_settings,  # takes seconds, as it needs torch: after the typing errors
    )

    with progress_bar("reading") as progress:
        return examine_settings(
            config, multiple=options.multiple, batch_size=options.batch_size, progress=progress
        )


def _mend(options: argparse.Namespace) -> dict[str, Any]:
    """Write the repaired copy; print what was changed in it and what is still wrong with it."""
    from ..data.check.findings import SEVERITIES
    from ..data.check.repair import repair
    from ..data.check.report_text import print_changes
    from .display import progress_bar

    with progress_bar("copying") as progress:
        changes = repair(
            Path(options.folder),
            options.output,
            recursive=not options.flat,
            follow_links=options.follow_links,
            progress=progress,
        )
    print_changes(options.output, changes)
    copy = _examined(options, options.output)
    counts = {severity: copy.count(severity) for severity in SEVERITIES}
    left = ", ".join(f"{count} {severity}(s)" for severity, count in counts.items())
    print(f"{options.output}: {copy.num_images} images; {left}. {copy.verdict()}")
    return {
        "output": options.output,
        "changes": [asdict(change) for change in changes],
        "num_images": copy.num_images,
        "counts": counts,
        "harmful": copy.harmful,
    }


def _refuse_to_replace(file: Path) -> None:
    """Refuse a file that exists, unless it is an earlier page of ``sdlora check``."""
    refuse_bad_names(file)
    if file.is_dir():
        raise OutputError(f"--html {file}: is a folder; give the name of a file")
    if file.exists() and b"- sdlora check</title>" not in file.read_bytes()[:4096]:
        raise OutputError(f"--html {file}: exists and is not a page of sdlora check; give another name")


def declare_cache(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora cache``."""
    parser.add_argument(
        "--folder", type=path_argument, metavar="DIR", help="the cache; your own when left out"
    )
    parser.add_argument("--prune", action="store_true", help="remove entries, after listing what would go")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="only entries unused for this long")
    parser.add_argument(
        "--max-size", type=float, metavar="GB", help="the longest unused ones, until this much is left"
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")


def run_cache(options: argparse.Namespace) -> Result:
    """Run ``sdlora cache``: list the entries, and on request remove those that no run has needed for long."""
    from ..data.reading.cache_folder import (
        CacheEntry,
        choose_entries,
        default_cache_folder,
        index_file,
        list_entries,
        remove_entries,
    )
    from ..data.reading.index import forget_missing

    _refuse_odd_limits(options)
    folder = options.folder or default_cache_folder()
    if options.folder and not folder.is_dir():
        raise ConfigError(f"--folder {folder}: no such folder")
    entries = list_entries(folder)
    chosen: list[CacheEntry] = []
    if options.prune:
        limit = None if options.max_size is None else round(options.max_size * 1e9)
        chosen = choose_entries(entries, older_than_days=options.older_than, max_bytes=limit)
    print(f"{folder}")
    for kind in ("images", "captions", "leftovers"):
        print(_line(kind, [entry for entry in entries if entry.kind == kind], chosen, options.prune))
    freed, removed = 0, 0
    if chosen and _agreed(options, len(chosen), sum(entry.bytes for entry in chosen)):
        freed, removed = remove_entries(chosen), len(chosen)
        print(f"removed {removed} entries, {_megabytes(freed)}")
    elif options.prune and not chosen:
        print("nothing to remove")
    forgotten = forget_missing(index_file(folder)) if options.prune else 0
    return {
        "folder": folder,
        "entries": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "chosen": len(chosen),
        "removed": removed,
        "freed_bytes": freed,
        "forgotten_images": forgotten,
    }, 0


def _refuse_odd_limits(options: argparse.Namespace) -> None:
    for name in ("older_than", "max_size"):
        flag, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"{flag} {value:g}: must be 0 or more")
        if value is not None and not options.prune:
            raise ConfigError(f"{flag} has no effect without --prune")
    if options.yes and not options.prune:
        raise ConfigError("--yes has no effect without --prune")


def _line(kind: str, entries: list[Any], chosen: list[Any], prune: bool) -> str:
    text = f"  {kind:<10} {len(entries):>7}  {_megabytes(sum(entry.bytes for entry in entries)):>12}"
    if entries:
        days = (time.time() - entries[0].used) / _DAY
        text += f"  unused for up to {days:.0f} days"
    going = [entry for entry in chosen if entry.kind == kind]
    if prune:
        text += f"  to be removed: {len(going)}, {_megabytes(sum(entry.bytes for entry in going))}"
    return text


def _agreed(options: argparse.Namespace, count: int, size: int) -> bool:
    if options.yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty() or options.json:  # None: it is closed
        raise ConfigError(f"nothing was removed: add --yes to remove these {count} entries")
    return input(f"remove these {count} entries ({_megabytes(size)})? [y/N] ").strip().lower() in ("y", "yes")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
