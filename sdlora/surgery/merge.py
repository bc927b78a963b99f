"""Merging adapters into one: exactly, by putting their factors side by side, or cut to a size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.canonical import AdapterFile, AdapterWeights, LowRankPair, ModuleKey
from ..adapters.strength import Strength
from ..config.schema import Precision
from ..errors import ConfigError
from ..number_formats import dtype_name
from .dense import cut_matrix
from .factors import Cut, common_shape, cut_of, factors_of, joined
from .methods import METHODS, combined, layer_seed
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
    terms: tuple[tuple[int, LowRankPair, float], ...]


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
    adapters = _opened(sources, output, format, overwrite, family, drop)
    given = _weighted(adapters, sources, blocks)
    number = number_format(dtype, adapters)
    ranks = summed_ranks(given) if how.cut is None else None
    weights, changes = finish(merged(given, how, progress), format, number, with_errors=report, ranks=ranks)
    info = result_info(adapters, output.stem, _record(sources, blocks, how), keep_all=False)
    strengths = [(adapter, strength.of) for adapter, (_, strength) in zip(adapters, given, strict=True)]
    vectors = summed_vectors(strengths, number)
    result = AdapterFile(AdapterWeights({**weights.updates, **vectors}), info, all_embeddings(adapters))
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
    drop: Sequence[str],
) -> list[Opened]:
    """Return the adapters after checking that a result can be written."""
    if not sources:
        raise ConfigError("merge needs adapters: give FILE:WEIGHT, e.g. style.safetensors:0.8")
    paths = [path for path, _ in sources]
    check_target(output, format, overwrite, paths)
    adapters = open_adapters(paths, family, drop)
    family_of(adapters)
    return adapters


def _weighted(
    adapters: Sequence[Opened],
    sources: Sequence[tuple[Path, Strength]],
    blocks: Sequence[Mapping[str, float]],
) -> list[tuple[AdapterWeights, ModuleStrength]]:
    """Return each adapter with its strength by module."""
    factors = blocks or [{}] * len(sources)
    strengths = [ModuleStrength(s, b) for (_, s), b in zip(sources, factors, strict=True)]
    given = [(adapter.weights, strength) for adapter, strength in zip(adapters, strengths, strict=True)]
    check_blocks(given)
    return given


def _gone(adapters: Sequence[Opened], weights: AdapterWeights) -> list[str]:
    """Return a note on modules that no adapter has a weight for."""
    every = {module for adapter in adapters for module in adapter.weights.pairs}
    gone = len(every) - len(weights)
    return [f"{gone} modules have weight 0 in every adapter and were left out"] if gone else []


def merged(
    adapters: Sequence[tuple[AdapterWeights, ModuleStrength]],
    how: MergeMethod,
    progress: Progress = silent,
) -> Iterator[Part]:
    """Yield each module's merged update, sorted by module.

    Raises:
        AdapterFileError: when two adapters hold a layer in different shapes.
        ConfigError: when every weight is 0.
    """
    jobs = _jobs(adapters)
    for done, part in enumerate(in_order(lambda job: _merge_module(job, how), jobs), 1):
        yield part
        progress(done, len(jobs))


def summed_ranks(adapters: Sequence[tuple[AdapterWeights, ModuleStrength]]) -> dict[ModuleKey, int]:
    """Return the rank of each module of the exact sum."""
    return {job.module: sum(pair.rank for _, pair, _ in job.terms) for job in _jobs(adapters)}


def _jobs(adapters: Sequence[tuple[AdapterWeights, ModuleStrength]]) -> list[_Job]:
    jobs = []
    for module in sorted({module for weights, _ in adapters for module in weights.pairs}):
        terms = tuple(
            (place, weights.pairs[module], strength.of(module))
            for place, (weights, strength) in enumerate(adapters)
            if module in weights.pairs and strength.of(module) != 0.0
        )
        if terms:
            jobs.append(_Job(module, terms))
    if not jobs:
        raise ConfigError("every weight is 0, so nothing would be left; give at least one other weight")
    return jobs


def _merge_module(job: _Job, how: MergeMethod) -> Part:
    where = f"two adapters for `{job.module.component}.{job.module.path}`"
    if how.name == "linear":
        update = joined([factors_of(pair, weight) for _, pair, weight in job.terms], where)
        return cut_part(job.module, update, how.cut)
    assert how.cut is not None and how.density is not None, "checked when the method was made"
    shape = common_shape([(p.up.shape[0], *p.down.shape[1:]) for _, p, _ in job.terms], where)
    deltas = [pair.delta().flatten(1) * weight for _, pair, weight in job.terms]
    places = [place for place, _, _ in job.terms]
    matrix = combined(deltas, how.name, how.density, how.seed or 0, job.module, places)
    update, norm, lost = cut_matrix(matrix, shape, how.cut, layer_seed(0, job.module))
    return Part(job.module, update, sum(pair.rank for _, pair, _ in job.terms), norm, lost)


def _record(
    sources: Sequence[tuple[Path, Strength]], blocks: Sequence[Mapping[str, float]], how: MergeMethod
) -> dict[str, object]:
    """Return what was done, for the header: by file names and hashes, without the user's folders."""
    settings = {"method": how.name, "density": how.density, "seed": how.seed}
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
