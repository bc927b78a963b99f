"""The commands about training runs and their adapters: list them, compare them, judge them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import numbers, path_argument
from .flags import base_of, declare_base, declare_setting, settings_of

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


def declare_judge(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora judge``."""
    parser.add_argument(
        "sources", nargs="+", type=path_argument, metavar="RUN|FILE", help="run folders, or adapter files"
    )
    parser.add_argument(
        "--against",
        type=path_argument,
        required=True,
        metavar="FOLDER",
        help="images in the style, captioned",
    )
    declare_base(parser)
    parser.add_argument(
        "--output", type=path_argument, default=Path("judged.html"), metavar="HTML", help="the report"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report that exists")
    parser.add_argument("--strengths", metavar="A,B,...", help="0.5,0.75,1,1.25,1.5 when left out")
    parser.add_argument("--count", type=int, default=8, help="prompts drawn at each strength (default 8)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default 10)")
    for key in ("training.device", "training.precision"):
        declare_setting(parser, key)
    declare_setting(parser, "data.trigger_word", "--trigger", metavar="WORD")


def run_judge(options: argparse.Namespace) -> Result:
    """Run ``sdlora judge``."""
    from ..inspecting.judging import STRENGTHS, judge_adapters
    from .display import progress_bar

    given = settings_of(options)
    with progress_bar("drawing") as progress:
        result = judge_adapters(
            options.sources,
            options.against,
            options.output,
            base=base_of(options) if any(key.startswith("model.") for key in given if given[key]) else None,
            strengths=numbers(options.strengths, "--strengths") if options.strengths else STRENGTHS,
            images=options.count,
            steps=options.steps,
            trigger_word=given["data.trigger_word"],
            device=given["training.device"],
            precision=given["training.precision"],
            overwrite=options.overwrite,
            progress=progress,
        )
    print(result.render())
    return result.to_dict(), 0
