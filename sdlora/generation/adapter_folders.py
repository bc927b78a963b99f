"""The folders in which adapters are looked for by name: runs, a WebUI's models, any others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import ConfigError, shown
from ..run_folder import ADAPTER_SUFFIX, CheckpointFolder, RunFolder, list_checkpoints

MOST_FILES = 50_000
"""Files and folders that are looked at in one folder."""
_DEPTH = 8
_INSIDE = (("models", "Lora"), ("models", "loras"), ("models", "LyCORIS"))
"""Where WebUI, Forge and ComfyUI keep adapters."""
_FOLDER_MARKS = ("adapter_config.json", f"pytorch_lora_weights{ADAPTER_SUFFIX}")


def find_adapter(name: str, folders: Sequence[Path]) -> Path:
    """Return the adapter of a name: its file's, its folder's, its run's, or ``RUN-step-000100``.

    In the first folder that has one; of several there the uppermost, which a warning says.

    Args:
        name: as in ``<lora:NAME:0.8>``; case counts only where it decides.
        folders: a run, a folder of runs, a WebUI's own folder, or any folder of adapters, with all below.

    Raises:
        ConfigError: when none has it, saying where it was looked for.
    """
    for folder in folders:
        fitting = list(_named(name, folder, exact=True)) or list(_named(name, folder, exact=False))
        if fitting:
            best = min(fitting, key=lambda path: (len(path.parts), str(path)))
            if len(fitting) > 1:
                warnings.warn(
                    f"<lora:{name}>: {len(fitting)} adapters have this name; {best} is used", stacklevel=2
                )
            return best
    looked = ", ".join(str(place) for folder in folders for place in _places(folder)) or "no folder"
    raise ConfigError(
        f"<lora:{shown(name, 60)}>: there is no such adapter; looked in {looked}; name the folder with "
        "--adapter-folder, or the file with --adapter"
    )


def _named(name: str, folder: Path, *, exact: bool) -> Iterator[Path]:
    wanted = name if exact else name.casefold()
    for known, path in _adapters(folder):
        if (known if exact else known.casefold()) == wanted:
            yield path


def _adapters(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, file or folder) of the adapters in a folder and below."""
    for place in _places(folder):
        count = 0
        for here, inner, files in os.walk(place):
            path = Path(here)
            inner[:] = sorted(name for name in inner if name[0] != ".")
            if len(path.parts) - len(place.parts) >= _DEPTH:
                inner.clear()
            count += len(inner) + len(files)
            if count > MOST_FILES:
                warnings.warn(
                    f"{place}: holds more than {MOST_FILES} files; not all were looked at", stacklevel=2
                )
                return
            run = RunFolder(path)
            if run.exists():
                inner.clear()
                yield from _of_run(run)
            elif any(mark in files for mark in _FOLDER_MARKS):
                yield path.name, path
            else:
                yield from ((f[: -len(ADAPTER_SUFFIX)], path / f) for f in sorted(files) if _is_adapter(f))


def _of_run(run: RunFolder) -> Iterator[tuple[str, Path]]:
    """Yield a run's adapter under its own name and the run's, and its checkpoints."""
    finished = run.adapter_files()
    yield from ((file.stem, file) for file in finished)
    if len(finished) == 1 and finished[0].stem != run.path.name:
        yield run.path.name, finished[0]
    for checkpoint in list_checkpoints(run.checkpoints):
        if checkpoint.adapter_file.is_file():
            yield checkpoint_name(run, checkpoint), checkpoint.adapter_file


def checkpoint_name(run: RunFolder, checkpoint: CheckpointFolder) -> str:
    """Return the name of a checkpoint's adapter: ``RUN-step-000100``."""
    return f"{run.path.name}-{checkpoint.path.name}"


def _is_adapter(name: str) -> bool:
    return name.endswith(ADAPTER_SUFFIX) and name[0] != "."


def _places(folder: Path) -> list[Path]:
    """Return the folders to look in: a WebUI's own for adapters, else the folder itself."""
    inside = [folder.joinpath(*parts) for parts in _INSIDE]
    return [place for place in inside if place.is_dir()] or [folder]
