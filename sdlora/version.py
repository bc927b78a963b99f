"""The version of the program."""

from __future__ import annotations


def version() -> str:
    """Return the installed version of sdlora; ``0+unknown`` in a checkout that was not installed."""
    from importlib import metadata  # slow to import, and rarely asked for

    try:
        return metadata.version("sdlora")
    except metadata.PackageNotFoundError:
        return "0+unknown"
