"""The commands for adapter surgery: merge, resize, diff, extract, bake, convert."""

from __future__ import annotations

import argparse
from typing import Any

from ..formats.table import written_formats
from ..number_formats import PRECISIONS
from .arguments import FAMILY_HELP, path_argument

Result = tuple[dict[str, Any], int]


def declare_merge(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora merge``."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="FILE[:WEIGHT[:TEXT]]",
        help="adapter and its weight, which may be negative (a second number is the text encoder's)",
    )
    parser.add_argument("--method", default="linear", help="linear (weighted sum), ties, dare or dare-ties")
    parser.add_argument(
        "--density", type=float, metavar="SHARE", help="share of the entries that ties and dare keep"
    )
    parser.add_argument("--seed", type=int, help="fixes what dare drops; 0 when left out")
    _declare_blocks(parser)
    _declare_cut(parser)
    parser.add_argument("--family", metavar="NAME", help=FAMILY_HELP)
    parser.add_argument(
        "--base",
        type=path_argument,
        metavar="MODEL",
        help="base that DoRA, GLoRA, IA3, OFT or BOFT adapters were trained on, whose weights they need",
    )
    _declare_drops(parser)
    _declare_output(parser)


def run_merge(options: argparse.Namespace) -> Result:
    """Run ``sdlora merge``."""
    from ..adapters.strength import parse_adapter
    from ..surgery.merge import merge_adapters
    from ..surgery.strengths import parse_blocks
    from .display import progress_bar

    sources = [parse_adapter(text) for text in options.adapters]
    blocks = parse_blocks(options.block, len(sources))
    with progress_bar("merging") as progress:
        report = merge_adapters(
            sources,
            options.output,
            method=options.method,
            density=options.density,
            seed=options.seed,
            blocks=blocks,
            family=options.family,
            base=options.base,
            drop=options.drop,
            progress=progress,
            **_cut(options),
            **_output(options),
        )
    print(report.render())
    return report.to_dict(), 0


def declare_resize(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora resize``."""
    parser.add_argument("source", type=path_argument, help="adapter file or PEFT folder")
    _declare_cut(parser)
    parser.add_argument("--family", metavar="NAME", help=FAMILY_HELP)
    _declare_drops(parser)
    _declare_output(parser)


def run_resize(options: argparse.Namespace) -> Result:
    """Run ``sdlora resize``."""
    from ..surgery.resize import resize_adapter
    from .display import progress_bar

    with progress_bar("resizing") as progress:
        report = resize_adapter(
            options.source,
            options.output,
            family=options.family,
            drop=options.drop,
            progress=progress,
            **_cut(options),
            **_output(options),
        )
    print(report.render())
    return report.to_dict(), 0


def declare_diff(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora diff``."""
    parser.add_argument("first", type=path_argument, help="adapter file or PEFT folder")
    parser.add_argument("other", type=path_argument, help="another one of the same model family")
    parser.add_argument(
        "--image", type=path_argument, metavar="PNG", help="draw a heat map, block by kind of layer"
    )
    # the option's earlier name
    parser.add_argument(
        "--picture", dest="image", type=path_argument, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an image that exists")
    parser.add_argument("--report", action="store_true", help="list every module, not only the blocks")


def run_diff(options: argparse.Namespace) -> Result:
    """Run ``sdlora diff``."""
    from ..surgery.diff import diff_adapters
    from .display import progress_bar

    with progress_bar("comparing") as progress:
        difference = diff_adapters(
            options.first,
            options.other,
            image=options.image,
            overwrite=options.overwrite,
            report=options.report,
            progress=progress,
        )
    print(difference.render())
    return difference.to_dict(), 0


def declare_convert(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora convert``."""
    parser.add_argument("source", type=path_argument, help="adapter file or PEFT folder")
    parser.add_argument(
        "--to-lora",
        action="store_true",
        help="turn LoHa, LoKr and Tucker LoCon into plain LoRA, exactly or cut to a size; DoRA with --base",
    )
    parser.add_argument("--family", metavar="NAME", help=FAMILY_HELP)
    parser.add_argument(
        "--base",
        type=path_argument,
        help="checkpoint or folder that it was trained on: for DoRA, and for the proof",
    )
    _declare_cut(parser)
    _declare_drops(parser)
    _declare_output(parser)


def run_convert(options: argparse.Namespace) -> Result:
    """Run ``sdlora convert``."""
    from ..surgery.convert import convert_adapter
    from .display import progress_bar

    with progress_bar("converting") as progress:
        report = convert_adapter(
            options.source,
            options.output,
            to_lora=options.to_lora,
            base=options.base,
            family=options.family,
            drop=options.drop,
            progress=progress,
            **_cut(options),
            **_output(options),
        )
    print(report.render())
    return report.to_dict(), 0


def declare_bake(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora bake``."""
    parser.add_argument("checkpoint", type=path_argument, help=".safetensors checkpoint or diffusers folder")
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE[:STRENGTH[:TEXT]]",
        help="adapter and its strength (a second number is the text encoder's); may be repeated",
    )
    _declare_blocks(parser)
    parser.add_argument(
        "--inverse", action="store_true", help="subtract instead: exact only within the rounding"
    )
    parser.add_argument(
        "--output", type=path_argument, required=True, metavar="PATH", help="the new file, or the new folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--report", action="store_true", help="show what rounding spoils in each module")


def run_bake(options: argparse.Namespace) -> Result:
    """Run ``sdlora bake``."""
    from ..adapters.strength import parse_adapter
    from ..surgery.bake import bake_checkpoint
    from ..surgery.strengths import parse_blocks
    from .display import progress_bar

    adapters = [parse_adapter(text) for text in options.adapter]
    with progress_bar("baking") as progress:
        report = bake_checkpoint(
            options.checkpoint,
            adapters,
            options.output,
            blocks=parse_blocks(options.block, len(adapters)),
            inverse=options.inverse,
            overwrite=options.overwrite,
            report=options.report,
            progress=progress,
        )
    print(report.render())
    return report.to_dict(), 0


def declare_extract(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora extract``."""
    parser.add_argument("base", type=path_argument, help="checkpoint the LoRA will be used on")
    parser.add_argument("tuned", type=path_argument, help="checkpoint it should give")
    parser.add_argument(
        "--targets", choices=["attention", "linear", "all"], help="layers of the U-Net; as in training"
    )
    parser.add_argument("--no-text-encoders", action="store_true", help="leave the text encoders out")
    _declare_cut(parser)
    _declare_output(parser)


def run_extract(options: argparse.Namespace) -> Result:
    """Run ``sdlora extract``."""
    from ..surgery.extract import extract_adapter
    from .display import progress_bar

    with progress_bar("extracting") as progress:
        report = extract_adapter(
            options.base,
            options.tuned,
            options.output,
            targets=options.targets,
            text_encoders=not options.no_text_encoders,
            progress=progress,
            **_cut(options),
            **_output(options),
        )
    print(report.render())
    return report.to_dict(), 0


def _declare_blocks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="[N:]BLOCK=WEIGHT,...",
        help="factor for a block, for adapter N or for all; BLOCK is a component, the start of a module's "
        "path, or BASE, IN00-IN11, MID, OUT00-OUT11; may be repeated",
    )


def _declare_cut(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="at most this rank in each module")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="keep this share of each update's squared norm"
    )
    parser.add_argument(
        "--error", type=float, metavar="SHARE", help="stay within this relative error of each update"
    )


def _cut(options: argparse.Namespace) -> dict[str, Any]:
    return {"rank": options.rank, "energy": options.energy, "error": options.error}


def _declare_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=path_argument,
        required=True,
        metavar="FILE",
        help="the new file (for peft: the folder)",
    )
    parser.add_argument("--format", choices=written_formats(), default="webui")
    parser.add_argument("--dtype", choices=PRECISIONS, help="number format; as in the source")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    _declare_report(parser)


def _declare_drops(parser: argparse.ArgumentParser) -> None:
    from .files import declare_drop

    declare_drop(parser)


def _declare_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", action="store_true", help="show the relative error of each module")


def _output(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "format": options.format,
        "dtype": options.dtype,
        "overwrite": options.overwrite,
        "report": options.report,
    }
