"""The commands that run the model: train, generate, the demo, the web UI."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ConfigError
from ..files import find_settings
from ..run_folder import RunFolder
from .arguments import folder_argument, numbers, path_argument
from .flags import base_of, declare_base, declare_setting, settings_of
from .next_steps import after_training
from .settings import show_presets

if TYPE_CHECKING:
    from ..events import Listener

Result = tuple[dict[str, Any], int]


def declare_train(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora train``."""
    parser.add_argument(
        "folder", nargs="?", type=folder_argument, help="folder of images, captions beside them"
    )
    declare_setting(parser, "model.base")
    declare_setting(parser, "output.name")
    declare_setting(parser, "output.folder", "--output", metavar="DIR")
    parser.add_argument("--config", type=path_argument, metavar="FILE", help="settings as TOML")
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME",
        help="settings that suit a purpose, over those of --config and below all others on this line; `list` "
        "shows which there are; may be repeated, the last one wins",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument(
        "--continue-for",
        type=int,
        metavar="N",
        help="with --output DIR: N steps more than that run has made",
    )
    declare_setting(parser, "data.trigger_word", "--trigger", metavar="WORD")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="train on N cards")
    parser.add_argument(
        "--events",
        type=path_argument,
        metavar="FILE",
        help="also write events as JSON lines (- for stdout)",
    )
    parser.set_defaults(overrides=[])
    parser.usage = "sdlora train FOLDER [options] [section.name=value ...]"


def settings_help() -> str:
    """Return every setting with its default and meaning, for the end of ``sdlora train --help``."""
    from ..config.schema import fields

    lines = ["settings (section.name=value, or in the TOML file):"]
    for key, field in fields():
        default = "left open" if field.default is None else f"{field.default}"
        lines.append(f"  {key} [{default}]\n      {' '.join((field.description or '').split())}")
    return "\n".join(lines)


def run_train(options: argparse.Namespace) -> Result:
    """Run ``sdlora train``."""
    if options.processes != 1 and not _is_launched():
        return _run_in_processes(options)
    from ..config.presets import preset_values
    from ..config.toml import load_config

    if "list" in options.preset:
        return show_presets()
    file, given = options.config, settings_of(options)
    more: int | None = options.continue_for
    if more is not None and more < 1:
        raise ConfigError(f"--continue-for {more}: must be 1 or more")
    if options.preset and (options.resume or more is not None):
        raise ConfigError("--preset: a run that goes on keeps its settings; leave --preset out")
    if file is None and (options.resume or more is not None):
        if given["output.folder"] is None:
            flag = "--resume" if more is None else "--continue-for"
            raise ConfigError(f"{flag} needs --output DIR, the run folder to continue")
        file = find_settings(given["output.folder"])
    folder = options.folder and Path(options.folder)
    presets = preset_values(options.preset)
    config = load_config(file, options.overrides, {**given, "data.folder": folder}, presets=presets)
    from ..events import Control
    from ..training.state import run_folder
    from ..training.train import train
    from .display import TrainingDisplay

    control = Control(run_folder(config).path)
    with ExitStack() as stack:
        listeners: list[Listener] = [stack.enter_context(TrainingDisplay())] if _is_main_process() else []
        if options.events and _is_main_process():
            listeners.append(_event_listener(options.events))
        stack.enter_context(control.on_interrupt())
        result = train(config, resume=options.resume, continue_for=more, listeners=listeners, control=control)
    if not _is_main_process():
        options.json = False
    elif result.stopped:
        print(
            f"stopped after step {result.step} and saved; continue with:\n"
            f"  sdlora train --resume --output {result.folder}"
        )
    else:
        print(f"adapter: {result.adapter_file}")
        if (grid := RunFolder(result.folder).grid).is_file():
            print(f"previews: {grid}")
        if (report := RunFolder(result.folder).report).is_file():
            print(f"report: {report}")
        if result.adapter_file is not None:
            print("\n".join(after_training(result.folder, result.adapter_file)))
    return {
        "adapter_file": result.adapter_file,
        "run": result.folder,
        "step": result.step,
        "stopped": result.stopped,
        "report": report if (report := RunFolder(result.folder).report).is_file() else None,
        "loss": result.loss,
        "validation_loss": result.validation_loss,
        "seconds": round(result.seconds, 2),
        "data_wait_share": round(result.data_wait_share, 4),
    }, 0


def _run_in_processes(options: argparse.Namespace) -> Result:
    """Start this command line in several processes; only the first of them prints."""
    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: must be 1 or more")
    from ..training.launch import train_in_processes

    code = train_in_processes([*options.words, *(["--json"] if options.json else [])], options.processes)
    options.json = False
    return {}, code


def _is_launched() -> bool:
    """Tell whether a launcher started this process."""
    return "LOCAL_RANK" in os.environ


def _event_listener(place: Path) -> Listener:
    from ..events import Journal, JsonlWriter

    if str(place) == "-":
        return JsonlWriter(sys.stdout)
    try:
        place.open("ab").close()
        return Journal(place)
    except OSError as error:
        raise ConfigError(
            f"--events {place}: cannot be written ({error.strerror}); give another file"
        ) from None


def _is_main_process() -> bool:
    """Tell whether this is the one of a launcher's processes that prints."""
    return os.environ.get("RANK", "0") == "0"


def declare_generate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora generate``."""
    from ..config.schema import SamplerName

    declare_base(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[:TEXT]]",
        help="adapter and its strength (a second number is the text encoder's); may be repeated",
    )
    parser.add_argument(
        "--adapter-folder",
        type=path_argument,
        action="append",
        default=[],
        metavar="DIR",
        help="where <lora:NAME:0.8> in prompts is looked for: a run, a folder of runs, a WebUI's folder or "
        "any other; may be repeated (runs/ is looked at, too)",
    )
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be repeated")
    parser.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="a file of prompts, one a line, with kohya's options: a cat --n blurry --w 512 --d 1 --s 30",
    )
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what to avoid")
    parser.add_argument(
        "--output", type=path_argument, required=True, metavar="DIR", help="where the PNGs go"
    )
    parser.add_argument("--seed", type=int, help="fixes the noise; 1 when left out")
    parser.add_argument("--count", type=int, default=1, help="images per prompt, from consecutive seeds")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="in px; the base's own size when left out")
    parser.add_argument("--steps", type=int, help="denoising steps; 20 when left out")
    parser.add_argument("--guidance", type=float, help="guidance scale; the base's own when left out")
    samplers = f"DPM++ 2M Karras when left out; there are {', '.join(get_args(SamplerName))}"
    parser.add_argument("--sampler", metavar="NAME", help=samplers)
    parser.add_argument("--strengths", metavar="A,B,...", help="render a sweep grid, e.g. 0,0.25,0.5,0.75,1")
    parser.add_argument(
        "--grid",
        nargs="+",
        default=[],
        metavar="AXIS=A,B",
        help="a labelled grid over one or two of strength, seed, checkpoint (steps, or all), steps, "
        "guidance, sampler: --grid strength=0,0.5,1 seed=1,2; what --output holds already is not drawn again",
    )
    parser.add_argument("--merge", action="store_true", help="fold the adapters into the weights first")
    for key in ("training.device", "training.precision", "training.attention"):
        declare_setting(parser, key)
    parser.add_argument("--offload", action="store_true", help="one component on the card at a time")


def run_generate(options: argparse.Namespace) -> Result:
    """Run ``sdlora generate``."""
    strengths = numbers(options.strengths, "--strengths") if options.strengths else None
    width, height = _size(options.size) if options.size else (None, None)
    for name, least in (("count", 1), ("steps", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: must be {least} or more")
    from ..adapters.strength import parse_adapter
    from ..config.prompt_lines import read_line, read_prompt_file
    from ..generation.generate import generate
    from .display import progress_bar

    adapters = [parse_adapter(text) for text in options.adapter]
    from_file = [read_line(line) for line in read_prompt_file(options.prompts)] if options.prompts else []
    prompts = [*options.prompt, *from_file]
    given = settings_of(options)
    with progress_bar("drawing") as progress:
        result = generate(
            base_of(options),
            adapters,
            prompts,
            negative_prompt=options.negative,
            seed=options.seed,
            height=height,
            width=width,
            steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            strengths=strengths,
            axes=options.grid,
            merge=options.merge,
            count=options.count,
            output=options.output,
            adapter_folders=options.adapter_folder,
            device=given["training.device"],
            precision=given["training.precision"],
            attention=given["training.attention"] or "auto",
            offload=options.offload,
            progress=progress,
        )
    for file in [*result.files, *([result.grid] if result.grid else [])]:
        print(file)
    return {"files": list(result.files), "grid": result.grid, "seconds": round(result.seconds, 2)}, 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise ConfigError(f"--size {text}: give WIDTHxHEIGHT in px, e.g. 512x768") from None


def declare_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora demo``."""
    parser.add_argument(
        "--output", type=path_argument, default=Path("demo"), metavar="DIR", help="run folder"
    )
    parser.add_argument("--steps", type=int, help="train this many steps instead of the recommended number")
    parser.add_argument("--resume", action="store_true", help="continue a demo that was stopped")


def run_demo(options: argparse.Namespace) -> Result:
    """Run ``sdlora demo``."""
    if options.resume and options.steps is not None:
        raise ConfigError("--steps cannot change what is resumed; start a new demo in another --output")
    from ..demonstration.demo import demo
    from .display import TrainingDisplay

    with TrainingDisplay() as display:
        result = demo(options.output, steps=options.steps, listeners=[display], resume=options.resume)
    print(result.render())
    return result.to_dict(), 0


def declare_ui(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora ui``."""
    parser.add_argument(
        "--runs", type=path_argument, default=Path("runs"), metavar="DIR", help="training runs"
    )
    parser.add_argument(
        "--images", type=path_argument, metavar="DIR", help="where drawn images go (default: images)"
    )
    # the option's earlier name
    parser.add_argument(
        "--pictures", dest="images", type=path_argument, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--data",
        type=path_argument,
        metavar="DIR",
        help="where dropped images go (default: training-images)",
    )
    parser.add_argument(
        "--allow",
        type=path_argument,
        action="append",
        default=[],
        metavar="DIR",
        help="another folder the page may read and write; may be repeated",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument(
        "--listen",
        nargs="?",
        const="0.0.0.0",
        metavar="ADDRESS",
        help="let other machines reach it; they need --password, or a generated one that is printed",
    )
    parser.add_argument(
        "--password", help="everyone needs it; 8 characters or more (or the variable SDLORA_UI_PASSWORD)"
    )
    parser.add_argument(
        "--browser",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="open the page in the browser; when left out, on a desktop where only this machine reaches it",
    )


def run_ui(options: argparse.Namespace) -> Result:
    """Run ``sdlora ui``."""
    try:
        from sdlora_ui.start import start
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the web UI is not installed ({error.name} is missing); run: pip install "sdlora[ui]"'
        ) from None
    start(
        runs=options.runs,
        images=options.images or _usual_folder("images", "pictures"),
        data=options.data or _usual_folder("training-images", "training-pictures"),
        allowed=options.allow,
        host=options.listen or "127.0.0.1",
        port=options.port,
        password=options.password or os.environ.get("SDLORA_UI_PASSWORD"),
        browser=options.browser,
    )
    return {"served": True}, 0


def _usual_folder(name: str, earlier: str) -> Path:
    """Return a default folder, under its earlier name where only that one exists."""
    return Path(earlier) if Path(earlier).is_dir() and not Path(name).exists() else Path(name)
