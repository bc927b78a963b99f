"""The command about training runs: list them, compare them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

Result = tuple[dict[str, Any], int]


def declare_runs(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora runs``."""
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER | compare RUN RUN",
        help="folder of runs (default runs), or runs",
    )
    parser.add_argument("--image", type=Path, metavar="PNG", help="compare: where the curves are drawn")
    parser.add_argument("--overwrite", action="store_true", help="compare: replace an image that exists")
    parser.usage = "sdlora runs [FOLDER] | sdlora runs compare RUN RUN [RUN ...] [--image PNG]"


def run_runs(options: argparse.Namespace) -> Result:
    """Run ``sdlora runs``."""
    from ..errors import ConfigError
    from ..inspecting.runs import compare_runs, list_runs

    words: list[str] = options.folders
    if words[:1] == ["compare"]:
        folders = [Path(word) for word in words[1:]]
        names = "-".join(folder.name or "run" for folder in folders[:4])
        table = compare_runs(
            folders, options.image or Path(f"compare-{names}.png"), overwrite=options.overwrite
        )
    elif len(words) > 1:
        raise ConfigError(f"sdlora runs: one folder of runs, not {len(words)}; or: sdlora runs compare A B")
    elif options.image or options.overwrite:
        raise ConfigError("--image and --overwrite belong to: sdlora runs compare A B")
    else:
        table = list_runs(Path(words[0] if words else "runs"))
    print(table.render())
    return table.to_dict(), 0
