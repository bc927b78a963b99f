"""The file formats of adapters: one table for the command line, the page, writing, reading and checking.

Imports no torch, so that every ``--help`` can list them: a format's own module is imported when it is used.
A new format is such a module with a :class:`~sdlora.formats.format_code.FormatCode`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .format_code import FormatCode


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        title: what users call it.
        code: gives what writes, reads and judges it.
        file_name: of an adapter called ``{name}``; None for formats that are only read.
        programs: the programs it is for, to help users choose.
        is_folder: whether an adapter is a folder rather than one file.
        has_card: whether WebUI shows such a file with a preview and a card beside it.
        one_alpha: whether clients take one alpha for all modules of a component.
    """

    title: str
    code: Callable[[], FormatCode]
    file_name: str | None = None
    programs: str = ""
    is_folder: bool = False
    has_card: bool = False
    one_alpha: bool = False


def _webui() -> FormatCode:
    from . import webui

    return webui.CODE


def _diffusers() -> FormatCode:
    from . import diffusers

    return diffusers.CODE


def _peft() -> FormatCode:
    from . import peft

    return peft.CODE


def _comfyui() -> FormatCode:
    from . import only_read

    return only_read.COMFYUI


def _lycoris() -> FormatCode:
    from . import only_read

    return only_read.LYCORIS


FORMATS: dict[str, Format] = {
    "webui": Format(
        "WebUI (kohya)",
        _webui,
        "{name}.safetensors",
        "WebUI, Forge, ComfyUI",
        has_card=True,
        one_alpha=True,
    ),
    "diffusers": Format("diffusers", _diffusers, "{name}-diffusers.safetensors", "diffusers"),
    "peft": Format("PEFT", _peft, "{name}-peft", "PEFT", is_folder=True),
    # every client reads these better in another format, so they are only read
    "comfyui": Format("ComfyUI (generic keys)", _comfyui),
    "lycoris": Format("LyCORIS wrapper (lycoris_ keys)", _lycoris),
}


def written_formats() -> list[str]:
    """Return the names of the formats that can be written."""
    return [name for name, format in FORMATS.items() if format.file_name is not None]


def find_format(name: str) -> Format:
    """Return a format that can be written.

    Raises:
        ConfigError: when there is none of that name.
    """
    if name not in written_formats():
        raise ConfigError(f"--format {name}: is not a format; give one of {', '.join(written_formats())}")
    return FORMATS[name]
