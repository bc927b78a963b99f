"""The command line: parse -> settings -> one public function -> show its result.

Each command is one line in :data:`COMMANDS`: a function that declares its arguments and one that runs
it and returns (JSON result, exit code); they live in the modules beside this one. Everything meant for
people goes to stderr or is the plain answer on stdout; with ``--json`` the last line of stdout is one JSON
object. Heavy imports happen inside the commands, so that ``--help`` and ``check`` answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from ..errors import ConfigError, OtherProcessError, SdloraError, without_controls
from ..files import write_problem
from ..machine import version
from .arguments import nearest
from .captions import declare_caption, declare_tags, run_caption, run_tags
from .completion import complete, declare_completion, is_asked, line_words, run_completion
from .data import declare_cache, declare_check, run_cache, run_check
from .files import declare_export, declare_inspect, run_export, run_inspect
from .hub import declare_publish, run_publish
from .machine import declare_doctor, run_doctor
from .models import (
    declare_demo,
    declare_generate,
    declare_train,
    declare_ui,
    run_demo,
    run_generate,
    run_train,
    run_ui,
    settings_help,
)
from .runs import declare_judge, declare_runs, run_judge, run_runs
from .settings import declare_import, declare_presets, run_import, run_presets
from .streams import tolerant_streams
from .surgery import (
    declare_bake,
    declare_convert,
    declare_diff,
    declare_extract,
    declare_merge,
    declare_resize,
    run_bake,
    run_convert,
    run_diff,
    run_extract,
    run_merge,
    run_resize,
)

Result = tuple[dict[str, Any], int]
_COMMA = re.compile(r"invalid float value: '([+-]?\d+,\d+)'")


class Command(NamedTuple):
    """One subcommand: help, its arguments, what it does, and what only its own help shows."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]
    more_help: Callable[[], str] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 good, 1 found harmful, 2 an error the user can correct."""
    # threads that wait by spinning make a run 3 to 10 times slower when other programs use the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments is None:
        _leave_ascii()
        warnings.showwarning = _show_warning
        # PEFT loads bitsandbytes wherever it is installed, and that reports kernels nobody asked for
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if is_asked():
            complete(*_parsers(_command_of(line_words())))
    words = sys.argv[1:] if arguments is None else list(arguments)
    with tolerant_streams() as lost:
        code = _answer(words)
        sys.stdout.flush()
        if lost.failure is None:
            return code
        reason = "the disk is full" if lost.failure.errno == errno.ENOSPC else lost.failure.strerror
        print(
            f"sdlora: the answer could not be written to standard output ({reason}); files that the command "
            "wrote are whole",
            file=sys.stderr,
        )
        return code or 2


def _leave_ascii() -> None:
    """Start again in UTF-8 where the locale has Python take names of files for ASCII.

    Python does so by itself for the locale C, unless it is told not to (``PYTHONUTF8=0``); a folder that is
    called ``blüten`` could be neither named nor shown.
    """
    ascii_names = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_names and os.name == "posix" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as a line for people; where in the code it arose means nothing to them."""
    ours = Path(filename).is_relative_to(Path(__file__).parent.parent)
    text = without_controls(str(message))
    print(f"note: {text}" if ours else f"{category.__name__}: {text}", file=sys.stderr)


def _answer(words: Sequence[str]) -> int:
    """Run one command and print its answer; return the exit code."""
    as_json = "--json" in words  # anywhere on the line, and also when the line cannot be parsed
    try:
        options = _parse([word for word in words if word != "--json"])
        options.json, options.words = as_json, [word for word in words if word != "--json"]
        result, code = COMMANDS[options.command].run(options)
        as_json = options.json
    except OtherProcessError as error:  # the other process has reported it
        result, code = {"error": str(error), "kind": type(error).__name__}, 2
    except SdloraError as error:
        result, code = _refusal(str(error), type(error).__name__), 2
    except SystemExit as error:  # how argparse ends after --help and --version
        return int(error.code or 0)
    except KeyboardInterrupt:
        result, code = _refusal("interrupted", "KeyboardInterrupt"), 130
    except MemoryError:
        result, code = _refusal("there is not enough memory for this", "MemoryError"), 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        result, code = _refusal(f"{place}{_os_problem(error)}", "OutputError"), 2
    if as_json:
        print(json.dumps(result, default=str), flush=True)
    return code


def _os_problem(error: OSError) -> str:
    """Return in words what the system said of a file that nobody had thought of."""
    if error.errno in (errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG):
        return write_problem(error)
    return f"{error.strerror or error}; check the path, its permissions and the disk"


def _refusal(message: str, kind: str) -> dict[str, Any]:
    """Print why there is no result; return the same for scripts."""
    print(f"sdlora: {without_controls(message)}", file=sys.stderr)
    return {"error": message, "kind": kind}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are like all others: one line, with ``--json`` also as JSON.

    Attributes:
        more_help: makes the end of the help text, only when the help is asked for.
    """

    more_help: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the help text, with its end."""
        if self.more_help is not None:
            self.epilog = self.more_help()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print before exiting."""
        if comma := _COMMA.search(message):
            message += f"; write {comma[1].replace(',', '.')}, with a point"
        raise ConfigError(f"{' '.join(message.split())} (see {self.prog} --help)")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of one command line.

    Raises:
        ConfigError: for a line that cannot be parsed.
    """
    for number, word in enumerate(words, start=1):
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(
                f"word {number} of the command line, {word!a}, is not UTF-8; rename the file"
            ) from None
    wanted = _command_of(words)
    parser, commands = _parsers(wanted)
    if wanted is not None and wanted not in commands:
        parser.error(f"no command `{wanted}`{nearest(wanted, commands)}")
    options, extra = parser.parse_known_args(words)
    _take_overrides(options, extra, commands[options.command])
    return options


def _command_of(words: Sequence[str]) -> str | None:
    """Return the word of a line that names the command."""
    return next((word for word in words if not word.startswith("-")), None)


def _parsers(wanted: str | None) -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser for the whole line, and command -> its parser.

    Only the wanted command gets its arguments: declaring those of the others would make every command line
    read the settings' schema.
    """
    parser = _Parser(
        prog="sdlora",
        description="Train a Stable Diffusion LoRA from a folder of images, see it at any strength, "
        "export it.",
    )
    parser.add_argument("--version", action="version", version=f"sdlora {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        subparser.more_help = command.more_help
        if name == wanted:
            command.declare(subparser)
    return parser, dict(commands.choices)


def _take_overrides(options: argparse.Namespace, extra: list[str], parser: _Parser) -> None:
    """Accept key=value anywhere on the line of a command that has settings."""
    settable = hasattr(options, "overrides")
    unknown = [text for text in extra if text.startswith("-") or not settable]
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        flag, _, value = unknown[0].partition("=")
        hint = nearest(flag, flags)
        if settable and flag.startswith("--"):
            from ..config.advice import as_setting

            hint = as_setting(flag, value or _behind(unknown[0], extra), exactly=bool(hint)) or hint
        parser.error(f"{'unknown option' if settable else 'unknown argument'}: {' '.join(unknown)}{hint}")
    if not settable:
        return
    folder = getattr(options, "folder", None)
    if folder is not None and "=" in folder and not Path(folder).exists():
        extra, options.folder = [folder, *extra], None
    stray = [text for text in extra if "=" not in text]
    if stray and folder is not None:
        parser.error(
            f"`{stray[0]}` is neither an option nor a setting (section.name=value); if it belongs to the "
            f"folder's name, put that in quotes: '{folder} {stray[0]}'"
        )
    options.overrides = extra


def _behind(word: str, words: Sequence[str]) -> str:
    """Return the word that follows another one, or nothing."""
    at = words.index(word) + 1
    return words[at] if at < len(words) else ""


COMMANDS: dict[str, Command] = {
    "train": Command("train a LoRA on a folder of images", declare_train, run_train, settings_help),
    "generate": Command("draw images with adapters at any strength", declare_generate, run_generate),
    "export": Command("write an adapter for WebUI, diffusers or PEFT", declare_export, run_export),
    "publish": Command("put an adapter with its model card on the hub", declare_publish, run_publish),
    "inspect": Command("show what an adapter file or a base model holds", declare_inspect, run_inspect),
    "merge": Command("merge adapters into one", declare_merge, run_merge),
    "resize": Command("write an adapter with fewer ranks", declare_resize, run_resize),
    "bake": Command("add adapters to a checkpoint, or take them out", declare_bake, run_bake),
    "extract": Command("make a LoRA from the difference of two checkpoints", declare_extract, run_extract),
    "diff": Command("compare two adapters by block and layer", declare_diff, run_diff),
    "convert": Command("write an adapter in another format or kind", declare_convert, run_convert),
    "check": Command("look for problems in a folder of images", declare_check, run_check),
    "caption": Command("write captions for images with a model", declare_caption, run_caption),
    "tags": Command("count and change the tags of all captions", declare_tags, run_tags),
    "import": Command("read the settings of another trainer", declare_import, run_import),
    "presets": Command("list settings that suit a purpose", declare_presets, run_presets),
    "doctor": Command("show what this machine can compute with", declare_doctor, run_doctor),
    "cache": Command("show what the cache of encodings holds, and thin it out", declare_cache, run_cache),
    "judge": Command("say which adapter is best, and at which strength", declare_judge, run_judge),
    "runs": Command("list training runs, draw their curves over each other", declare_runs, run_runs),
    "completion": Command(
        "print what lets a shell complete command lines", declare_completion, run_completion
    ),
    "demo": Command("learn an ink style on the built-in base and show it", declare_demo, run_demo),
    "ui": Command("train, draw and export in the browser", declare_ui, run_ui),
}
