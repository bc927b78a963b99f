"""The command line: parse -> settings -> one public function -> show what it tells.

Each command is one line in :data:`COMMANDS`: a function that declares its arguments and one that runs
it and returns (JSON result, exit code). Everything meant for people goes to stderr or is the plain
answer on stdout; with ``--json`` the last line of stdout is one JSON object. Heavy imports happen inside
the commands, so that ``--help`` and ``check`` answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from .data_commands import declare_cache, declare_check, run_cache, run_check
from .errors import ConfigError, SdloraError
from .files import find_settings, write_problem
from .surgery_commands import (
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


class Command(NamedTuple):
    """One subcommand: help, its arguments, and what it does."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 good, 1 found harmful, 2 an error the user can mend."""
    # Threads that wait for each other by spinning cost 3-10 times when other programs want the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # Windows consoles may not be UTF-8
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    words = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in words  # wherever it stands, and also when the line cannot be understood
    try:
        options = _parse([word for word in words if word != "--json"])
        options.json = as_json
        result, code = COMMANDS[options.command].run(options)
        as_json = options.json
        sys.stdout.flush()
    except SdloraError as error:
        result, code = _refusal(str(error), type(error).__name__), 2
    except KeyboardInterrupt:
        result, code = _refusal("interrupted", "KeyboardInterrupt"), 130
    except BrokenPipeError:  # whoever read our answer has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        result, code = _refusal(f"{place}{write_problem(error)}", "OutputError"), 2
    if as_json:
        print(json.dumps(result, default=str), flush=True)
    return code


def _refusal(message: str, kind: str) -> dict[str, Any]:
    """Tell people why there is no result; return the same for scripts."""
    print(f"sdlora: {message}", file=sys.stderr)
    return {"error": message, "kind": kind}


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others: one line, with ``--json`` as JSON, too.

    Attributes:
        more_help: makes the end of the help, when it is asked for and not before.
    """

    more_help: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the help, with all that belongs to it."""
        if self.more_help is not None:
            self.epilog = self.more_help()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage, and exit with."""
        raise ConfigError(f"{' '.join(message.split())} (see {self.prog} --help)")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of one command line.

    Raises:
        ConfigError: for a line that means nothing.
    """
    parser, commands = _parsers()
    wanted = next((word for word in words if not word.startswith("-")), None)
    if wanted is not None and wanted not in commands:
        parser.error(f"no command `{wanted}`{_nearest(wanted, commands)}")
    options, extra = parser.parse_known_args(words)
    _take_overrides(options, extra, commands[options.command])
    return options


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser of whole lines, and that of each command by its name."""
    parser = _Parser(
        prog="sdlora",
        description="Train a Stable Diffusion LoRA from a folder of pictures, see it at any strength, "
        "export it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        own.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        command.declare(own)
    return parser, dict(commands.choices)


def _take_overrides(options: argparse.Namespace, extra: list[str], parser: _Parser) -> None:
    """Accept key=value anywhere on the line of a command that has settings."""
    settable = hasattr(options, "overrides")
    unknown = [text for text in extra if text.startswith("-") or not settable]
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        nearest = _nearest(unknown[0].partition("=")[0], flags)
        parser.error(f"{'unknown option' if settable else 'unknown argument'}: {' '.join(unknown)}{nearest}")
    if not settable:
        return
    folder = getattr(options, "folder", None)
    if folder is not None and "=" in folder and not Path(folder).exists():
        extra, options.folder = [folder, *extra], None
    options.overrides = extra


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


# --- train ---------------------------------------------------------------------------------------------


def _declare_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", help="folder of pictures, captions beside them")
    parser.add_argument("--base", help="mini, a diffusers folder, a .safetensors file, or a hub id")
    parser.add_argument("--name", help="name of the adapter and of its file")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder (default runs/NAME)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--trigger", metavar="WORD", help="word that calls the style")
    parser.add_argument("--events", metavar="FILE", help="also write events as JSON lines (- for stdout)")
    parser.set_defaults(overrides=[])
    parser.usage = "sdlora train FOLDER [options] [section.name=value ...]"
    assert isinstance(parser, _Parser)
    parser.more_help = _settings_help


def _settings_help() -> str:
    from .config import fields

    lines = ["settings (section.name=value, or in the TOML file):"]
    for key, field in fields():
        default = "follows the data" if field.default is None else f"{field.default}"
        lines.append(f"  {key} [{default}]\n      {' '.join((field.description or '').split())}")
    return "\n".join(lines)


def _run_train(options: argparse.Namespace) -> Result:
    from .config import load_config

    file = options.config
    if file is None and options.resume:
        if options.output is None:
            raise ConfigError("--resume needs --output DIR, the run folder to go on with")
        file = find_settings(options.output)
    config = load_config(
        file,
        options.overrides,
        {
            "data.folder": options.folder and Path(options.folder),
            "data.trigger_word": options.trigger,
            "model.base": options.base,
            "output.name": options.name,
            "output.folder": options.output,
        },
    )
    from .display import TrainingDisplay
    from .events import Control, JsonlWriter, Listener
    from .run import run_folder
    from .train import train

    control = Control(run_folder(config))
    with ExitStack() as stack:
        listeners: list[Listener] = [stack.enter_context(TrainingDisplay())] if _is_main_process() else []
        if options.events:
            listeners.append(JsonlWriter(stack.enter_context(_event_stream(options.events))))
        stack.enter_context(control.on_interrupt())
        result = train(config, resume=options.resume, listeners=listeners, control=control)
    if not _is_main_process():
        options.json = False
    elif result.stopped:
        print(
            f"stopped after step {result.step} and saved; go on with:\n"
            f"  sdlora train --resume --output {result.folder}"
        )
    else:
        print(f"adapter: {result.adapter_file}")
        if (grid := result.folder / "samples" / "grid.png").is_file():
            print(f"previews: {grid}")
    return {
        "adapter_file": result.adapter_file,
        "run": result.folder,
        "step": result.step,
        "stopped": result.stopped,
        "loss": result.loss,
        "validation_loss": result.validation_loss,
        "seconds": round(result.seconds, 2),
        "data_wait_share": round(result.data_wait_share, 4),
    }, 0


def _event_stream(place: str) -> AbstractContextManager[TextIO]:
    return nullcontext(sys.stdout) if place == "-" else Path(place).open("a", encoding="utf-8")


def _is_main_process() -> bool:
    """Tell whether this is the process that speaks, of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


# --- generate ------------------------------------------------------------------------------------------


def _declare_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="mini", help="mini, a folder, a .safetensors file, or a hub id")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[:TEXT]]",
        help="adapter and its strength (a second number is the text encoder's); may be repeated",
    )
    parser.add_argument("--prompt", action="append", required=True, help="what to draw; may be repeated")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what to avoid")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the PNGs go")
    parser.add_argument("--seed", type=int, default=0, help="fixes the noise")
    parser.add_argument("--count", type=int, default=1, help="pictures a prompt, from consecutive seeds")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="in px; the base's own size when left out")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale; the base's own when left out")
    parser.add_argument(
        "--sampler", default="DPM++ 2M Karras", help="DDIM, Euler, Euler a, DPM++ 2M[ Karras]"
    )
    parser.add_argument("--strengths", metavar="A,B,...", help="render a sweep grid, e.g. 0,0.25,0.5,0.75,1")
    parser.add_argument("--merge", action="store_true", help="fold the adapters into the weights first")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the fastest when left out")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="number format")
    parser.add_argument("--vae", metavar="FILE", help="another autoencoder: a file, a folder, or a hub id")
    parser.add_argument("--clip-skip", type=int, default=1, help="n-th last layer of the text encoder (SD1)")
    parser.add_argument(
        "--family", choices=["sd1", "sd2", "sdxl"], help="what the base is, against its header"
    )
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction"], help="what the U-Net predicts")
    parser.add_argument("--zero-terminal-snr", action=argparse.BooleanOptionalAction, help="schedule's end")
    parser.add_argument("--attention", choices=["auto", "sdpa", "xformers"], default="auto")
    parser.add_argument("--offload", action="store_true", help="one component on the card at a time")


def _run_generate(options: argparse.Namespace) -> Result:
    strengths = _numbers(options.strengths, "--strengths") if options.strengths else None
    width, height = _size(options.size) if options.size else (None, None)
    for name, least in (("count", 1), ("steps", 1), ("seed", 0), ("clip_skip", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be {least} or more")
    from .adapters.strength import parse_adapter
    from .display import progress_bar
    from .families.loading import LoadOptions
    from .generate import generate

    adapters = [parse_adapter(text) for text in options.adapter]
    with progress_bar("drawing") as progress:
        result = generate(
            options.base,
            adapters,
            options.prompt,
            negative_prompt=options.negative,
            seed=options.seed,
            height=height,
            width=width,
            steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            strengths=strengths,
            merge=options.merge,
            count=options.count,
            output=options.output,
            device=options.device,
            precision=options.precision,
            options=LoadOptions(
                family=options.family,
                prediction_type=options.prediction,
                zero_terminal_snr=options.zero_terminal_snr,
                clip_skip=options.clip_skip,
                vae=options.vae,
                attention=options.attention,
                offload=options.offload,
            ),
            progress=progress,
        )
    for file in [*result.files, *([result.grid] if result.grid else [])]:
        print(file)
    return {"files": list(result.files), "grid": result.grid, "seconds": round(result.seconds, 2)}, 0


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: give numbers with commas between them, e.g. 0,0.5,1") from None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise ConfigError(f"--size {text}: give WIDTHxHEIGHT in px, e.g. 512x768") from None


# --- export, inspect, demo ----------------------------------------------------------------------


def _declare_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run folder or adapter file")
    parser.add_argument("--format", choices=["webui", "diffusers", "peft"], default="webui")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the file goes")
    parser.add_argument("--webui", type=Path, metavar="DIR", help="also copy into this WebUI's models/Lora")
    parser.add_argument("--name", help="file name without ending")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="number format; as in the source")
    parser.add_argument("--preview", type=Path, metavar="PNG", help="picture for the WebUI card")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--private", action="store_true", help="leave out folder names, captions, tags and file names"
    )
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
    parser.add_argument("--base", help="base to draw on for --verify-images; a run's own when left out")
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to draw for --verify-images; may be repeated"
    )


def _run_export(options: argparse.Namespace) -> Result:
    if options.output is None and options.webui is None:
        raise ConfigError("sdlora export needs --output DIR (or --webui DIR)")
    if not options.verify_images and (options.base or options.prompt):
        raise ConfigError("--base and --prompt of sdlora export have no effect without --verify-images")
    from .export import export_adapter

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
        verify=options.verify,
    )
    for file in report.files:
        print(file)
    print(f"proof: {report.proof_line()}")
    if not options.verify_images:
        return report.to_dict(), 0
    from .display import progress_bar
    from .picture_proof import compare_pictures

    with progress_bar("drawing") as progress:
        pictures = compare_pictures(
            options.source, report.adapter, base=options.base, prompts=options.prompt, progress=progress
        )
    print(f"pictures: {pictures.line()}")
    return report.to_dict() | {"pictures": pictures.to_dict()}, 0


def _declare_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="adapter file or PEFT folder, or a base model")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a header entry, e.g. modelspec.license=CC-BY-4.0; the tensors stay; may be repeated",
    )
    parser.add_argument("--remove", action="append", default=[], metavar="KEY", help="take an entry out")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="also draw the norms by block as a picture")
    parser.add_argument(
        "--header",
        action="store_true",
        help="show every header entry and read no tensor: at once for any size, without norms and hash",
    )


def _run_inspect(options: argparse.Namespace) -> Result:
    from .base_inspection import inspect_base, is_base
    from .inspection import inspect_adapter

    source = options.file.as_posix()  # a hub id has its slash on every system
    if is_base(source):
        if options.set or options.remove or options.chart or options.header:
            raise ConfigError(
                f"{options.file}: is a base model; --set, --remove, --chart and --header are for adapters"
            )
        base = inspect_base(source)
        print(base.render())
        return base.to_dict(), 0
    if options.header and options.chart:
        raise ConfigError("--chart draws the norms, which --header does not read; leave one of them out")
    edits: dict[str, Any] = {}
    if options.set or options.remove:
        from .inspection import edit_adapter

        edits = edit_adapter(options.file, options.set, options.remove)
        for key, change in edits.items():
            print(f"{key}: {change['before']} -> {change['after']}")
    from .inspection_view import draw_norms, render

    summary = inspect_adapter(options.file, values=not options.header)
    if options.chart is not None:
        draw_norms(summary, options.chart)
    columns = shutil.get_terminal_size((140, 24)).columns
    print(render(summary, width=columns, colour=sys.stdout.isatty(), plain=not _shows_blocks()))
    more = {"chart": options.chart} if options.chart else {}
    return summary.to_dict() | more | ({"edited": edits} if edits else {}), 0


def _shows_blocks() -> bool:
    """Tell whether the terminal's encoding has block characters."""
    try:
        "\u2588\u258c".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _declare_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="run folder")
    parser.add_argument("--steps", type=int, help="train this many steps instead of the recommended number")
    parser.add_argument("--resume", action="store_true", help="go on with a demo that was stopped")


def _run_demo(options: argparse.Namespace) -> Result:
    if options.resume and options.steps is not None:
        raise ConfigError("--steps cannot change what is resumed; start a new demo in another --output")
    from .demo import demo
    from .display import TrainingDisplay

    with TrainingDisplay() as display:
        result = demo(options.output, steps=options.steps, listeners=[display], resume=options.resume)
    print(result.render())
    return result.to_dict(), 0


def _declare_ui(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="training runs")
    parser.add_argument(
        "--pictures", type=Path, default=Path("pictures"), metavar="DIR", help="where what is drawn goes"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("training-pictures"),
        metavar="DIR",
        help="where dropped pictures go",
    )
    parser.add_argument(
        "--allow",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a further folder the page may read and write; may be repeated",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument(
        "--listen",
        nargs="?",
        const="0.0.0.0",
        metavar="ADDRESS",
        help="let others reach it; needs --password",
    )
    parser.add_argument("--password", help="asked of everyone (or the variable SDLORA_UI_PASSWORD)")
    parser.add_argument("--browser", action="store_true", help="also open the page in the browser")


def _run_ui(options: argparse.Namespace) -> Result:
    try:
        from sdlora_ui.start import start
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the web UI is not installed ({error.name} is missing); run: pip install -e '.[ui]'"
        ) from None
    start(
        runs=options.runs,
        pictures=options.pictures,
        data=options.data,
        allowed=options.allow,
        host=options.listen or "127.0.0.1",
        port=options.port,
        password=options.password or os.environ.get("SDLORA_UI_PASSWORD"),
        browser=options.browser,
    )
    return {"served": True}, 0


COMMANDS: dict[str, Command] = {
    "train": Command("train a LoRA on a folder of pictures", _declare_train, _run_train),
    "generate": Command("draw pictures with adapters at any strength", _declare_generate, _run_generate),
    "export": Command("write an adapter for WebUI, diffusers or PEFT", _declare_export, _run_export),
    "inspect": Command("show what an adapter file or a base model holds", _declare_inspect, _run_inspect),
    "merge": Command("merge adapters into one", declare_merge, run_merge),
    "resize": Command("write an adapter with fewer ranks", declare_resize, run_resize),
    "bake": Command("add adapters to a checkpoint, or take them out", declare_bake, run_bake),
    "extract": Command("make a LoRA of the difference of two checkpoints", declare_extract, run_extract),
    "diff": Command("compare two adapters by block and layer", declare_diff, run_diff),
    "convert": Command("write an adapter in another format or kind", declare_convert, run_convert),
    "check": Command("look for trouble in a folder of pictures", declare_check, run_check),
    "cache": Command("show what the cache of encodings holds, and thin it out", declare_cache, run_cache),
    "demo": Command("learn an ink style on the built-in base and show it", _declare_demo, _run_demo),
    "ui": Command("train, draw and export in the browser", _declare_ui, _run_ui),
}
