"""Merging adapters into one: exactly, by putting their factors side by side, or cut to a size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.canonical import AdapterFile, AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.kinds.table import title_of
from ..adapters.plain import as_plain
from ..adapters.strength import Strength
from ..config.schema import Precision
from ..errors import ConfigError
from ..number_formats import dtype_name
from .checkpoints import open_checkpoint
from .dense import cut_matrix
from .factors import Cut, Factors, common_shape, cut_of, factors_of, joined
from .methods import METHODS, combined, layer_seed
from .on_base import BaseWeight, delta_on, fitted, weights_in
from .report import SurgeryReport
from .result import Part, cut_part, finish
from .sources import (
    Opened,
    Progress,
    all_embeddings,
    check_target,
    family_of,
    fingerprints,
    kind_notes,
    number_format,
    open_adapters,
    result_info,
    silent,
    summed_vectors,
    write_adapter,
)
from .strengths import ModuleStrength, check_blocks, component_strengths
from .workers import in_order

_ON_BASE = "give the base it was trained on, --base BASE, and a size, e.g. --rank 32"


@dataclass(frozen=True)
class MergeMethod:
    """How the updates of a layer become one.

    Attributes:
        name: one of :data:`sdlora.surgery.methods.METHODS`.
        density: share of the entries that TIES and DARE keep; None for ``linear``.
        seed: of DARE's random choice.
        cut: size of the result; None for the exact sum.
    """

    name: str = "linear"
    density: float | None = None
    seed: int | None = None
    cut: Cut | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ConfigError(f"--method {self.name}: is not a method; give one of {', '.join(METHODS)}")
        if self.name == "linear":
            if self.density is not None:
                raise ConfigError(
                    f"--density {self.density:g}: has no effect with --method linear; leave it out"
                )
        elif self.density is None:
            raise ConfigError(
                f"--method {self.name}: needs --density, the share of the entries kept, e.g. 0.2"
            )
        elif not 0.0 < self.density <= 1.0:
            raise ConfigError(f"--density {self.density:g}: is a share, so above 0 and at most 1, e.g. 0.2")
        if self.seed is not None and not self.name.startswith("dare"):
            raise ConfigError(f"--seed {self.seed}: only --method dare and dare-ties draw; leave it out")
        if self.name != "linear" and self.cut is None:
            raise ConfigError(
                f"--method {self.name}: its result is not of low rank; give --rank, --energy or --error"
            )


@dataclass(frozen=True)
class _Job:
    module: ModuleKey
    terms: tuple[tuple[int, Update, float], ...]


def merge_adapters(
    sources: Sequence[tuple[Path, Strength]],
    output: Path,
    *,
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    blocks: Sequence[Mapping[str, float]] = (),
    format: str = "webui",
    dtype: Precision | None = None,
    family: str | None = None,
    base: Path | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
    report: bool = False,
    progress: Progress = silent,
) -> SurgeryReport:
    """Merge adapters into one and write it; ``linear`` without a size gives the exact sum.

    Args:
        sources: (file, strength) of each adapter; strengths may be negative, and differ by component.
        output: the new file, or the folder for ``peft``.
        method: ``linear`` (weighted sum), ``ties``, ``dare`` or ``dare-ties``.
        density: share of the entries that TIES and DARE keep.
        seed: of DARE's choice, 0 when None.
        rank: at most this rank in each module.
        energy: share of each update's sum of squared singular values to keep.
        error: largest relative Frobenius error of each update; instead of ``energy``.
        blocks: block -> factor for each adapter; see :mod:`sdlora.surgery.strengths`.
        format: a key of :data:`sdlora.formats.table.FORMATS`.
        dtype: number format; the widest of the sources when None.
        family: what the sources are for, where they do not tell.
        base: what kinds that need its weights were trained on; see :mod:`sdlora.surgery.on_base`.
        drop: kinds of layers that are left out; see :func:`sdlora.formats.dropping.words`.
        overwrite: replace an existing file.
        report: also measure each module's error, rounding included.
        progress: called after each module.

    Raises:
        AdapterFileError: when a source cannot be read, or they do not go together.
        ConfigError: for settings that are missing, contradict each other or have no effect.
        OutputError: when the file exists or cannot be written.
    """
    started = time.perf_counter()
    how = MergeMethod(method, density, seed, cut_of(rank, energy, error))
    adapters = _opened(sources, output, format, overwrite, family, base, drop)
    given = _weighted(adapters, sources, blocks)
    number, weight_of = number_format(dtype, adapters), _base_weights(base, adapters)
    ranks = summed_ranks(given) if how.cut is None and base is None else None
    parts = merged(given, how, progress, weight_of)
    weights, changes = finish(parts, format, number, with_errors=report, ranks=ranks)
    info = result_info(adapters, output.stem, _record(sources, blocks, how, base), keep_all=False)
    updates = {**weights.updates, **_vectors(adapters, given, number, weight_of)}
    result = AdapterFile(AdapterWeights(updates), info, all_embeddings(adapters))
    written = write_adapter(result, family_of(adapters), output, format, number)
    seconds, notes = time.perf_counter() - started, (*kind_notes(adapters), *_gone(adapters, weights))
    details = {"method": method, "dtype": dtype_name(number), "format": format}
    return SurgeryReport("merge", written.files, changes, report, seconds, notes, written.proof, details)


def _opened(
    sources: Sequence[tuple[Path, Strength]],
    output: Path,
    format: str,
    overwrite: bool,
    family: str | None,
    base: Path | None,
    drop: Sequence[str],
) -> list[Opened]:
    """Return the adapters after checking that a result can be written."""
    if not sources:
        raise ConfigError("merge needs adapters: give FILE:WEIGHT, e.g. style.safetensors:0.8")
    paths = [path for path, _ in sources]
    check_target(output, format, overwrite, paths)
    adapters = open_adapters(paths, family, drop, has_base=base is not None, remedy=_ON_BASE)
    family_of(adapters)
    if base is not None and not any(
        update.needs_base
        for adapter in adapters
        for update in (*adapter.on_base.updates.values(), *adapter.vectors.updates.values())
    ):
        raise ConfigError(f"--base {base}: no adapter here needs the base's weights; leave it out")
    return adapters


def _base_weights(base: Path | None, adapters: Sequence[Opened]) -> BaseWeight | None:
    """Return what gives the weights of a base, if one is given, after checking that it fits."""
    if base is None:
        return None
    model, made_for = open_checkpoint(base), family_of(adapters)
    if model.family.name != made_for.name:
        raise ConfigError(
            f"--base {base}: is {model.family.title}, but the adapters are for {made_for.title}; give the "
            "base they were trained on"
        )
    return weights_in(model)


def _weighted(
    adapters: Sequence[Opened],
    sources: Sequence[tuple[Path, Strength]],
    blocks: Sequence[Mapping[str, float]],
) -> list[tuple[AdapterWeights, ModuleStrength]]:
    """Return each adapter with its strength by module."""
    factors = blocks or [{}] * len(sources)
    strengths = [ModuleStrength(s, b) for (_, s), b in zip(sources, factors, strict=True)]
    given = [(adapter.matrices, strength) for adapter, strength in zip(adapters, strengths, strict=True)]
    check_blocks(given)
    return given


def _vectors(
    adapters: Sequence[Opened],
    given: Sequence[tuple[AdapterWeights, ModuleStrength]],
    number: torch.dtype,
    base: BaseWeight | None,
) -> dict[ModuleKey, Update]:
    """Return the sum of what changes norms and biases."""
    strengths = [(adapter, strength.of) for adapter, (_, strength) in zip(adapters, given, strict=True)]
    return summed_vectors(strengths, number, base)


def _gone(adapters: Sequence[Opened], weights: AdapterWeights) -> list[str]:
    """Return a note on modules that no adapter has a weight for."""
    every = {module for adapter in adapters for module in adapter.matrices.updates}
    gone = len(every) - len(weights)
    return [f"{gone} modules have weight 0 in every adapter and were left out"] if gone else []


def merged(
    adapters: Sequence[tuple[AdapterWeights, ModuleStrength]],
    how: MergeMethod,
    progress: Progress = silent,
    base: BaseWeight | None = None,
) -> Iterator[Part]:
    """Yield each module's merged update, sorted by module.

    Raises:
        AdapterFileError: when two adapters hold a layer in different shapes, or one needs the base and there
            is none.
        ConfigError: when every weight is 0.
    """
    jobs = _jobs(adapters)
    for done, part in enumerate(in_order(lambda job: _merge_module(job, how, base), jobs), 1):
        yield part
        progress(done, len(jobs))


def summed_ranks(adapters: Sequence[tuple[AdapterWeights, ModuleStrength]]) -> dict[ModuleKey, int]:
    """Return the rank of each module of the exact sum."""
    return {job.module: sum(update.rank for _, update, _ in job.terms) for job in _jobs(adapters)}


def _jobs(adapters: Sequence[tuple[AdapterWeights, ModuleStrength]]) -> list[_Job]:
    jobs = []
    for module in sorted({module for weights, _ in adapters for module in weights.updates}):
        terms = tuple(
            (place, weights.updates[module], strength.of(module))
            for place, (weights, strength) in enumerate(adapters)
            if module in weights.updates and strength.of(module) != 0.0
        )
        if terms:
            jobs.append(_Job(module, terms))
    if not jobs:
        raise ConfigError("every weight is 0, so nothing would be left; give at least one other weight")
    return jobs


def _merge_module(job: _Job, how: MergeMethod, base: BaseWeight | None) -> Part:
    where = f"two adapters for `{job.module.component}.{job.module.path}`"
    if how.name == "linear" and (exact := _joined(job, where, base)) is not None:
        return cut_part(job.module, exact, how.cut)
    if how.cut is None:
        (needy, *_) = (update for _, update, _ in job.terms if update.needs_base)
        raise ConfigError(
            f"`{job.module.component}.{job.module.path}` is a {title_of(needy)}, whose update is not of low "
            "rank, so there is no exact sum; give --rank, --energy or --error"
        )
    shapes, deltas = [], []
    for _, term, strength in job.terms:
        delta = delta_on(job.module, term, base)
        shapes.append(tuple(delta.shape))
        deltas.append(delta.flatten(1) * strength)
    shape = common_shape(shapes, where)
    if how.name == "linear":
        matrix = torch.stack(deltas).sum(0)
    else:
        assert how.density is not None, "checked when the method was made"
        places = [place for place, _, _ in job.terms]
        matrix = combined(deltas, how.name, how.density, how.seed or 0, job.module, places)
    update, norm, lost = cut_matrix(matrix, shape, how.cut, layer_seed(0, job.module))
    return Part(job.module, update, sum(term.rank for _, term, _ in job.terms), norm, lost)


def _joined(job: _Job, where: str, base: BaseWeight | None) -> Factors | None:
    """Return the exact sum as factors; None if some update has no exact factors."""
    factors = []
    for _, update, strength in job.terms:
        if isinstance(update, LowRankPair):
            factors.append(factors_of(update, strength))
            continue
        if not update.exact_factors or base is None:
            return None
        weight = base(job.module)
        plain = as_plain(fitted(job.module, update, weight), weight).pair
        factors.append(factors_of(plain, strength))
    return joined(factors, where)


def _record(
    sources: Sequence[tuple[Path, Strength]],
    blocks: Sequence[Mapping[str, float]],
    how: MergeMethod,
    base: Path | None,
) -> dict[str, object]:
    """Return what was done, for the header: by file names and hashes, without the user's folders."""
    settings: dict[str, object] = {"method": how.name, "density": how.density, "seed": how.seed}
    if base is not None:
        settings["base"] = base.name
    if how.cut is not None:
        settings |= vars(how.cut)
    prints = fingerprints([path for path, _ in sources])
    listed = [
        {**fingerprint, "strength": component_strengths(strength)}
        for fingerprint, (_, strength) in zip(prints, sources, strict=True)
    ]
    return {
        "operation": "merge",
        "sources": listed,
        **({"blocks": [dict(block) for block in blocks]} if any(blocks) else {}),
        **{key: value for key, value in settings.items() if value is not None},
    }
