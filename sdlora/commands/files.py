"""The commands for single files: export an adapter, inspect an adapter or a base model."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from ..errors import ConfigError
from ..formats.table import written_formats
from ..number_formats import PRECISIONS
from .arguments import FAMILY_HELP, path_argument, source_argument
from .next_steps import after_export

Result = tuple[dict[str, Any], int]


def declare_export(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora export``."""
    parser.add_argument("source", type=path_argument, help="run folder or adapter file")
    parser.add_argument("--format", choices=written_formats(), default="webui")
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="where the file goes")
    parser.add_argument(
        "--webui", type=path_argument, metavar="DIR", help="also copy into this WebUI's models/Lora"
    )
    parser.add_argument("--name", help="file name without ending")
    parser.add_argument("--dtype", choices=PRECISIONS, help="number format; as in the source")
    parser.add_argument("--family", metavar="NAME", help=FAMILY_HELP)
    parser.add_argument("--preview", type=path_argument, metavar="PNG", help="image for the WebUI card")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--private", action="store_true", help="leave out folder names, captions, tags and file names"
    )
    declare_drop(parser)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the file again, also through diffusers or PEFT, and compare every update",
    )
    parser.add_argument(
        "--verify-images",
        action="store_true",
        help="also draw with the trained adapter and with the file, at several strengths, and compare",
    )
    parser.add_argument(
        "--base", type=source_argument, help="base to draw on for --verify-images; a run's own when left out"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to draw for --verify-images; may be repeated"
    )


def declare_drop(parser: argparse.ArgumentParser) -> None:
    """Declare what leaves kinds of layers out."""
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="KIND",
        help="leave out what the format has no place for: bias, norm, embedding, or a kind of layers (full, "
        "glora, ...); may be repeated",
    )


def run_export(options: argparse.Namespace) -> Result:
    """Run ``sdlora export``."""
    if options.output is None and options.webui is None:
        raise ConfigError("sdlora export needs --output DIR (or --webui DIR)")
    if not options.verify_images and (options.base or options.prompt):
        raise ConfigError("--base and --prompt of sdlora export have no effect without --verify-images")
    from ..exporting.export import export_adapter

    report = export_adapter(
        options.source,
        options.format,
        options.output,
        dtype=options.dtype,
        preview=options.preview,
        webui_folder=options.webui,
        overwrite=options.overwrite,
        name=options.name,
        private=options.private,
        drop=options.drop,
        verify=options.verify,
        family=options.family,
    )
    for file in report.files:
        print(file)
    for note in report.notes:
        print(note)
    print(f"proof: {report.proof_line()}")
    if not options.verify_images:
        print(after_export(report, in_webui=options.webui is not None))
        return report.to_dict(), 0
    from ..exporting.image_proof import compare_images
    from .display import progress_bar

    with progress_bar("drawing") as progress:
        images = compare_images(
            options.source, report.adapter, base=options.base, prompts=options.prompt, progress=progress
        )
    print(f"images: {images.line()}")
    print(after_export(report, in_webui=options.webui is not None))
    return report.to_dict() | {"images": images.to_dict()}, 0


def declare_inspect(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora inspect``."""
    parser.add_argument("file", type=path_argument, help="adapter file or PEFT folder, or a base model")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a header entry, e.g. modelspec.license=CC-BY-4.0; the tensors stay; may be repeated",
    )
    parser.add_argument("--remove", action="append", default=[], metavar="KEY", help="remove a header entry")
    parser.add_argument(
        "--chart", type=path_argument, metavar="PNG", help="also draw the norms by block as an image"
    )
    parser.add_argument(
        "--fix",
        type=path_argument,
        metavar="FILE",
        help="write a mended copy: dimensions, alphas, names and header entries, proven to change no update",
    )
    parser.add_argument("--overwrite", action="store_true", help="let --fix replace a file that exists")
    parser.add_argument(
        "--header",
        action="store_true",
        help="show every header entry and read no tensor: fast for any size, but without norms and hash",
    )


def run_inspect(options: argparse.Namespace) -> Result:
    """Run ``sdlora inspect``."""
    from ..inspecting.base_inspection import inspect_base, is_base
    from ..inspecting.inspection import inspect_adapter

    source = options.file.as_posix()  # a hub id has its slash on every system
    if is_base(source):
        if options.set or options.remove or options.chart or options.header or options.fix:
            raise ConfigError(
                f"{options.file}: is a base model; --set, --remove, --chart, --fix and --header are "
                "for adapters"
            )
        base = inspect_base(source)
        print(base.render())
        return base.to_dict(), 0
    if options.header and options.chart:
        raise ConfigError("--chart draws the norms, which --header does not read; leave one of them out")
    if options.fix is not None:
        return _fix(options)
    edits: dict[str, Any] = {}
    if options.set or options.remove:
        from ..inspecting.inspection import edit_adapter

        edits = edit_adapter(options.file, options.set, options.remove)
        for key, change in edits.items():
            print(f"{key}: {change['before']} -> {change['after']}")
    from ..inspecting.view import draw_norms, render

    summary = inspect_adapter(options.file, values=not options.header)
    if options.chart is not None:
        draw_norms(summary, options.chart)
    columns = shutil.get_terminal_size((140, 24)).columns
    print(render(summary, width=columns, colour=sys.stdout.isatty(), plain=not _shows_blocks()))
    more = {"chart": options.chart} if options.chart else {}
    return summary.to_dict() | more | ({"edited": edits} if edits else {}), 0


def _fix(options: argparse.Namespace) -> Result:
    if options.set or options.remove or options.chart or options.header:
        raise ConfigError(
            "--fix writes a mended copy and does nothing else; give the other options another time"
        )
    from ..inspecting.fix import fix_adapter

    fix = fix_adapter(options.file, options.fix, overwrite=options.overwrite)
    for what in fix.mended:
        print(f"mended: {what}")
    print(f"proof: {fix.proof}" if fix.file else "there is nothing to mend; no file was written")
    if fix.file is not None:
        print(fix.file)
    clients = {support.client: list(support.reasons) or "full" for support in fix.clients}
    return {"file": fix.file, "mended": list(fix.mended), "proof": fix.proof, "clients": clients}, 0


def _shows_blocks() -> bool:
    """Tell whether the terminal's encoding has block characters."""
    try:
        "\u2588\u258c".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
