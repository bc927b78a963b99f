"""Where the programs that draw keep their models: found by what their folders hold, however they are called.

Looks only at names of folders and at each program's own file of paths; follows no more than a bounded number
of folders for a bounded time. Which of the files are bases is another question: :mod:`sdlora_ui.bases`.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlora.config.foreign.texts import read_yaml
from sdlora.files import is_text, parse_json

MOST_FOLDERS = 4000
MOST_SECONDS = 4.0
MOST_ENTRIES = 3000
"""Names that are read of one folder."""
MAX_PATHS_BYTES = 64 * 2**10
"""Of a program's own file of paths."""
DEPTH = 3
"""Folders below a root in which a program is looked for."""
_SKIPPED = frozenset(
    {
        "appdata",
        "application data",
        "windows",
        "program files",
        "program files (x86)",
        "programdata",
        "library",
    }
    | {
        "system volume information",
        "proc",
        "sys",
        "dev",
        "run",
        "snap",
        "node_modules",
        "site-packages",
        "venv",
    }
    | {"env", "lib", "lib64", "usr", "etc", "boot", "var", "tmp", "bin", "sbin", "lost+found"}
)
_FLAG = re.compile(r"--(ckpt-dir|lora-dir)[ =]+(?:\"([^\"\n]+)\"|'([^'\n]+)'|(\S+))")


@dataclass(frozen=True)
class Place:
    """Folders of one program.

    Attributes:
        program: its name.
        bases: folders with checkpoints.
        adapters: folders with adapters.
    """

    program: str
    bases: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()


@dataclass
class Budget:
    """What a search may cost.

    Attributes:
        folders: that are left to be looked at.
        end: when it ends, on the clock.
    """

    folders: int = MOST_FOLDERS
    seconds: float = MOST_SECONDS
    clock: Callable[[], float] = time.monotonic
    end: float = field(init=False)

    def __post_init__(self) -> None:
        """Begin."""
        self.end = self.clock() + self.seconds

    def spend(self) -> bool:
        """Return whether one folder more may be looked at."""
        self.folders -= 1
        return self.folders >= 0 and self.clock() < self.end


def usual_roots(home: Path, drives: Iterable[Path] = ()) -> list[Path]:
    """Return where to look: the home folder, where programs are unpacked to, and every drive."""
    settings = ("AppData/Roaming", ".config", ".local/share")
    named = [home, *(home / name / "StabilityMatrix" for name in settings), *drives]
    return [root for root in dict.fromkeys(named) if root.is_dir()]


def find_places(roots: Iterable[Path], budget: Budget | None = None) -> list[Place]:
    """Return the programs below these folders, each with its folders of models.

    Args:
        roots: where to look, the most likely first.
        budget: what it may cost; a search that is out of it returns what it found.
    """
    budget = budget or Budget()
    places: dict[Path, Place] = {}
    waiting = deque((root, 0) for root in roots)
    seen: set[str] = set()
    while waiting:
        folder, depth = waiting.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        if not budget.spend():
            break
        seen.add(real)
        names, folders = _listed(folder)
        if (place := _program(folder, names)) is not None:
            places.setdefault(folder, place)
            inside = [folder / "Packages"] if "Packages" in folders else []  # Stability Matrix holds programs
        else:
            inside = [folder / name for name in sorted(folders) if _is_worth_it(name)]
        if depth < DEPTH + (folder.name == "Packages"):
            waiting.extend((each, depth + 1) for each in inside)
    return [place for place in places.values() if place.bases or place.adapters]


def hub_models(cache: Path) -> Iterator[tuple[str, Path]]:
    """Yield (``owner/name``, folder) of each pipeline in a cache of the hub."""
    for name in sorted(_names(cache)):
        parts = name.split("--")
        if parts[0] != "models" or len(parts) != 3:
            continue
        for revision in sorted(_names(cache / name / "snapshots")):
            folder = cache / name / "snapshots" / revision
            if (folder / "model_index.json").is_file():
                yield f"{parts[1]}/{parts[2]}", folder
                break


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names in a folder, and those of them that are folders; none where it cannot be read."""
    names: list[str] = []
    folders: list[str] = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MOST_ENTRIES):
            if not is_text(entry.name):
                continue  # the page could not ask for it
            names.append(entry.name)
            with suppress(OSError):
                folders += [entry.name] if entry.is_dir() else []
    return names, folders


def _names(folder: Path) -> list[str]:
    return _listed(folder)[0]


def _is_worth_it(name: str) -> bool:
    return not name.startswith((".", "$")) and name.lower() not in _SKIPPED


def _program(folder: Path, names: list[str]) -> Place | None:
    """Return the program that a folder belongs to, None if it is not one's."""
    lower = {name.lower(): name for name in names}
    models = folder / lower["models"] if "models" in lower else None
    kinds = {name.lower(): name for name in _names(models)} if models else {}
    if models and "stablediffusion" in kinds:
        return _given("Stability Matrix", models, kinds, ("stablediffusion",), ("lora", "lycoris"))
    if models and "stable-diffusion" in kinds:
        place = _given(_webui_name(lower), models, kinds, ("stable-diffusion",), ("lora", "lycoris"))
        return _and(place, _of_webui(folder, lower), "ckpt_dir", "lora_dir", "diffusers_dir")
    if models and ("invokeai.yaml" in lower or "invokeai.db" in _names(folder / "databases")):
        return Place("InvokeAI", bases=(models,))
    if models and "checkpoints" in kinds:
        fooocus = "fooocus_version.py" in lower or "fooocus" in folder.name.lower()
        place = _given("Fooocus" if fooocus else "ComfyUI", models, kinds, ("checkpoints",), ("loras",))
        if fooocus:
            told = _said(folder / "config.txt", parse_json)
            return _and(place, (folder, told), "path_checkpoints", "path_loras")
        return _with_extra(place, folder)
    if "library.json" in lower and folder.name == "StabilityMatrix":
        library = _said(folder / "library.json", parse_json).get("LibraryPath")
        return (
            _program(Path(library), _names(Path(library))) if isinstance(library, str) and library else None
        )
    return None


def _webui_name(names: Mapping[str, str]) -> str:
    if "modules_forge" in names:
        return "Forge"
    return "SD.Next" if "installer.py" in names else "WebUI"


def _given(
    program: str, models: Path, kinds: Mapping[str, str], bases: tuple[str, ...], adapters: tuple[str, ...]
) -> Place:
    return Place(
        program,
        tuple(models / kinds[kind] for kind in bases if kind in kinds),
        tuple(models / kinds[kind] for kind in adapters if kind in kinds),
    )


def _and(place: Place, told: tuple[Path, Mapping[str, Any]], bases: str, adapters: str, *more: str) -> Place:
    """Return a place with the folders that a program's own file of paths names."""
    home, values = told
    named = [path for key in (bases, *more) for path in _paths(home, values.get(key))]
    return Place(
        place.program,
        tuple(dict.fromkeys([*place.bases, *named])),
        tuple(dict.fromkeys([*place.adapters, *_paths(home, values.get(adapters))])),
    )


def _of_webui(folder: Path, names: Mapping[str, str]) -> tuple[Path, Mapping[str, Any]]:
    """Return what a WebUI's starter and SD.Next's settings say about folders."""
    values = dict(_said(folder / "config.json", parse_json)) if "config.json" in names else {}
    for starter in ("webui-user.sh", "webui-user.bat"):
        if starter in names:
            for flag, *texts in _FLAG.findall(_text(folder / names[starter])):
                values[flag.replace("-", "_")] = next(text for text in texts if text)
    return folder, values


def _with_extra(place: Place, folder: Path) -> Place:
    """Return ComfyUI's place with what its ``extra_model_paths.yaml`` names."""
    for section in _said(folder / "extra_model_paths.yaml", read_yaml).values():
        if isinstance(section, dict):
            base = next(iter(_paths(folder, section.get("base_path"))), folder)
            place = _and(place, (base, section), "checkpoints", "loras", "diffusers")
    return place


def _said(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return what a program's file of paths says; nothing where it is damaged or too long."""
    with suppress(ValueError, RecursionError):
        value = parse(_text(file))
        return value if isinstance(value, dict) else {}
    return {}


def _text(file: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        if file.is_file() and file.stat().st_size <= MAX_PATHS_BYTES:
            return file.read_text(encoding="utf-8-sig")
    return ""


def _paths(home: Path, told: Any) -> list[Path]:
    """Return the folders that there are among those a program names: a text, lines of it, or a list."""
    texts = told.splitlines() if isinstance(told, str) else told if isinstance(told, list) else []
    named = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    folders = []
    for text in named:
        with suppress(OSError, RuntimeError, ValueError):
            # a network share would be logged in to
            if not text.startswith(("\\\\", "//")) and (path := home / Path(text).expanduser()).is_dir():
                folders.append(path)
    return folders
