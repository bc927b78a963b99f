"""Ways to compute that only a measurement can choose between: a short trial on the run's own first batch.

Layout of the images in memory, a batch whole or in parts of one core each, which attention, whose kernels:
what is fastest depends on device, number format, sizes and versions. The trial takes at most 2 % of the run,
so a short one computes the usual way; what it found is remembered for this machine, these versions and
shapes. All ways compute the same but for rounding, and a resumed run keeps the way it has.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.schema import TrainingConfig
from ..data.reading.cache_folder import default_cache_folder
from ..data.reading.items import Visit
from ..errors import OutputError
from ..events import Notice
from ..families.attention import Attention, without_more_memory
from ..families.layout import LAYOUTS, Layout, set_layout, usual_layout
from ..families.quantised import quantisation_of
from ..files import parse_json, write_json
from .fast import Choice
from .proof import run_pass

if TYPE_CHECKING:
    from .state import Run

SHARE = 0.02
"""Of a run that its trial may take."""
_CLEARLY = 0.97  # another way must take less than this share of the time: differences below it are chance
_REMEMBERED = 200  # choices kept


def usual_choice(run: Run) -> Choice:
    """Return the way a run computes unless it measures."""
    model: Any = run.model
    attention = model.attention.training.name
    return Choice(usual_layout(model.facts.device, model.facts.dtype), False, attention)


def remembered_choice(run: Run) -> Choice | None:
    """Return what an earlier trial found for such a run here; all processes take the main one's."""
    known = _valid(run, _remembered(_file()).get(_key(run)))
    return _agreed(run, known)


def try_choices(run: Run, visits: tuple[Visit, ...]) -> Choice | None:
    """Use the fastest way to compute that a trial finds, and remember it.

    Nothing is tried, and None returned, where the trial would take more than its share of the run.

    Args:
        run: ready to step, computing the usual way.
        visits: the first batch.
    """
    usual = usual_choice(run)
    passes = int(SHARE * (run.steps - run.step) * run.config.training.gradient_accumulation)
    if passes <= len(_others(run, usual)):
        return None
    best, seconds, tried = _trial(run, visits, usual, passes)
    if run.processes.is_main:
        _remember(_file(), _key(run), asdict(best) | {"seconds": seconds})
    chosen = _agreed(run, best)
    assert chosen is not None
    use(run, chosen)
    run.emit(Notice(f"computing {chosen.render()}: the fastest way in a trial ({'; '.join(tried)})"))
    return chosen


def use(run: Run, choice: Choice) -> None:
    """Compute this way from now on."""
    names = run.fast.names
    run.fast.use(())
    model: Any = run.model
    set_layout(model.components()[model.info.denoiser.component], choice.layout)
    if choice.attention != model.attention.training.name:
        model.attention = replace(model.attention, training=Attention(choice.attention, "measured"))
    run.splitter = run.made_splitter if choice.split else None
    run.fast.splitter, run.fast.kernels = run.splitter, choice.kernels
    run.ready_to_train()
    run.fast.use(names)
    run.choice = choice


def _agreed(run: Run, choice: Choice | None) -> Choice | None:
    """Return what the main process says."""
    first = run.processes.exchange(None if choice is None else asdict(choice))[0]
    return None if first is None else Choice.of(first)


def _valid(run: Run, values: Any) -> Choice | None:
    """Return a choice from a file, if this run can compute that way."""
    usual = usual_choice(run)
    try:
        choice = Choice.of(values)
    except (TypeError, KeyError):
        return None
    ways = {usual.attention, *without_more_memory(usual.attention, run.model.facts.device)}
    possible = choice.attention in ways and choice.layout in LAYOUTS
    return choice if possible and (run.made_splitter is not None or not choice.split) else None


def _others(run: Run, usual: Choice) -> list[Callable[[Choice], Choice]]:
    """Return changes to try one after the other, each on top of the best so far."""
    changes: list[Callable[[Choice], Choice]] = []
    if "kernels" in run.fast.names:
        changes.append(lambda best: replace(best, kernels=not best.kernels))
    if run.made_splitter is not None:
        changes.append(lambda best: replace(best, split=not best.split))
    flipped: dict[Layout, Layout] = {"channels-last": "channels-first", "channels-first": "channels-last"}
    changes.append(lambda best: replace(best, layout=flipped[best.layout]))
    if run.config.training.attention == "auto":
        for other in without_more_memory(usual.attention, run.model.facts.device):
            changes.append(lambda best, other=other: replace(best, attention=other))  # type: ignore[misc]
    return changes


def _trial(
    run: Run, visits: tuple[Visit, ...], usual: Choice, passes: int
) -> tuple[Choice, float, list[str]]:
    """Return the fastest way, its seconds a pass, and what was measured, in so many passes at most."""
    best, best_seconds = usual, _seconds(run, visits, warm_up=False)
    tried = [f"{usual.render()}: {best_seconds:.3g} s a pass"]
    others = _others(run, usual)
    warm_up = passes >= 1 + 2 * len(others)
    for change in others:
        candidate = change(best)
        use(run, candidate)
        seconds = _seconds(run, visits, warm_up=warm_up)
        tried.append(f"{candidate.render()}: {seconds:.3g} s")
        if seconds < _CLEARLY * best_seconds:
            best, best_seconds = candidate, seconds
    return best, best_seconds, tried


def _seconds(run: Run, visits: tuple[Visit, ...], *, warm_up: bool) -> float:
    if warm_up:
        run_pass(run, visits)
    return run_pass(run, visits).seconds


def _key(run: Run) -> str:
    """Return what a choice holds for: machine, versions, and the shapes and formats of a step."""
    device, settings = run.model.facts.device, run.config
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    denoiser = run.model.components()[run.model.info.denoiser.component]
    shapes = sum(parameter.numel() for parameter in denoiser.parameters())
    parts = [
        *(machine, device.type, torch.get_num_threads(), torch.__version__, run.model.info.name, shapes),
        *(str(run.model.facts.dtype), settings.data.resolution, settings.training.batch_size),
        *(_again(settings.training), settings.training.attention, *run.fast.names),
        *(run.made_splitter is not None, len(run.trainable.layers)),
        *filter(None, (quantisation_of(denoiser),)),
    ]
    return " ".join(map(str, parts))


def _again(settings: TrainingConfig) -> str | bool:
    """Return what is computed again in the backward pass."""
    return settings.rung != "nothing" and f"{settings.rung}/{settings.recompute_blocks}"


def _file() -> Path:
    return default_cache_folder() / "choices.json"


def _processor() -> str:
    return f"{platform.processor() or platform.machine()} x{os.cpu_count()}"


def _remembered(file: Path) -> dict[str, Any]:
    """Return key -> choice; a file that is missing or damaged costs a trial only."""
    with suppress(OSError, ValueError):
        values = parse_json(file.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if isinstance(value, dict)}
    return {}


def _remember(file: Path, key: str, choice: dict[str, Any]) -> None:
    known = _remembered(file)
    known.pop(key, None)
    kept = dict(list(known.items())[-_REMEMBERED + 1 :]) | {key: choice}
    with suppress(OSError, OutputError):  # then it is measured again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, kept)
