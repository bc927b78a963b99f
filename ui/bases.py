"""The bases that can be chosen on the page: found in the background, recognised by a worker, newest first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sdlora.errors import OutputError, SdloraError
from sdlora.files import parse_json, size_text, write_json

from .model_places import find_places, hub_models, usual_roots
from .owner import Owner
from .server.allowed_paths import AllowedPaths, model_files
from .worker_client import WorkerClient

MOST_FILES = 500
"""Files that are looked at."""


@dataclass(frozen=True)
class Base:
    """A base that was found.

    Attributes:
        source: a path, or an ``owner/name`` that the hub's cache holds.
        name: for people.
        family: title of its family; empty until it is known.
        bytes: its size; 0 for a folder.
        changed: when its file was written, in seconds since 1970.
    """

    source: str
    name: str
    family: str
    bytes: int
    changed: float

    @property
    def label(self) -> str:
        """Return what a list shows: name, family, size and date."""
        date = time.strftime("%d %b %Y", time.localtime(self.changed))
        facts = [self.family or "not looked at yet", size_text(self.bytes) if self.bytes else "", date]
        return f"{self.name} ({', '.join(fact for fact in facts if fact)})"


class Bases:
    """What was found so far. Its methods may be called from any thread."""

    def __init__(self, paths: AllowedPaths, owner: Owner, worker: WorkerClient) -> None:
        """Look at nothing yet.

        Args:
            paths: of the server; where others can reach it, only folders it was given are looked into.
            owner: names further folders.
            worker: recognises files.
        """
        self._paths, self._owner, self.worker = paths, owner, worker
        self._record = paths.state / "bases.json"
        self._families: dict[str, str | None] = _kept(self._record)
        self._hub: list[tuple[str, Path]] = []
        self._looking = threading.Lock()
        self.searched = threading.Event()

    def begin(self) -> None:
        """Search in the background."""
        threading.Thread(target=self.search, name="search for bases", daemon=True).start()

    def search(self) -> None:
        """Look where models are kept, and find out what they are."""
        with self._looking, suppress(OSError, RuntimeError):
            if self._paths.local:
                places = find_places(usual_roots(Path.home(), local_drives()))
                granted = self._paths.granted
                bases = (folder.resolve() for place in places for folder in place.bases)
                adapters = (folder.resolve() for place in places for folder in place.adapters)
                granted.bases = tuple(dict.fromkeys([*granted.bases, *bases]))
                granted.adapters = tuple(dict.fromkeys([*granted.adapters, *adapters]))
                self._hub = list(hub_models(hub_cache()))
            self._recognise()
        self.searched.set()

    def listed(self) -> list[Base]:
        """Return what is or may be a base, the newest first."""
        bases = [self._base(str(file), file.stem, file) for file in self._files()]
        bases += [self._base(name, name, folder) for name, folder in self._hub]
        return sorted((base for base in bases if base is not None), key=lambda base: -base.changed)

    def newest(self) -> str:
        """Return the newest base that is known to be one; empty if there is none."""
        return next((base.source for base in self.listed() if base.family), "")

    def _files(self) -> list[Path]:
        files = model_files(self._paths, "base")
        return sorted(files, key=lambda file: -file.stat().st_mtime if file.exists() else 0)[:MOST_FILES]

    def _base(self, source: str, name: str, path: Path) -> Base | None:
        with suppress(OSError):
            state = path.stat()
            family = self._families.get(_key(path), "")
            size = state.st_size if path.is_file() else 0
            return None if family is None else Base(source, name, family, size, state.st_mtime)
        return None

    def _recognise(self) -> None:
        paths = [*self._files(), *(folder for _, folder in self._hub)]
        new = {str(path): _key(path) for path in paths if _key(path) not in self._families}
        if not new:
            return
        with suppress(SdloraError):
            for answer in self.worker.call("bases", {"paths": list(new)}):
                if answer.part is not None:
                    self._families |= {
                        new[path]: family for path, family in answer.part.items() if path in new
                    }
        with suppress(OSError, OutputError):
            write_json(self._record, self._families)


def hub_cache() -> Path:
    """Return where the hub's library keeps what it fetched."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or usual).expanduser() / "hub"


def drives_of(partitions: Iterable[Any]) -> list[Path]:
    """Return the drives to be searched: local disks but the system's own, whose home folder is searched.

    Args:
        partitions: with ``mountpoint``, ``fstype`` and ``opts``, as psutil gives them.
    """
    left_out = ("squashfs", "overlay", "tmpfs", "nfs", "nfs4", "cifs", "smbfs", "fuse.sshfs")
    mounted = [
        p for p in partitions if p.fstype not in left_out and "remote" not in p.opts and "cdrom" not in p.opts
    ]
    system = ("/", "/home", "/boot", "/boot/efi", "/var", "/usr")
    return [Path(p.mountpoint) for p in mounted if p.mountpoint not in system]


def local_drives() -> list[Path]:
    """Return the drives of this machine that are searched."""
    with suppress(OSError, psutil.Error):
        return drives_of(psutil.disk_partitions(all=False))
    return []


def _key(path: Path) -> str:
    """Return a word for a file as it is now."""
    with suppress(OSError):
        state = path.stat()
        return f"{path}|{state.st_mtime_ns}|{state.st_size}"
    return str(path)


def _kept(file: Path) -> dict[str, str | None]:
    with suppress(OSError, ValueError):
        known: Mapping[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return {
                str(key): value for key, value in known.items() if value is None or isinstance(value, str)
            }
    return {}
