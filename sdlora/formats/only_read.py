"""Formats that are only read: every client reads adapters better in another format."""

from __future__ import annotations

from . import clients, single_file
from .format_code import FormatCode, grouped, spelled

COMFYUI = FormatCode(None, spelled("comfyui"), grouped, single_file.read_modules, clients.comfyui_reasons)
LYCORIS = FormatCode(None, spelled("lycoris"), grouped, single_file.read_modules, clients.lycoris_reasons)
