"""What a grid varies: ``strength=0,0.5,1``, ``seed=1,2,3``, ``checkpoint=50,100``, and the other axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.strength import Strength
from ..diffusion.samplers import find_sampler
from ..errors import ConfigError, shown
from ..run_folder import CheckpointFolder, RunFolder, checkpoint_of, list_checkpoints
from .adapter_folders import checkpoint_name
from .render import GenerateRequest

MOST_VALUES = 100
"""Of one axis."""


@dataclass(frozen=True)
class Axis:
    """One side of a grid.

    Attributes:
        name: a key of :data:`AXES`.
        values: in the order of the rows or columns; a checkpoint's is its adapter's file.
        labels: what stands beside them, one a value.
    """

    name: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


def read_axis(text: str, adapters: tuple[Path, ...] = ()) -> Axis:
    """Return the axis that ``NAME=A,B,...`` describes.

    Args:
        text: for ``checkpoint`` the values are steps of the run that the first adapter belongs to, ``all`` of
            its checkpoints, or files.
        adapters: the files of the adapters that are drawn with.

    Raises:
        ConfigError: for an axis that does not exist, or a value that it cannot have.
    """
    name, equals, rest = text.partition("=")
    name = name.strip().lower()
    if name not in AXES or not equals:
        raise ConfigError(
            f"--grid {shown(text, 60)}: give one or two of {', '.join(AXES)}, e.g. strength=0,0.5,1"
        )
    values = [part.strip() for part in rest.split(",") if part.strip()]
    if not 1 <= len(values) <= MOST_VALUES:
        raise ConfigError(
            f"--grid {name}: has {len(values)} values; give 1 to {MOST_VALUES}, e.g. {name}=A,B"
        )
    if name == "checkpoint":
        return _checkpoints(values, adapters)
    read = AXES[name]
    assert read is not None
    try:
        numbers = tuple(read(value) for value in values)
    except ValueError:
        raise ConfigError(
            f"--grid {shown(text, 60)}: {name} takes numbers with commas between them"
        ) from None
    return Axis(
        name, numbers, tuple(f"{name} {value}" if read is not _sampler else value for value in values)
    )


def _sampler(text: str) -> str:
    find_sampler(text)
    return text


AXES: Mapping[str, Callable[[str], Any] | None] = {
    "strength": float,
    "seed": int,
    "checkpoint": None,
    "steps": int,
    "guidance": float,
    "sampler": _sampler,
}
"""How a value of each axis is read; checkpoints are looked for on the disk."""


def varied(request: GenerateRequest, axis: Axis, number: int, names: Mapping[Path, str]) -> GenerateRequest:
    """Return a request with the ``number``-th value of an axis.

    Args:
        request: of the cell.
        axis: what varies.
        number: of the value, from 0.
        names: file of a checkpoint's adapter -> its name; the first adapter's place is taken by it.
    """
    value = axis.values[number]
    if axis.name == "strength":
        return replace(request, strengths=swept(request.strengths, value))
    if axis.name == "checkpoint":
        acting: list[tuple[str, Strength]] = list(request.strengths.items())
        first = acting[0][1] if acting else 1.0
        return replace(request, strengths={names[value]: first, **dict(acting[1:])})
    return replace(request, **{axis.name: value})


def _checkpoints(values: list[str], adapters: tuple[Path, ...]) -> Axis:
    saved = _saved(adapters)
    if values == ["all"]:
        values = [str(checkpoint.step) for checkpoint in saved]
    files, labels = [], []
    for value in values:
        step = next((c for c in saved if value.isdecimal() and c.step == int(value)), None)
        file = step.adapter_file if step else Path(value).expanduser()
        if not file.exists():
            steps = ", ".join(str(c.step) for c in saved) or "none; give the run's adapter with --adapter"
            raise ConfigError(
                f"--grid checkpoint={shown(value, 60)}: neither a file nor a checkpoint ({steps})"
            )
        files.append(file)
        belongs = checkpoint_of(file)
        of_file = checkpoint_name(*belongs) if belongs else file.stem
        labels.append(f"step {step.step}" if step else of_file)
    if not files:
        raise ConfigError(
            "--grid checkpoint=all: the run of --adapter has no checkpoints; give files instead"
        )
    return Axis("checkpoint", tuple(files), tuple(labels))


def _saved(adapters: tuple[Path, ...]) -> list[CheckpointFolder]:
    """Return the checkpoints of the run that the first adapter belongs to."""
    for file in adapters[:1]:
        for folder in (file, file.parent, *file.parents[1:3]):
            if RunFolder(folder).exists():
                return [
                    c for c in list_checkpoints(RunFolder(folder).checkpoints) if c.adapter_file.is_file()
                ]
    return []


def swept(given: Mapping[str, Strength], value: float) -> dict[str, Strength]:
    """Return the strengths of one column of a sweep.

    A value replaces the strength of a single adapter; the strengths of several adapters, or the separate
    U-Net and text-encoder strengths of one, are multiplied by it.
    """
    if len(given) == 1 and all(isinstance(strength, int | float) for strength in given.values()):
        return dict.fromkeys(given, value)
    return {
        name: value * strength
        if isinstance(strength, int | float)
        else {component: value * share for component, share in strength.items()}
        for name, strength in given.items()
    }
