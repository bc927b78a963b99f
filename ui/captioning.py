"""Captioning as a job of the page: one folder at a time, in a process of its own, seen by every tab.

What is written can be undone. Work that was stopped, or whose server ended, continues when started again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError, SdloraError

from .server.allowed_paths import AllowedPaths
from .settings import checked_source
from .worker_client import CallCancelled, WorkerClient

FIELDS = (
    "model",
    "prompt",
    "prefix",
    "trigger",
    "max_tokens",
    "threshold",
    "blacklist",
    "batch_size",
    "device",
)


class Captioning:
    """The captioning under way, or the last of each folder. Its methods may be called from any thread.

    Attributes:
        worker: the process that it is done in.
    """

    def __init__(self, paths: AllowedPaths, worker: WorkerClient) -> None:
        """Start nothing yet."""
        self.worker = worker
        self._paths = paths
        self._lock = threading.Lock()
        self._states: dict[Path, dict[str, Any]] = {}
        self._busy: Path | None = None

    def start(self, folder: Path, values: Mapping[str, Any], *, preview: bool) -> None:
        """Begin to caption a folder, or to show what eight images would get.

        Args:
            folder: that may be written.
            values: the fields of the page, see :func:`sdlora_ui.tasks.caption.settings_of`.
            preview: write nothing.

        Raises:
            ConfigError: when a folder is being captioned, or no model is named.
            PathRefused: for a model outside the named folders.
        """
        settings: dict[str, Any] = {name: str(values.get(name) or "") for name in FIELDS}
        settings["model"] = checked_source(self._paths, "model", settings["model"])
        settings["overwrite"] = values.get("overwrite") is True
        with self._lock:
            if self._busy is not None:
                raise ConfigError(
                    f"{self._paths.shown(self._busy)}: is being captioned; wait, or stop it first"
                )
            self._busy = folder
            self._states[folder] = {"status": "running", "preview_only": preview, "note": "starting"}
        arguments = {"folder": str(folder), "settings": settings, "preview": preview}
        threading.Thread(target=self._work, args=(folder, arguments), name="captioning", daemon=True).start()

    def stop(self, folder: Path) -> None:
        """End the captioning of a folder after the image it is at."""
        with self._lock:
            if self._busy == folder:
                self._states[folder] |= {"status": "stopping"}
        self.worker.cancel("caption")

    def holds(self, folders: Iterable[Path]) -> str:
        """Return why a run on these folders has to wait: captions are being written in one; else nothing."""
        with self._lock:
            busy = self._busy
            if busy is None or self._states[busy].get("preview_only"):
                return ""
        if not any(folder.is_relative_to(busy) or busy.is_relative_to(folder) for folder in folders):
            return ""
        return (
            f"{self._paths.shown(busy)}: its captions are being written; start when that is done, or stop it"
        )

    def state(self, folder: Path) -> dict[str, Any]:
        """Return how far a folder's captioning is, or how its last one ended, as JSON values."""
        with self._lock:
            return dict(self._states.get(folder, {"status": "none"}))

    def _work(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        first, began = 0, time.monotonic()
        end: dict[str, Any] = {
            "status": "failed",
            "error": "the worker process ended; look at the server's log",
        }
        try:
            for answer in self.worker.call("caption", arguments, replace="caption"):
                if answer.progress is not None:
                    done, total, note = answer.progress
                    if done <= 1:  # before the first image is done, the model is being loaded
                        first, began = done, time.monotonic()
                    self._tell(folder, done, total, note, (time.monotonic() - began) / max(1, done - first))
                if answer.result is not None:
                    end = {"status": "finished", **answer.result}
        except CallCancelled:
            end = {"status": "stopped"}
        except (SdloraError, OSError) as error:
            end = {"status": "failed", "error": str(error)}
        with self._lock:
            preview_only = self._states[folder].get("preview_only")
            self._states[folder] = end | {"preview_only": preview_only}
            self._busy = None

    def _tell(self, folder: Path, done: int, total: int, note: str, each: float) -> None:
        with self._lock:
            self._states[folder] |= {
                "done": done,
                "total": total,
                "note": note,
                "images_per_second": 1 / each if done > 1 and each else None,
                "seconds_left": each * (total - done) if done > 1 and each else None,
            }
