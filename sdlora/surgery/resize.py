"""Resizing an adapter: fewer ranks, chosen for each module from the singular values of its update.

The best update of a given rank is the truncated SVD of dW (Eckart and Young 1936). It is computed from the
factors (:func:`sdlora.surgery.factors.spectrum`), never from dW itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..adapters.canonical import AdapterFile, AdapterWeights
from ..config.schema import Precision
from ..errors import ConfigError
from ..number_formats import dtype_name
from .factors import Cut, factors_of
from .report import SurgeryReport
from .result import Part, cut_part, finish
from .sources import (
    Opened,
    Progress,
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
from .workers import in_order


def resize_adapter(
    source: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    format: str = "webui",
    dtype: Precision | None = None,
    family: str | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
    report: bool = False,
    progress: Progress = silent,
) -> SurgeryReport:
    """Write an adapter with fewer ranks.

    Args:
        source: adapter file or folder of any format.
        output: the new file, or the folder for ``peft``.
        rank: at most this rank in each module.
        energy: share of each update's sum of squared singular values to keep, e.g. 0.99.
        error: largest relative Frobenius error of each update, e.g. 0.05; instead of ``energy``.
        format: a key of :data:`sdlora.formats.table.FORMATS`.
        dtype: number format; the source's own when None.
        family: what the source is for, where it does not tell.
        drop: kinds of layers that are left out; see :func:`sdlora.formats.dropping.words`.
        overwrite: replace an existing file.
        report: also measure each module's error, rounding included.
        progress: called after each module.

    Raises:
        AdapterFileError: when the source cannot be read, or the format cannot hold the result.
        ConfigError: for sizes that are missing, contradict each other or change nothing.
        OutputError: when the file exists or cannot be written.
    """
    started = time.perf_counter()
    cut = Cut(rank, energy, error)
    check_target(output, format, overwrite, [source])
    [adapter] = open_adapters([source], family, drop)
    made_for = family_of([adapter])
    _refuse_no_change(source, adapter, cut)
    number = number_format(dtype, [adapter])
    parts = resized(adapter.weights, cut, progress)
    weights, changes = finish(parts, format, number, with_errors=report)
    record = {
        "operation": "resize",
        "sources": fingerprints([source]),
        **{key: value for key, value in vars(cut).items() if value is not None},
    }
    info = result_info([adapter], output.stem, record, keep_all=True)
    vectors = summed_vectors([(adapter, lambda _: 1.0)], number)
    result = AdapterFile(AdapterWeights({**weights.updates, **vectors}), info, adapter.embeddings)
    written = write_adapter(result, made_for, output, format, number)
    details = {"dtype": dtype_name(number), "format": format}
    seconds, notes = time.perf_counter() - started, kind_notes([adapter])
    return SurgeryReport("resize", written.files, changes, report, seconds, notes, written.proof, details)


def _refuse_no_change(source: Path, adapter: Opened, cut: Cut) -> None:
    largest = max(adapter.weights.ranks())
    if cut.allowed_loss is None and cut.rank is not None and cut.rank >= largest:
        raise ConfigError(f"--rank {cut.rank}: {source} has no more than rank {largest}; give a smaller one")


def resized(weights: AdapterWeights, cut: Cut, progress: Progress = silent) -> Iterator[Part]:
    """Yield each module's update, cut to size."""
    work = in_order(lambda item: cut_part(item[0], factors_of(item[1]), cut), weights.items())
    for done, part in enumerate(work, 1):
        yield part
        progress(done, len(weights))
