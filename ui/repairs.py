"""`sdlora check --fix` on the page: first what it would do, then the repaired copy, in the data folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from sdlora.data.check.repair import Change, preview, repair
from sdlora.errors import ConfigError, SdloraError
from sdlora.files import as_file_name

from .server.allowed_paths import AllowedPaths

MOST_SHOWN = 500


class Repairs:
    """The repair under way, or the last of each folder. Its methods may be called from any thread."""

    def __init__(self, paths: AllowedPaths) -> None:
        """Start nothing yet."""
        self._paths = paths
        self._lock = threading.Lock()
        self._states: dict[Path, dict[str, Any]] = {}

    def start(self, folder: Path, *, write: bool) -> None:
        """Begin to look what is to be repaired in a folder, or to write the repaired copy.

        Raises:
            ConfigError: when that is under way already.
        """
        with self._lock:
            if self._states.get(folder, {}).get("status") == "running":
                raise ConfigError("this folder is being looked at already; wait for it")
            self._states[folder] = {"status": "running", "write": write, "done": 0, "total": 0}
        threading.Thread(target=self._work, args=(folder, write), name="repair", daemon=True).start()

    def state(self, folder: Path) -> dict[str, Any]:
        """Return how far it is, or what it found and wrote, as JSON values."""
        with self._lock:
            return dict(self._states.get(folder, {"status": "none"}))

    def _work(self, folder: Path, write: bool) -> None:
        end: dict[str, Any]

        def tell(done: int, total: int) -> None:
            with self._lock:
                self._states[folder] |= {"done": done, "total": total}

        try:
            if write:
                output = self._free(folder)
                changes = repair(folder, output, progress=tell)
                end = {"status": "finished", "folder": str(output), "shown": self._paths.shown(output)}
            else:
                changes, end = preview(folder, progress=tell), {"status": "finished"}
            end |= {"write": write, "changes": _listed(changes), "count": len(changes)}
        except (SdloraError, OSError) as error:
            end = {"status": "failed", "error": str(error)}
        with self._lock:
            self._states[folder] = end

    def _free(self, folder: Path) -> Path:
        """Return a folder of the data folder that is not there yet."""
        name = as_file_name(f"{folder.name}-repaired", "repaired")
        output, number = self._paths.data / name, 1
        while output.exists():
            number += 1
            output = self._paths.data / f"{name}-{number}"
        return output


def _listed(changes: list[Change]) -> list[dict[str, Any]]:
    return [
        {"name": change.name, "what": change.what, "written": change.written}
        for change in changes[:MOST_SHOWN]
    ]
