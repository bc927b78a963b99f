"""The arguments of commands: paths and base models; empty ones are refused, ``~`` is expanded."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigError
from ..files import given_path

FAMILY_HELP = "family the adapter is for (e.g. sd1), if its file does not say"


def path_argument(text: str) -> Path:
    """Return the path that an argument names.

    Raises:
        argparse.ArgumentTypeError: when it names none.
    """
    try:
        return given_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder_argument(text: str) -> str:
    """Return the folder argument of a command with settings, ``~`` expanded; a setting stays as it is.

    Raises:
        argparse.ArgumentTypeError: when it names none.
    """
    return text if "=" in text else source_argument(text)


def source_argument(text: str) -> str:
    """Return a base model's name: a path with ``~`` expanded; a hub id stays as it is.

    Raises:
        argparse.ArgumentTypeError: when it names nothing.
    """
    path = path_argument(text)
    return str(path) if text.startswith("~") else text


def command_line(*words: object) -> str:
    """Return a command as it is typed here: the words with the quotes that this system's shell needs."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for a word that is not among those known, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {matches[0]}?" if matches else ""


def numbers(text: str, flag: str) -> list[float]:
    """Return the numbers that a text lists with commas between them.

    Raises:
        ConfigError: when it is no such list.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: give numbers with commas between them, e.g. 0,0.5,1") from None
