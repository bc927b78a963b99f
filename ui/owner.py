"""What the owner of this machine set on the page, for every later server: folders, a mirror, words to avoid.

Kept in the user's own folder for settings. A server that others can reach neither reads nor writes it.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from platformdirs import user_config_path

from sdlora.errors import ConfigError
from sdlora.files import parse_json, write_json

from .server.allowed_paths import AllowedPaths, PathRefused, may_be_added

_LONG = 200  # characters of a path that an error repeats
MOST = 50
"""Folders of a kind that are remembered; the oldest go."""
MOST_NEGATIVES, LONGEST_NAME, LONGEST_NEGATIVE = 100, 60, 4000
"""Negative prompts that are kept, and the letters of a name and of a prompt."""


class Owner:
    """What was set on this machine; nothing at all where ``paths`` are those of an open server."""

    def __init__(self, paths: AllowedPaths, file: Path | None = None) -> None:
        """Read what was remembered, and grant it.

        Args:
            paths: of the server.
            file: where it is kept; below the user's settings when None.
        """
        self._paths, self._lock = paths, threading.Lock()
        self._file = file or user_config_path("sdlora") / "page.json"
        self._values: dict[str, Any] = {}
        if paths.local:
            with suppress(OSError, ValueError):
                values = parse_json(self._file.read_text(encoding="utf-8"))
                self._values = values if isinstance(values, dict) else {}
            for kind in ("allowed", "models"):
                for folder in self._folders(kind):
                    with suppress(PathRefused):  # a drive that is not there now is there another time
                        self._grant(kind, folder)

    @property
    def model_folders(self) -> list[Path]:
        """The folders of models that were named, also those that are not there now."""
        return self._folders("models")

    @property
    def endpoint(self) -> str:
        """The address of a mirror of the hub; empty for the hub itself."""
        address = self._values.get("endpoint")
        return address if isinstance(address, str) else ""

    def allow(self, text: str) -> Path:
        """Add a folder that may be read and written, and remember it."""
        return self._add("allowed", text)

    def add_models(self, text: str) -> Path:
        """Add a folder of models that may be read, and remember it."""
        return self._add("models", text)

    def set_endpoint(self, address: str) -> str:
        """Remember a mirror of the hub, or with an empty text the hub itself; return it.

        Raises:
            ConfigError: for what is no address.
            PathRefused: where others can reach the server.
        """
        self._refuse_strangers("the mirror")
        address = address.strip().rstrip("/")
        try:
            parts = urlsplit(address)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
        except ValueError:  # half an IPv6 address
            sound = False
        if address and not sound:
            raise ConfigError(f"mirror `{address}`: give an address such as https://hf-mirror.com")
        self._keep("endpoint", address)
        return address

    @property
    def negatives(self) -> dict[str, str]:
        """The negative prompts that were kept, by name."""
        kept = self._values.get("negatives")
        listed = kept.items() if isinstance(kept, dict) else ()
        known = [(name, text) for name, text in listed if isinstance(text, str) and _is_short(name, text)]
        return dict(known[:MOST_NEGATIVES])

    def keep_negative(self, name: str, text: str) -> str:
        """Remember a negative prompt, also in place of one with the same name; return the name.

        Raises:
            ConfigError: without a name or a prompt, or with too long ones, or too many of them.
            PathRefused: where others can reach the server.
        """
        self._refuse_strangers("a negative prompt")
        name, text = " ".join(name.split()), text.strip()
        if not name or not text:
            raise ConfigError("negative prompt: write one and a name for it, then keep it")
        if not _is_short(name, text):
            raise ConfigError(
                f"negative prompt: at most {LONGEST_NEGATIVE} letters, and {LONGEST_NAME} in its name"
            )
        kept = self.negatives | {name: text}
        if len(kept) > MOST_NEGATIVES:
            raise ConfigError(f"negative prompt: at most {MOST_NEGATIVES} are kept; remove one first")
        self._keep("negatives", kept)
        return name

    def remove_negative(self, name: str) -> None:
        """Forget a negative prompt.

        Raises:
            ConfigError: when none of yours has this name.
            PathRefused: where others can reach the server.
        """
        self._refuse_strangers("a negative prompt")
        name, kept = " ".join(name.split()), self.negatives
        if name not in kept:
            shown = f"`{name[:LONGEST_NAME]}`" if name else "no name"
            raise ConfigError(f"negative prompt: {shown} is none of yours; choose one from the list first")
        self._keep("negatives", {known: text for known, text in kept.items() if known != name})

    def _add(self, kind: str, text: str) -> Path:
        """Add a folder.

        Raises:
            PathRefused: where others can reach the server, and for a folder that may not be added.
        """
        self._refuse_strangers("a folder")
        named = text.strip()
        if not named or named.startswith(("\\\\", "//")):
            raise PathRefused(f"{named or 'an empty path'}: give the path of a folder on this machine")
        try:
            folder = (self._paths.home / Path(named).expanduser()).resolve()
        except (OSError, RuntimeError, ValueError):
            raise PathRefused(f"{named}: is no path") from None
        self._grant(kind, folder)
        kept = [str(other) for other in self._folders(kind) if other != folder]
        self._keep(kind, [*kept, str(folder)][-MOST:])
        return folder

    def _grant(self, kind: str, folder: Path) -> None:
        if not os.path.isdir(folder):  # unlike Path's, it says no to a name that is too long
            raise PathRefused(f"{str(folder)[:_LONG]}: there is no such folder")
        may_be_added(folder, Path.home().resolve())
        granted = self._paths.granted
        if kind == "allowed":
            granted.allowed = tuple(dict.fromkeys([*granted.allowed, folder]))
        else:
            granted.bases = tuple(dict.fromkeys([*granted.bases, folder]))

    def _refuse_strangers(self, what: str) -> None:
        if not self._paths.local:
            raise PathRefused(f"{what} is set on the machine itself only: others can reach this server")

    def _folders(self, kind: str) -> list[Path]:
        kept = self._values.get(kind)
        return [Path(text) for text in kept if isinstance(text, str)] if isinstance(kept, list) else []

    def _keep(self, key: str, value: Any) -> None:
        with self._lock:
            self._values[key] = value
            write_json(self._file, self._values)


def _is_short(name: str, text: str) -> bool:
    return 0 < len(name) <= LONGEST_NAME and len(text) <= LONGEST_NEGATIVE
