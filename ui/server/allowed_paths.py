"""The folders that the server may read and write, whatever a request says.

Every path that a browser names goes through :meth:`AllowedPaths.readable` or :meth:`AllowedPaths.writable`.
They resolve links and ``..`` first and compare afterwards, so the answer is about the real path.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from sdlora.errors import SdloraError
from sdlora.files import is_text, list_files, refuse_bad_names

STATE = ".sdlora-ui"
_MODEL_FOLDERS = (
    "models/Stable-diffusion",
    "models/checkpoints",
    "models/Lora",
    "models/loras",
)
"""Where A1111's WebUI (and Forge) and ComfyUI keep checkpoints and adapters."""
_USUAL_HOMES = (
    "stable-diffusion-webui",
    "stable-diffusion-webui-forge",
    "stable-diffusion-webui-reForge",
    "sd.webui/webui",
    "webui_forge_cu121_torch231/webui",
    "ComfyUI",
    "Documents/ComfyUI",
    "ComfyUI_windows_portable/ComfyUI",
)


_SYSTEM_FOLDERS = ("/etc", "/proc", "/sys", "/dev", "/boot", "/root", "/run", "/bin", "/sbin", "/lib")
_MOST_NAMES = 2000
_LONG = 200  # characters of a path that an error repeats
_ALIKE = 0.7


class MissingPath(SdloraError):
    """A path inside the folders of the server where nothing is."""


class PathRefused(SdloraError):
    """A path outside the folders that the user named when starting the server."""


@dataclass
class Granted:
    """Folders that were added while the server runs; empty where others can reach it.

    Attributes:
        allowed: to read and write, added by the owner on the page.
        bases: with checkpoints, found or named; to read only.
        adapters: with adapters, likewise.
    """

    allowed: tuple[Path, ...] = ()
    bases: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()


@dataclass(frozen=True)
class AllowedPaths:
    """The folders of one server, all resolved.

    Attributes:
        home: where relative paths start.
        runs: training runs; the queue's state lies in it.
        images: drawn images.
        data: uploaded data sets.
        allowed: further folders to read and write, as given with ``--allow``.
        models: folders with checkpoints and adapters, to read only.
        local: whether only this machine can reach the server: only then is told what exists elsewhere on it,
            and only then can folders be added.
        granted: folders that were added while the server runs.
    """

    home: Path
    runs: Path
    images: Path
    data: Path
    allowed: tuple[Path, ...] = ()
    models: tuple[Path, ...] = ()
    local: bool = False
    granted: Granted = field(default_factory=lambda: Granted(), compare=False)

    @classmethod
    def of(
        cls,
        home: Path,
        *,
        runs: Path,
        images: Path,
        data: Path,
        allowed: Iterable[Path] = (),
        models: Iterable[Path] = (),
        local: bool = False,
    ) -> AllowedPaths:
        """Return the folders as absolute paths with their links followed.

        Raises:
            PathRefused: when an allowed folder does not exist, or another one cannot be a folder.
            OutputError: for names that not every system takes.
        """
        home = home.resolve()
        named = [(home / folder.expanduser()).resolve() for folder in allowed]
        for folder in named:
            if not folder.is_dir():
                raise PathRefused(f"--allow {folder}: no such folder; check the path")
        first, second, third = ((home / place.expanduser()).resolve() for place in (runs, images, data))
        for flag, folder in (("--runs", first), ("--images", second), ("--data", third)):
            refuse_bad_names(folder)
            if folder.exists() and not folder.is_dir():
                raise PathRefused(f"{flag} {folder}: is a file, but a folder is needed; choose another")
        return cls(
            home, first, second, third, tuple(named), tuple(folder.resolve() for folder in models), local
        )

    @property
    def state(self) -> Path:
        """Where the queue and uploads are kept."""
        return self.runs / STATE

    @property
    def roots(self) -> tuple[Path, ...]:
        """Folders that may be written."""
        return (self.runs, self.images, self.data, *self.named)

    @property
    def named(self) -> tuple[Path, ...]:
        """Further folders that may be written: those of ``--allow``, and those added on the page."""
        return (*self.allowed, *self.granted.allowed)

    @property
    def read_only(self) -> tuple[Path, ...]:
        """Folders with models, which may be read: known at the start, or found or named since."""
        return (*self.models, *self.granted.bases, *self.granted.adapters)

    def readable(self, text: str | Path) -> Path:
        """Return the real path of something that may be read.

        Raises:
            PathRefused: when it lies elsewhere.
        """
        return self._inside(text, (*self.roots, *self.read_only), "read")

    def can_be_added(self, text: str) -> bool:
        """Return whether the owner may add a folder on the page: it exists, and only this machine asks."""
        path = self._resolve(text.strip())
        if path is None or not self.local or not path.is_dir():
            return False
        try:
            may_be_added(path, Path.home().resolve())
        except (PathRefused, RuntimeError):
            return False
        return True

    def folder(self, text: str | Path) -> Path:
        """Return the real path of a folder that may be read.

        Raises:
            PathRefused: when it lies elsewhere.
            MissingPath: when there is none; it names the nearest one that there is.
        """
        path = self.readable(text)
        if not path.exists():
            raise MissingPath(self._missing(str(text).strip(), path))
        if not path.is_dir():
            raise MissingPath(f"{str(text).strip()}: is a file; give the folder that it lies in")
        return path

    def model(self, text: str | Path) -> Path:
        """Return the real path of an adapter, a base or a run that may be read, with all that lies in it.

        Raises:
            PathRefused: when it, or what a link in it leads to, lies elsewhere.
        """
        path = self.readable(text)
        seen: set[str] = set()
        for current, folders, names in os.walk(path, followlinks=True):
            for name in (*folders, *names):
                inside = Path(current, name)
                if inside.is_symlink() and inside.exists() and not self.reaches(inside):
                    raise PathRefused(
                        f"{inside}: is a link that leads out of the folders this server was given; start it "
                        "with `sdlora ui --allow FOLDER` to add one"
                    )
            real = os.path.realpath(current)
            folders[:] = [] if real in seen else folders
            seen.add(real)
        return path

    def reaches(self, path: Path) -> bool:
        """Return whether something found inside an allowed folder is there, and not a link that leads out.

        Nor is it of use with a name that is not UTF-8: the page could not ask for it.
        """
        real = self._resolve(str(path)) if is_text(path) else None
        roots = (*self.roots, *self.read_only)
        return real is not None and real.exists() and any(real.is_relative_to(root) for root in roots)

    def writable(self, text: str | Path) -> Path:
        """Return the real path of something that may be written.

        Raises:
            PathRefused: when it lies elsewhere, or among the server's own records.
        """
        path = self._inside(text, self.roots, "written")
        if path == self.state or path.is_relative_to(self.state):
            raise PathRefused(f"{text}: holds the queue's records; choose another folder")
        return path

    def shown(self, path: Path) -> str:
        """Return a path as people would type it: relative to the home folder where it lies in it."""
        return str(path.relative_to(self.home)) if path.is_relative_to(self.home) else str(path)

    def _inside(self, text: str | Path, roots: tuple[Path, ...], verb: str) -> Path:
        named = str(text).strip()
        path = self._resolve(named)
        if path is None or not any(path == root or path.is_relative_to(root) for root in roots):
            if path is not None and self.local and not path.exists():
                raise PathRefused(self._missing(named, path))
            if path is None and len(named) > _LONG:
                raise PathRefused(f"{named[:_LONG]}…: is too long for a path; shorten it")
            shown = ", ".join(dict.fromkeys(self.shown(root) or "." for root in roots))
            raise PathRefused(
                f"{named or 'an empty path'}: may not be {verb}, it is outside the folders this server was "
                f"given ({shown}); start it with `sdlora ui --allow FOLDER` to add one"
            )
        return path

    def _missing(self, named: str, path: Path) -> str:
        """Say that there is no such folder, and which one there is that is spelled nearly so."""
        seen = (*self.roots, *self.read_only)
        parent = next((parent for parent in path.parents if parent.is_dir()), None)
        text = f"{named}: there is no such folder or file"
        if parent is None or not (self.local or any(parent.is_relative_to(root) for root in seen)):
            return text
        close = nearest(path, parent)
        if close != parent:
            return f"{text}; did you mean {self.shown(close)}?"
        return f"{text}; the nearest one that there is: {self.shown(parent) if parent != self.home else '.'}"

    def _resolve(self, text: str) -> Path | None:
        # Windows would log in to a network share that a request names
        if not text or text.startswith(("\\\\", "//")):
            return None
        try:
            path = (self.home / Path(text).expanduser()).resolve()
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                path.lstat()  # refuses what cannot be a name here, such as one that is too long
        except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown ~user, a null byte
            return None
        return path


def nearest(path: Path, parent: Path) -> Path:
    """Return the path below ``parent``, an existing folder, that is spelled most like ``path``."""
    for part in path.relative_to(parent).parts:
        names: list[str] = []
        with suppress(OSError), os.scandir(parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
        match = next((name for name in names if name == part), None)
        lower = {name.lower(): name for name in names}
        close = get_close_matches(part.lower(), lower, n=1, cutoff=_ALIKE)
        if match is None and not close:
            return parent
        parent = parent / (match or lower[close[0]])
    return parent


def usual_model_folders(user_home: Path | None = None) -> list[Path]:
    """Return the folders of a WebUI or ComfyUI in the user's home that hold checkpoints and adapters."""
    try:
        start = user_home or Path.home()
    except RuntimeError:  # no home folder
        return []
    return [
        folder
        for home in _USUAL_HOMES
        for inside in _MODEL_FOLDERS
        if (folder := start / home / inside).is_dir()
    ]


def model_files(paths: AllowedPaths, kind: str) -> list[Path]:
    """Return the ``.safetensors`` files in WebUI's and ComfyUI's usual folders below the named ones.

    Args:
        paths: the server's folders.
        kind: ``base`` or ``adapter``.
    """
    wanted = _MODEL_FOLDERS[:2] if kind == "base" else _MODEL_FOLDERS[2:]
    endings = {Path(inside).name for inside in wanted}
    folders = [folder for folder in paths.models if folder.name in endings]
    folders += paths.granted.bases if kind == "base" else paths.granted.adapters
    folders += [folder for folder in paths.named if folder.name in endings]
    folders += [root / inside for root in paths.named for inside in wanted if (root / inside).is_dir()]
    files = [file for folder in dict.fromkeys(folders) for file in list_files(folder, ".safetensors")]
    return [file for file in dict.fromkeys(files) if file.is_file() and paths.reaches(file)]


def may_be_added(folder: Path, user_home: Path) -> None:
    """Check that a folder may be added on the page: one of images or models, not half of the machine.

    Args:
        folder: resolved.
        user_home: the owner's home folder, resolved.

    Raises:
        PathRefused: for a drive, the home folder or one above it, hidden folders and those of the system.
    """
    system = [Path(name) for name in _SYSTEM_FOLDERS] + [Path(os.environ.get("SYSTEMROOT", "/etc"))]
    hidden = any(part.startswith(".") for part in folder.parts)
    if user_home.is_relative_to(folder) or folder == Path(folder.anchor) or hidden:
        raise PathRefused(f"{folder}: holds more than images or models; name a folder inside it")
    system = [place for place in system if not user_home.is_relative_to(place)]
    if any(folder.is_relative_to(place) for place in system):
        raise PathRefused(f"{folder}: belongs to the system; copy what you need into a folder of yours")


def program_folders(paths: AllowedPaths) -> tuple[list[Path], list[Path]]:
    """Return the WebUI and ComfyUI folders that may be written, and those that were found but not named."""
    named = [root for root in paths.named if any((root / inside).is_dir() for inside in _MODEL_FOLDERS[2:])]
    named += [root for root in paths.named if root.name.lower() in ("lora", "loras")]
    programs = dict.fromkeys(folder.parent.parent for folder in (*paths.models, *paths.granted.adapters))
    others = [folder for folder in programs if not any(folder.is_relative_to(root) for root in paths.named)]
    return list(dict.fromkeys(named)), others
