"""The command that puts an adapter on the hub."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import path_argument

Result = tuple[dict[str, Any], int]


def declare_publish(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora publish``."""
    parser.add_argument("source", type=path_argument, metavar="RUN", help="run folder, or an adapter file")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--dry-run", action="store_true", help="show the card and the files; send nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace files that the repository holds")
    parser.add_argument("--private-repo", action="store_true", help="only its owner sees the repository")
    parser.add_argument(
        "--private", action="store_true", help="leave out captions, prompts and names of files, as in export"
    )
    parser.add_argument("--strength", type=float, metavar="NUMBER", help="recommended strength, for the card")
    parser.add_argument("--license", metavar="ID", help="e.g. cc-by-4.0; what the adapter says when left out")


def run_publish(options: argparse.Namespace) -> Result:
    """Run ``sdlora publish``."""
    from ..exporting.publish import publish

    result = publish(
        options.source,
        options.to,
        dry_run=options.dry_run,
        overwrite=options.overwrite,
        private_repo=options.private_repo,
        private=options.private,
        strength=options.strength,
        license=options.license,
    )
    if result.address is None:
        print(result.card)
        print(f"files for {result.repo}, not sent (--dry-run):")
        for name in result.files:
            print(f"  {name}")
    else:
        print(f"published: {result.address}")
    for note in result.notes:
        print(f"note: {note}")
    return {
        "repo": result.repo,
        "files": list(result.files),
        "address": result.address,
        "card": result.card,
        "notes": list(result.notes),
    }, 0
