"""The commands for settings: ``presets`` lists and keeps them, ``import`` reads those of other trainers."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, OutputError
from ..files import refuse_bad_names, write_text
from .arguments import path_argument

if TYPE_CHECKING:
    from ..config.foreign.programs import Imported

Result = tuple[dict[str, Any], int]
_LONGEST_PASTE = 1 << 20


def declare_presets(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora presets``."""
    parser.add_argument("name", nargs="?", help="show this preset's settings instead of the list")
    parser.add_argument(
        "--save",
        type=path_argument,
        metavar="FILE",
        help="keep the settings of a TOML file (a run's config.toml, say) as your own preset NAME",
    )
    parser.usage = "sdlora presets [NAME [--save FILE]]"


def run_presets(options: argparse.Namespace) -> Result:
    """Run ``sdlora presets``: list them, show one, or keep one."""
    from ..config.presets import find_preset, keep_preset

    if options.save is not None:
        if options.name is None:
            raise ConfigError("--save FILE: give the preset a name: sdlora presets NAME --save FILE")
        file = keep_preset(options.name, options.save)
        print(f"{file}: use it with `sdlora train FOLDER --preset {options.name}`")
        return {"file": file}, 0
    if options.name is None:
        return show_presets()
    preset = find_preset(options.name)
    print(f"{preset.file}\n\n{preset.file.read_text(encoding='utf-8').strip()}")
    return {"name": preset.name, "file": preset.file, "values": preset.values()}, 0


def show_presets() -> Result:
    """Print the presets that there are, and where one's own are put."""
    from ..config.presets import own_folder, presets

    there = presets()
    width = max((len(preset.name) for preset in there), default=0)
    for preset in there:
        print(f"{preset.name:<{width}}  {preset.about}{' (yours)' if preset.users else ''}".rstrip())
    print(f"\nuse one:   sdlora train FOLDER --preset NAME\nyour own:  TOML files in {own_folder()}")
    listed = [
        {"name": preset.name, "about": preset.about, "file": preset.file, "users": preset.users}
        for preset in there
    ]
    return {"presets": listed, "own_folder": own_folder()}, 0


def declare_import(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora import``."""
    parser.add_argument(
        "source",
        help="settings file of another trainer (.toml, .json, .yaml, .bat, .sh), its command line in "
        "quotes, or - to read either from standard input",
    )
    parser.add_argument(
        "--from",
        dest="program",
        metavar="PROGRAM",
        help="the trainer they are from, if that is not recognised: kohya, kohya-config, kohya-dataset, "
        "kohya-gui, onetrainer, ai-toolkit, simpletuner, diffusers, adapter-config",
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="FILE",
        help="where to write them; NAME.sdlora.toml when left out",
    )
    parser.usage = "sdlora import FILE|'COMMAND' [--output FILE]"


def run_import(options: argparse.Namespace) -> Result:
    """Run ``sdlora import``: write sdlora's settings, and show what became of each of the other trainer's."""
    from ..config.foreign.programs import import_settings

    source, stem = _source(options.source)
    output: Path = options.output or Path(f"{stem}.sdlora.toml")
    refuse_bad_names(output)
    if output.exists():
        raise OutputError(f"{output}: exists already; give another name with --output")
    imported = import_settings(source, program=options.program)
    _check(imported)
    write_text(output, imported.toml())
    _show(imported)
    print(f"\n{output}: train with `sdlora train --config {output}`")
    return {
        "program": imported.program,
        "output": output,
        "settings": dict(imported.values),
        "rows": [asdict(row) for row in imported.rows],
        "notes": list(imported.notes),
    }, 0


def _source(text: str) -> tuple[str | Path, str]:
    """Return a file or a command line, and the stem of the output's name.

    Raises:
        ConfigError: when it is neither.
    """
    if text == "-" and sys.stdin is None:
        raise ConfigError("standard input: is closed; name a settings file")
    if text == "-":
        pasted = sys.stdin.read(_LONGEST_PASTE + 1)
        if len(pasted) > _LONGEST_PASTE:
            raise ConfigError("standard input: is longer than 1 MiB; settings are not")
        return pasted, "imported"
    text = os.path.expanduser(text)
    if os.path.isfile(text):  # a command line may be too long to be asked for as a path
        return Path(text), Path(text).stem
    if os.path.isdir(text):
        raise ConfigError(f"{text}: is a folder; name the settings file in it")
    if not text.strip():
        raise ConfigError(
            "nothing to import: the source is empty; give a settings file or a command line in quotes"
        )
    if " " not in text.strip():
        raise ConfigError(f"{text}: no such file; give a settings file, or a command line in quotes")
    return text, "imported"


def _check(imported: Imported) -> None:
    """Refuse settings that contradict each other before anything is written."""
    try:
        imported.config()
    except ConfigError as error:
        raise ConfigError(f"what was read contradicts itself in sdlora: {error}") from None


def _show(imported: Imported) -> None:
    """Print the account: a line for each setting, those without a counterpart last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..config.foreign.ledger import Outcome

    order = list(Outcome)
    table = Table(
        title=imported.program[0].upper() + imported.program[1:],
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for title in ("setting", "value", "became", "in sdlora", "why"):
        table.add_column(title, overflow="fold")
    for row in sorted(imported.rows, key=lambda row: order.index(row.outcome)):
        cells = (row.setting, row.value, str(row.outcome), row.ours, row.reason)
        table.add_row(*(Text(cell) for cell in cells), style=_STYLES.get(row.outcome))
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
    else:
        print(_wide(table))
    counts = [f"{sum(row.outcome == outcome for row in imported.rows)} {outcome}" for outcome in order]
    print(f"\n{len(imported.rows)} settings: {', '.join(counts)}")
    for note in imported.notes:
        print(f"note: {note}")


_STYLES = {"without counterpart": "yellow", "default anyway": "dim"}


def _wide(table: Any) -> str:
    """Return a table as text that no terminal's width breaks, for files and pipes."""
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=240, color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
