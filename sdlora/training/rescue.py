"""The trained adapter when its file could not be written: kept wherever there is room, and the place told."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.canonical import AdapterFile, AdapterInfo
from ..errors import SdloraError, TrainingError
from ..formats.adapter_files import write_adapter
from ..number_formats import dtype_of
from ..run_folder import ADAPTER_SUFFIX, checkpoint_folder
from . import checkpoint
from .extras import reason
from .finish import adapter_file

if TYPE_CHECKING:
    from .state import Run


def rescued(run: Run, cause: Exception) -> SdloraError:
    """Return the error that ends a run whose adapter could not be written as planned.

    The checkpoint of this step holds it; if that could not be written either, it goes to the first of several
    places that takes it.

    Args:
        run: after its last step.
        cause: what kept the adapter from its place.
    """
    kind = type(cause) if isinstance(cause, SdloraError) else TrainingError
    again = f"`sdlora train --resume --output {run.folder.path}`"
    saved = checkpoint_folder(run.folder.checkpoints, run.step)
    if checkpoint.is_whole(saved):
        return kind(
            f"{reason(cause)}; nothing is lost: the trained adapter is in {saved.adapter_file}, and {again} "
            "writes the file again"
        )
    file = _written_somewhere(run)
    if file is not None:
        return kind(f"{reason(cause)}; the trained adapter was written to {file} instead")
    return kind(
        f"{reason(cause)}; the trained adapter could not be written to any other place either. Free some "
        f"space, then {again} continues from the last checkpoint"
    )


def _written_somewhere(run: Run) -> Path | None:
    info, dtype = run.model.info, dtype_of(run.config.output.dtype)
    for make in (lambda: adapter_file(run), lambda: _bare(run)):
        adapter = _quietly(make)
        if adapter is None:
            continue
        for place in _places(run):
            with suppress(Exception):  # whatever is wrong there, another place may do
                write_adapter(adapter, info.adapter_format, place, dtype, info)
                return place
    return None


def _quietly(make: Callable[[], AdapterFile]) -> AdapterFile | None:
    with suppress(Exception):  # what is wrong with the header may be why we are here
        return make()
    return None


def _bare(run: Run) -> AdapterFile:
    """Return the adapter without anything about its making."""
    words = run.config.data.trigger_word
    info = AdapterInfo(run.model.info.name, run.config.output.name, (words,) if words else (), {})
    with run.shown.in_model():
        return AdapterFile(run.masters(), info)


def _places(run: Run) -> Iterator[Path]:
    """Yield free names of files, the nearest folder first."""
    folders = [run.folder.path, run.folder.path.parent]
    for find in (Path.cwd, lambda: Path(tempfile.gettempdir()), Path.home):
        with suppress(OSError, RuntimeError):
            folders.append(find())
    for folder in folders:
        for number in itertools.count(1):
            more = "" if number == 1 else f"-{number}"
            file = folder.absolute() / f"{run.config.output.name}-rescued{more}{ADAPTER_SUFFIX}"
            if not file.exists():
                yield file
                break
