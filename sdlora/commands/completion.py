"""Completion of command lines in shells: commands, options, presets and settings, through argcomplete.

The shell runs ``sdlora`` with the line typed so far in its environment; :func:`complete` then answers instead
of the command. ``sdlora completion SHELL`` prints what a shell has to be told for that.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError

Result = tuple[dict[str, Any], int]

SHELLS = {
    "bash": 'eval "$(sdlora completion bash)"',
    "zsh": 'eval "$(sdlora completion zsh)"',
    "fish": "sdlora completion fish | source",
    "powershell": "sdlora completion powershell | Out-String | Invoke-Expression",
}
"""Shell -> the line that belongs into its start file."""
_VARIABLE = "_ARGCOMPLETE"  # set by the shell's function


def declare_completion(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora completion``."""
    parser.add_argument("shell", choices=list(SHELLS), help="the shell that is to complete command lines")
    lines = "\n".join(f"  {shell:<11} {line}" for shell, line in SHELLS.items())
    parser.epilog = f"put one line into the shell's start file (~/.bashrc, ~/.zshrc, $PROFILE, ...):\n{lines}"


def run_completion(options: argparse.Namespace) -> Result:
    """Run ``sdlora completion``: print the shell's code."""
    if importlib.util.find_spec("argcomplete") is None:
        raise ConfigError('argcomplete is not installed; run: pip install "sdlora[completion]"')
    import argcomplete

    code = argcomplete.shellcode(["sdlora"], shell=options.shell)
    print(code)
    return {"shell": options.shell, "code": code}, 0


def is_asked() -> bool:
    """Return whether a shell asks for completions instead of running a command."""
    return _VARIABLE in os.environ and importlib.util.find_spec("argcomplete") is not None


def line_words() -> list[str]:
    """Return the whole words of the line that a shell asks about, without the program's name."""
    before = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0") or 0)]
    return before.split()[1:]


def complete(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Answer the shell and end the process, as argcomplete does.

    Args:
        parser: of the whole line.
        commands: command -> its parser, of which that on the line has its arguments.
    """
    import argcomplete

    for name, subparser in commands.items():
        if subparser.get_default("overrides") is not None:
            _offer(subparser.add_argument("settings", nargs="*", help=argparse.SUPPRESS), setting_words)
        for action in subparser._actions:
            if "--preset" in action.option_strings or (name, action.dest) == ("presets", "name"):
                _offer(action, preset_names)
    argcomplete.autocomplete(parser, always_complete_options="long")


def setting_words(prefix: str, **_: Any) -> list[str]:
    """Return the settings that begin so, as ``section.name=``; with their words where they have some."""
    from ..config.schema import choices_of, fields

    words = []
    for key, field in fields():
        if prefix.startswith(f"{key}="):
            switch = field.annotation is bool
            words += [f"{key}={word}" for word in (("true", "false") if switch else choices_of(field))]
        elif f"{key}=".startswith(prefix):
            words.append(f"{key}=")
    return [word for word in words if word.startswith(prefix)]


def preset_names(**_: Any) -> list[str]:
    """Return the names that ``--preset`` takes."""
    from ..config.presets import presets

    return ["list", *(preset.name for preset in presets())]


def _offer(action: argparse.Action, completer: Callable[..., list[str]]) -> None:
    setattr(action, "completer", completer)  # noqa: B010 - argcomplete's way; argparse declares no such name
